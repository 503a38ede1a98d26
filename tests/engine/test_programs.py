"""Programs as teachers: they answer and guide, cannot be tapped, and nothing in a hostile file is executed."""

import contextlib
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdfkd.engine.classifier import Classifier, build_classifier, uncompiled
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.exported import _operator, beyond
from diffdfkd.engine.plan import weights_digest
from diffdfkd.engine.recipe import ClassifierRecipe, GuidanceRecipe, TeacherRecipe
from diffdfkd.engine.stages import guidance_chain
from diffdfkd.engine.taps import BatchNormTaps, check_taps
from diffdfkd.engine.torchscript import ScriptedNetwork, _allowed

SIZE = 16
DYNAMIC = ({0: torch.export.Dim("batch")},)


def network(size: int = SIZE) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).eval()
    model[1].running_mean.normal_()
    return model


class Patches(nn.Module):
    """A transformer in small: sizes in the graph, attention, a class token, chunks, a constant, LayerNorm, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.register_buffer("places", torch.randn(1, 17, 8), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.places
        query, key, value = self.qkv(self.norm(tokens)).chunk(3, dim=-1)
        tokens = tokens + nn.functional.scaled_dot_product_attention(query, key, value)
        return self.head(nn.functional.gelu(tokens[:, 0] + torch.arange(8.0)))


def exported(model: nn.Module, path: Path, dynamic: Any = DYNAMIC, batch: int = 2) -> Path:
    torch.export.save(torch.export.export(model, (torch.rand(batch, 3, SIZE, SIZE),), dynamic_shapes=dynamic), path)
    return path


def scripted(model: nn.Module, path: Path) -> Path:
    torch.jit.script(model).save(str(path))
    return path


def traced(model: nn.Module, path: Path) -> Path:
    torch.jit.trace(model, torch.rand(2, 3, SIZE, SIZE)).save(str(path))
    return path


def frozen(model: nn.Module, path: Path) -> Path:
    torch.jit.freeze(torch.jit.script(model)).save(str(path))
    return path


KINDS: dict[str, tuple[str, Callable[[nn.Module, Path], Path]]] = {
    "exported": ("exported", exported),
    "scripted": ("torchscript", scripted),
    "traced": ("torchscript", traced),
    "frozen": ("torchscript", frozen),
}


def teacher_recipe(architecture: str, weights: Path, **changes: Any) -> TeacherRecipe:
    fields = {"architecture": architecture, "weights": str(weights), "classes": ["a", "b", "c"], "size": SIZE}
    return TeacherRecipe.model_validate({**fields, **changes})


def load(architecture: str, weights: Path, **changes: Any) -> Classifier:
    recipe = teacher_recipe(architecture, weights, **changes)
    return build_classifier(recipe, recipe, field="teacher")


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [network, Patches])
def test_a_program_answers_as_its_module_and_passes_the_gradient(
    kind: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    architecture, save = KINDS[kind]
    model = make().eval()
    teacher = load(architecture, save(model, tmp_path / "program"), mean=[0.0], std=[1.0])
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last).requires_grad_()
        torch.testing.assert_close(teacher(images), model(images))
        gradients = [torch.autograd.grad(net(images).square().sum(), images)[0] for net in (teacher, model)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_guides_with_the_class_loss_alone(kind: str, tmp_path: Path) -> None:
    architecture, save = KINDS[kind]
    teacher = load(architecture, save(network(), tmp_path / "program"))
    guidance = GuidanceRecipe(batchnorm_weight=0.0)
    chain = guidance_chain(lambda latents: latents.sigmoid(), teacher, None, guidance)
    made = chain(torch.randn(4, 3, SIZE, SIZE), torch.eye(3)[[0, 1, 2, 0]], torch.ones(4, dtype=torch.bool))
    assert made.finite.all() and (made.norm > 0).all() and made.losses[2] == 0
    with pytest.raises(UserError, match=r"batchnorm_weight: the teacher is a compiled or exported program, and L_bn"):
        check_taps(teacher.model, GuidanceRecipe())
    check_taps(teacher.model, guidance)
    check_taps(teacher.model, GuidanceRecipe(mode="none"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_digest_tells_programs_of_the_same_weights_apart(kind: str, tmp_path: Path) -> None:
    architecture, save = KINDS[kind]
    first, second = network(), network()
    second[2] = nn.ReLU6()
    digests = [
        weights_digest([load(architecture, save(model, tmp_path / name))])
        for name, model in (("first", first), ("second", second))
    ]
    assert digests[0] != digests[1]
    assert weights_digest([load(architecture, tmp_path / "first")]) == digests[0]


def test_a_fixed_batch_or_size_is_refused(tmp_path: Path) -> None:
    path = exported(network(), tmp_path / "fixed.pt2", dynamic=None)
    with pytest.raises(UserError, match=r"teacher.weights: .*fixed.pt2 was exported for a fixed batch of 2; exp"):
        load("exported", path)
    path = exported(network(), tmp_path / "dynamic.pt2")
    with pytest.raises(UserError, match=r"exported for 3x16x16 images, but .* say 3x32x32"):
        load("exported", path, size=32)
    with pytest.raises(UserError, match=r"exported for 3x16x16 images, but .* say 1x16x16"):
        load("exported", path, channels=1)
    with pytest.raises(UserError, match=r"gives \[2, 3\] for 2 images, but teacher.classes names 4"):
        load("exported", path, classes=["a", "b", "c", "d"])

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.reshape(2, -1)[:, :3]

    with pytest.raises(UserError, match=r"fixed.pt gives \[2, 3\] for 1 image\(s\), so its batch is fixed"):
        load("torchscript", traced(Fixed(), tmp_path / "fixed.pt"))


@pytest.mark.parametrize("kind", ["exported", "traced"])
def test_a_program_in_train_mode_is_refused(kind: str, tmp_path: Path) -> None:
    architecture, save = KINDS[kind]
    with pytest.raises(UserError, match=r"train mode"):
        load(architecture, save(network().train(), tmp_path / "program"))


def test_a_program_is_no_student_and_has_no_options(tmp_path: Path) -> None:
    path = exported(network(), tmp_path / "program.pt2")
    with pytest.raises(UserError, match=r"teacher.options: exported takes none"):
        load("exported", path, options={"width": 3})
    with pytest.raises(UserError, match=r"student.architecture: exported is a whole program, which can teach but not"):
        student = ClassifierRecipe(architecture="exported", weights=str(path))
        build_classifier(student, teacher_recipe("exported", path), field="student", seed=0)
    with pytest.raises(UserError, match=r"none\.pt2: no such file"):
        load("exported", tmp_path / "none.pt2")


@pytest.mark.parametrize("architecture", ["exported", "torchscript"])
def test_other_files_are_refused(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(network().state_dict(), path)
    with pytest.raises(UserError, match=rf"teacher.weights: {path} (holds no program|is not a TorchScript file)"):
        load(architecture, path)
    whole = (exported if architecture == "exported" else scripted)(network(), tmp_path / "whole").read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"teacher.weights: {path} (is not a .*or is damaged|holds no program)"):
            load(architecture, path)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], more: dict[str, bytes] | None = None) -> Path:
    """The archive with its files changed and more put in."""
    with zipfile.ZipFile(path) as archive:
        files = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {**files, **(more or {})}.items():
            archive.writestr(name, content)
    return path


def changed_json(end: str, change: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    def apply(name: str, content: bytes) -> bytes:
        if not name.endswith(end):
            return content
        data = json.loads(content)
        change(data)
        return json.dumps(data).encode()

    return apply


def test_nothing_in_an_exported_program_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload = pickle.dumps(Hostile(marker))

    def fresh() -> Path:
        return exported(network(), tmp_path / "program.pt2")

    # Artifacts that torch.export.load would unpickle, and does when the file is read with it.
    path = rewritten(fresh(), lambda name, content: payload if name.endswith("sample_inputs/model.pt") else content)
    load("exported", path)
    assert not marker.exists()

    def pickled(data: Any) -> None:
        data["config"]["0.weight"]["use_pickle"] = True

    path = rewritten(fresh(), changed_json("model_weights_config.json", pickled))
    with pytest.raises(UserError, match=r"0.weight is a pickle or no plain tensor, which is not read"):
        load("exported", path)

    def called(data: Any) -> None:
        argument = {"name": "path", "arg": {"as_string": str(marker)}, "kind": 1}
        node = {"target": "torch.serialization.os.mkdir", "inputs": [argument], "outputs": [], "metadata": {}}
        data["graph_module"]["graph"]["nodes"].insert(0, node)

    with pytest.raises(UserError, match=r"uses torch.serialization.os.mkdir, and only plain ATen operators"):
        load("exported", rewritten(fresh(), changed_json("models/model.json", called)))

    def saved(data: Any) -> None:
        called(data)
        data["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"

    with pytest.raises(UserError, match=r"uses torch.ops.aten.from_file.default"):
        load("exported", rewritten(fresh(), changed_json("models/model.json", saved)))

    def symbolic(data: Any) -> None:
        code = f"__import__('os').mkdir('{marker}')"
        data["guards_code"] = [code]
        for value in data["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code

    load("exported", rewritten(fresh(), changed_json("models/model.json", symbolic)))
    assert not marker.exists()

    def beyond(data: Any) -> None:
        data["config"]["0.weight"]["tensor_meta"]["storage_offset"] = {"as_int": 10**6}

    with pytest.raises(UserError, match=r"is not a program of torch.export.save, or is damaged"):
        load("exported", rewritten(fresh(), changed_json("model_weights_config.json", beyond)))


class Writer(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        torch.save(images, self.path)
        return images.mean((2, 3))


class Restored(nn.Module):
    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.training = state[1]

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_a_script_that_could_do_more_than_compute_is_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "written", tmp_path / "program.pt"
    scripted(Writer(str(marker)), path)
    with pytest.raises(UserError, match=rf"teacher.weights: {path} uses aten::save, which may do more than compute"):
        load("torchscript", path)
    assert not marker.exists()
    scripted(Restored(), path)
    with pytest.raises(UserError, match=r"holds __setstate__ .* which runs while the file is loaded"):
        load("torchscript", path)
    scripted(network(), path)
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    rewritten(path, lambda name, content: pickle.dumps(Hostile(marker)) if name == pickled else content)
    with pytest.raises(UserError, match=r"holds STACK_GLOBAL \(program/data.pkl\), which runs"):
        load("torchscript", path)
    for names in (b"ctorch\nclasses.quantized.Packed\n", b"c__torch__.torch\nclasses\n", b"cos\nsystem\n"):
        rewritten(path, lambda name, content, names=names: names + b"." if name == pickled else content)
        with pytest.raises(UserError, match=r"holds (torch\.classes|__torch__\.torch\.classes|os\.system)"):
            load("torchscript", path)
    assert not marker.exists()


class Loaded(nn.Module):
    """Writes its file while it is being loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state[0], state[1]
        torch.save(torch.zeros(1), state[0])

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def with_code_in_another_case(path: Path) -> Path:
    """Python's ``endswith`` and torch's look-up differ on ``.PY``; one more file lets it pass for TorchScript."""
    with zipfile.ZipFile(path) as archive:
        files = {re.sub(r"\.py$", ".PY", name): archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {**files, "program/code/other.py": b""}.items():
            archive.writestr(name, content)
    return path


def with_two_directories(path: Path) -> Path:
    """Torch finds the archive; Python's zipfile, which takes the directory that ends where the end record begins,
    finds another one of equal size and names."""
    stored, other = path.with_suffix(".stored"), path.with_suffix(".other")
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(stored, "w", zipfile.ZIP_STORED) as copy,
        zipfile.ZipFile(other, "w") as benign,
    ):
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
            benign.writestr(name, b"N.")  # the pickle of None
    first, count, size, start = directory(stored)
    second, _, _, second_start = directory(other)
    front = first[: start + size]
    shift = len(front) + second_start - start
    entries = bytearray(second[second_start : second_start + size])
    place = 0
    while place < size:
        lengths = struct.unpack("<HHH", entries[place + 28 : place + 34])
        (offset,) = struct.unpack("<I", entries[place + 42 : place + 46])
        entries[place + 42 : place + 46] = struct.pack("<I", (len(front) + offset - shift) & 0xFFFFFFFF)
        place += 46 + sum(lengths)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0)
    path.write_bytes(front + second[:second_start] + bytes(entries) + end)
    return path


