"""Plans that TensorRT-RTX really builds, for GPUs that are not here, and all that is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from small_stage import ROWS, export, specify

from diffdfkd.engine.backends import tensorrt_builder
from diffdfkd.engine.backends.tensorrt_builder import build_plan
from diffdfkd.engine.runner import NoEngine
from diffdfkd.engine.specification import Port, Specification

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """ONNX files by dtype and kind, each exported once."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[Any, Path] = {}

    def model(dtype: torch.dtype = torch.float32, ranged: bool = False) -> Path:
        if (dtype, ranged) not in made:
            made[dtype, ranged] = export(folder / f"{len(made)}.onnx", dtype, ranged=ranged)
        return made[dtype, ranged]

    return model


class Build:
    """``build_plan`` into a folder of its own, for TensorRT-RTX and SM86 unless it is told otherwise."""

    def __init__(self, folder: Path) -> None:
        self.plan, self.log = folder / "stage.plan", folder / "build.log"

    def __call__(self, model: Path, specification: Specification, **options: Any) -> dict[str, Any]:
        options = {"flavour": "tensorrt-rtx", "capabilities": ["SM86"], "log": self.log, **options}
        return build_plan(model, self.plan, specification, **options)

    def refuses(self, model: Path, specification: Specification, **options: Any) -> str:
        """What it says, in one line; a plan of an earlier build is gone."""
        self.plan.write_text("of an earlier build")
        with pytest.raises(NoEngine) as refusal:
            self(model, specification, **options)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "least", "most", "capabilities"),
    [
        (torch.float32, None, None, ["SM86"]),
        (torch.float16, None, None, ["SM86", "SM89", "SM120"]),
        (torch.float32, 1, 16, ["SM80", "SM121"]),
        (torch.float16, 2, 8, ["SM75"]),
    ],
    ids=["float32", "float16, three capabilities", "float32, ranged", "float16, ranged, Turing"],
)
def test_plan(
    build: Build,
    models: Callable[..., Path],
    dtype: torch.dtype,
    least: int | None,
    most: int | None,
    capabilities: list[str],
) -> None:
    told: list[tuple[str, float]] = []
    specification = specify(dtype, least, most)
    details = build(
        models(dtype, most is not None),
        specification,
        capabilities=capabilities,
        progress=lambda phase, fraction: told.append((phase, fraction)),
    )
    assert json.loads(json.dumps(details)) == details
    assert details["bytes"] == build.plan.stat().st_size > 10_000
    assert details["capabilities"] == capabilities
    assert (details["flavour"], details["version"]) == ("tensorrt-rtx", rtx.__version__)
    assert details["layers"] > 5
    assert details["seconds"] > 0
    numbers = " or ".join(f"{name[2:-1]}.{name[-1]}" for name in capabilities)
    assert details["runs_on"] == f"GPUs of compute capability {numbers}, under tensorrt-rtx {rtx.__version__}"

    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < 0.1
    assert fractions[-1] == 1
    assert len({phase for phase, _ in told}) > 3

    log = build.log.read_text().splitlines()
    assert {line.partition(":")[0] for line in log} >= {"verbose", "info"}
    assert any("compute capabilit" in line and f": {len(capabilities)}" in line for line in log)


