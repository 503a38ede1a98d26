import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import open_images
from diffdfkd.engine.tar_images import OPEN_FILES, UNLABELLED, TarImages

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 9, 9), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 2], dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_idx(folder: Path, pack: bool = False) -> Path:
    end = ".gz" if pack else ""
    for name, array in (("t-images-idx3-ubyte", PIXELS), ("t-labels-idx1-ubyte", LABELS)):
        content = idx(array)
        (folder / (name + end)).write_bytes(gzip.compress(content) if pack else content)
    return folder / f"t-images-idx3-ubyte{end}"


@pytest.mark.parametrize("pack", [False, True])
def test_idx_files_are_read_with_the_labels_beside_them(tmp_path: Path, pack: bool) -> None:
    images = open_images(write_idx(tmp_path, pack))
    pixels, labels = images.read([4, 1])
    assert len(images) == 5
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, torch.from_numpy(PIXELS[[4, 1]])[:, None])
    assert labels.dtype == torch.int64 and labels.tolist() == [2, 0]


def test_grey_is_replicated_and_colour_becomes_luma(tmp_path: Path) -> None:
    pixels, _ = open_images(write_idx(tmp_path), channels=3).read(range(5))
    assert torch.equal(pixels, torch.from_numpy(PIXELS)[:, None].expand(-1, 3, -1, -1))
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(colours))
    assert open_images(folder).read([0])[0].shape == (1, 3, 1, 3)
    grey, labels = open_images(folder, channels=1).read([0])
    assert grey.flatten().tolist() == [round(255 * weight) for weight in (0.299, 0.587, 0.114)]
    assert labels.tolist() == [UNLABELLED]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "truncated: its header promises 405 bytes for 5x9x9, it holds 404"),
        (lambda data: data + b"0", "too long"),
        (lambda data: data[:9], "truncated within its header"),
        (lambda data: b"PK" + data, "not an IDX file"),
        (lambda data: b"", "begins with nothing"),
        (lambda data: data[:2] + b"\x0d" + data[3:], "data type 0x0d"),
        (lambda data: idx(LABELS), "images and labels swapped"),
        (lambda data: gzip.compress(data)[:-12], "truncated or damaged gzip"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = write_idx(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        open_images(path)
    assert str(path) in str(caught.value)


def test_idx_labels_must_fit(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    with pytest.raises(UserError, match="label 2 is outside the classes; allowed: 0 to 1"):
        open_images(path, classes=["a", "b"])
    labels = tmp_path / "short"
    labels.write_bytes(idx(LABELS[:4]))
    with pytest.raises(UserError, match="4 labels for the 5 images"):
        open_images(path, labels)
    (tmp_path / "t-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"no labels file beside it \(t-labels-idx1-ubyte\)"):
        open_images(path)


def make_folders(root: Path, names: list[str]) -> Path:
    for value, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "a.png").write_bytes(png(np.full((4, 4), value, np.uint8)))
    return root


def test_class_folders_by_name_follow_the_order_of_the_classes(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "set", ["coat", "ankle_boot", "t-shirt-top"])
    images = open_images(root, classes=["T-shirt/top", "Ankle boot", "Coat"])
    pixels, labels = images.read(range(3))
    assert labels.tolist() == [0, 1, 2]
    assert pixels[:, 0, 0, 0].tolist() == [2, 1, 0]
    assert open_images(root).classes == ["ankle_boot", "coat", "t-shirt-top"]


def test_numbered_class_folders_are_ordered_as_numbers(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "set", [str(number) for number in range(11)])
    pixels, labels = open_images(root, classes=[f"class {number}" for number in range(11)]).read(range(11))
    assert labels.tolist() == list(range(11)) == pixels[:, 0, 0, 0].tolist()


def test_class_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "set", ["cat", "dog", "emu"])
    with pytest.raises(
        UserError, match=r"3 folders do not match the 3 classes; no class is named emu; no folder for fox"
    ):
        open_images(root, classes=["cat", "dog", "fox"])
    with pytest.raises(UserError, match="no folder for fox"):
        open_images(root, classes=["cat", "dog", "emu", "fox"])
    (root / "dog" / "a.png").unlink()
    with pytest.raises(UserError, match="dog: a class folder without images"):
        open_images(root, classes=["cat", "dog", "emu"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no class folders, no tars and no images"):
        open_images(tmp_path / "empty")


def test_numbered_folders_that_do_not_fit_name_the_offenders(tmp_path: Path) -> None:
    classes = ["cat", "dog", "emu", "fox"]
    root = make_folders(tmp_path / "odd", ["0", "1", "2", "hats"])
    with pytest.raises(UserError, match=r"odd: no folder 3; hats is not one of 0\.\.3; number the 4 folders from 0"):
        open_images(root, classes=classes)
    with pytest.raises(UserError, match=r"short: no folder 1; number"):
        open_images(make_folders(tmp_path / "short", ["0", "2", "3"]), classes=classes)
    with pytest.raises(UserError, match=r"long: 4 is not one of 0\.\.3; number"):
        open_images(make_folders(tmp_path / "long", ["0", "1", "2", "3", "4"]), classes=classes)


def test_image_sizes_must_agree_unless_one_is_asked_for(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "set", ["0", "1"])
    (root / "1" / "b.png").write_bytes(png(np.zeros((4, 6), np.uint8)))
    with pytest.raises(UserError, match=r"b.png: 6x4 pixels, but .*a.png has 4x4"):
        open_images(root).read(range(3))
    assert open_images(root, size=8).read(range(3))[0].shape == (3, 1, 8, 8)


def test_unreadable_image_files_are_named(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "set", ["0", "1"])
    (root / "1" / "a.png").write_bytes(png(PIXELS[0])[:-30])
    with pytest.raises(UserError, match=r"1/a.png: not a readable image"):
        open_images(root).read([1])


def test_formats_that_are_not_asked_for_are_refused_under_any_name(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png", "TGA")
    with pytest.raises(UserError, match=r"a.png: not a readable image"):
        open_images(tmp_path)


def test_tars_are_read_in_any_order(tmp_path: Path) -> None:
    count = OPEN_FILES + 3
    for number in range(count):
        members = {}
        for sample in range(2):
            members[f"{number}-{sample}.png"] = png(np.full((3, 3), 10 * number + sample, np.uint8))
            members[f"{number}-{sample}.json"] = json.dumps({"class": (number + sample) % 3}).encode()
        folder = tmp_path / f"round-{number % 2:03d}"
        folder.mkdir(exist_ok=True)
        write_tar(folder / f"shard-{number:05d}.tar", members)
    images = open_images(tmp_path, classes=["a", "b", "c"])
    assert isinstance(images, TarImages) and len(images) == 2 * count
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0)).tolist()
    pixels, labels = images.read(order)
    again, _ = images.read(list(range(2 * count)))
    assert torch.equal(pixels, again[order])
    numbers, samples = pixels[:, 0, 0, 0] // 10, pixels[:, 0, 0, 0] % 10
    assert torch.equal((numbers + samples).long() % 3, labels)
    assert len(images._files) <= OPEN_FILES


def test_tar_labels_of_strangers(tmp_path: Path) -> None:
    image = png(PIXELS[0])
    members = {"x/a.jpg": image, "x/a.cls": b"1\n", "x/b.png": image, "x/c.png": image, "x/c.json": b'{"class": "dog"}'}
    path = write_tar(tmp_path / "set.tar", members)
    assert open_images(path, classes=["cat", "dog"]).read(range(3))[1].tolist() == [1, UNLABELLED, 1]
    with pytest.raises(UserError, match=r"set.tar, sample 0: label 1 is outside the classes"):
        open_images(path, classes=["cat"]).read([0])
    with pytest.raises(UserError, match=r"set.tar, sample 2: class 'dog' is neither"):
        open_images(path).read([2])
    write_tar(path, {"a.png": image, "a.json": b"[1]"})
    with pytest.raises(UserError, match=r"set.tar, sample 0: unreadable label"):
        open_images(path).read([0])


def test_first_image_without_a_label(tmp_path: Path) -> None:
    image = png(PIXELS[0])
    members = {"a.png": image, "a.cls": b"1", "b.png": image, "b.json": b'{"class": 0}', "c.png": image}
    tar = write_tar(tmp_path / "set.tar", members)
    assert open_images(tar).first_unlabelled() == 2
    write_tar(tar, {**members, "b.json": b"{}"})
    assert open_images(tar).first_unlabelled() == 1
    write_tar(tar, {**members, "c.cls": b"0"})
    assert open_images(tar).first_unlabelled() is None
    folder = tmp_path / "folder"
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "a.png").write_bytes(image)
    assert open_images(folder).first_unlabelled() is None
    assert open_images(folder / "0").first_unlabelled() == 0
    assert open_images(write_idx(tmp_path)).first_unlabelled() is None


def tones(images, count: int) -> list[int]:  # type: ignore[no-untyped-def]
    """The first pixel of each of the images, none of which may have a label."""
    assert len(images) == count and images.first_unlabelled() == 0
    pixels, labels = images.read(range(count))
    assert labels.tolist() == [UNLABELLED] * count
    return pixels[:, 0, 0, 0].tolist()


def tone(value: int) -> bytes:
    return png(np.full((4, 4), value, np.uint8))


@pytest.mark.parametrize(
    "label",
    [{"json": b'{"class": "no class of ours"}'}, {"cls": b"dog"}, {"json": b"[1]"}, {"json": b"{"}, {"cls": b"99"}],
)
def test_labels_that_are_not_asked_for_are_not_read(tmp_path: Path, label: dict[str, bytes]) -> None:
    members = {"a.png": tone(1), **{f"a.{ending}": content for ending, content in label.items()}}
    path = write_tar(tmp_path / "set.tar", members)
    with pytest.raises(UserError, match=r"set.tar, sample 0: "):
        open_images(path, classes=["cat"]).read([0])
    assert tones(open_images(path, classes=["cat"], labelled=False), 1) == [1]


def test_first_image_of_a_key_is_taken_by_its_last_ending_where_labels_are_not_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = {
        "x/1.input.png": tone(1),
        "x/1.target.png": tone(2),
        "x/1.json": b"[]",
        "2.PNG": tone(3),
        "2.mask.png": tone(4),
        "x/2.note.txt": b"",
        "x/.2.png": tone(5),
        "y/1.v2.0.png": tone(6),
    }
    assert tones(open_images(write_tar(tmp_path / "set.tar", members), labelled=False), 3) == [1, 3, 6]
    assert "2 of its 5 images are left out" in caplog.text


def test_folders_of_any_depth_are_read_where_labels_are_not_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for value, name in enumerate(["b/deep/er/a.PNG", "b/a.png", "a.png", "c/z.png", "b-c/a.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(tone(value))
    for name in (".hidden/a.png", "b/.a.png", "notes.txt", "d.png/empty"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"none")
    (root / "c" / "back").symlink_to(root)
    assert tones(open_images(root, classes=["x"], labelled=False), 5) == [2, 4, 1, 0, 3]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "to").symlink_to(root / "b")
    assert tones(open_images(tmp_path / "linked", labelled=False), 2) == [1, 0]


def test_idx_needs_no_labels_where_they_are_not_asked_for(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    assert tones(open_images(path, classes=["a"], labelled=False), 5) == PIXELS[:, 0, 0].tolist()
    (tmp_path / "t-labels-idx1-ubyte").unlink()
    assert tones(open_images(path, labelled=False), 5) == PIXELS[:, 0, 0].tolist()


@pytest.mark.parametrize("labelled", [True, False])
def test_tars_and_image_files_in_one_folder_are_refused(tmp_path: Path, labelled: bool) -> None:
    (tmp_path / "tars" / "x").mkdir(parents=True)
    write_tar(tmp_path / "tars" / "x" / "set.TAR", {"a.png": tone(1), "a.cls": b"0"})
    (tmp_path / "b.png").write_bytes(tone(2))
    words = r": holds tars \(tars/x/set.TAR\) and loose image files \(b.png\); give .*tars/x for the tars alone"
    with pytest.raises(UserError, match=words):
        open_images(tmp_path, labelled=labelled)
    assert len(open_images(tmp_path / "tars", labelled=labelled)) == 1
    write_tar(tmp_path / "a.tar", {"a.png": tone(1)})
    with pytest.raises(UserError, match="give a folder of the ones or of the others alone"):
        open_images(tmp_path, labelled=labelled)


def test_class_folders_with_loose_images_beside_them_are_refused(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "set", ["0", "1"])
    (root / "1" / "deep").mkdir()
    (root / "1" / "deep" / "b.png").write_bytes(tone(2))
    pixels, labels = open_images(root).read(range(3))
    assert (labels.tolist(), pixels[:, 0, 0, 0].tolist()) == ([0, 1, 1], [0, 1, 2])
    (root / "a.png").write_bytes(tone(9))
    with pytest.raises(UserError, match=r"set: holds class folders \(0\) and loose images \(a.png\), which have no"):
        open_images(root)


def test_image_file_that_is_gone_is_named(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "set", ["0", "1"])
    images = open_images(root)
    (root / "1" / "a.png").unlink()
    with pytest.raises(UserError, match=r"1/a.png: cannot be read \(No such file"):
        images.read([1])


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tgz", "set.TAR.xz", "set.tar.zst", "set.zip"])
def test_packed_archives_are_to_be_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: a packed archive, .*; unpack it first"):
        open_images(tmp_path / name)


def test_damaged_tars_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", {"a.png": png(PIXELS[0]), "a.cls": b"0", "b.png": png(PIXELS[1])})
    whole = path.read_bytes()
    end = whole.rindex(b"IEND")
    path.write_bytes(whole[: end - 20])
    with pytest.raises(UserError, match=r"set.tar: not a whole, uncompressed tar"):
        open_images(path)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"set.tar: not a whole, uncompressed tar"):
        open_images(path)
    write_tar(path, {"a.txt": b"hello"})
    with pytest.raises(UserError, match="without an image"):
        open_images(path)
