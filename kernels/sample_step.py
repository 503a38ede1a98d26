"""What a step makes of one sample before CutMix: in the kernel `advance`, of the sample itself and of its partner."""

import triton
import triton.language as tl

from diffdfkd.kernels.memory_format import place
from diffdfkd.kernels.philox import STEP_NOISE, normal_at, normal_run
from diffdfkd.kernels.rho import step_size
from diffdfkd.kernels.row import EPS, NOISE, PREVIOUS, X0, Z

STREAM = tl.constexpr(STEP_NOISE)


@triton.jit
def sample_state(
    sample,
    alive,
    finite,
    squares,
    gradient_norm,
    scale,
    x0_m,
    rho,
    batch,
    tiles,
    TILES: tl.constexpr,
    GUIDED: tl.constexpr,
    RULE: tl.constexpr,
):
    """Whether a sample is alive, and its step size."""
    tile = tl.arange(0, TILES)
    parts = squares + sample * tiles + tile
    x0_norm = tl.sqrt(tl.sum(tl.load(parts + batch.to(tl.int64) * tiles, mask=tile < tiles, other=0.0)))
    living = (tl.load(alive + sample) != 0) & (x0_norm < float("inf"))
    size = 0.0
    if GUIDED:
        living = living & (tl.load(finite + sample) != 0)
        guidance_norm = x0_norm
        if RULE == 2:
            guidance_norm = tl.sqrt(tl.sum(tl.load(parts, mask=tile < tiles, other=0.0)))
        size = step_size(
            tl.load(gradient_norm + sample), x0_norm, guidance_norm, tl.load(scale + sample), x0_m, rho, RULE
        )
    return living, size


@triton.jit
def stepped(
    sample,
    wanted,  # [BLOCK]
    i,  # [BLOCK]
    living,
    size,
    row,
    now,
    z,
    x0,
    eps_hat,
    previous,
    gradient,
    noise,
    sample_ids,
    seed_low,
    seed_high,
    n,
    channels,
    pixels,
    BLOCK: tl.constexpr,
    GUIDED: tl.constexpr,
    NOISY: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PREVIOUS_CROSSED: tl.constexpr,
    GRADIENT_CROSSED: tl.constexpr,
    NOISE_CROSSED: tl.constexpr,
):
    """z' and x0' [BLOCK] of a sample at its elements i, before CutMix."""
    base = sample * n
    clean = tl.load(x0 + base + i, mask=wanted, other=0.0)
    if GUIDED:
        # Not read where the step size is 0, so that a NaN there stays where it is.
        at = base + place(i, channels, pixels, CHANNELS_LAST, GRADIENT_CROSSED)
        sizes = tl.full([BLOCK], size, tl.float32)
        clean -= sizes * tl.load(gradient + at, mask=wanted & (sizes != 0.0), other=0.0).to(tl.float32)
    following = tl.load(row + X0) * clean
    following += tl.load(row + EPS) * tl.load(eps_hat + base + i, mask=wanted, other=0.0)
    if previous is not None:
        at = base + place(i, channels, pixels, CHANNELS_LAST, PREVIOUS_CROSSED)
        following += tl.load(row + PREVIOUS) * tl.load(previous + at, mask=wanted, other=0.0).to(tl.float32)
    if NOISY:
        strength = tl.load(row + NOISE)
        if noise is not None:
            at = base + place(i, channels, pixels, CHANNELS_LAST, NOISE_CROSSED)
            following += strength * tl.load(noise + at, mask=wanted, other=0.0).to(tl.float32)
        else:
            identity = tl.load(sample_ids + sample)
            if CHANNELS_LAST:
                element = place(i, channels, pixels, CHANNELS_LAST, True)
                following += strength * normal_at(element, now, identity, seed_low, seed_high, STREAM)
            else:
                first = tl.program_id(1) * (BLOCK // 4)
                following += strength * normal_run(first, now, identity, seed_low, seed_high, STREAM, BLOCK)
    by_z = tl.load(row + Z)
    if (by_z != 0.0) | (living == 0):
        old = tl.load(z + base + i, mask=wanted, other=0.0)
        following = tl.where(living, following + by_z * old, old)
    return following, clean
