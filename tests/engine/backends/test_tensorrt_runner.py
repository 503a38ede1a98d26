"""The TensorRT runner over a recording stand-in for the runtime; over TensorRT itself: test_tensorrt_on_gpu.py."""

import dataclasses
import logging
import sys
from collections.abc import Callable
from enum import EnumType
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recording_tensorrt import RecordingConfig, RecordingContext, RecordingEngine, RecordingTensorRT
from torch import Tensor

from diffdfkd.engine.backends.tensorrt import Execution, TensorRTRunner, Workspace
from diffdfkd.engine.backends.tensorrt_flavour import Flavour
from diffdfkd.engine.runner import NoEngine
from diffdfkd.engine.specification import Port, Specification

STREAM = 4711
CPU = torch.device("cpu")
FLAVOURS = ("tensorrt", "tensorrt-rtx")


def specify(least: int | None = None, most: int | None = None, name: str = "unet") -> Specification:
    return Specification(
        name,
        (
            Port("latent", (4, 3), torch.float32),
            Port("time", (4,), torch.float32),
            Port("scale", (1,), torch.float32, False),
        ),
        (Port("noise", (4, 3), torch.float32), Port("mean", (3,), torch.float32, False)),
        least,
        most,
    )


def compute(latent: Tensor, time: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    noise = latent * scale + time[:, None]
    return noise, noise.mean(0)


def examples(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, 3), torch.rand(rows), torch.tensor([1.5])


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    return request.param


@pytest.fixture
def module(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> RecordingTensorRT:
    """Imported in TensorRT's place, on a machine that seems to have a GPU."""
    made = RecordingTensorRT(flavour.replace("-", "_"), {"tensorrt": "10.13.0", "tensorrt-rtx": "1.7.1"}[flavour])
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A4000")
    return made


Make = Callable[..., TensorRTRunner]


@pytest.fixture
def make(module: RecordingTensorRT, flavour: Flavour, tmp_path: Path) -> Make:
    """A runner for a specification, over an engine of that specification or of another."""

    def make(
        specification: Specification,
        *,
        built: Specification | None = None,
        workspace: Workspace | None = None,
        size: int = 64,
        change: Callable[[RecordingEngine], None] = lambda engine: None,
    ) -> TensorRTRunner:
        plan = tmp_path / f"{specification.name}.plan"
        plan.write_text(specification.name)
        change(RecordingEngine(module, specification.name, built or specification, compute, size))
        return TensorRTRunner(plan, specification, CPU, workspace or Workspace(CPU), flavour=flavour)

    return make


def told(module: RecordingTensorRT, *kinds: str) -> list[tuple[Any, ...]]:
    return [call for call in module.calls if call[0] in kinds]


def test_addresses_are_told_once_and_shapes_when_rows_change(make: Make, module: RecordingTensorRT) -> None:
    runner = make(specify(1, 6))
    for rows in (4, 4, 6, 6, 4):
        inputs = examples(rows)
        for given, expected in zip(runner(*inputs), compute(*inputs), strict=True):
            torch.testing.assert_close(given, expected)
    addresses = {name: address for _, _, name, address in told(module, "address")}
    buffers = {**runner.inputs, **runner.outputs}
    assert addresses == {name: buffer.data_ptr() for name, buffer in buffers.items()}
    assert len(told(module, "address")) == 5
    # Of the batched inputs alone, at the first call and at each change.
    shapes = [(name, shape[0]) for _, _, name, shape in told(module, "shape")]
    assert shapes == [(name, rows) for rows in (4, 6, 4) for name in ("latent", "time")]
    assert told(module, "execute") == [("execute", "unet", STREAM, rows) for rows in (4, 4, 6, 6, 4)]


def test_short_batch_of_a_static_engine_is_padded_with_zeros(make: Make, module: RecordingTensorRT) -> None:
    runner = make(specify())
    runner(*examples(4))
    latent, time, scale = examples(3)
    noise, mean = runner(latent, time, scale)
    padded = torch.cat([latent, torch.zeros(1, 3)]), torch.cat([time, torch.zeros(1)])
    expected = compute(*padded, scale)
    torch.testing.assert_close(noise, expected[0][:3])
    torch.testing.assert_close(mean, expected[1])
    # It has one shape, which it knows.
    assert told(module, "shape") == []
    with pytest.raises(ValueError, match="a batch of 5 rows"):
        runner(*examples(5))


def test_batch_below_the_range_is_padded(make: Make, module: RecordingTensorRT) -> None:
    runner = make(specify(2, 4))
    latent, time, scale = examples(1)
    assert runner(latent, time, scale)[0].shape == (1, 3)
    torch.testing.assert_close(runner(latent, time, scale)[0], compute(latent, time, scale)[0])
    assert {call[-1] for call in told(module, "execute")} == {2}


def test_views_of_the_buffers_are_not_copied(make: Make) -> None:
    runner = make(specify(1, 4))
    views = runner.views(2)
    for view in views:
        view.fill_(2.0)
    noise, _ = runner(*views)
    assert torch.equal(noise, torch.full((2, 3), 6.0))
    assert noise.data_ptr() == runner.outputs["noise"].data_ptr()


def test_stages_share_one_workspace_that_grows_to_the_largest(make: Make, module: RecordingTensorRT) -> None:
    workspace = Workspace(CPU)
    small = make(specify(name="small"), workspace=workspace, size=100)
    before = workspace.memory.data_ptr()
    large = make(specify(name="large"), workspace=workspace, size=5000)
    middle = make(specify(name="middle"), workspace=workspace, size=300)
    assert workspace.memory.numel() == 5000
    place = (workspace.memory.data_ptr(), 5000)
    assert told(module, "memory") == [
        ("memory", "small", before, 100),
        # The memory moved, and those that use it are told.
        ("memory", "small", *place),
        ("memory", "large", *place),
        ("memory", "middle", *place),
    ]
    large.close()
    assert workspace.memory.numel() == 5000
    for runner in (small, middle):
        inputs = examples(4)
        torch.testing.assert_close(runner(*inputs)[0], compute(*inputs)[0])


def test_workspace_that_cannot_grow_keeps_serving(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(CPU)
    runner = make(specify(name="small"), workspace=workspace, size=100)
    with pytest.raises(NoEngine, match=r"large.plan: it does not fit into memory .*one batch instead of a range"):
        make(specify(name="large"), workspace=workspace, size=2**60)
    assert workspace.memory.numel() == 100
    inputs = examples(4)
    torch.testing.assert_close(runner(*inputs)[0], compute(*inputs)[0])


def test_context_is_made_without_memory_of_its_own(make: Make, module: RecordingTensorRT, flavour: Flavour) -> None:
    make(specify())
    [(_, _, how)] = told(module, "context")
    strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
    if flavour == "tensorrt":
        assert how is strategy
    else:
        assert how.strategy is strategy
        eager = module.DynamicShapesKernelSpecializationStrategy.EAGER
        assert how.dynamic_shapes_kernel_specialization_strategy is eager


def test_default_stream_is_left_for_one_beside_it(
    make: Make, module: RecordingTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[str, str]] = []

    def stream(name: str, number: int) -> Any:
        return SimpleNamespace(
            name=name, cuda_stream=number, wait_stream=lambda other: waits.append((name, other.name))
        )

    workspace = Workspace(CPU)
    workspace.side = stream("side", 99)
    default = stream("default", 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: default)
    make(specify(), workspace=workspace)(*examples(4))
    assert told(module, "execute") == [("execute", "unet", 99, 4)]
    assert waits == [("side", "default"), ("default", "side")]


def test_no_gpu(make: Make, module: RecordingTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoEngine, match="runs on a GPU, and torch finds none"):
        make(specify())
    assert module.runtimes == 0


def test_plan_that_does_not_load(make: Make, module: RecordingTensorRT, flavour: Flavour, tmp_path: Path) -> None:
    plan = tmp_path / "other.plan"
    with pytest.raises(NoEngine, match="no such file; build the engine first"):
        TensorRTRunner(plan, specify(), CPU, Workspace(CPU), flavour=flavour)
    plan.write_text("from another version")
    with pytest.raises(NoEngine) as refusal:
        TensorRTRunner(plan, specify(), CPU, Workspace(CPU), flavour=flavour)
    assert str(refusal.value) == (
        f"{plan}: {flavour} does not load it on NVIDIA RTX A4000, as with a plan of another version or for another "
        "kind of GPU: no magic tag; build it again here"
    )


def replaced(**changes: Port) -> Specification:
    """The usual specification with other ports, by name."""
    usual = specify()
    return dataclasses.replace(
        usual,
        inputs=tuple(changes.get(port.name, port) for port in usual.inputs),
        outputs=tuple(changes.get(port.name, port) for port in usual.outputs),
    )


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (
            replaced(latent=Port("image", (4, 3), torch.float32)),
            "its inputs are image, time, scale; latent, time, scale",
        ),
        (replaced(mean=Port("average", (3,), torch.float32, False)), "its outputs are noise, average; noise, mean exp"),
        (
            replaced(latent=Port("latent", (4, 3), torch.float16)),
            r"input latent is float16 \[4, 3\]; float32 \[4, 3\] expected",
        ),
        (
            replaced(noise=Port("noise", (4, 5), torch.float32)),
            r"output noise is float32 \[4, 5\]; float32 \[4, 3\] expected",
        ),
        (specify(1, 8), r"input latent is float32 \[any, 3\]; float32 \[4, 3\] expected"),
    ],
    ids=["input", "output", "dtype", "shape", "range"],
)
def test_engine_of_another_stage(make: Make, built: Specification, message: str) -> None:
    with pytest.raises(NoEngine, match=message):
        make(specify(), built=built)


def test_engine_for_fewer_batches(make: Make) -> None:
    with pytest.raises(NoEngine, match="built for batches of 1 to 6 rows; 1 to 8 expected"):
        make(specify(1, 8), built=specify(1, 6))
    make(specify(2, 5), built=specify(1, 6))


def test_engine_that_reads_an_input_on_the_cpu(make: Make) -> None:
    with pytest.raises(NoEngine, match="time is a shape, read on the CPU"):
        make(specify(), change=lambda engine: engine.host.add("time"))


def test_no_execution_context(make: Make) -> None:
    def change(engine: RecordingEngine) -> None:
        engine.makes_context = False

    with pytest.raises(NoEngine, match=r"makes no execution context: .*memory.*one batch instead of a range"):
        make(specify(), change=change)


def test_engine_that_does_not_run(make: Make, module: RecordingTensorRT) -> None:
    runner = make(specify())
    module.engines[b"unet"].executes = False
    with pytest.raises(RuntimeError, match=r"unet: .* does not run a batch of 4: .*make its batches smaller"):
        runner(*examples(4))


def test_outputs_of_another_size_than_their_buffers(make: Make, module: RecordingTensorRT) -> None:
    runner = make(specify(1, 6))
    runner(*examples(4))
    module.engines[b"unet"].wrong_rows = 1
    with pytest.raises(RuntimeError, match=r"unet: at 5 rows .* gives noise the shape \[6, 3\]; \[5, 3\] expected"):
        runner(*examples(5))
    assert len(told(module, "execute")) == 1
    module.engines[b"unet"].wrong_rows = 0
    # It is told the shapes anew, although it had run four rows before.
    runner(*examples(4))
    assert told(module, "shape")[-1] == ("shape", "unet", "time", (4,))


def test_closed_or_dropped_runners_leave_the_workspace(make: Make, module: RecordingTensorRT) -> None:
    workspace = Workspace(CPU)
    closed, dropped = make(specify(name="closed"), workspace=workspace), make(specify(name="drop"), workspace=workspace)
    closed.close()
    closed.close()
    assert closed.inputs == closed.outputs == {}
    del dropped
    make(specify(name="larger"), workspace=workspace, size=1000)
    assert [name for _, name, *_ in told(module, "memory")] == ["closed", "drop", "larger"]


def test_context_goes_before_its_kernels() -> None:
    gone: list[str] = []

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            gone.append(self.name)

    parts: Any = [Part(name) for name in ("context", "kernels", "plan", "runtime")]
    execution = Execution(*parts)
    del parts
    assert gone == []
    del execution
    assert gone[0] == "context"
    assert len(gone) == 4


def test_stand_in_has_nothing_that_tensorrt_lacks() -> None:
    rtx: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    pairs = (
        (RecordingEngine, rtx.ICudaEngine),
        (RecordingConfig, rtx.IRuntimeConfig),
        (RecordingContext, rtx.IExecutionContext),
    )
    for stand_in, real in pairs:
        assert {name for name in vars(stand_in) if not name.startswith("_")} - set(dir(real)) == set()
    assert {"device_memory_size_v2"} <= set(dir(rtx.ICudaEngine))
    assert {"serialize", "deserialize"} <= set(dir(rtx.IRuntimeCache))
    for name, kind in vars(RecordingTensorRT).items():
        if isinstance(kind, EnumType):
            assert set(kind.__members__) <= set(getattr(rtx, name).__members__)


class TestKernels:
    """TensorRT-RTX's compiled kernels, beside the plan."""

    @pytest.fixture
    def flavour(self) -> Flavour:
        return "tensorrt-rtx"

    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "unet.nvidia-rtx-a4000.kernels"

    def test_are_kept(self, make: Make, module: RecordingTensorRT, tmp_path: Path) -> None:
        runner = make(specify())
        assert self.file(tmp_path).read_bytes() == b"compiled"
        [(_, _, config)] = told(module, "context")
        assert config.cache is not None
        module.engines[b"unet"].kernels = b"compiled for more shapes"
        runner.close()
        assert self.file(tmp_path).read_bytes() == b"compiled for more shapes"

    def test_of_another_gpu_are_replaced(self, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.file(tmp_path).write_bytes(b"compiled by an older driver")
        with caplog.at_level(logging.INFO):
            make(specify())
        assert "kernels of another GPU, driver or version" in caplog.text
        assert self.file(tmp_path).read_bytes() == b"compiled"

    def test_that_cannot_be_kept(self, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        # A folder in its place: the user may be root, who may write anywhere.
        self.file(tmp_path).mkdir()
        (self.file(tmp_path) / "something").touch()
        make(specify())(*examples(4))
        assert "compiled kernels are not kept" in caplog.text
