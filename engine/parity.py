"""Whether an engine computes what it is meant to: its outputs beside those of the eager float32 reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.memory import ran_out
from diffdfkd.engine.onnx_files import deepest_line
from diffdfkd.engine.runner import NoEngine


class Tolerance(NamedTuple):
    """What one precision may be off by."""

    values: float
    """|a - b|_2 / |b|_2 of an output."""
    gradients: float
    """The same of a gradient: where a network has kinks, rounding moves single entries by their whole size."""
    cosine: float
    """Of a gradient with the reference's, at least."""


TOLERANCES = {
    torch.float32: Tolerance(1e-4, 5e-3, 0.9999),
    torch.float16: Tolerance(1e-2, 5e-2, 0.998),
    torch.bfloat16: Tolerance(4e-2, 2.5e-1, 0.97),
}
"""Set from what eager arithmetic of that precision itself is off by on the demo: docs/engines.md."""


@dataclass(frozen=True)
class Parity:
    """The worst that was found over several batches, noise levels and prompts."""

    rows: tuple[int, ...]
    """Of the batches that were compared."""
    max_abs: float
    relative: float
    """Largest |a - b|_2 / |b|_2 of an output that is no gradient."""
    gradient: float | None
    """The same of the gradients; None for a stage that has none."""
    cosine: float | None
    """Smallest cosine of a gradient with the reference's."""
    fault: str | None
    """Why the engine is refused, in words; None where it is within the tolerance of its precision."""


class Refused(NoEngine):
    """The engine was built and computes something else than eager; it is not kept."""

    def __init__(self, message: str, parity: Parity) -> None:
        super().__init__(message, lasting=True)
        self.parity = parity


def proven(
    stage: Stage,
    engine: str,
    precision: torch.dtype,
    run: Callable[..., Sequence[Tensor]],
    rows: Sequence[int] | None = None,
) -> Parity:
    """The parity of an engine, named in words; raises NoEngine where it fails when it is called.

    Raises Refused where it is not within its precision's tolerance.
    """

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        try:
            return run(*inputs)
        # Each engine has errors of its own.
        except Exception as error:
            advice = "; give a smaller synthesis.batch_size, or let it have more memory" if ran_out(error) else ""
            raise NoEngine(f"{stage.name}: {engine} fails when it is called: {deepest_line(error)}{advice}") from error

    parity = measure_parity(stage, call, rows=rows, precision=precision)
    if parity.fault is not None:
        raise Refused(f"{stage.name}: {engine} differs from eager ({parity.fault}); it is not used", parity)
    return parity


def measure_parity(
    stage: Stage,
    run: Callable[..., Sequence[Tensor]],
    rows: Sequence[int] | None = None,
    precision: torch.dtype | None = None,
) -> Parity:
    """Compare ``run`` with the stage's reference on batches of ``rows``, by default the smallest to the largest.

    ``precision`` is that of the engine, by default the stage's.
    """
    tolerance = TOLERANCES[precision or stage.precision]
    rows = tuple(rows or usual_rows(stage))
    max_abs = relative = 0.0
    gradient = cosine = None
    fault: str | None = None
    for seed, count in enumerate(rows):
        inputs = stage.examples(count, seed)
        with torch.no_grad():
            expected = stage.reference(*inputs)
            given = run(*inputs)
        for port, a, b in zip(stage.specification.outputs, given, expected, strict=True):
            where = f"{port.name}, batch of {count}"
            if a.shape != b.shape:
                fault = fault or f"{where}: shape {list(a.shape)}, {list(b.shape)} expected"
                continue
            if b.dtype == torch.bool:
                if not torch.equal(a.to(b.device), b):
                    fault = fault or f"{where}: flags differ from eager"
                continue
            a, b = a.to(b.device, torch.float64), b.double()
            if not torch.isfinite(a).all():
                fault = fault or f"{where}: not finite"
                max_abs = relative = float("inf")
                continue
            size = float(b.norm())
            error = float((a - b).norm()) / size if size else float((a - b).norm())
            max_abs = max(max_abs, float((a - b).abs().max()))
            if port.name in stage.gradients:
                gradient = max(gradient or 0.0, error)
                found = _cosine(a.flatten(), b.flatten())
                cosine = min(1.0 if cosine is None else cosine, found)
                if not (error <= tolerance.gradients and found >= tolerance.cosine):
                    fault = fault or (
                        f"{where}: relative error {error:.1e}, cosine {found:.4f} with eager; {tolerance.gradients:g} "
                        f"and {tolerance.cosine} are allowed"
                    )
            else:
                relative = max(relative, error)
                if not error <= tolerance.values:
                    fault = fault or f"{where}: relative error {error:.1e}, {tolerance.values:g} is allowed"
    return Parity(rows, max_abs, relative, gradient, cosine, fault)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Two vectors of zeros point the same way."""
    sizes = float(a.norm() * b.norm())
    return float(a @ b) / sizes if sizes else float(torch.equal(a, b))


def usual_rows(stage: Stage) -> tuple[int, ...]:
    """Batches that show an engine: of a static one the whole and a padded one, else the ends of the range too."""
    least, usual, most = stage.specification.range
    chosen = (usual, max(1, usual // 2)) if stage.specification.static else (least, usual, most)
    return tuple(dict.fromkeys(chosen))
