"""Stages as ONNX files: what is in them, and that ONNX Runtime computes from them what eager float32 does."""

import getpass
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from onnx import TensorProto
from stand_in_stages import classifier, gradient_stand_in, open_prior, prior_stage, stand_in
from torch import nn

from diffdfkd.engine import export
from diffdfkd.engine.backends.onnxruntime import OnnxRuntimeRunner
from diffdfkd.engine.classifier import build_classifier
from diffdfkd.engine.engine_stages import Batches, Stage
from diffdfkd.engine.export import MODEL, export_stage
from diffdfkd.engine.folded_upsampling import Form, by_phases, transposed
from diffdfkd.engine.parity import TOLERANCES, Parity, measure_parity
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.prompts import class_prompts, embed_prompts
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.engine.runner import NoEngine

CPU = torch.device("cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = {F32: TensorProto.FLOAT, torch.bool: TensorProto.BOOL}


def run(model: Path, stage: Stage) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(model, stage.specification, CPU, 1)


class Exports:
    """Files of stages, each exported once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[Any, tuple[Stage, Path, Any]] = {}

    def __call__(self, key: Any, make: Callable[[], Stage]) -> tuple[Stage, Path, Any]:
        """(the stage, its file, what the export says)."""
        if key not in self.made:
            stage, folder = make(), self.folder / str(len(self.made))
            folder.mkdir()
            self.made[key] = stage, folder / MODEL, export_stage(stage, folder)
        return self.made[key]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


STAND_INS: dict[str, Callable[[], Stage]] = {
    "static": stand_in,
    "ranged": lambda: stand_in(least=1, most=9),
    "ranged from one row": lambda: stand_in(rows=1, least=1, most=9),
    "float16": lambda: stand_in(F16),
    "with a gradient": gradient_stand_in,
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_file_is_the_specifications(exports: Exports, kind: str) -> None:
    stage, path, details = exports(kind, STAND_INS[kind])
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    specification = stage.specification
    for ports, found in ((specification.inputs, model.graph.input), (specification.outputs, model.graph.output)):
        assert [value.name for value in found] == [port.name for port in ports]
        for port, value in zip(ports, found, strict=True):
            tensor = value.type.tensor_type
            assert tensor.elem_type == TYPES[port.dtype]
            sizes = [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim]
            if specification.static or not port.batched:
                assert tuple(sizes) == port.shape
            else:
                assert isinstance(sizes[0], str) and tuple(sizes[1:]) == port.shape[1:]
    assert details == {
        "opset": 21,
        "weights_bytes": details["weights_bytes"],
        "specification": specification.describe(),
    }
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    weights = sum(parameter.numel() for parameter in weights_of(stage))
    assert details["weights_bytes"] >= weights * (2 if stage.precision == F16 else 4)
    assert [path.name for path in path.parent.iterdir()] == [MODEL]


def weights_of(stage: Stage) -> list[nn.Parameter]:
    import small_stage

    return list(small_stage.SmallStage().parameters())


@pytest.mark.parametrize("kind", STAND_INS)
def test_engine_computes_what_the_stage_does(exports: Exports, kind: str) -> None:
    stage, path, _ = exports(kind, STAND_INS[kind])
    least, usual, most = stage.specification.range
    parity = measure_parity(stage, run(path, stage), rows=tuple({1, least, usual, most}))
    assert parity.fault is None
    if stage.precision == F32:
        check_float32(parity)
    else:
        assert parity.relative > 1e-5  # it really computes in float16


def check_float32(parity: Parity) -> None:
    assert parity.fault is None
    assert parity.relative <= 1e-5
    assert parity.gradient is None or (parity.gradient <= 1e-5 and parity.cosine > 1 - 1e-9)


def test_bfloat16_takes_a_later_opset(exports: Exports) -> None:
    stage, path, details = exports("bfloat16", lambda: stand_in(BF16))
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert details["opset"] == model.opset_import[0].version == 22
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {1}
    assert TensorProto.BFLOAT16 in {weight.data_type for weight in model.graph.initializer}
    with pytest.raises(NoEngine, match="ONNX Runtime refuses it"):
        run(path, stage)


@pytest.mark.parametrize(("precision", "form"), [(torch.float32, transposed), (F16, transposed), (BF16, by_phases)])
def test_doubling_in_the_form_that_engines_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: torch.dtype, form: Form
) -> None:
    """TensorRT has no transposed convolution in bfloat16."""
    asked: list[Form] = []

    def stop(stage: Stage, *, doubling: Form) -> None:
        asked.append(doubling)
        raise RuntimeError("far enough")

    monkeypatch.setattr(export, "trace", stop)
    with pytest.raises(NoEngine, match="far enough"):
        export_stage(stand_in(precision), tmp_path)
    assert asked == [form]


def test_nothing_of_this_machine_is_in_the_file(exports: Exports) -> None:
    _, path, _ = exports("static", stand_in)
    content = path.read_bytes()
    here = Path(__file__).resolve()
    for told in (here.parent, here.parents[2], Path(torch.__file__).parent, Path.home(), path.parent, Path.cwd()):
        assert str(told).encode() not in content, told
    for word in (b"site-packages", b"stack_trace", b".py", socket.gethostname().encode(), getpass.getuser().encode()):
        assert len(word) < 4 or word not in content, word
    model = onnx.load(path)
    for item in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.initializer):
        assert not item.metadata_props and not item.doc_string


def test_weights_of_a_large_stage_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "EXTERNAL", 1000)
    stage = stand_in()
    details = export_stage(stage, tmp_path)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert files.keys() == {MODEL, "model.onnx.data"}
    assert details["weights_bytes"] > 1000 and files["model.onnx.data"] >= 1000
    check_float32(measure_parity(stage, run(tmp_path / MODEL, stage)))
    content = (tmp_path / MODEL).read_bytes()
    assert str(tmp_path).encode() not in content
    # Moved as a whole it still works, without its weights it is refused in one line.
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in files:
        (tmp_path / name).rename(moved / name)
    check_float32(measure_parity(stage, run(moved / MODEL, stage)))
    (moved / "model.onnx.data").unlink()
    with pytest.raises(NoEngine) as refusal:
        run(moved / MODEL, stage)
    assert str(refusal.value).startswith(f"{moved / MODEL}: ONNX Runtime refuses it: ")
    assert "xternal data" in str(refusal.value) and "\n" not in str(refusal.value)


def refuse(stage: Stage, folder: Path) -> str:
    with pytest.raises(NoEngine) as refusal:
        export_stage(stage, folder)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    return str(refusal.value)


def spoilt(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Stage:
    return stand_in(spoil=spoil)


def test_stage_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    def branches(made: torch.Tensor) -> torch.Tensor:
        return made if float(made.sum()) > 0 else -made

    assert refuse(spoilt(branches), tmp_path).startswith("unet: torch.onnx.export refuses it: GuardOnDataDependent")


def test_stage_that_cannot_be_translated_is_refused(tmp_path: Path) -> None:
    def rare(made: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(made)

    said = refuse(spoilt(rare), tmp_path)
    assert said.startswith("unet: torch.onnx.export refuses it: ") and "bessel_j0" in said


def test_full_disk_is_not_blamed_on_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.onnx.ONNXProgram.save", full)
    with pytest.raises(OSError, match="No space left"):
        export_stage(stand_in(), tmp_path)


def test_decoder_of_a_prior(exports: Exports, tiny_prior: Path) -> None:
    stage, path, _ = exports("tiny decoder", lambda: prior_stage("decoder", open_prior(tiny_prior), Batches(3, 1, 5)))
    check_float32(measure_parity(stage, run(path, stage)))


class Case(NamedTuple):
    name: str
    batches: Batches = Batches(2)
    precision: torch.dtype = F32


RANGED = Batches(3, 1, 5)
FAMILIES = [
    ("tiny_sd1", Case("unet", RANGED)),
    ("tiny_sd1", Case("vjp")),
    ("tiny_sd1", Case("chain")),
    ("tiny_sd1", Case("unet", precision=F16)),
    ("tiny_sd2", Case("unet")),
    ("tiny_sd2", Case("vjp", RANGED)),
]


def case_id(case: Case) -> str:
    kind = "static" if case.batches.most is None else "ranged"
    return f"{case.name}, {str(case.precision).removeprefix('torch.')}, {kind}"


def check(stage: Stage, path: Path) -> Parity:
    parity = measure_parity(stage, run(path, stage))
    if stage.precision == F32:
        check_float32(parity)
    assert parity.fault is None
    tolerance = TOLERANCES[stage.precision]
    assert parity.relative <= tolerance.values
    return parity


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "case"), FAMILIES, ids=lambda value: case_id(value) if isinstance(value, Case) else value
)
def test_families(exports: Exports, request: pytest.FixtureRequest, family: str, case: Case) -> None:
    """Cross attention at two of three resolutions, GEGLU, linear projections: as published, small."""

    def make() -> Stage:
        prior = open_prior(request.getfixturevalue(family))
        return prior_stage(case.name, prior, case.batches, case.precision, teacher=classifier(3))

    stage, path, _ = exports((family, case), make)
    check(stage, path)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    if case.name == "vjp":
        assert {"Softmax", "Erf"} <= kinds
    assert not kinds & {"ScatterND", "ScatterElements", "GatherND", "NonZero", "Loop", "If", "LayerNormalization"}


@pytest.mark.slow
def test_chain_with_a_student(exports: Exports, tiny_prior: Path) -> None:
    """Its weights are inputs of the file: another student's give what eager gives with that student."""
    from diffdfkd.engine.engine_stages import student_weights

    prior, teacher = open_prior(tiny_prior), classifier()
    students = [classifier(seed=seed) for seed in (1, 1)]
    for student, factor in zip(students, (0.2, 0.6), strict=True):
        student.model.head.weight.mul_(factor)
    weights = {"batchnorm_weight": 0.1, "adversarial_weight": 5.0}

    def make(student: Any = students[0]) -> Stage:
        from stand_in_stages import WEIGHTS

        return prior_stage(
            "chain", prior, Batches(4), teacher=teacher, student=student, weights=WEIGHTS.model_copy(update=weights)
        )

    stage, path, _ = exports("student", make)
    # Images of random weights are all but alike, and a student that acts on them magnifies rounding.
    assert measure_parity(stage, run(path, stage)).fault is None
    other = make(students[1])
    assert other.digest == stage.digest and other.specification == stage.specification
    assert measure_parity(other, run(path, other)).fault is None
    inputs = stage.examples(4, 0)[:4]
    runner = run(path, stage)
    first = runner(*inputs, *student_weights(students[0]).values())[3].clone()
    second = runner(*inputs, *student_weights(students[1]).values())[3]
    assert first[3] < second[3] < 0  # the softer student differs more


@pytest.fixture(scope="module")
def demo() -> Callable[[str, Batches, torch.dtype], Stage]:
    from diffdfkd.engine.engine_stages import (
        chain_engine_stage,
        decoder_engine_stage,
        unet_engine_stage,
        vjp_engine_stage,
    )

    recipe = load_recipe("fashion")
    prior = load_prior(recipe.prior, "cpu")
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher").eval().requires_grad_(False)
    context, _ = embed_prompts(prior, class_prompts(recipe))

    def make(name: str, batches: Batches, precision: torch.dtype) -> Stage:
        if name == "chain":
            return chain_engine_stage(prior, teacher, recipe.guidance, batches, precision)
        if name == "decoder":
            return decoder_engine_stage(prior, batches, precision)
        return {"unet": unet_engine_stage, "vjp": vjp_engine_stage}[name](prior, batches, context, precision)

    return make


DEMO = [
    *(Case(name, Batches(4, 1, 12)) for name in ("unet", "chain", "decoder")),
    Case("vjp", Batches(12)),
    *(Case(name, Batches(4), F16) for name in ("unet", "chain")),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", DEMO, ids=case_id)
def test_demo(exports: Exports, demo: Callable[..., Stage], case: Case) -> None:
    stage, path, _ = exports(("demo", case), lambda: demo(*case))
    if (case.name, case.precision) != ("chain", F32):
        check(stage, path)
        return
    # One rounding in some tens of thousands turns a ReLU of the teacher, and with it the gradient of a batch.
    runner = run(path, stage)
    assert measure_parity(stage, runner).fault is None
    found = [measure_parity(stage, runner, rows=(rows,)) for rows in (1, 2, 3, 4, 5)]
    assert max(parity.relative for parity in found) <= 1e-5
    gradients = sorted(parity.gradient or 0.0 for parity in found)
    assert 0 < gradients[2] <= 1e-5 and gradients[-1] <= TOLERANCES[F32].gradients, gradients
