"""The row of coefficients that one sampling step applies: every sampler is a table of such rows.

    UNet input = input_scale * z
    x0         = x0_z * z + x0_m * m            m: UNet output after classifier-free guidance
    eps_hat    = eps_z * z + eps_m * m
    z'         = z * z + x0 * x0' + eps * eps_hat + previous * x0'_before + noise * N(0, 1)

where x0' is the guided x0 and x0'_before that of the step before (multistep samplers). On the right-hand side of the
last line the columns ``z``, ``x0``, ``eps``, ``previous``, ``noise`` are coefficients.

Which row is meant lives on the device as a step counter, int32 [2], so that a captured step can be replayed: `predict`
takes row ``step[0]`` and notes it in ``step[1]``; `advance` takes row ``step[1]`` and sets ``step[0]`` to the next.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def counted_step(counter, steps):
    """The step that a counter holds, inside the table: one replay too many must not read or write behind it."""
    return tl.minimum(tl.maximum(tl.load(counter), 0), steps - 1)


class Row(NamedTuple):
    """One step's coefficients by name; each a scalar tensor, so that reading one costs no synchronisation."""

    input_scale: Tensor
    x0_z: Tensor
    x0_m: Tensor
    eps_z: Tensor
    eps_m: Tensor
    z: Tensor
    x0: Tensor
    eps: Tensor
    previous: Tensor
    noise: Tensor
    alpha: Tensor
    """Signal level: z (or z * input_scale, for Euler) is alpha * x0 + sigma * eps_hat."""
    sigma: Tensor
    """Noise level, alpha^2 + sigma^2 = 1."""


COLUMNS: tuple[str, ...] = Row._fields

# For the kernels, which know neither names nor tuples of them.
N_COLUMNS = tl.constexpr(len(COLUMNS))
INPUT_SCALE, X0_Z, X0_M, EPS_Z, EPS_M, Z, X0, EPS, PREVIOUS, NOISE, ALPHA = map(tl.constexpr, range(11))


def named(row: Tensor) -> Row:
    """Row of a table [n_columns] by name; raises ValueError for another shape."""
    if row.shape != (len(COLUMNS),):
        raise ValueError(f"row: got shape {tuple(row.shape)}; one row of the table has shape ({len(COLUMNS)},)")
    return Row(*row.unbind())


def start_counter(device: torch.device | str, step: int = 0) -> Tensor:
    """Step counter int32 [2] of a trajectory that begins with row ``step`` of its table."""
    return torch.full((2,), step, dtype=torch.int32, device=device)


def inside_table(step: Tensor, rows: Tensor) -> Tensor:
    """`counted_step` in torch: a number of the counter, int32 [1]."""
    return step.clamp(0, len(rows) - 1)


def row_at(rows: Tensor, step: Tensor) -> Row:
    """Row of a table [S, n_columns] at a step int32 [1], by name and without asking the device."""
    return named(rows.index_select(0, step)[0])


def check_table(rows: Tensor, step: Tensor, like: Tensor) -> None:
    """Raises ValueError unless ``rows`` and ``step`` are a table and a step counter on the device of ``like``."""
    shaped = rows.dim() == 2 and len(rows) > 0 and rows.shape[1] == len(COLUMNS)
    if not shaped or rows.dtype != torch.float32 or not rows.is_contiguous():
        raise ValueError(
            f"rows: got {rows.dtype} {tuple(rows.shape)}; a table is contiguous float32 [steps, {len(COLUMNS)}], of at "
            "least one step"
        )
    if step.shape != (2,) or step.dtype != torch.int32 or not step.is_contiguous():
        raise ValueError(f"step: got {step.dtype} {tuple(step.shape)}; a step counter is int32 [2]: start_counter")
    if rows.device != like.device or step.device != like.device:
        raise ValueError(f"devices: z {like.device}, rows {rows.device}, step {step.device}; one expected")
