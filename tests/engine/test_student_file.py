"""A student from its file alone, and what a stranger's file cannot make us do."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from diffdfkd.engine.classifier import Classifier, build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.student_file import damage, read_student, write_student

CLASSES = ["T-shirt/top", "<b>Shoe</b>", "größer"]
STRANGER = """
open("ran", "w").write("code of the file's author")
def factory(channels, classes):
    import torch
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 256, classes))
"""


def recipe(**student: Any) -> Recipe:
    teacher = {"architecture": "small_cnn", "weights": "t", "classes": CLASSES, "size": 16, "channel_order": "bgr"}
    colours = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    return load_recipe(
        {"prior": "p", "teacher": {**teacher, **colours}, "student": {"architecture": "small_cnn", **student}}
    )


def student(of: Recipe) -> Classifier:
    """Random, away from the initial statistics."""
    made = build_classifier(of.student, of.teacher, field="student", seed=3)
    torch.manual_seed(3)
    for layer in made.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -1, 1)
    return made


def headed(path: Path, **changes: Any) -> Path:
    """The file with another header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"].update(changes)
    header["__metadata__"] = {key: value for key, value in header["__metadata__"].items() if value is not None}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    asked = recipe(options={"width": 4})
    write_student(student(asked), path, asked)
    return path


@pytest.mark.parametrize("size", [16, 24])
def test_student_is_what_was_written(tmp_path: Path, size: int) -> None:
    asked = recipe(options={"width": 4, "blocks": [0, 1, 0]})
    written = student(asked).eval()
    write_student(written, tmp_path / "s.safetensors", asked)
    read = read_student(tmp_path / "s.safetensors")
    images = torch.rand(3, 3, size, size)
    assert torch.equal(read(images), written(images))
    # The order of the colours and the normalisation are part of it.
    assert not torch.allclose(read(images), read(images.flip(1)))
    assert (read.classes, read.training) == (CLASSES, False)
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_equal_students_give_equal_bytes(file: Path, tmp_path: Path) -> None:
    asked = recipe(options={"width": 4})
    write_student(student(asked), tmp_path / "again.safetensors", asked)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_header_says_what_it_takes(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["architecture"] == "small_cnn" and header["channel_order"] == "bgr"
    assert json.loads(header["versions"]) == {"torch": torch.__version__.split("+")[0]}


def test_header_of_before_the_channel_order_is_rgb(file: Path) -> None:
    before = read_student(file)
    read = read_student(headed(file, channel_order=None, versions=None, mean="[0.1]", std="[0.4]"))
    images = torch.rand(2, 3, 16, 16)
    assert read.preprocessing(images) == pytest.approx((images - 0.1) / 0.4)
    assert read.model.state_dict().keys() == before.model.state_dict().keys()


def test_strangers_factory_is_imported_with_consent_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_network.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    asked = recipe(architecture="stranger_network:factory")
    path = tmp_path / "student.safetensors"
    write_student(student(asked), path, asked)
    (tmp_path / "ran").unlink()
    monkeypatch.delitem(__import__("sys").modules, "stranger_network")
    with pytest.raises(UserError, match=r"student\.safetensors: its architecture is the function stranger_network:fac"):
        read_student(path)
    assert not (tmp_path / "ran").exists()
    assert read_student(path, allow_factory=True)(torch.rand(1, 3, 16, 16)).shape == (1, 3)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("option", ["weights", "weights_backbone", "pretrained", "checkpoint_path", "cache_dir"])
def test_options_that_open_other_files_are_refused(file: Path, option: str) -> None:
    strange = headed(file, architecture="torchvision:resnet18", options=json.dumps({option: "DEFAULT"}))
    with pytest.raises(UserError, match=rf"its option {option} lets torchvision open other files or the network"):
        read_student(strange)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": None}, "its header lacks architecture"),
        ({"classes": None}, "its header lacks classes"),
        ({"classes": "[1, 2]"}, "its header is damaged: classes.0"),
        ({"classes": '["a", "b"]'}, "3"),
        ({"options": "[]"}, "its header is damaged: options"),
        ({"options": "{"}, "its header is damaged"),
        ({"options": '{"width": 8}'}, "mis-shaped"),
        ({"mean": '["x"]'}, "its header is damaged: mean"),
        ({"architecture": "no_such_cnn"}, "no architecture no_such_cnn"),
        ({"architecture": "os:system"}, "is the function os:system"),
        ({"architecture": "torchscript"}, "torchscript"),
    ],
)
def test_damaged_headers_are_one_line(file: Path, changes: dict[str, str | None], words: str) -> None:
    with pytest.raises(UserError) as error:
        read_student(headed(file, **changes))
    assert str(error.value).startswith(f"{file}: ") and words in str(error.value) and "\n" not in str(error.value)


def test_a_changed_bit_is_found(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert damage(file) == "its weights are not those that were written"
    with pytest.raises(UserError, match="its weights are not those that were written; take another copy"):
        read_student(file)
    # Whoever wrote a file without the digest did not promise anything.
    assert damage(headed(file, weights_sha256=None)) is None


def test_a_disk_that_fails_is_no_damage(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a whole snapshot would be thrown away for a moment without the network."""

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("diffdfkd.engine.student_file.safe_open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        damage(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04pickle", "truncated"])
def test_other_files_are_refused(file: Path, content: bytes | str) -> None:
    file.write_bytes(content if isinstance(content, bytes) else file.read_bytes()[:-5])
    with pytest.raises(UserError, match="not a safetensors file, or cut short"):
        read_student(file)
    with pytest.raises(UserError, match="no such file"):
        read_student(file.with_name("nowhere.safetensors"))
