"""Engines from a stage to a runner: built once, proven, kept; and what is refused, and leaves nothing behind."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from built_engines import visible
from onnx import numpy_helper
from stand_in_stages import gradient_stand_in, stand_in
from tracing import distance

from diffdfkd.engine import export as export_module
from diffdfkd.engine.backends import build as build_module
from diffdfkd.engine.backends.build import (
    Backend,
    Settings,
    build,
    exported,
    graph_precision,
    prepare,
)
from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.eager import EagerRunner
from diffdfkd.engine.backends.identity import engine_identity
from diffdfkd.engine.backends.openvino import OpenVinoRunner
from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.memory import LESS_MEMORY
from diffdfkd.engine.parity import Refused
from diffdfkd.engine.runner import NoEngine

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
needs_openvino = pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed")
needs_rtx = pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="tensorrt-rtx is not installed")
SLOW = pytest.mark.slow
OPENVINO = pytest.param("openvino", marks=needs_openvino)
RTX = pytest.param("tensorrt-rtx", marks=needs_rtx)
ENGINES = [
    pytest.param("eager", BF16, id="eager, bfloat16"),
    pytest.param("onnxruntime", F32, id="onnxruntime"),
    pytest.param("onnxruntime", F16, id="onnxruntime, float16"),
    pytest.param("openvino", F32, id="openvino", marks=needs_openvino),
    pytest.param("openvino", BF16, id="openvino, bfloat16", marks=needs_openvino),
    pytest.param("compiled", F32, id="compiled", marks=SLOW),
    pytest.param("compiled", BF16, id="compiled, bfloat16", marks=SLOW),
]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(EngineCache(tmp_path / "cache"), threads=1)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Precisions of what has been exported since."""
    made: list[str] = []
    real = export_module.export_stage

    def counted(stage: Stage, folder: Path) -> Mapping[str, Any]:
        made.append(str(stage.precision))
        return real(stage, folder)

    monkeypatch.setattr(export_module, "export_stage", counted)
    return made


def kept(settings: Settings) -> list[str]:
    """Kinds of what lies in the cache."""
    return [name.split("/")[0] for name in visible(settings.cache)]


def make(precision: torch.dtype) -> Stage:
    return stand_in(precision)


def right(runner: Any, precision: torch.dtype) -> None:
    stage = stand_in()
    for rows in (4, 3):
        inputs = stage.examples(rows, 7)
        given, expected = runner(*inputs)[0], stage.reference(*inputs)[0]
        assert distance(given, expected) <= (1e-5 if precision == F32 else 2e-2)


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_built_once_and_then_taken_from_the_cache(
    settings: Settings, exports: list[str], engine: Backend, precision: torch.dtype
) -> None:
    built = build(make, engine, precision, settings)
    assert not built.cached and built.seconds > 0 and built.runner.engine == engine
    assert built.parity is not None and built.parity.fault is None and built.parity.rows == (4, 2)
    assert 0 < built.parity.relative < (1e-5 if precision == F32 else 2e-2)
    right(built.runner, precision)

    stage = make(graph_precision(engine, precision))
    entry = settings.cache.find(engine, engine_identity(stage, engine, precision, settings))
    assert entry is not None
    assert entry.details["engine"] == engine
    assert entry.details["precision"] == str(precision).removeprefix("torch.")
    assert entry.details["parity"]["relative"] == built.parity.relative

    exports.clear()
    before = visible(settings.cache)
    again = build(make, engine, precision, settings)
    assert again.cached and not exports and visible(settings.cache) == before
    assert (again.parity, again.seconds) == (built.parity, built.seconds)
    right(again.runner, precision)
    for runner in (built.runner, again.runner):
        runner.close()


def test_plain_eager_needs_no_proof_and_no_cache(settings: Settings) -> None:
    built = build(make, "eager", F32, settings)
    assert (built.parity, built.seconds, built.cached) == (None, 0.0, False)
    right(built.runner, F32)
    assert not settings.cache.folder.exists()


