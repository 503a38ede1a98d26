"""How far a sample moves along its gradient: the rho rules.

    raw   rho
    unit  rho |x0| / |g|
    cfg   rho w (sigma / alpha) |eps_c - eps_u| / |g|

The step size is 0 where the gradient is 0, and where gradient or size are not finite. An update of the UNet's
input y = input_scale z (modes exact and reuse) takes |y| in the place of |x0|, and the last rule then has no
sigma / alpha.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffdfkd.kernels.row import Row

Rule = Literal["raw", "unit", "cfg"]
RULES: tuple[Rule, ...] = ("raw", "unit", "cfg")
"""By their numbers in the kernel."""


def step_size_reference(
    rule: Rule,
    rho: float,
    gradient_norm: Tensor,
    x0_norm: Tensor,
    guidance_norm: Tensor,
    scale: Tensor,
    row: Row,
    *,
    of: Literal["x0", "z"] = "x0",
) -> Tensor:
    """Step [B] along the gradient; for an update of z (``of="z"``) hand the norm of the UNet's input in as ``x0_norm``.

    ``guidance_norm`` is that of `Prediction`, ``scale`` [B] that of classifier-free guidance.
    """
    if rule == "raw":
        size = torch.full_like(gradient_norm, rho)
    elif rule == "unit":
        size = rho * x0_norm / gradient_norm
    else:
        # (sigma / alpha) |eps_c - eps_u| = |x0_c - x0_u| = |x0_m| |m_c - m_u|: finite at zero terminal SNR too.
        factor = row.x0_m if of == "x0" else row.eps_m
        size = rho * scale * factor.abs() * guidance_norm / gradient_norm
    usable = (gradient_norm > 0) & torch.isfinite(gradient_norm) & torch.isfinite(size)
    return torch.where(usable, size, 0.0)


@triton.jit
def step_size(gradient_norm, x0_norm, guidance_norm, scale, factor, rho, RULE: tl.constexpr):
    """The same of one sample; ``factor`` is x0_m of the row for an update of x0, eps_m for one of z."""
    if RULE == 0:
        size = gradient_norm * 0.0 + rho
    elif RULE == 1:
        size = rho * x0_norm / gradient_norm
    else:
        size = rho * scale * tl.abs(factor) * guidance_norm / gradient_norm
    # Comparisons with NaN are false.
    usable = (gradient_norm > 0.0) & (gradient_norm < float("inf")) & (tl.abs(size) < float("inf"))
    return tl.where(usable, size, 0.0)
