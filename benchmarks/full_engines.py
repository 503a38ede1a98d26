"""A stage of the full Stable Diffusion 1.5 as an engine, with random weights and without a GPU: seconds and memory.

    python -m diffdfkd.benchmarks.full_engines
    python -m diffdfkd.benchmarks.full_engines --stage vjp --rows 1 --capability SM89 --no-parity

The networks are those of `benchmarks.full_sd15`; nothing is fetched. Three steps, each in a process of its own so that
its peak of memory is its own: the stage is exported to ONNX, weights in a file beside it, and checked; ONNX Runtime
computes it on the CPU beside eager float32; TensorRT-RTX builds a plan for the named compute capabilities. Printed is
one line of JSON; the exit status is 1, with a line on stderr, where a step is refused.
It takes minutes, up to 11 GiB of memory and 5 GB of disk.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdfkd.benchmarks.conditions import peak_memory

if TYPE_CHECKING:
    from diffdfkd.engine.engine_stages import Stage
    from diffdfkd.engine.specification import Specification

STAGES = ("unet", "chain", "vjp")
PLAN = "plan.engine"


@dataclass(frozen=True)
class Asked:
    """What is exported, and for which GPUs it is built."""

    stage: str
    precision: str
    rows: int
    """Of the stage, all of them at once: a static batch."""
    teacher_size: int
    """Pixels of the input of the chain's teacher, an untrained ResNet-18."""
    capabilities: tuple[str, ...]


def stage_of(asked: Asked) -> "Stage":
    """The stage, with the same random weights in each process."""
    import torch

    from diffdfkd.benchmarks.full_sd15 import build_prior, build_teacher
    from diffdfkd.engine.engine_stages import Batches, chain_engine_stage, unet_engine_stage, vjp_engine_stage
    from diffdfkd.engine.recipe import GuidanceRecipe

    precision: torch.dtype = getattr(torch, asked.precision)
    batches = Batches(asked.rows)
    prior = build_prior(asked.precision)
    if asked.stage == "chain":
        weights = GuidanceRecipe(class_weight=1.0, batchnorm_weight=0.1)
        torch.manual_seed(0)
        prior.unet = torch.nn.Linear(1, 1)  # the chain asks for its device alone
        return chain_engine_stage(prior, build_teacher(asked.teacher_size), weights, batches, precision)
    context = prior.embed(["an image of a coat", ""])
    make = unet_engine_stage if asked.stage == "unet" else vjp_engine_stage
    return make(prior, batches, context, precision)


def export(asked: Asked, folder: Path) -> tuple[dict[str, Any], "Specification"]:
    """Write the stage into ``folder``; what the file is, and its specification. Raises NoEngine where it is refused."""
    from diffdfkd.engine.export import export_stage

    stage = stage_of(asked)
    started = time.perf_counter()
    details = export_stage(stage, folder)
    seconds = time.perf_counter() - started
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {"seconds": round(seconds, 1), "opset": details["opset"], "bytes": files}, stage.specification


def compare(asked: Asked, folder: Path) -> dict[str, Any]:
    """The file under ONNX Runtime beside eager float32, on the whole batch; raises Refused beyond the tolerance.

    The seconds are ONNX Runtime's, its loading of the file included.
    """
    import torch

    from diffdfkd.engine.backends.onnxruntime import OnnxRuntimeRunner
    from diffdfkd.engine.export import MODEL
    from diffdfkd.engine.parity import proven

    stage = _answered(stage_of(asked))
    gc.collect()
    started = time.perf_counter()
    runner = OnnxRuntimeRunner(folder / MODEL, stage.specification, torch.device("cpu"), torch.get_num_threads())
    parity = proven(stage, "its exported graph", stage.precision, runner, rows=(asked.rows,))
    return {"seconds": round(time.perf_counter() - started, 1), **asdict(parity)}


def _answered(stage: "Stage") -> "Stage":
    """The stage with its answer to its first examples in the place of its networks, which need not stay in memory."""
    import torch

    inputs = stage.examples(stage.specification.rows, 0)
    with torch.no_grad():
        expected = stage.reference(*inputs)
    return replace(stage, make=lambda dtype: lambda *given: expected, examples=lambda rows, seed: inputs)


def build(asked: Asked, folder: Path, specification: "Specification") -> dict[str, Any]:
    """TensorRT-RTX's plan of the file; raises NoEngine where it is not installed or refuses."""
    from diffdfkd.engine.backends.tensorrt_builder import build_plan
    from diffdfkd.engine.export import MODEL

    details = build_plan(
        folder / MODEL,
        folder / PLAN,
        specification,
        flavour="tensorrt-rtx",
        capabilities=asked.capabilities,
        log=folder / "builder.log",
    )
    return {key: details[key] for key in ("seconds", "version", "capabilities", "layers", "bytes")}


def apart(step: Callable[..., Any], *values: Any) -> tuple[Any, dict[str, float]]:
    """What a step gives in a process of its own, and what that process took; raises what the step raises.

    ``peak_mib`` is the most MiB that it held, ``cpu_seconds`` its processor time, imports and networks included.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_accounted, step, *values).result()


def _accounted(step: Callable[..., Any], *values: Any) -> tuple[Any, dict[str, float]]:
    made = step(*values)
    return made, {"peak_mib": round(peak_memory() / 2**20), "cpu_seconds": round(time.process_time(), 1)}


def measure(asked: Asked, folder: Path, *, parity: bool = True) -> dict[str, Any]:
    """All steps one after another in ``folder``: their figures by name, JSON-ready. Raises NoEngine."""
    import torch

    from diffdfkd.benchmarks.conditions import conditions
    from diffdfkd.engine.backends.tensorrt_flavour import targets

    targets("tensorrt-rtx", asked.capabilities)  # said before the export, which takes minutes

    def told(name: str, figures: dict[str, Any], account: dict[str, float]) -> None:
        result[name] = {**figures, **account}
        print(f"{name}: {figures['seconds']:.1f} s, peak {account['peak_mib']:,} MiB", file=sys.stderr)

    result: dict[str, Any] = asdict(asked)
    (figures, specification), account = apart(export, asked, folder)
    told("export", figures, account)
    # ONNX Runtime has no bfloat16 on a CPU.
    if parity and asked.precision != "bfloat16":
        told("parity", *apart(compare, asked, folder))
    told("build", *apart(build, asked, folder, specification))
    return {**result, "conditions": conditions(torch.device("cpu"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default="unet")
    parser.add_argument("--precision", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--rows", type=int, default=2, help="of the stage; guidance of one image takes two of the UNet")
    parser.add_argument("--teacher-size", type=int, default=224, help="pixels of the teacher's input, for the chain")
    parser.add_argument("--capability", action="append", help="such as SM86, the default; may be given again")
    parser.add_argument("--no-parity", action="store_true", help="leave ONNX Runtime out")
    parser.add_argument("--folder", type=Path, help="keep the files in this folder, which is made")
    arguments = parser.parse_args()
    from diffdfkd.engine.runner import NoEngine

    capabilities = tuple(arguments.capability or ("SM86",))
    asked = Asked(arguments.stage, arguments.precision, arguments.rows, arguments.teacher_size, capabilities)
    with tempfile.TemporaryDirectory(prefix="full-engines-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            print(json.dumps(measure(asked, folder, parity=not arguments.no_parity)))
        except NoEngine as reason:
            sys.exit(str(reason))


if __name__ == "__main__":
    main()