def test_gradients_are_proven_by_their_cosine(settings: Settings) -> None:
    parity = build(gradient_stand_in, "onnxruntime", F32, settings).parity
    assert parity is not None
    assert parity.gradient is not None and 0 < parity.gradient < 1e-5
    assert parity.cosine is not None and 0.999999 < parity.cosine < 1.000001


@needs_openvino
def test_one_graph_serves_all_engines_that_read_it(settings: Settings, exports: list[str]) -> None:
    for engine, precision in (("onnxruntime", F32), ("openvino", F32), ("openvino", BF16)):
        build(make, engine, precision, settings)  # type: ignore[arg-type]
    assert exports == ["torch.float32"]
    assert kept(settings) == ["onnx", "onnxruntime", "openvino", "openvino"]
    build(make, "onnxruntime", F16, settings)
    assert exports == ["torch.float32", "torch.float16"]


def test_graph_keeps_its_own_parity(settings: Settings) -> None:
    entry = exported(make(F32), settings)
    assert entry.details["parity"]["fault"] is None and entry.details["parity"]["relative"] < 1e-5
    assert entry.details["opset"] == 21
    assert exported(make(BF16), settings).details["parity"] is None  # which ONNX Runtime does not compute on a CPU


def perturb(model: Path) -> None:
    """Change one weight of a file by a tenth of what its layer's weights are like."""
    graph = onnx.load(model)
    weight = next(weight for weight in graph.graph.initializer if len(weight.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[5] += 0.1 * values.std()
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, model)


@pytest.mark.parametrize("engine", ["onnxruntime", OPENVINO, RTX])
def test_wrong_weight_in_the_file_is_found(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, engine: Backend
) -> None:
    real = export_module.export_stage

    def wrong(stage: Stage, folder: Path) -> Mapping[str, Any]:
        details = real(stage, folder)
        perturb(folder / export_module.MODEL)
        return details

    monkeypatch.setattr(export_module, "export_stage", wrong)
    settings = replace(settings, capabilities=("SM86",) if engine == "tensorrt-rtx" else ())
    with pytest.raises(Refused, match=r"^unet: its exported graph differs from eager \(noise, batch of 4: ") as refusal:
        prepare(make, engine, F32, settings)
    assert refusal.value.parity.fault is not None and refusal.value.parity.relative > 1e-4
    assert kept(settings) == []
    monkeypatch.setattr(export_module, "export_stage", real)
    prepare(make, engine, F32, settings)
    assert sorted(kept(settings)) == sorted(["onnx", engine])


def test_engine_that_computes_something_else_is_refused(settings: Settings) -> None:
    def spoilt(precision: torch.dtype) -> Stage:
        return stand_in(precision, spoil=lambda made: 1.05 * made)

    with pytest.raises(
        Refused, match=r"^unet: eager differs from eager \(.*relative error 5.*, 0.04 is allowed\)"
    ) as refusal:
        build(spoilt, "eager", BF16, settings)
    assert 0.04 < refusal.value.parity.relative < 0.06
    assert kept(settings) == []


@needs_openvino
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda rows, outputs: (1.01 * outputs[0],), "openvino differs from eager"),
        (lambda rows, outputs: (outputs[0] * float("nan"),), "not finite"),
        (lambda rows, outputs: (outputs[0][:, :3],), r"shape \[4, 3, 8, 8\], \[4, 4, 8, 8\] expected"),
        # What is wrong in the rows of padding alone is nobody's.
        (lambda rows, outputs: (outputs[0].roll(1, 0),), "relative error"),
    ],
)
def test_engine_that_is_wrong_leaves_the_graph_alone(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[int, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]],
    said: str,
) -> None:
    real = OpenVinoRunner.run
    monkeypatch.setattr(OpenVinoRunner, "run", lambda self, rows: fault(rows, real(self, rows)))
    with pytest.raises(Refused, match=said):
        build(make, "openvino", F32, settings)
    assert kept(settings) == ["onnx"]