def test_profile_is_the_specification_s_range(
    build: Build, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    profile = tensorrt_builder._profile

    def watched(*arguments: Any) -> Any:
        found = profile(*arguments)
        made.append([[tuple(shape) for shape in found.get_shape(name)] for name in ("latent", "time")])
        return found

    monkeypatch.setattr(tensorrt_builder, "_profile", watched)
    build(models(ranged=True), specify(least=2, most=16))
    assert made == [[[(rows, 4, 8, 8) for rows in (2, ROWS, 16)], [(rows,) for rows in (2, ROWS, 16)]]]


def test_weights_beside_the_model(build: Build, tmp_path: Path) -> None:
    model = export(tmp_path / "model.onnx", weights_beside=True)
    beside = tmp_path / "model.onnx.data"
    assert build(model, specify())["bytes"] > 10_000

    content = beside.read_bytes()
    beside.write_bytes(content[:1000])
    said = build.refuses(model, specify())
    assert str(beside) in said
    assert "file size=1000" in said
    beside.unlink()
    said = build.refuses(model, specify())
    assert f"Failed to open file: {beside}" in said
    assert said.endswith("export the stage again")


class Mismatch:
    """Ports that the file has not."""

    latent, time, noise = (*specify().inputs, *specify().outputs)
    half = Port("noise", noise.shape, torch.float16)
    wide = Port("latent", (ROWS, 4, 16, 16), torch.float32)
    flat = Port("time", (ROWS, 1), torch.float32)
    image = Port("image", latent.shape, torch.float32)
    mean = Port("mean", (3,), torch.float32, False)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((Mismatch.image, Mismatch.time), (Mismatch.noise,), "inputs are latent, time; image, time expected (unet)"),
        ((Mismatch.latent,), (Mismatch.noise,), "inputs are latent, time; latent expected (unet)"),
        (
            (Mismatch.latent, Mismatch.time),
            (Mismatch.noise, Mismatch.mean),
            "outputs are noise; noise, mean expected (unet)",
        ),
        (
            (Mismatch.wide, Mismatch.time),
            (Mismatch.noise,),
            "input latent is float32 [4, 4, 8, 8]; float32 [4, 4, 16, 16] expected",
        ),
        ((Mismatch.latent, Mismatch.flat), (Mismatch.noise,), "input time is float32 [4]; float32 [4, 1] expected"),
        (
            (Mismatch.latent, Mismatch.time),
            (Mismatch.half,),
            "output noise is float32 [4, 4, 8, 8]; float16 [4, 4, 8, 8] expected",
        ),
    ],
    ids=["another input", "input too many", "missing output", "size", "rank", "dtype"],
)
def test_model_of_another_stage(
    build: Build, models: Callable[..., Path], inputs: tuple[Port, ...], outputs: tuple[Port, ...], message: str
) -> None:
    model = models()
    said = build.refuses(model, Specification("unet", inputs, outputs))
    assert message in said
    assert said.startswith(f"{model}: ")
    assert not build.plan.exists()


def test_model_of_other_batches(build: Build, models: Callable[..., Path]) -> None:
    # TensorRT would miss a profile.
    said = build.refuses(models(ranged=True), specify())
    assert said.endswith("input latent is float32 [any, 4, 8, 8]; float32 [4, 4, 8, 8] expected")
    said = build.refuses(models(), specify(least=1, most=8))
    assert said.endswith("input latent is float32 [4, 4, 8, 8]; float32 [any, 4, 8, 8] expected")
    said = build.refuses(models(), specify(rows=6))
    assert said.endswith("input latent is float32 [4, 4, 8, 8]; float32 [6, 4, 8, 8] expected")


def one_node(path: Path, operator: str, domain: str = "") -> Path:
    """A model of one node, named ``odd``."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 2)) for name in ("x", "y")]
    node = helper.make_node(operator, ["x"], ["y"], name="odd", domain=domain)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("our.domain", 1)]
    graph = helper.make_graph([node], "odd", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("operator", "domain", "message"),
    [
        ("Frobnicate", "our.domain", "node 0 odd (Frobnicate): unknown operator"),
        ("Det", "", "node 0 odd (Det): unsupported node"),
    ],
)
def test_operator_that_tensorrt_lacks(build: Build, tmp_path: Path, operator: str, domain: str, message: str) -> None:
    model = one_node(tmp_path / "odd.onnx", operator, domain)
    assert build.refuses(model, specify()) == f"{model}: tensorrt-rtx cannot read it: {message}"
    assert "error: " in build.log.read_text()


def test_no_file_and_half_a_file(build: Build, models: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    assert build.refuses(model, specify()) == f"{model}: there is no such file; export the stage first"
    content = models().read_bytes()
    model.write_bytes(content[: len(content) // 2])
    said = build.refuses(model, specify())
    assert said == f"{model}: tensorrt-rtx cannot read it: Failed to parse the ONNX model; export the stage again"


REFUSED_BUILDS = """
import sys
from pathlib import Path
from diffdfkd.engine.backends import tensorrt_builder
from diffdfkd.engine.runner import NoEngine
from small_stage import specify

folder = Path(sys.argv[1])


def refuse(model, specification, **options):
    try:
        tensorrt_builder.build_plan(
            folder / model, folder / "plan", specification, flavour="tensorrt-rtx", log=folder / "log", **options
        )
    except NoEngine as error:
        print(error)
    assert not (folder / "plan").exists()