def directory(path: Path) -> tuple[bytes, int, int, int]:
    """A zip file's bytes, and of its directory: entries, bytes and offset."""
    content = path.read_bytes()
    end = content.rfind(b"PK\x05\x06")
    return content, *struct.unpack("<HII", content[end + 10 : end + 20])


@pytest.mark.parametrize("change", [lambda path: path, with_code_in_another_case, with_two_directories])
def test_a_script_does_not_run_while_it_is_loaded(change: Callable[[Path], Path], tmp_path: Path) -> None:
    marker = tmp_path / "written"
    path = change(scripted(Loaded(str(marker)), tmp_path / "program.pt"))
    with contextlib.suppress(RuntimeError):
        torch.jit.load(path)
    assert marker.exists(), "the file does what it is made for"
    marker.unlink()
    with pytest.raises(UserError, match=rf"teacher.weights: {path} (holds __setstate__|is not a TorchScript file)"):
        load("torchscript", path)
    assert not marker.exists()


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)


class Questioned(nn.Module):
    """Writes when Python asks whether it is true."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __bool__(self) -> bool:
        torch.save(torch.zeros(1), self.path)
        return True

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_hooks_and_special_methods_of_a_script_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A hook knows no path but one in its own code.
    monkeypatch.chdir(tmp_path)

    def before(self: Any, input: tuple[Tensor]) -> tuple[Tensor]:
        torch.save(input[0], "written")
        return input

    hooked = Plain()
    hooked.register_forward_pre_hook(before)
    path = tmp_path / "program.pt"
    for model in (hooked, Outer(hooked)):
        scripted(model, path)
        with pytest.raises(UserError, match=r"holds __forward_pre_hooks__ \(program/code/__torch__.*\.py\)"):
            load("torchscript", path)
    # Were they not named in the code, they would be seen, and not called.
    monkeypatch.setattr("diffdfkd.engine.torchscript.AT_LOAD", re.compile(rb"__setstate__"))
    with pytest.raises(UserError, match=r"has forward hooks, which are not run"):
        load("torchscript", scripted(hooked, path))
    script = torch.jit.load(path)
    ScriptedNetwork(script)(torch.rand(2, 3, SIZE, SIZE))
    assert not Path("written").exists()
    script(torch.rand(2, 3, SIZE, SIZE))
    assert Path("written").exists(), "the file does what it is made for"
    Path("written").unlink()
    scripted(Questioned("written"), path)
    with pytest.raises(UserError, match=r"uses aten::save"):
        load("torchscript", path)
    assert not Path("written").exists()


@pytest.mark.parametrize("name", ["fbgemm_pack_gemm_matrix_fp16", "mkldnn_rnn_layer", "quantized_gru", "resize_"])
def test_operators_that_trust_their_arguments_are_refused(name: str) -> None:
    assert beyond(name) and not _allowed(f"aten::{name}")
    assert _operator(f"torch.ops.aten.{name}.default") is None
    assert _operator("torch.ops.aten.conv2d.default") is not None and _allowed("aten::conv2d")


def test_a_compiled_module_is_taken_out_of_its_wrapper() -> None:
    model = network()
    wrapped = nn.Sequential(torch.compile(model), nn.Identity())
    plain = uncompiled(torch.compile(wrapped))
    assert list(plain.state_dict()) == [f"0.{key}" for key in model.state_dict()] and plain[0] is model
    model.compile()
    assert uncompiled(model)._compiled_call_impl is None
    with BatchNormTaps(plain) as taps:
        plain(torch.rand(2, 3, SIZE, SIZE))
        assert taps.names == ["0.1"] and taps.inputs[0].shape == (2, 4, SIZE, SIZE)
