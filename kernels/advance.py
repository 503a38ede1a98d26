"""One sampling step: guide x0, apply the sampler's row, mix the latents (CutMix), write the next UNet input.

    x0'  = x0 - step_size_b g_b                                           (guidance, `step_size` by the rho rules)
    z'   = z z + x0 x0' + eps eps_hat + previous x0'_before + noise N     (coefficients: kernels/row.py)
    z'_b, x0'_b <- z'_p(b), x0'_p(b) inside the box of b                  (latent CutMix: signal and noise together)

A box holds what its partner would have been without CutMix, so that chains of partners never see a half-mixed latent:
the kernel computes the partner's step again from the partner's own inputs, inside the box alone. A sample that is not
alive keeps z, and neither gives nor takes a patch; who was to take one from it is not alive either, since the label
that was planned for it would be wrong. Per element: eps_hat, x0, x0'_before (multistep), g, explicit noise, and z where
it counts (LCM, samples that are not alive) are read; z', x0' (multistep) and the doubled UNet input are written.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffdfkd.kernels.box import box_mask
from diffdfkd.kernels.launch import Kernel, Launch, blocks, check_floats, power_of_two, settle_kernel
from diffdfkd.kernels.memory_format import is_channels_last, is_crossed, pixel_of, place
from diffdfkd.kernels.philox import STEP_NOISE, philox_normal, signed_words
from diffdfkd.kernels.predict import Prediction, check_latents, step_tiling
from diffdfkd.kernels.rho import RULES, step_size_reference
from diffdfkd.kernels.row import (
    INPUT_SCALE,
    N_COLUMNS,
    X0_M,
    check_table,
    counted_step,
    inside_table,
    row_at,
)
from diffdfkd.kernels.sample_step import sample_state, stepped
from diffdfkd.kernels.step_inputs import Draw, Guidance, Mix, NextInput, check_format, check_step, write_input


class Advance(NamedTuple):
    z: Tensor
    """[B, c, h, w] float32, latents of the next step."""
    x0: Tensor | None
    """[B, c, h, w] float32, guided and mixed clean latents, ``previous_x0`` of the next step; None if not kept."""
    alive: Tensor
    """[B] bool: still finite, and mixed as planned."""


def advance_reference(
    z: Tensor,
    prediction: Prediction,
    previous_x0: Tensor | None,
    rows: Tensor,
    step: Tensor,
    alive: Tensor,
    *,
    guidance: Guidance | None,
    noise: Tensor | Draw | None,
    mix: Mix | None,
    next_input: NextInput | None,
    keep_x0: bool,
    frozen: Tensor | None,
) -> Advance:
    now = inside_table(step[1:], rows)
    row = row_at(rows, now)
    z, x0 = z.float(), prediction.x0.float()
    living = alive & torch.isfinite(prediction.x0_norm)
    if guidance is not None:
        living = living & guidance.finite
        size = step_size_reference(
            guidance.rule,
            guidance.rho,
            guidance.norm,
            prediction.x0_norm,
            prediction.guidance_norm,
            guidance.scale,
            row,
        )[:, None, None, None]
        # Select, never multiply: a gradient that is not used may hold NaN.
        x0 = x0 - torch.where(size != 0, size * guidance.gradient.float(), 0.0)
    following = row.z * z + row.x0 * x0 + row.eps * prediction.eps_hat.float()
    if previous_x0 is not None:
        following = following + row.previous * previous_x0.float()
    if noise is not None:
        if isinstance(noise, Draw):
            noise = philox_normal(noise.seed, noise.sample_ids, now, STEP_NOISE, tuple(z.shape[1:]))
        following = following + row.noise * noise.float()
    following = torch.where(living[:, None, None, None], following, z)
    still = living
    if mix is not None:
        partners, boxes = mix.partners.index_select(0, now)[0], mix.boxes.index_select(0, now)[0]
        known = (partners >= 0) & (partners < len(z))
        partners = torch.where(known, partners, 0)
        giving = living[partners] & known
        mixed = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        inside = box_mask(boxes, *z.shape[2:]) & (living & giving)[:, None, None, None]
        following = torch.where(inside, following[partners], following)
        x0 = torch.where(inside, x0[partners], x0)
        still = living & (giving | ~mixed)
    if frozen is not None:
        frozen.index_add_(0, now, (alive & ~still).sum(dtype=frozen.dtype)[None])
    following_step = (now + 1).clamp(max=len(rows) - 1)
    if next_input is not None:
        write_input(next_input.sample, row_at(rows, following_step).input_scale * following)
        next_input.timestep.copy_(next_input.timesteps.index_select(0, following_step).expand(len(next_input.timestep)))
    step[:1].copy_(now + 1)
    return Advance(following, x0 if keep_x0 else None, still)


# A batch or seed of 1 would become a Python number, which has no type to be cast from.
@triton.jit(do_not_specialize=["batch", "seed_low", "seed_high"])
def _advance_kernel(
    z,  # [B, n] float32
    x0,  # [B, n] float32
    eps_hat,  # [B, n] float32
    previous,  # [B, n] or None
    gradient,  # [B, n] or None
    noise,  # [B, n] or None
    squares,  # [2, B, tiles] float32
    gradient_norm,  # [B] float32
    finite,  # [B] bool
    scale,  # [B] float32
    alive,  # [B] bool
    rows,  # [S, N_COLUMNS] float32
    step,  # [2] int32
    sample_ids,  # [B] int64
    partners,  # [S, B] int64
    boxes,  # [S, B, 4] int32
    timesteps,  # [S] float32
    z_out,  # [B, n] float32
    x0_out,  # [B, n] float32 or None
    input_out,  # [B or 2B, n] or None
    timestep_out,  # [B or 2B] float32
    alive_out,  # [B] bool
    frozen,  # [S] int32 or None
    rho,
    seed_low,
    seed_high,
    batch,
    n,
    channels,
    pixels,
    width,
    tiles,
    steps,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    RULE: tl.constexpr,
    NOISY: tl.constexpr,
    DOUBLED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PREVIOUS_CROSSED: tl.constexpr,
    GRADIENT_CROSSED: tl.constexpr,
    NOISE_CROSSED: tl.constexpr,
    INPUT_CROSSED: tl.constexpr,
):
    GUIDED: tl.constexpr = gradient is not None
    sample = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    now = counted_step(step + 1, steps)
    following_step = tl.minimum(now + 1, steps - 1)
    row = rows + now * N_COLUMNS
    x0_m = tl.load(row + X0_M)
    i = tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < n

    living, size = sample_state(
        sample, alive, finite, squares, gradient_norm, scale, x0_m, rho, batch, tiles, TILES, GUIDED, RULE
    )
    following, clean = stepped(
        sample, inside, i, living, size, row, now, z, x0, eps_hat, previous, gradient, noise, sample_ids, seed_low,
        seed_high, n, channels, pixels, BLOCK, GUIDED, NOISY, CHANNELS_LAST, PREVIOUS_CROSSED, GRADIENT_CROSSED,
        NOISE_CROSSED,
    )  # fmt: skip
    still = living
    if partners is not None:
        box = boxes + (now.to(tl.int64) * batch + sample) * 4
        top, left, bottom, right = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        if (bottom > top) & (right > left):
            partner = tl.load(partners + now.to(tl.int64) * batch + sample)
            # Refused where the plan is made; one that slipped through must not be followed.
            known = (partner >= 0) & (partner < batch)
            partner = tl.where(known, partner, sample)
            partner_living, partner_size = sample_state(
                partner, alive, finite, squares, gradient_norm, scale, x0_m, rho, batch, tiles, TILES, GUIDED, RULE
            )
            still = living & partner_living & known
            pixel = pixel_of(i, channels, pixels, CHANNELS_LAST)
            y, x = pixel // width, pixel % width
            patch = inside & (y >= top) & (y < bottom) & (x >= left) & (x < right) & still
            partner_following, partner_clean = stepped(
                partner, patch, i, partner_living, partner_size, row, now, z, x0, eps_hat, previous, gradient, noise,
                sample_ids, seed_low, seed_high, n, channels, pixels, BLOCK, GUIDED, NOISY, CHANNELS_LAST,
                PREVIOUS_CROSSED, GRADIENT_CROSSED, NOISE_CROSSED,
            )  # fmt: skip
            following = tl.where(patch, partner_following, following)
            clean = tl.where(patch, partner_clean, clean)

    own = sample * n + i
    tl.store(z_out + own, following, mask=inside)
    if x0_out is not None:
        tl.store(x0_out + own, clean, mask=inside)
    if input_out is not None:
        scaled = (tl.load(rows + following_step * N_COLUMNS + INPUT_SCALE) * following).to(input_out.dtype.element_ty)
        input_at = sample * n + place(i, channels, pixels, CHANNELS_LAST, INPUT_CROSSED)
        tl.store(input_out + input_at, scaled, mask=inside)
        if DOUBLED:
            tl.store(input_out + batch.to(tl.int64) * n + input_at, scaled, mask=inside)
    if tile == 0:
        tl.store(alive_out + sample, still)
        if frozen is not None:
            tl.atomic_add(frozen + now, 1, mask=(tl.load(alive + sample) != 0) & (still == 0), sem="relaxed")
        if input_out is not None:
            timestep = tl.load(timesteps + following_step)
            tl.store(timestep_out + sample, timestep)
            if DOUBLED:
                tl.store(timestep_out + batch + sample, timestep)
        if tl.program_id(0) == 0:
            tl.store(step, now + 1)


def advance_launch(
    z: Tensor,
    prediction: Prediction,
    previous_x0: Tensor | None,
    rows: Tensor,
    step: Tensor,
    alive: Tensor,
    *,
    guidance: Guidance | None,
    noise: Tensor | Draw | None,
    mix: Mix | None,
    next_input: NextInput | None,
    keep_x0: bool,
    frozen: Tensor | None,
) -> tuple[Launch, Advance]:
    """The kernel's call and the tensors that it will fill."""
    batch, channels, height, width = z.shape
    n = channels * height * width
    block, warps = step_tiling(n)
    tiles = prediction.squares.shape[2]
    channels_last = is_channels_last("z", z)
    check_format(prediction, z)
    explicit = noise if isinstance(noise, Tensor) else None
    gradient = guidance.gradient if guidance is not None else None
    inputs = next_input.sample if next_input is not None else None
    foreign = {
        "PREVIOUS": ("previous_x0", previous_x0),
        "GRADIENT": ("guidance.gradient", gradient),
        "NOISE": ("noise", explicit),
        "INPUT": ("next_input.sample", inputs),
    }
    check_floats(**dict(foreign.values()))
    crossed = {
        f"{flag}_CROSSED": tensor is not None and is_crossed(name, tensor, z)
        for flag, (name, tensor) in foreign.items()
    }
    seed_low, seed_high = signed_words(noise.seed) if isinstance(noise, Draw) else (0, 0)
    result = Advance(torch.empty_like(z), torch.empty_like(z) if keep_x0 else None, torch.empty_like(alive))
    arguments: dict[str, Any] = {
        "z": z,
        "x0": prediction.x0,
        "eps_hat": prediction.eps_hat,
        "previous": previous_x0,
        "gradient": gradient,
        "noise": explicit,
        "squares": prediction.squares,
        "gradient_norm": guidance.norm if guidance is not None else None,
        "finite": guidance.finite if guidance is not None else None,
        "scale": guidance.scale if guidance is not None else None,
        "alive": alive,
        "rows": rows,
        "step": step,
        "sample_ids": noise.sample_ids if isinstance(noise, Draw) else None,
        "partners": mix.partners if mix is not None else None,
        "boxes": mix.boxes if mix is not None else None,
        "timesteps": next_input.timesteps if next_input is not None else None,
        "z_out": result.z,
        "x0_out": result.x0,
        "input_out": inputs,
        "timestep_out": next_input.timestep if next_input is not None else None,
        "alive_out": result.alive,
        "frozen": frozen,
        "rho": float(guidance.rho) if guidance is not None else 0.0,
        "seed_low": seed_low,
        "seed_high": seed_high,
        "batch": batch,
        "n": n,
        "channels": channels,
        "pixels": height * width,
        "width": width,
        "tiles": tiles,
        "steps": len(rows),
    }
    constants = {
        "BLOCK": block,
        "TILES": power_of_two(tiles),
        "RULE": RULES.index(guidance.rule) if guidance is not None else 0,
        "NOISY": noise is not None,
        "DOUBLED": inputs is not None and len(inputs) == 2 * batch,
        "CHANNELS_LAST": channels_last,
        **crossed,
    }
    return Launch(_advance_kernel, (batch, blocks(n, block)), arguments, constants, warps), result


