"""The corpus of bad inputs, continued: real images, and output folders that cannot be had."""

import fcntl
import gzip
import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

from bad_input_cases import Arguments, Case, Recipe, Spoil, command, given
from PIL import Image


def png(colour: int = 7, size: int = 28) -> bytes:
    """A grey image file."""
    stream = io.BytesIO()
    Image.new("L", (size, size), colour).save(stream, "PNG")
    return stream.getvalue()


def huge_png() -> bytes:
    """The header of a file with 60,000 x 60,000 pixels."""
    content = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    header = struct.pack(">I", len(content)) + b"IHDR" + content
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", zlib.crc32(b"IHDR" + content)) + png()[33:]


def pipes(folder: Path, recipe: Recipe) -> Arguments:
    """A run with test images that no one writes."""
    for name in "0123":
        (folder / "real" / name).mkdir(parents=True)
        os.mkfifo(folder / "real" / name / "a.png")
    return command(folder, recipe, f"evaluation.images={folder / 'real'}")


def pictures(files: dict[str, bytes], *overrides: str, name: str = "run") -> Spoil:
    """A run with a folder of test images."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        (folder / "real").mkdir()
        for file, content in files.items():
            (folder / "real" / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / "real" / file).write_bytes(content)
        return command(folder, recipe, f"evaluation.images={folder / 'real'}", *overrides, name=name)

    return spoil


def idx(images: int = 8, labels: int = 8, *, largest: int = 3, cut: int = 0, pack: bool = False) -> Spoil:
    """A run with an IDX file of test images, its labels beside it."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        pixels = struct.pack(">IIII", 0x803, images, 28, 28) + bytes(28 * 28 * images)
        pixels = pixels[: len(pixels) - cut]
        if pack:
            pixels = gzip.compress(pixels)[:-9]
        (folder / "my-images-idx3-ubyte").write_bytes(pixels)
        if labels:
            content = struct.pack(">II", 0x801, labels) + bytes(labels - 1) + bytes([largest])
            (folder / "my-labels-idx1-ubyte").write_bytes(content)
        return command(folder, recipe, f"evaluation.images={folder / 'my-images-idx3-ubyte'}")

    return spoil


