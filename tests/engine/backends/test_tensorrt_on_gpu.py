"""TensorRT and TensorRT-RTX themselves: built for the GPU at hand, run, and compared with torch.

pytest -m gpu tests/engine/backends
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_stage import ROWS, SmallStage, examples, export, specify

from diffdfkd.engine.backends.tensorrt import TensorRTRunner, Workspace
from diffdfkd.engine.backends.tensorrt_builder import build_plan
from diffdfkd.engine.backends.tensorrt_flavour import FLAVOURS, Flavour, here, load_flavour
from diffdfkd.engine.runner import NoEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2}
Make = Callable[..., TensorRTRunner]


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    try:
        load_flavour(request.param)
        here(request.param)
    except NoEngine as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Of the reference: TensorRT's are exact unless it is told otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def make(flavour: Flavour, tmp_path: Path) -> Make:
    def make(
        dtype: torch.dtype = torch.float32,
        least: int | None = None,
        most: int | None = None,
        workspace: Workspace | None = None,
        build: bool = True,
    ) -> TensorRTRunner:
        device = torch.device("cuda", torch.cuda.current_device())
        specification = specify(dtype, least, most)
        plan = tmp_path / "stage.plan"
        if build:
            model = export(tmp_path / "stage.onnx", dtype, ranged=most is not None)
            details = build_plan(model, plan, specification, flavour=flavour, log=tmp_path / "build.log")
            assert torch.cuda.get_device_name() in details["runs_on"]
        return TensorRTRunner(plan, specification, device, workspace or Workspace(device), flavour=flavour)

    return make


def check(runner: TensorRTRunner, rows: int, dtype: torch.dtype, seed: int = 0) -> None:
    latent, time = (value.cuda() for value in examples(rows, dtype, seed))
    with torch.no_grad():
        expected = SmallStage().cuda()(latent.float(), time.float())
    [noise] = runner(latent, time)
    assert noise.shape == expected.shape
    assert noise.dtype == dtype
    assert float((noise.float() - expected).norm() / expected.norm()) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_static(make: Make, dtype: torch.dtype) -> None:
    runner = make(dtype)
    for seed, rows in enumerate((ROWS, 1, ROWS)):
        check(runner, rows, dtype, seed)
    runner.close()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_ranged(make: Make, dtype: torch.dtype) -> None:
    runner = make(dtype, 2, 9)
    for seed, rows in enumerate((ROWS, 9, 2, 1, ROWS)):
        check(runner, rows, dtype, seed)


def test_on_a_stream_of_the_caller(make: Make) -> None:
    runner = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check(runner, ROWS, torch.float32)


def test_two_stages_in_one_workspace(make: Make) -> None:
    workspace = Workspace(torch.device("cuda", torch.cuda.current_device()))
    small = make(workspace=workspace)
    large = make(torch.float16, 1, 64, workspace)
    for seed in range(3):
        check(small, ROWS, torch.float32, seed)
        check(large, 64, torch.float16, seed)


@pytest.mark.parametrize("most", [None, 8])
def test_captured_into_a_graph(make: Make, most: int | None) -> None:
    runner = make(least=most and 1, most=most)
    check(runner, ROWS, torch.float32)
    latent, time = runner.views(ROWS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        [noise] = runner(latent, time)
    for seed in (5, 6):
        given = [value.cuda() for value in examples(ROWS, seed=seed)]
        latent.copy_(given[0])
        time.copy_(given[1])
        noise.zero_()
        graph.replay()
        with torch.no_grad():
            expected = SmallStage().cuda()(*given)
        torch.testing.assert_close(noise, expected, atol=1e-4, rtol=1e-4)


def test_same_plan_twice_gives_the_same_bytes(make: Make, flavour: Flavour, tmp_path: Path) -> None:
    given = [value.cuda() for value in examples(ROWS)]
    first = make(least=1, most=8)
    [noise] = first(*given)
    noise = noise.clone()
    first.close()
    kernels = list(tmp_path.glob("*.kernels"))
    assert len(kernels) == (flavour == "tensorrt-rtx")
    # TensorRT-RTX takes its kernels from the file now.
    second = make(least=1, most=8, build=False)
    assert torch.equal(second(*given)[0], noise)


def test_plan_that_is_none(flavour: Flavour, tmp_path: Path) -> None:
    plan = tmp_path / "stage.plan"
    plan.write_bytes(b"nothing of the kind" * 100)
    device = torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(NoEngine, match="build it again here"):
        TensorRTRunner(plan, specify(), device, Workspace(device), flavour=flavour)
