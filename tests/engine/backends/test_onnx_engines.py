"""ONNX Runtime and OpenVINO on a small file: their buffers, and every file that is not the stage's."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import small_stage
import torch
from stand_in_stages import gradient_stand_in
from tracing import distance

from diffdfkd.engine.backends import onnxruntime as onnxruntime_backend
from diffdfkd.engine.backends.onnx_ports import Found, compare_ports
from diffdfkd.engine.backends.onnxruntime import OnnxRuntimeRunner, load_onnxruntime
from diffdfkd.engine.backends.openvino import OpenVinoRunner, load_openvino
from diffdfkd.engine.export import export_stage
from diffdfkd.engine.runner import NoEngine, Runner
from diffdfkd.engine.specification import Port, Specification

CPU = torch.device("cpu")
F32 = torch.float32
Open = Callable[[Path, Specification], Runner]


def by_onnxruntime(model: Path, specification: Specification) -> Runner:
    return OnnxRuntimeRunner(model, specification, CPU, 1)


def by_openvino(model: Path, specification: Specification) -> Runner:
    return OpenVinoRunner(model, specification, CPU, 1, F32)


needs_openvino = pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed")
ENGINES = [
    pytest.param(by_onnxruntime, id="onnxruntime"),
    pytest.param(by_openvino, id="openvino", marks=needs_openvino),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "static": small_stage.export(folder / "static.onnx"),
        "ranged": small_stage.export(folder / "ranged.onnx", ranged=True),
    }


def reference(*inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return small_stage.SmallStage()(*inputs)


@pytest.mark.parametrize("open_engine", ENGINES)
def test_static_engine(open_engine: Open, files: dict[str, Path]) -> None:
    runner = open_engine(files["static"], small_stage.specify())
    for rows in (4, 1, 3):
        inputs = small_stage.examples(rows, seed=rows)
        (made,) = runner(*inputs)
        assert made.shape == (rows, 4, 8, 8)
        assert distance(made, reference(*inputs)) <= 1e-5
    with pytest.raises(ValueError, match="a batch of 5 rows is more than this engine was built for, 4"):
        runner(*small_stage.examples(5))


@pytest.mark.parametrize("open_engine", ENGINES)
def test_engine_for_a_range(open_engine: Open, files: dict[str, Path]) -> None:
    runner = open_engine(files["ranged"], small_stage.specify(least=1, most=7))
    for rows in (4, 7, 1, 7, 3):
        inputs = small_stage.examples(rows, seed=rows)
        assert distance(runner(*inputs)[0], reference(*inputs)) <= 1e-5


@pytest.mark.parametrize("open_engine", ENGINES)
def test_engine_reads_and_writes_in_place(open_engine: Open, files: dict[str, Path]) -> None:
    runner = open_engine(files["ranged"], small_stage.specify(least=1, most=7))
    inputs = small_stage.examples(5)
    for view, value in zip(runner.views(5), inputs, strict=True):
        view.copy_(value)
    (made,) = runner(*runner.views(5))
    assert distance(made, reference(*inputs)) <= 1e-5
    before, kept = made.data_ptr(), made.clone()
    runner.views(5)[0].mul_(2)
    (again,) = runner(*runner.views(5))
    assert again.data_ptr() == before
    assert torch.equal(made, again) and not torch.equal(kept, again)  # valid until the next call


@pytest.mark.parametrize("open_engine", ENGINES)
def test_gradient_bool_and_unbatched_ports(open_engine: Open, tmp_path: Path) -> None:
    stage = gradient_stand_in()
    export_stage(stage, tmp_path)
    runner = open_engine(tmp_path / "model.onnx", stage.specification)
    for rows in (4, 2):
        inputs = stage.examples(rows, rows)
        for made, wanted in zip(runner(*inputs), stage.reference(*inputs), strict=True):
            assert distance(made, wanted) <= 1e-5


def spoil(path: Path, folder: Path, kind: str) -> Path:
    other, content = folder / "other.onnx", path.read_bytes()
    if kind != "missing":
        other.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no model" * 50}[kind])
    return other


@pytest.mark.parametrize("open_engine", ENGINES)
@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "missing"])
def test_file_that_is_no_model(open_engine: Open, files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = spoil(files["static"], tmp_path, kind)
    with pytest.raises(NoEngine) as refusal:
        open_engine(model, small_stage.specify())
    said = str(refusal.value)
    assert said.startswith(f"{model}: ") and " refuses it: " in said
    assert "\n" not in said and "src/" not in said and len(said) < 600


@pytest.mark.parametrize("open_engine", ENGINES)
def test_weights_that_are_gone(open_engine: Open, tmp_path: Path) -> None:
    model = small_stage.export(tmp_path / "model.onnx", weights_beside=True)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(NoEngine, match=r"model\.onnx: .* refuses it: .*(xternal|\.data)") as refusal:
        open_engine(model, small_stage.specify())
    assert "\n" not in str(refusal.value)


LATENT, TIME, NOISE = Port("latent", (4, 4, 8, 8), F32), Port("time", (4,), F32), Port("noise", (4, 4, 8, 8), F32)
OTHERS = {
    "names": (Specification("chain", (LATENT, TIME._replace(name="t")), (NOISE,)), "a graph of latent, time, noise; "),
    "order": (Specification("unet", (TIME, LATENT), (NOISE,)), "time, latent, noise expected"),
    "more": (
        Specification("unet", (LATENT, TIME), (NOISE, NOISE._replace(name="n"))),
        "latent, time, noise, n expected",
    ),
    "shape": (
        Specification("unet", (LATENT._replace(shape=(4, 4, 6, 6)), TIME), (NOISE._replace(shape=(4, 4, 6, 6)),)),
        r"latent is torch.float32 \[4, 4, 8, 8\]; torch.float32 \[4, 4, 6, 6\] expected",
    ),
    "dimensions": (
        Specification("unet", (LATENT, TIME._replace(shape=(4, 1))), (NOISE,)),
        r"time is torch.float32 \[4\]; torch.float32 \[4, 1\] expected",
    ),
    "output": (
        Specification("unet", (LATENT, TIME), (NOISE._replace(shape=(4, 3, 8, 8)),)),
        r"noise is torch.float32 \[4, 4, 8, 8\]; torch.float32 \[4, 3, 8, 8\] expected",
    ),
    "dtype": (
        Specification("unet", (LATENT._replace(dtype=torch.float16), TIME), (NOISE,)),
        r"latent is torch.float32 \[4, 4, 8, 8\]; torch.float16",
    ),
    "batch": (small_stage.specify(rows=3), r"latent is torch.float32 \[4, 4, 8, 8\]; torch.float32 \[3, 4, 8, 8\]"),
    "range": (small_stage.specify(most=9), r"torch.float32 \[4, 4, 8, 8\] for batches of 4 to 9 expected"),
}


@pytest.mark.parametrize("open_engine", ENGINES)
@pytest.mark.parametrize("kind", OTHERS)
def test_file_of_another_stage(open_engine: Open, files: dict[str, Path], kind: str) -> None:
    specification, said = OTHERS[kind]
    with pytest.raises(NoEngine, match=f"static.onnx: .*{said}") as refusal:
        open_engine(files["static"], specification)
    assert "\n" not in str(refusal.value)


def test_ports_that_fit() -> None:
    specification = small_stage.specify(least=1, most=9)
    free = [Found("latent", F32, (None, 4, 8, 8)), Found("time", F32, (None,)), Found("noise", F32, (None, 4, None, 8))]
    compare_ports(specification, free, Path("file"))
    compare_ports(small_stage.specify(), free, Path("file"))  # one batch is among them
    unknown = [free[0]._replace(dtype=None), *free[1:]]
    with pytest.raises(NoEngine, match=r"latent is of another type \['any', 4, 8, 8\]"):
        compare_ports(specification, unknown, Path("file"))


def test_what_an_engine_does_not_serve_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoEngine, match=r"no bfloat16 on a CPU; give engine\.precision=float32"):
        load_onnxruntime(CPU, torch.bfloat16)
    with pytest.raises(NoEngine, match=r"this onnxruntime has no CUDAExecutionProvider; pip install"):
        load_onnxruntime(torch.device("cuda"))
    with pytest.raises(NoEngine, match=r"float16 was asked for; give engine\.precision=bfloat16"):
        load_openvino(CPU, torch.float16)
    with pytest.raises(NoEngine, match="OpenVINO runs on the CPU here, and the device is cuda"):
        load_openvino(torch.device("cuda"))
    for name, load in (("onnxruntime", load_onnxruntime), ("openvino", load_openvino)):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(NoEngine, match=rf'{name} is not installed; pip install "diffdfkd\[{name}\]"'):
            load(CPU)


def test_onnxruntime_takes_no_core_that_it_was_not_given(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    given: list[Any] = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, model: str, options: Any, providers: Any) -> None:
            given.append((options.intra_op_num_threads, options.inter_op_num_threads, providers))
            super().__init__(model, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    OnnxRuntimeRunner(files["static"], small_stage.specify(), CPU, 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    OnnxRuntimeRunner(files["static"], small_stage.specify(), CPU, None)
    assert given == [(3, 1, ["CPUExecutionProvider"]), (5, 1, ["CPUExecutionProvider"])]
    assert set(onnxruntime_backend.NUMPY) == set(onnxruntime_backend.TYPES.values())


@needs_openvino
@pytest.mark.parametrize(("precision", "least", "most"), [(F32, 0, 1e-5), (torch.bfloat16, 1e-4, 4e-2)])
def test_openvino_computes_in_the_precision_that_is_said(
    files: dict[str, Path], precision: torch.dtype, least: float, most: float
) -> None:
    runner = OpenVinoRunner(files["static"], small_stage.specify(), CPU, 1, precision)
    told = runner._compiled.get_property("INFERENCE_PRECISION_HINT")
    assert told.get_type_name() == {F32: "f32", torch.bfloat16: "bf16"}[precision]
    assert runner._compiled.get_property("INFERENCE_NUM_THREADS") == 1
    inputs = small_stage.examples(4)
    able = torch.cpu.get_capabilities()
    if precision == torch.bfloat16 and not (able.get("avx512_bf16") or able.get("amx_bf16")):
        least = 0  # the processor may compute in float32 instead
    assert least <= distance(runner(*inputs)[0], reference(*inputs)) <= most


def test_graphs_are_plain_onnx(files: dict[str, Path]) -> None:
    assert {entry.domain for entry in onnx.load(files["static"]).opset_import} == {""}
