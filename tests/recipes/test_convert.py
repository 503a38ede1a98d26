"""Shards to folders of images: the same pixels and labels, for us and for torchvision."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import open_images
from diffdfkd.engine.licences import image_licences
from diffdfkd.engine.shards import Sample, round_folder, write_shard
from diffdfkd.recipes.convert import convert, folder_names

CLASSES = ["T-shirt/top", "Bag", "../../evil", "<b>Shoe</b>"]


def image(value: int, size: int = 9, format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (size, size), dtype=np.uint8)
    stream = io.BytesIO()
    # Not as this package compresses, so that a copy can be told from a file encoded anew.
    Image.fromarray(pixels).save(stream, format, compress_level=1)
    return stream.getvalue()


def write_run(root: Path, classes: list[str] = CLASSES, soft: bool = False) -> Path:
    """Two rounds of two shards each, of three images a class in all."""
    for round in range(2):
        for shard in range(2):
            samples = []
            for place in range(3 * len(classes) // 4):
                number = (2 * round + shard) * (3 * len(classes) // 4) + place
                label = number % len(classes)
                record: dict[str, Any] = {"class": label, "class_name": classes[label]}
                if soft and number == 1:
                    record["soft_label"] = {"0": 0.25, "1": 0.75}
                samples.append(Sample(f"{round:03d}-{place:08d}", image(number), record))
            write_shard(
                round_folder(root / "synthetic", round), shard, samples, round=round, digest="d", choices={"steps": 3}
            )
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def by_pixels(images: Any) -> list[tuple[bytes, int]]:
    pixels, labels = images.read(range(len(images)))
    return sorted((array.numpy().tobytes(), label) for array, label in zip(pixels, labels.tolist(), strict=True))


@pytest.mark.parametrize("classes", [CLASSES, ["C", "C#", "...", "c"], ["3", "1", "0", "2"]])
def test_the_same_pixels_and_labels_come_back(tmp_path: Path, classes: list[str]) -> None:
    run = write_run(tmp_path / "run", classes)
    said = convert(run, tmp_path / "new" / "images", format="png", size=None)
    assert said == f"wrote 12 images in 4 folders, labels.csv and image-licences.json to {tmp_path / 'new' / 'images'}"
    folder = tmp_path / "new" / "images"
    theirs = by_pixels(open_images(run / "synthetic", classes=classes))
    assert by_pixels(open_images(folder, classes=classes)) == theirs
    # Nothing was written elsewhere, nothing left behind.
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"] and len(list(folder.parent.iterdir())) == 1
    )
    listed = {row["file"]: row for row in csv.DictReader((folder / "labels.csv").open(encoding="utf-8"))}
    torchvisions = ImageFolder(str(folder))
    assert len(torchvisions) == len(listed) == 12
    for path, index in torchvisions.samples:
        row = listed[Path(path).relative_to(folder).as_posix()]
        assert row["class_name"] == classes[int(row["class"])]
        assert Path(path).read_bytes() in {image(number) for number in range(int(row["class"]), 12, 4)}
        assert torchvisions.classes[index] == folder_names(dict(enumerate(classes)))[int(row["class"])]


def test_licences_go_with_the_images(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    for shard, licence in enumerate(["openrail", None]):
        sample = Sample("000", image(shard), {"class": 0, "class_name": "Bag"})
        write_shard(tars, shard, [sample], round=0, digest="d", choices={}, licence=licence)
    convert(tars, tmp_path / "images")
    stated = image_licences(tmp_path / "images")
    assert stated == image_licences(tars) and set(stated.values()) == {"openrail", None}
    # Also from where it is one of several.
    convert(tars, tmp_path / "data" / "a")
    assert image_licences(tmp_path / "data") == stated
    convert(tars, tmp_path / "data" / "b")
    assert image_licences(tmp_path / "data") == {f"{k}, folder {n}": v for n in (1, 2) for k, v in stated.items()}
    (tmp_path / "images" / "image-licences.json").write_text('{"images": 3}')
    with pytest.raises(UserError, match=r"images/image-licences\.json: damaged, .*convert the shards again"):
        image_licences(tmp_path / "images")


def test_names_of_folders() -> None:
    assert folder_names({0: "T-shirt/top", 1: "Bag"}) == {0: "T-shirt_top", 1: "Bag"}
    assert folder_names({0: "C", 10: "C#"}) == {0: "00-C", 10: "10-C_"}
    assert folder_names({"a": "a", "A.": "A."}) == {"a": "0-a", "A.": "1-A"}
    assert folder_names({0: "..", 1: "x"}) == {0: "0-", 1: "1-x"}


@pytest.mark.parametrize(("format", "kind"), [("webp", "WEBP"), ("jpeg", "JPEG"), ("png", "PNG")])
def test_format_and_size(tmp_path: Path, format: str, kind: str) -> None:
    run = write_run(tmp_path / "run", soft=True)
    said = convert(run / "synthetic" / "round-000", tmp_path / "a", format=format, size=5)
    assert "; 1 soft labels stand in labels.csv alone, which folders cannot express" in said
    files = sorted((tmp_path / "a").glob("*/*"))
    assert len(files) == 6
    for file in files:
        with Image.open(file) as opened:
            assert (opened.size, opened.format, opened.mode) == ((5, 5), kind, "RGB" if kind == "WEBP" else "L")
    rows = list(csv.DictReader((tmp_path / "a" / "labels.csv").open()))
    assert [json.loads(row["soft_label"]) for row in rows if row["soft_label"]] == [{"0": 0.25, "1": 0.75}]
    # Lossless: what is converted on to PNG has the pixels of PNG.
    if format == "webp":
        convert(run / "synthetic" / "round-000", tmp_path / "b", format="png", size=5)
        assert by_pixels(open_images(tmp_path / "a", channels=1)) == by_pixels(open_images(tmp_path / "b"))


@pytest.mark.parametrize("damage", ["flip", "cut", "tar", "sidecar"])
def test_a_damaged_shard_is_named_and_nothing_is_left(tmp_path: Path, damage: str) -> None:
    run = write_run(tmp_path / "run")
    tar = run / "synthetic" / "round-001" / "shard-00001.tar"
    content = tar.read_bytes()
    if damage == "flip":
        tar.write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    elif damage == "cut":
        tar.write_bytes(content[:-2000])
    elif damage == "tar":
        tar.unlink()
    else:
        tar.with_suffix(".json").write_text("{")
    for source in (run, run / "synthetic") if damage != "tar" else (run,):
        with pytest.raises(UserError, match=r"round-001/shard-00001\.tar: damaged \(.*makes it again"):
            convert(source, tmp_path / "images", format="png", size=None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_strangers_tar_writes_nothing_outside(tmp_path: Path) -> None:
    png, label = image(1), json.dumps({"class": "../../up"}).encode()
    members = {}
    for key in ("../../../a", "/abs/a", "x/../../a", "..", "a\\b"):
        members |= {f"{key}.png": png, f"{key}.json": label}
    tar = write_tar(tmp_path / "hostile.tar", members)
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    convert(tar, tmp_path / "in" / "images", format="png", size=None)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir())
    folder = "in/images/_.._up"
    assert files == [
        "hostile.tar",
        *sorted(f"{folder}/{name}.png" for name in ("00000-a", "00000-a-2", "a", "a_b")),
        "in/images/image-licences.json",
        "in/images/labels.csv",
    ]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"a.png": b"x", "a.cls": b"1"}, "a.tar, sample 0: not a readable image"),
        ({"a.png": image(0)}, "sample 0: has no class"),
        ({"a.png": image(0), "a.json": b'{"class": true}'}, "sample 0: has no class"),
        ({"a.png": image(0), "a.cls": b"-3"}, "class -3; allowed: 0 or above"),
        ({"a.png": image(0), "a.cls": b"x"}, "unreadable label"),
        (
            {
                "a.png": image(0),
                "a.json": b'{"class": 1, "class_name": "cat"}',
                "b.png": image(0),
                "b.json": b'{"class": 1, "class_name": "dog"}',
            },
            "sample 1: class 1 is dog here and cat elsewhere",
        ),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, members: dict[str, bytes], problem: str) -> None:
    tar = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=problem):
        convert(tar, tmp_path / "images", format="png", size=None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_places_and_options_that_do_not_serve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    target = tmp_path / "images"
    target.mkdir()
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (run, run, {}, "run: exists and is not an empty folder"),
        (tmp_path / "absent", target, {}, "absent: no such file or folder"),
        (target, tmp_path / "new", {}, "images: holds no shards"),
        (run, target, {"format": "gif"}, "--format: got gif; allowed: png, webp, jpeg"),
        (run, target, {"size": 0}, "--size: got 0"),
        (run, run / "synthetic" / "manifest" / "x", {}, "cannot be written"),
    ]
    (run / "synthetic" / "manifest").write_text("")
    for source, folder, options, problem in cases:
        with pytest.raises(UserError, match=problem):
            convert(source, folder, **options)
    assert not any(target.iterdir())
    convert(run, target)  # an empty folder will do
    shutil.rmtree(run)
    assert len(ImageFolder(str(target))) == 12


def test_numbers_without_names_are_the_folders(tmp_path: Path) -> None:
    members = {}
    for number in range(12):
        members |= {f"{number}.png": image(number), f"{number}.cls": str(number).encode()}
    convert(write_tar(tmp_path / "a.tar", members), tmp_path / "images")
    pixels, labels = open_images(tmp_path / "images").read(range(12))
    assert labels.tolist() == list(range(12))
    for number in range(12):
        assert torch.equal(pixels[number, 0], torch.from_numpy(np.array(Image.open(io.BytesIO(image(number))))))
