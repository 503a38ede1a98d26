"""Published data sets as they are unpacked, known by what lies in their folders: their test splits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffdfkd.engine.array_images import ArrayImages, idx_images
from diffdfkd.engine.cifar import binary_cifar10, binary_cifar100, pickled_cifar10, pickled_cifar100
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.file_images import FileImages
from diffdfkd.engine.listed_images import tiny_imagenet
from diffdfkd.engine.pixels import Wanted


def raw_mnist(folder: Path, wanted: Wanted) -> ArrayImages:
    """The ``t10k`` files of MNIST and its kin; they hold no class names, so the labels are taken as the teacher's."""
    files = [folder / f"t10k-images-idx3-ubyte{suffix}" for suffix in ("", ".gz")]
    file = next(file for file in files if file.is_file())
    companion = file.name.replace("images-idx3", "labels-idx1").removesuffix(".gz")
    labels = next((folder / f"{companion}{s}" for s in ("", ".gz") if (folder / f"{companion}{s}").is_file()), None)
    return idx_images(file, labels, wanted)


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk."""

    folders: tuple[str, ...]
    """Where torchvision or the archive puts it below a data root."""
    marks: tuple[tuple[str, ...], ...]
    """Files that tell it, all of any one of these."""
    open: Callable[[Path, Wanted], ArrayImages | FileImages]


LAYOUTS = (
    Layout(("cifar-10-batches-py",), (("batches.meta", "test_batch"),), pickled_cifar10),
    Layout(("cifar-10-batches-bin",), (("batches.meta.txt", "test_batch.bin"),), binary_cifar10),
    Layout(("cifar-100-python",), (("meta", "test"),), pickled_cifar100),
    Layout(("cifar-100-binary",), (("fine_label_names.txt", "test.bin"),), binary_cifar100),
    Layout(
        ("MNIST/raw", "FashionMNIST/raw", "KMNIST/raw", "raw"),
        (("t10k-images-idx3-ubyte",), ("t10k-images-idx3-ubyte.gz",)),
        raw_mnist,
    ),
    Layout(("tiny-imagenet-200",), (("wnids.txt", "val/val_annotations.txt"),), tiny_imagenet),
)


def open_data_set(path: Path, wanted: Wanted) -> ArrayImages | FileImages | None:
    """Test images of the data set that the folder is, or that alone lies in it; None where it is another folder.

    UserError where there are several, or where one is not whole. Training files are never read.
    """
    for layout in LAYOUTS:
        if _marked(path, layout):
            return layout.open(path, wanted)
        if path.absolute().name in layout.folders[:1]:
            raise UserError(f"{path}: {' or '.join(layout.marks[0])} is missing; unpack the data set again")
    if path.absolute().name == "val" and (path / "val_annotations.txt").is_file():
        return tiny_imagenet(path.absolute().parent, wanted)
    inside = [(path / name, layout) for layout in LAYOUTS for name in layout.folders if _marked(path / name, layout)]
    if len(inside) > 1:
        names = ", ".join(str(folder) for folder, _ in inside)
        raise UserError(f"{path}: holds several data sets; give one of {names}")
    return inside[0][1].open(inside[0][0], wanted) if inside else None


def _marked(path: Path, layout: Layout) -> bool:
    return any(all((path / name).is_file() for name in names) for names in layout.marks)