@torch.no_grad()
def advance(
    z: Tensor,
    prediction: Prediction,
    previous_x0: Tensor | None,
    rows: Tensor,
    step: Tensor,
    alive: Tensor,
    *,
    guidance: Guidance | None = None,
    noise: Tensor | Draw | None = None,
    mix: Mix | None = None,
    next_input: NextInput | None = None,
    keep_x0: bool = False,
    frozen: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Advance:
    """Latents of the next step from z [B, c, h, w], what `predict` made of it, and the x0 kept by the step before.

    ``previous_x0`` is what the step before kept, for a multistep sampler; ``keep_x0`` keeps the guided and mixed x0 for
    the next. ``next_input`` are buffers that receive input_scale z' and the timestep of the next row.

    The table's row is ``step[1]``; ``step[0]`` becomes the next. ``alive`` bool [B]. Without ``guidance``, ``noise``
    (drawn, or numbers [B, c, h, w]) or ``mix`` the step has none. ``frozen`` int32 [S] counts, per step, the samples
    that stopped being alive in it. A ``mix`` that was not checked where it was made is checked here, which waits for
    the device. No graph is built. Raises ValueError, before anything is written, for what does not fit together.
    """
    check_latents(z)
    check_table(rows, step, z)
    check_step(z, prediction, previous_x0, rows, alive, guidance, noise, mix, next_input, frozen)
    form = advance_reference
    if settle_kernel(kernel, z.device) == "triton":
        form = advance_by_kernel
    return form(
        z,
        prediction,
        previous_x0,
        rows,
        step,
        alive,
        guidance=guidance,
        noise=noise,
        mix=mix,
        next_input=next_input,
        keep_x0=keep_x0,
        frozen=frozen,
    )


def advance_by_kernel(*tensors: Any, **options: Any) -> Advance:
    launch, result = advance_launch(*tensors, **options)
    launch.run()
    return result
