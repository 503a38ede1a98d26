"""The row of coefficients that one sampling step applies: every sampler is a table of such rows.

    UNet input = input_scale * z
    x0         = x0_z * z + x0_m * m            m: UNet output after classifier-free guidance
    eps_hat    = eps_z * z + eps_m * m
    z'         = z * z + x0 * x0' + eps * eps_hat + previous * x0'_before + noise * N(0, 1)

where x0' is the guided x0 and x0'_before that of the step before (multistep samplers). On the right-hand side of the
last line the columns ``z``, ``x0``, ``eps``, ``previous``, ``noise`` are coefficients.
"""

from typing import NamedTuple

from torch import Tensor


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


def named(row: Tensor) -> Row:
    """Row of a table [n_columns] by name; raises ValueError for another shape."""
    if row.shape != (len(COLUMNS),):
        raise ValueError(f"row: got shape {tuple(row.shape)}; one row of the table has shape ({len(COLUMNS)},)")
    return Row(*row.unbind())
