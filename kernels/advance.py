"""One sampling step: guide x0, apply the sampler's row, mix the latents (CutMix), write the next UNet input.

    x0'  = x0 - step_size_b g_b                                           (guidance, `step_size` by the rho rules)
    z'   = z z + x0 x0' + eps eps_hat + previous x0'_before + noise N     (coefficients: kernels/row.py)
    z'_b, x0'_b <- z'_p(b), x0'_p(b) inside the box of b                  (latent CutMix: signal and noise together)

Mixing reads the partner's unmixed result, so that chains of partners never see a half-mixed latent. A sample that is
not alive keeps z, and neither gives nor takes a patch. Per element: z (frozen samples and LCM), eps_hat, x0, x0'_before
(multistep), g, noise are read; z', x0' and the doubled UNet input are written.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffdfkd.kernels.box import box_mask
from diffdfkd.kernels.row import named


class Advance(NamedTuple):
    z: Tensor
    """[B, c, h, w] float32, latents of the next step."""
    x0: Tensor
    """[B, c, h, w] float32, guided and mixed clean latents: ``previous_x0`` of the next step."""


def step_size(
    rule: Literal["raw", "unit", "cfg"],
    rho: float,
    gradient_norm: Tensor,
    x0_norm: Tensor,
    guidance_norm: Tensor,
    scale: Tensor | float,
    row: Tensor,
    *,
    of: Literal["x0", "z"] = "x0",
) -> Tensor:
    """Step [B] along the gradient by the rho rules: rho | rho |x0| / |g| | rho w (sigma / alpha) |eps_c - eps_u| / |g|.

    For an update of z (``of="z"``: modes exact and reuse) hand the norm of z in as ``x0_norm``; the last rule then has
    no sigma / alpha. ``guidance_norm`` is that of `Prediction`. Zero where the gradient is zero or not finite.
    """
    if rule == "raw":
        size = torch.full_like(gradient_norm, rho)
    elif rule == "unit":
        size = rho * x0_norm / gradient_norm
    else:
        # (sigma / alpha) |eps_c - eps_u| = |x0_c - x0_u| = |x0_m| |m_c - m_u|: finite at zero terminal SNR too.
        coefficients = named(row)
        factor = coefficients.x0_m if of == "x0" else coefficients.eps_m
        size = rho * scale * factor.abs() * guidance_norm / gradient_norm
    usable = (gradient_norm > 0) & torch.isfinite(gradient_norm) & torch.isfinite(size)
    return torch.where(usable, size, 0.0)


def advance_reference(
    z: Tensor,
    eps_hat: Tensor,
    x0: Tensor,
    previous_x0: Tensor | None,
    row: Tensor,
    *,
    gradient: Tensor | None,
    step_size: Tensor | None,
    alive: Tensor | None,
    noise: Tensor | None,
    partners: Tensor | None,
    boxes: Tensor | None,
    out_input: Tensor | None,
    next_input_scale: Tensor | float,
) -> Advance:
    coefficients = named(row)
    z, x0 = z.float(), x0.float()
    if gradient is not None and step_size is not None:
        size = step_size[:, None, None, None]
        # Select, never multiply: a gradient that is not used may hold NaN.
        x0 = x0 - torch.where(size != 0, size * gradient.float(), 0.0)
    following = coefficients.z * z + coefficients.x0 * x0 + coefficients.eps * eps_hat.float()
    if previous_x0 is not None:
        following = following + coefficients.previous * previous_x0.float()
    if noise is not None:
        following = following + coefficients.noise * noise.float()
    if alive is not None:
        living = alive[:, None, None, None]
        following = torch.where(living, following, z)
    if partners is not None and boxes is not None:
        inside = box_mask(boxes, *z.shape[2:])
        if alive is not None:
            inside = inside & (alive & alive[partners])[:, None, None, None]
        following = torch.where(inside, following[partners], following)
        x0 = torch.where(inside, x0[partners], x0)
    if out_input is not None:
        batch = z.shape[0]
        for start in range(0, out_input.shape[0], batch):
            out_input[start : start + batch].copy_(following * next_input_scale)
    return Advance(following, x0)


def advance(
    z: Tensor,
    eps_hat: Tensor,
    x0: Tensor,
    previous_x0: Tensor | None,
    row: Tensor,
    *,
    gradient: Tensor | None = None,
    step_size: Tensor | None = None,
    alive: Tensor | None = None,
    noise: Tensor | None = None,
    partners: Tensor | None = None,
    boxes: Tensor | None = None,
    out_input: Tensor | None = None,
    next_input_scale: Tensor | float = 1.0,
) -> Advance:
    """Latents of the next step from z, eps_hat, x0 and the x0 kept by the step before, all [B, c, h, w].

    ``gradient`` [B, c, h, w] comes with ``step_size`` [B] (0: not guided); ``partners`` int64 [B] with ``boxes`` int32
    [B, 4] (top, left, bottom, right; empty: not mixed). ``alive`` bool [B], all by default, must be false where x0 is
    not finite. ``out_input`` [B or 2B, c, h, w] of any float dtype receives the next UNet input. Values of boxes and
    partners are not read here: `box.check_boxes` does that once. Raises ValueError for shapes that do not fit.
    """
    batch = z.shape[0]
    latents = {"eps_hat": eps_hat, "x0": x0, "previous_x0": previous_x0, "gradient": gradient, "noise": noise}
    for name, tensor in latents.items():
        if tensor is not None and tensor.shape != z.shape:
            raise ValueError(f"{name}: got {tuple(tensor.shape)}; latents are {tuple(z.shape)}")
    vectors = {"step_size": (step_size, (batch,)), "alive": (alive, (batch,)), "partners": (partners, (batch,))}
    for name, (tensor, shape) in {**vectors, "boxes": (boxes, (batch, 4))}.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: got {tuple(tensor.shape)}; {shape} expected")
    if (gradient is None) != (step_size is None):
        raise ValueError("gradient and step_size: give both or neither")
    if (partners is None) != (boxes is None):
        raise ValueError("partners and boxes: give both or neither")
    if out_input is not None and (out_input.shape[0] not in (batch, 2 * batch) or out_input.shape[1:] != z.shape[1:]):
        raise ValueError(f"out_input: got {tuple(out_input.shape)} for latents {tuple(z.shape)}; B or 2B of them")
    return advance_reference(
        z,
        eps_hat,
        x0,
        previous_x0,
        row,
        gradient=gradient,
        step_size=step_size,
        alive=alive,
        noise=noise,
        partners=partners,
        boxes=boxes,
        out_input=out_input,
        next_input_scale=next_input_scale,
    )