refuse("model.onnx", specify(), capabilities=["SM75", "SM86"])
refuse("model.onnx", specify(), capabilities=["SM86"], memory_limit=16)
assert "error: IBuilder::buildSerializedNetwork" in (folder / "log").read_text()
tensorrt_builder._profile = lambda builder, network, specification: builder.create_optimization_profile()
refuse("ranged.onnx", specify(least=1, most=8), capabilities=["SM86"])
"""


def test_builds_that_fail(models: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of their own: what a failed build leaves behind is TensorRT's affair."""
    shutil.copy(models(), tmp_path / "model.onnx")
    shutil.copy(models(ranged=True), tmp_path / "ranged.onnx")
    tests = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", REFUSED_BUILDS, str(tmp_path)], cwd=tests, capture_output=True, text=True, check=True
    )
    turing, memory, profile = done.stdout.splitlines()
    where, log = tmp_path / "model.onnx", tmp_path / "log"
    assert turing.startswith(
        f"{where}: tensorrt-rtx cannot build it: Cannot compile operation 'node_linear' for Turing"
    )
    assert "; export the stage in float16, or leave SM75 out" in turing
    assert "workspace limit" in memory
    cure = "make its batches smaller (synthesis.batch_size), build it for one batch instead of a range, or let it have"
    assert f"; {cure} more memory (all it said: {log})" in memory
    assert profile == (
        f"{tmp_path / 'ranged.onnx'}: tensorrt-rtx cannot build it: Dynamic input tensor latent is missing dimensions "
        f"in profile 0 (all it said: {log})"
    )


def test_targets_that_the_flavour_lacks(
    build: Build, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = build.refuses(models(), specify(), capabilities=["SM86", "SM90"])
    assert "cannot build for SM90; it can for SM75, SM80, SM86, SM89, SM120, SM121" in said
    assert said.endswith("for data-centre cards the engine is tensorrt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = build.refuses(models(), specify(), capabilities=[])
    assert said.endswith("use a machine with one, or name what to build for: SM75, SM80, SM86, SM89, SM120, SM121")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_progress_that_raises_stops_the_build(
    build: Build, models: Callable[..., Path], raised: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def progress(phase: str, fraction: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise raised

    with pytest.raises(raised):
        build(models(), specify(), progress=progress)
    assert calls == 5
    assert not build.plan.exists()
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_log_on_a_full_disk(build: Build, models: Callable[..., Path]) -> None:
    with pytest.raises(OSError, match="No space left"):
        build(models(), specify(), log=Path("/dev/full"))
    assert not build.plan.exists()


@pytest.fixture
def tensorrt_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX in the place of ``tensorrt``, with a GPU that only seems to be there.

    Left without a target, it builds for all; its timing cache has TensorRT's interface, and keeps nothing.
    """
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    monkeypatch.setattr(rtx, "__version__", "10.13.3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("tensorrt_stand_in")
def test_flavour_for_the_gpu_at_hand(build: Build, models: Callable[..., Path], tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    options: dict[str, Any] = {"flavour": "tensorrt", "timing_cache": cache}
    details = build(models(), specify(), capabilities=[], **options)
    assert details["capabilities"] == ["SM90"]
    assert details["runs_on"] == "NVIDIA H100 (compute capability 9.0), under tensorrt 10.13.3"
    content = cache.read_bytes()
    assert content
    # Of use again, by name too; one that is none is begun anew.
    build(models(), specify(), capabilities=["SM90"], **options)
    cache.write_bytes(b"of another version")
    build(models(), specify(), capabilities=[], **options)
    assert cache.read_bytes() == content
    said = build.refuses(models(), specify(), capabilities=["SM86"], **options)
    assert said == (
        "tensorrt builds for the GPU at hand alone, SM90; to build for SM86 use a machine that has it, or tensorrt-rtx"
    )


def test_products_of_float32_are_not_rounded(
    build: Build, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[tuple[bool, bool]] = []
    configure = tensorrt_builder._configure

    def watched(*arguments: Any) -> Any:
        config = configure(*arguments)
        user = config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
        flags.append((config.get_flag(rtx.BuilderFlag.TF32), user))
        assert config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) == 2**30
        return config

    monkeypatch.setattr(tensorrt_builder, "_configure", watched)
    for tf32 in (False, True):
        assert build(models(), specify(), tf32=tf32, memory_limit=2**30)["tf32"] is tf32
    assert flags == [(False, True), (True, True)]
