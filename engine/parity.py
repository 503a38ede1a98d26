"""Whether an engine computes what it is meant to: its outputs beside those of the eager float32 reference."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.memory import LESS_MEMORY, less_memory, ran_out
from diffdfkd.engine.onnx_files import deepest_line
from diffdfkd.engine.runner import NoEngine

log = logging.getLogger(__name__)


class Tolerance(NamedTuple):
    """What one precision may be off by."""

    values: float
    """|a - b|_2 / |b|_2 of an output."""
    gradients: float
    """The same of a gradient: where a network has kinks, rounding moves single entries by their whole size."""
    cosine: float
    """Of a gradient with the reference's, at least; of nine samples in ten too, by themselves."""
    sample: float
    """The relative error of a single sample of a gradient, and of a single entry of what is no sample's, such as one
    of the losses. A sample that is another's, or missing, is off by 1 and more."""


TOLERANCES = {
    torch.float32: Tolerance(1e-4, 5e-3, 0.9999, 0.1),
    torch.float16: Tolerance(1e-2, 5e-2, 0.998, 0.3),
    torch.bfloat16: Tolerance(4e-2, 2.5e-1, 0.97, 0.75),
}
"""Set from what eager arithmetic of that precision itself is off by on the demo: docs/engines.md."""
ONE_SAMPLE = 3.0
"""How many times the tolerance of its values a single sample may be off by; rounding spreads evenly over them."""
SMALL = 0.5
"""Samples below this share of the root mean square size are judged as if they were of that size."""
SMALL_ENTRY = 1e-3
"""Likewise of entries, of the largest."""


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
    sample: float | None
    """Largest relative error of a single sample; None for a stage whose outputs have none."""
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

    Raises Refused where it is not within its precision's tolerance. Where eager float32 does not fit into memory with
    batches of ``rows``, by default `usual_rows`, it is compared with smaller ones, down to one row.
    """

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        try:
            return run(*inputs)
        # Each engine has errors of its own.
        except Exception as error:
            raise NoEngine(
                f"{stage.name}: {engine} fails when it is called: {deepest_line(error)}{less_memory(error)}"
            ) from error

    rows = tuple(rows or usual_rows(stage))
    parity = None
    while parity is None:
        try:
            parity = measure_parity(stage, call, rows=rows, precision=precision)
        except Exception as error:
            if not ran_out(error):
                raise
            what = "float32 in eager mode, which it is compared with, does not fit into memory"
            if max(rows) == 1:
                raise NoEngine(f"{stage.name}: {engine}: {what} ({deepest_line(error)}); {LESS_MEMORY}") from error
            log.warning("%s: %s: %s with a batch of %s; a smaller one is compared", stage.name, engine, what, max(rows))
            rows = tuple(dict.fromkeys(max(1, count // 2) for count in rows))
        # Out of the handler, which would keep what the batch holds.
        if parity is None and stage.device.type == "cuda":
            torch.cuda.empty_cache()
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
    gradient = cosine = sample = None
    fault: str | None = None
    for seed, count in enumerate(rows):
        inputs = stage.examples(count, seed)
        with torch.no_grad():
            expected = stage.reference(*inputs)
            given = run(*inputs)
        for port, a, b in zip(stage.specification.outputs, given, expected, strict=True):
            where = f"{port.name}, batch of {count}"
            if (unlike := _unlike(a, b)) is not None:
                fault = fault or f"{where}: {unlike}"
                if unlike == NOT_FINITE:
                    max_abs = relative = float("inf")
                continue
            if b.dtype == torch.bool:
                continue
            a, b = a.to(b.device, torch.float64), b.double()
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
            if port.batched:
                worst, told = _judge_samples(a, b, tolerance, port.name in stage.gradients)
                sample = max(sample or 0.0, worst)
            else:
                told = _judge_entries(a, b, tolerance)
            if told is not None:
                fault = fault or f"{where}: {told}"
    return Parity(rows, max_abs, relative, gradient, cosine, sample, fault)


NOT_FINITE = "not finite"


def _unlike(a: Tensor, b: Tensor) -> str | None:
    """What no tolerance is asked about: shapes, flags, NaN."""
    if a.shape != b.shape:
        return f"shape {list(a.shape)}, {list(b.shape)} expected"
    if b.dtype == torch.bool:
        return None if torch.equal(a.to(b.device), b) else "flags differ from eager"
    return None if torch.isfinite(a).all() else NOT_FINITE


def _judge_samples(a: Tensor, b: Tensor, tolerance: Tolerance, gradient: bool) -> tuple[float, str | None]:
    """(largest relative error of a sample, what is wrong): in a batch's norm one wrong sample of many would be lost."""
    a, b = a.flatten(1) if a.dim() > 1 else a[:, None], b.flatten(1) if b.dim() > 1 else b[:, None]  # [B, n]
    sizes = b.norm(dim=1)
    least = SMALL * float(sizes.norm()) / max(1, int((sizes > 0).sum())) ** 0.5
    if not least:
        return float((a - b).norm()), None  # all is 0, and was judged as a whole
    errors = (a - b).norm(dim=1) / sizes.clamp(min=least)
    worst, allowed = float(errors.max()), tolerance.sample if gradient else ONE_SAMPLE * tolerance.values
    if not worst <= allowed:
        return worst, f"sample {int(errors.argmax())}: relative error {worst:.1e}, {allowed:g} is allowed"
    if gradient and a.shape[1] > 1:
        judged = sizes >= least
        cosines = (a * b).sum(1)[judged] / (a.norm(dim=1) * sizes)[judged].clamp(min=1e-300)
        # Kinks may turn a few: a tenth of them, and of a handful one.
        low = float(cosines.sort().values[min(-(-len(cosines) // 10), len(cosines) - 1)])
        if not low >= tolerance.cosine:
            return worst, f"cosine {low:.4f} with eager in a tenth of the samples; {tolerance.cosine} is allowed"
    return worst, None


def _judge_entries(a: Tensor, b: Tensor, tolerance: Tolerance) -> str | None:
    """What is wrong with one entry, such as a small loss, which in the norm would be lost beside a large one."""
    if not b.any():
        return None  # judged as a whole
    errors = (a - b).abs() / b.abs().clamp(min=SMALL_ENTRY * float(b.abs().max()))
    worst = float(errors.max())
    if worst <= tolerance.sample:
        return None
    return f"entry {int(errors.argmax())}: relative error {worst:.1e}, {tolerance.sample:g} is allowed"


def _cosine(a: Tensor, b: Tensor) -> float:
    """Two vectors of zeros point the same way."""
    sizes = float(a.norm() * b.norm())
    return float(a @ b) / sizes if sizes else float(torch.equal(a, b))


def usual_rows(stage: Stage) -> tuple[int, ...]:
    """Batches that show an engine: of a static one the whole and a padded one, else the ends of the range too."""
    least, usual, most = stage.specification.range
    chosen = (usual, max(1, usual // 2)) if stage.specification.static else (least, usual, most)
    return tuple(dict.fromkeys(chosen))