@needs_openvino
@pytest.mark.parametrize(
    ("what", "said"), [("cannot go on", "cannot go on$"), ("std::bad_alloc", "std::bad_alloc; make its batches small")]
)
def test_engine_that_fails_when_called_is_no_engine(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    def fail(self: Any, rows: int) -> Any:
        raise RuntimeError(f"{what}\nand more lines")

    monkeypatch.setattr(OpenVinoRunner, "run", fail)
    with pytest.raises(NoEngine, match=f"^unet: openvino fails when it is called: RuntimeError: {said}"):
        build(make, "openvino", F32, settings)
    assert kept(settings) == ["onnx"]


@pytest.mark.parametrize("when", ["opened", "built"])
def test_engine_that_does_not_fit_into_memory_is_no_engine(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Nor is it dropped from the cache, or remembered as bad: memory may be there the next time."""
    if when == "opened":
        build(make, "onnxruntime", F32, settings).runner.close()
    before = kept(settings)

    def full(self: Any, *_: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("diffdfkd.engine.backends.onnxruntime.OnnxRuntimeRunner.__init__", full)
    monkeypatch.setattr(build_module, "_file_parity", lambda *_: None)
    with pytest.raises(
        NoEngine, match=r"^unet: onnxruntime does not fit into memory .*smaller \(synthesis\.batch_size\), .*one batch"
    ) as refusal:
        build(make, "onnxruntime", F32, settings)
    assert not refusal.value.lasting
    assert kept(settings) == (before or ["onnx"])


def test_kept_engine_that_fails_when_called_stays_in_the_cache(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be memory, or a GPU, that lacks today: nothing says that the engine is wrong."""
    build(make, "eager", BF16, settings)
    before = visible(settings.cache)

    def fail(self: Any, rows: int) -> Any:
        raise RuntimeError("cannot go on")

    monkeypatch.setattr(EagerRunner, "run", fail)
    with pytest.raises(NoEngine, match=r"^unet: eager fails when it is called: RuntimeError: cannot go on$"):
        build(make, "eager", BF16, settings)
    assert visible(settings.cache) == before != []


def test_export_that_runs_out_of_memory_may_pass(settings: Settings) -> None:
    """What the stage itself is to blame for does not."""

    def full(made: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("std::bad_alloc")

    def branching(made: torch.Tensor) -> torch.Tensor:
        return made if float(made.sum()) > 0 else -made

    for spoil, lasting in ((full, False), (branching, True)):
        with pytest.raises(NoEngine, match=r"torch\.onnx\.export refuses it") as refusal:
            build(lambda dtype, spoil=spoil: stand_in(dtype, spoil=spoil), "onnxruntime", F32, settings)
        assert refusal.value.lasting == lasting


def test_eager_goes_on_without_a_cache_and_says_so(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """The cache would hold its proof alone; other engines are refused."""
    settings.cache.folder.write_text("a file")
    built = build(make, "eager", BF16, settings)
    assert built.parity is not None and built.parity.fault is None and not built.cached
    right(built.runner, BF16)
    assert "its comparison with float32 is not kept: engine.cache: " in caplog.text
    with pytest.raises(UserError, match=r"^engine\.cache: .* cannot be used \(Not a directory\)"):
        build(make, "onnxruntime", F32, settings)

    def spoilt(precision: torch.dtype) -> Stage:
        return stand_in(precision, spoil=lambda made: 1.05 * made)

    with pytest.raises(Refused):
        build(spoilt, "eager", BF16, settings)


def damage_graph(cache: Path) -> None:
    (model,) = cache.glob("onnx/*/model.onnx")
    model.write_bytes(model.read_bytes()[:-50])


def damage_sidecar(cache: Path) -> None:
    (sidecar,) = cache.glob("onnxruntime/*/engine.json")
    sidecar.write_text(sidecar.read_text().replace('"relative":', '"relative": 1, "old":'))


@pytest.mark.parametrize("damage", [damage_graph, damage_sidecar])
def test_damaged_entry_is_built_again(
    settings: Settings,
    exports: list[str],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    build(make, "onnxruntime", F32, settings)
    damage(settings.cache.folder)
    with caplog.at_level(logging.WARNING):
        built = build(make, "onnxruntime", F32, settings)
    assert "is built again: " in caplog.text
    assert len(exports) == (2 if damage is damage_graph else 1)
    right(built.runner, F32)
    assert build(make, "onnxruntime", F32, settings).cached


@pytest.mark.parametrize("engine", ["onnxruntime", OPENVINO, pytest.param("compiled", marks=SLOW)])
def test_kept_engine_of_code_that_has_changed_is_built_again(
    settings: Settings, caplog: pytest.LogCaptureFixture, engine: Backend
) -> None:
    """A network's code enters no digest: an engine from the cache is compared on a small batch each time."""
    build(make, engine, F32, settings)
    with caplog.at_level(logging.WARNING):
        built = build(lambda dtype: stand_in(dtype, factor=2.0), engine, F32, settings)
    assert "differs from eager" in caplog.text and "is removed" in caplog.text
    assert not built.cached and built.parity is not None and built.parity.fault is None
    stage = stand_in(factor=2.0)
    inputs = stage.examples(4, 9)
    assert distance(built.runner(*inputs)[0], stage.reference(*inputs)[0]) <= 1e-5


def test_unknown_network_is_refused_before_anything_is_kept(settings: Settings) -> None:
    def branching(precision: torch.dtype) -> Stage:
        return stand_in(precision, spoil=lambda made: made if float(made.sum()) > 0 else -made)

    for engine in ("onnxruntime", "compiled"):
        with pytest.raises(NoEngine, match=r"^unet: torch.* refuses it: "):
            build(branching, engine, F32, settings)  # type: ignore[arg-type]
    assert kept(settings) == []


@pytest.mark.parametrize(
    ("engine", "precision", "said"),
    [
        ("onnxruntime", BF16, "ONNX Runtime has no bfloat16 on a CPU"),
        ("openvino", F16, "float16 was asked for"),
        ("tensorrt", F32, "^tensorrt "),
        ("tensorrt-rtx", F32, "^tensorrt-rtx "),
    ],
)
def test_what_cannot_be_had_is_said_before_the_export(
    settings: Settings, exports: list[str], engine: Backend, precision: torch.dtype, said: str
) -> None:
    if engine.startswith("tensorrt") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(NoEngine, match=said):
        build(make, engine, precision, settings)
    assert not exports and kept(settings) == []


@needs_rtx
@pytest.mark.parametrize("precision", [F32, F16, BF16], ids=str)
def test_plan_for_other_gpus_is_built_without_one(
    settings: Settings, exports: list[str], precision: torch.dtype
) -> None:
    told: list[tuple[str, float]] = []
    settings = replace(
        settings, capabilities=("SM86", "SM89"), progress=lambda phase, fraction: told.append((phase, fraction))
    )
    stage, entry = prepare(make, "tensorrt-rtx", precision, settings)
    assert entry.made and exports == [str(precision)] and told
    assert entry.files.keys() == {"plan.engine", "builder.log"}
    details = entry.details
    assert details["parity"] is None
    assert details["runs_on"].startswith("GPUs of compute capability 8.6 or 8.9, under tensorrt-rtx ")
    assert details["precision"] == str(precision).removeprefix("torch.") and details["build_seconds"] > 0
    # Whoever names them the other way round gets the same plan.
    settings = replace(settings, capabilities=("SM89", "SM86"))
    _, again = prepare(make, "tensorrt-rtx", precision, settings)
    assert not again.made and again.folder == entry.folder
    if not torch.cuda.is_available():
        with pytest.raises(NoEngine, match=r"runs on a GPU, and torch finds none.*capabilities \(SM89, SM86\) leaves"):
            build(make, "tensorrt-rtx", precision, settings)
        assert settings.cache.find("tensorrt-rtx", entry.identity) is not None
    assert stage.precision == precision


@needs_rtx
def test_what_a_builder_said_outlives_its_failure(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise NoEngine("no such network")

    monkeypatch.setattr("diffdfkd.engine.backends.tensorrt_builder.compare", fail)
    with pytest.raises(NoEngine, match="no such network"):
        prepare(make, "tensorrt-rtx", F32, replace(settings, capabilities=("SM86",)))
    (log,) = (settings.cache.folder / "logs").iterdir()
    assert log.name.startswith("unet-") and log.read_text()


def test_engine_that_no_longer_loads_is_built_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = build(make, "eager", BF16, settings)
    real, refused = build_module.open_runner, []

    def once(*given: Any) -> Any:
        if not refused:
            refused.append(given)
            raise NoEngine("unet: it was built for another driver")
        return real(*given)

    monkeypatch.setattr(build_module, "open_runner", once)
    assert first.cached is False and not build(make, "eager", BF16, settings).cached
    assert "no longer loads here, and is built again (unet: it was built for another driver)" in caplog.text
    assert build(make, "eager", BF16, settings).cached


@pytest.mark.parametrize("why", ["unet: it lacks a driver", f"unet: it does not fit; {LESS_MEMORY}"])
def test_engine_that_does_not_load_when_it_was_just_built_or_lacks_memory_is_no_engine(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    build(make, "eager", BF16, settings)
    before, calls = visible(settings.cache), []

    def fail(*given: Any) -> Any:
        calls.append(given)
        raise NoEngine(why)

    monkeypatch.setattr(build_module, "open_runner", fail)
    with pytest.raises(NoEngine, match=why.split(";")[0]):
        build(make, "eager", BF16, settings)
    if LESS_MEMORY in why:
        assert len(calls) == 1 and visible(settings.cache) == before
    else:
        assert len(calls) == 2 and not visible(settings.cache)


@needs_rtx
@pytest.mark.parametrize("spoil", [None, lambda made: 1.01 * made])
def test_plan_is_proven_where_it_first_runs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    settings = replace(settings, capabilities=("SM86",))
    _, entry = prepare(make, "tensorrt-rtx", F32, settings)

    def opened(stage: Stage, *_: Any) -> EagerRunner:
        """In the place of TensorRT's runner, for which there is no GPU."""
        return EagerRunner(stand_in(F16, spoil=spoil) if spoil else stage)

    monkeypatch.setattr(build_module, "open_runner", opened)
    if spoil is not None:
        with pytest.raises(Refused, match="tensorrt-rtx differs from eager"):
            build(make, "tensorrt-rtx", F32, settings)
        assert kept(settings) == ["onnx"]
        return
    built = build(make, "tensorrt-rtx", F32, settings)
    assert built.cached and built.parity is not None and built.parity.fault is None
    found = settings.cache.find("tensorrt-rtx", entry.identity)
    assert found is not None and found.details["parity"]["rows"] == [4, 2]
    assert build(make, "tensorrt-rtx", F32, settings).parity == built.parity


@pytest.mark.slow
def test_compiled_range_of_batches(settings: Settings) -> None:
    """One package serves all batches of a range, one row among them."""

    def ranged(precision: torch.dtype) -> Stage:
        return stand_in(precision, least=1, most=9)

    built = build(ranged, "compiled", F32, settings)
    assert built.parity is not None and built.parity.rows == (1, 4, 9)
    for rows in (1, 2, 9, 5):
        stage = ranged(F32)
        inputs = stage.examples(rows, 3)
        assert distance(built.runner(*inputs)[0], stage.reference(*inputs)[0]) <= 1e-5


@pytest.mark.slow
def test_compiled_gradient(settings: Settings) -> None:
    parity = build(gradient_stand_in, "compiled", F32, settings).parity
    assert parity is not None and parity.gradient is not None and parity.gradient < 1e-5
