"""Torch's Inductor, ahead of time: the traced stage as a package of machine code that loads in a moment."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.backends.channel_rows import row_norms
from diffdfkd.engine.backends.frozen import frozen
from diffdfkd.engine.backends.own_folder import DISK
from diffdfkd.engine.decompositions import decompositions
from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.memory import LESS_MEMORY, less_memory
from diffdfkd.engine.onnx_files import deepest_line, silent
from diffdfkd.engine.runner import NoEngine, Runner
from diffdfkd.engine.specification import Specification
from diffdfkd.engine.trace import trace

PACKAGE = "model.pt2"
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TRIAL = """
import json, sys, torch
asked = json.loads(sys.argv[1])
inputs = [torch.zeros(shape, dtype=getattr(torch, dtype), device=asked["device"]) for shape, dtype in asked["ports"]]
with torch.no_grad():
    torch._inductor.aoti_load_package(asked["package"])(*inputs)
"""
"""Run in a process of its own, which a bad package may take with it."""
RAISED = re.compile(r"\w*(Error|Exception)\b")
"""Begins the line that says what was raised."""


def compile_stage(stage: Stage, folder: Path, work: Path) -> Mapping[str, Any]:
    """Write ``folder/model.pt2``; raises NoEngine where tracer or compiler refuse the stage.

    The compiler keeps what it makes on the way in ``work``, the user's own like the cache: it loads code from there.
    """
    from torch._inductor import aoti_compile_and_package

    try:
        with silent(), working_in(work), torch.no_grad():
            program, _ = trace(stage, _table(stage.device))
            settings = frozen() if stage.device.type == "cpu" else None
            aoti_compile_and_package(program, package_path=str(folder / PACKAGE), inductor_configs=settings)
    # Whatever a network's own code, the tracer, Inductor or the C++ compiler raise: the reason is handed on.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise  # that of the folder is at fault, which is for its owner to say
        raise NoEngine(f"{stage.name}: torch's compiler refuses it: {deepest_line(error)}") from error
    _refuse_crash(folder / PACKAGE, stage)
    return {"specification": stage.specification.describe()}


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Inductor's own cache, by default a folder in /tmp that anybody may have made before."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _table(device: torch.device) -> dict[Any, Callable[..., Any]]:
    """What Inductor takes better than the graphs of other engines."""
    backward = {torch.ops.aten.convolution_backward.default: convolution_backward}
    return backward | (row_norms() if device.type == "cpu" else {})


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """The input's gradient alone, as a transposed convolution; anything else as other engines have it."""
    if transposed or wanted[1] or wanted[2]:
        plain = decompositions()[torch.ops.aten.convolution_backward.default]
        return plain(
            *(gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted)
        )
    rest = [
        int(size - ((out - 1) * s - 2 * p + d * (k - 1) + 1))
        for size, out, s, p, d, k in zip(
            x.shape[2:], gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    made = torch.ops.aten.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups)
    return made, None, None


def _refuse_crash(package: Path, stage: Stage) -> None:
    """NoEngine where loading and calling the package ends a process, as one did on a processor with AMX."""
    most = stage.specification.range[2]
    ports = [(port.shape_at(most), str(port.dtype).removeprefix("torch.")) for port in stage.specification.inputs]
    asked = json.dumps({"package": str(package), "device": str(stage.device), "ports": ports})
    answer = subprocess.run([sys.executable, "-c", TRIAL, asked], capture_output=True, text=True, errors="replace")
    if answer.returncode:
        lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
        # Behind its message torch lists the frames of C++.
        said = next((line for line in reversed(lines) if RAISED.match(line)), (lines or ["no word"])[-1])[:200]
        cure = less_memory(RuntimeError(answer.stderr))
        if answer.returncode < 0:
            said = f"signal {-answer.returncode}"
            if answer.returncode == -signal.SIGKILL:  # by the system, for want of memory
                cure = f"; if it is memory that lacks, {LESS_MEMORY}"
        raise NoEngine(f"{stage.name}: the compiled package does not run here ({said}){cure}")


class CompiledRunner(Runner):
    """A compiled stage; its outputs are made anew with each call."""

    engine = "compiled"

    def __init__(self, package: Path, specification: Specification, device: torch.device) -> None:
        super().__init__(specification, device)
        try:
            self._call = torch._inductor.aoti_load_package(str(package))
        except Exception as error:
            raise NoEngine(f"{package}: cannot be loaded: {deepest_line(error)}") from None

    def run(self, rows: int) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = tuple(self._call(*self.views(rows)))
        return outputs