def tar(files: dict[str, bytes], cut: int = 0) -> Spoil:
    """A run with test images in a tar."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        with tarfile.open(folder / "real.tar", "w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        if cut:
            os.truncate(folder / "real.tar", cut)
        return command(folder, recipe, f"evaluation.images={folder / 'real.tar'}")

    return spoil


IMAGES = [
    Case("no images there", given("evaluation.images=/nowhere"), "evaluation.images: /nowhere: no such file", ()),
    Case("no labels there", given("evaluation.labels=/nowhere"), "evaluation.labels: /nowhere", ()),
    Case("folder without images", pictures({"readme.txt": b"none"}), "evaluation.images: {folder}/real", (".png",)),
    Case(
        "images without labels",
        pictures({"a.png": png()}),
        "evaluation.images: {folder}/real",
        ("no label", "one sub-folder a class"),
        True,
    ),
    Case(
        "folders of other classes",
        pictures({f"{name}/a.png": png() for name in ("cat", "dog", "owl", "Bag")}),
        "evaluation.images: {folder}/real",
        ("cat, dog, owl", "teacher.classes"),
    ),
    Case(
        "a folder too few",
        pictures({f"{name}/a.png": png() for name in "012"}),
        "evaluation.images: {folder}/real",
        ("no folder 3",),
    ),
    Case(
        "a class without images",
        pictures({f"{name}/a.png": png() for name in "012"} | {"3/a.txt": b""}),
        "evaluation.images: {folder}/real/3",
        ("without images",),
    ),
    Case(
        "text as image",
        pictures({f"{name}/a.png": b"no image" for name in "0123"}),
        "evaluation.images: {folder}/real/0/a.png",
        ("not a readable image", "PNG"),
    ),
    Case(
        "image that only says it is one, of very many pixels",
        pictures({f"{name}/a.png": huge_png() for name in "0123"}),
        "evaluation.images: {folder}/real/0/a.png",
        ("not a readable image", "save it again, or take it away"),
    ),
    Case("pipe for an image", pipes, "evaluation.images: {folder}/real/0/a.png", ("no plain file", "take it away")),
    Case(
        "image half fetched",
        pictures({f"{name}/a.png": png()[:-30] for name in "0123"}),
        "evaluation.images: {folder}/real/0/a.png",
        ("not a readable image",),
    ),
    Case(
        "labels for a folder that has them",
        pictures({f"{name}/a.png": png() for name in "0123"}, "evaluation.labels={folder}/x"),
        "evaluation.labels: ",
        (),
    ),
    Case(
        "IDX cut", idx(cut=9), "evaluation.images: {folder}/my-images-idx3-ubyte", ("truncated", "fetch the file again")
    ),
    Case(
        "IDX packed and cut",
        idx(pack=True),
        "evaluation.images: {folder}/my-images-idx3-ubyte",
        ("truncated", "fetch the file again"),
    ),
    Case(
        "IDX without labels", idx(labels=0), "evaluation.images: {folder}/my-images-idx3-ubyte", ("evaluation.labels",)
    ),
    Case(
        "IDX with fewer labels",
        idx(labels=7),
        "evaluation.images: {folder}/my-labels-idx1-ubyte",
        ("7 labels for the 8 images",),
    ),
    Case(
        "IDX with a label of no class",
        idx(largest=9),
        "evaluation.images: {folder}/my-labels-idx1-ubyte",
        ("label 9", "0 to 3"),
    ),
    Case(
        "labels as images",
        given("evaluation.images={folder}/recipe.yaml"),
        "evaluation.images: {folder}/recipe.yaml",
        (),
    ),
    Case("tar cut", tar({"0.png": png(), "0.cls": b"0"}, cut=700), "evaluation.images: {folder}/real.tar", ()),
    Case("tar without images", tar({"0.txt": b"none"}), "evaluation.images: {folder}/real.tar", (".png",)),
    Case(
        "tar with a label of no class",
        tar({"0.png": png(), "0.cls": b"9"}),
        "evaluation.images: {folder}/real.tar",
        ("9", "0 to 3"),
    ),
    Case(
        "tar with a broken label",
        tar({"0.png": png(), "0.json": b"{"}),
        "evaluation.images: {folder}/real.tar",
        ("label",),
    ),
    Case(
        "tar that leaves its folder", tar({"../evil.png": png()}), "evaluation.images: {folder}/real.tar", ("no label",)
    ),
]


def run_below_a_file(folder: Path, recipe: Recipe) -> Arguments:
    (folder / "file").write_text("")
    return [*command(folder, recipe), f"output={folder / 'file' / 'run'}"]


def file_as_output(folder: Path, recipe: Recipe) -> Arguments:
    (folder / "file").write_text("")
    return [*command(folder, recipe), f"output={folder / 'file'}"]


HELD: list[int] = []


def output_in_use(folder: Path, recipe: Recipe) -> Arguments:
    """A lock as another process would hold it: a second open file."""
    (folder / "run").mkdir()
    lock = os.open(folder / "run" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    HELD.append(lock)
    return command(folder, recipe)


LAUNCH = (("RANK", "0"), ("WORLD_SIZE", "2"))

OUTPUT = [
    Case("output below a file", run_below_a_file, "output: {folder}/file/run cannot be written", ("another folder",)),
    Case("file as output", file_as_output, "output: {folder}/file cannot be written", ("another folder",)),
    Case(
        "output nobody may write", given("output=/proc/run"), "output: /proc/run cannot be written", ("another folder",)
    ),
    Case("output in use", output_in_use, "output: {folder}/run is in use", ("wait for it", "another folder")),
    Case(
        "run of several processes", given(), "run: synthesis is one process", ("diffdfkd distill",), environment=LAUNCH
    ),
    Case(
        "synthesis of several processes",
        given(name="synthesize"),
        "synthesize: synthesis is one process",
        ("diffdfkd distill",),
        environment=LAUNCH,
    ),
    Case("no GPU", given("device=cuda"), "device: cuda", ("device=cpu",)),
    Case(
        "batch of no end",
        given("synthesis.batch_size=100000000", "synthesis.images_per_class=100000000"),
        "synthesis.batch_size: a batch of 100,000,000 images needs",
        ("GiB", "smaller one"),
    ),
]


CASES = [*IMAGES, *OUTPUT]
