"""Guidance of z rather than of x0: modes ``exact`` (as published: DiffDFKD, arXiv 2504.00870) and ``reuse``.

    y   = input_scale z                                  the UNet's input, in which Euler's z is like the others'
    g   = x0_z / input_scale d + x0_m ((1 - w) J_u'd + w J_c'd)        d = dL/dx0, J_u and J_c: the UNet's two halves
    y'  = y - step_size_b g_b                            step size by the rho rules, with |y| in the place of |x0|
    x0' = x0 - (y - y') / alpha                          ``reuse``: eps_hat is held (y = alpha x0 + sigma eps_hat)

Per element: z, dL/dx0, one or two halves and (reuse) x0 are read; z', the UNet's input (exact) and x0' (reuse) written.
The norm of g is needed before g is: one program a sample goes over it twice, the second time from the cache.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffdfkd.kernels.launch import Kernel, Launch, check_floats, check_tensor, power_of_two, settle_kernel
from diffdfkd.kernels.memory_format import is_channels_last, is_crossed, place
from diffdfkd.kernels.predict import Prediction, check_latents, sum_of_squares
from diffdfkd.kernels.rho import RULES, step_size, step_size_reference
from diffdfkd.kernels.row import (
    ALPHA,
    EPS_M,
    INPUT_SCALE,
    N_COLUMNS,
    X0_M,
    X0_Z,
    check_table,
    counted_step,
    inside_table,
    row_at,
)
from diffdfkd.kernels.step_inputs import (
    Guidance,
    check_format,
    check_guidance,
    check_prediction,
    refuse_overlap,
    write_input,
)


class Move(NamedTuple):
    z: Tensor
    """[B, c, h, w] float32, guided latents."""
    prediction: Prediction
    """Mode ``reuse``: that at the new z, with eps_hat held; mode ``exact``: as it was, to be made again."""
    alive: Tensor
    """[B] bool."""


def move_reference(
    z: Tensor,
    prediction: Prediction,
    rows: Tensor,
    step: Tensor,
    alive: Tensor,
    guidance: Guidance,
    by_inputs: Tensor,
    inputs: Tensor | None,
) -> Move:
    row = row_at(rows, inside_table(step[1:], rows))
    products = row.x0_m * by_inputs.float()
    if len(products) == 2 * len(z):
        unconditional, conditional = products.chunk(2)
        products = unconditional + guidance.scale[:, None, None, None] * (conditional - unconditional)
    gradient = row.x0_z / row.input_scale * guidance.gradient.float() + products
    norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
    living = alive & guidance.finite & torch.isfinite(norm)
    y_norm = row.input_scale * torch.linalg.vector_norm(z, dim=(1, 2, 3))
    size = step_size_reference(
        guidance.rule, guidance.rho, norm, y_norm, prediction.guidance_norm, guidance.scale, row, of="z"
    )
    # Select, never multiply: the gradient of a sample that is not alive may hold NaN.
    used = (living & (size != 0))[:, None, None, None]
    moved = torch.where(used, size[:, None, None, None] * gradient, 0)  # of y
    z = z - moved / row.input_scale
    if inputs is not None:
        write_input(inputs, row.input_scale * z)
        return Move(z, prediction, living)
    # Where nothing but noise is left (alpha 0), eps_hat alone says nothing of x0.
    x0 = prediction.x0 - torch.where(row.alpha > 0, 1 / row.alpha, 0) * moved
    squares = torch.stack([prediction.squares[0].sum(1, keepdim=True), sum_of_squares(x0)])
    return Move(z, Prediction(x0, prediction.eps_hat, squares), living)


@triton.jit
def _gradient(
    at,  # [BLOCK]
    by_x0_at,  # [BLOCK]
    by_inputs_at,  # [BLOCK]
    inside,  # [BLOCK]
    by_x0,
    by_inputs,
    half,
    factor,
    x0_m,
    w,
    DOUBLED: tl.constexpr,
):
    """g [BLOCK] of the UNet's input."""
    product = tl.load(by_inputs + by_inputs_at, mask=inside, other=0.0).to(tl.float32)
    if DOUBLED:
        conditional = tl.load(by_inputs + half + by_inputs_at, mask=inside, other=0.0).to(tl.float32)
        product += w * (conditional - product)
    return factor * tl.load(by_x0 + by_x0_at, mask=inside, other=0.0).to(tl.float32) + x0_m * product


@triton.jit(do_not_specialize=["batch"])  # a batch of 1 would become a Python number
def _move_kernel(
    z,  # [B, n] float32
    x0,  # [B, n] float32
    squares,  # [2, B, tiles] float32
    by_x0,  # [B, n]
    by_inputs,  # [B or 2B, n]
    finite,  # [B] bool
    scale,  # [B] float32
    alive,  # [B] bool
    rows,  # [S, N_COLUMNS] float32
    step,  # [2] int32
    z_out,  # [B, n] float32
    x0_out,  # [B, n] float32 (reuse) or None
    squares_out,  # [2, B, 1] float32 (reuse)
    input_out,  # [B or 2B, n] (exact) or None
    alive_out,  # [B] bool
    rho,
    batch,
    n,
    channels,
    pixels,
    tiles,
    steps,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    RULE: tl.constexpr,
    DOUBLED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GRADIENT_CROSSED: tl.constexpr,
    BY_INPUTS_CROSSED: tl.constexpr,
    INPUT_CROSSED: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    base, half = sample * n, batch.to(tl.int64) * n
    row = rows + counted_step(step + 1, steps) * N_COLUMNS
    input_scale = tl.load(row + INPUT_SCALE)
    factor, x0_m = tl.load(row + X0_Z) / input_scale, tl.load(row + X0_M)
    w = tl.load(scale + sample)

    g_squares = tl.zeros([BLOCK], tl.float32)
    z_squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < n
        g = _gradient(
            base + i,
            base + place(i, channels, pixels, CHANNELS_LAST, GRADIENT_CROSSED),
            base + place(i, channels, pixels, CHANNELS_LAST, BY_INPUTS_CROSSED),
            inside, by_x0, by_inputs, half, factor, x0_m, w, DOUBLED,
        )  # fmt: skip
        old = tl.load(z + base + i, mask=inside, other=0.0)
        g_squares += g * g
        z_squares += old * old

    norm = tl.sqrt(tl.sum(g_squares))
    living = (tl.load(alive + sample) != 0) & (tl.load(finite + sample) != 0) & (norm < float("inf"))
    tile = tl.arange(0, TILES)
    guidance_squares = tl.sum(tl.load(squares + sample * tiles + tile, mask=tile < tiles, other=0.0))
    y_norm = input_scale * tl.sqrt(tl.sum(z_squares))
    eps_m = tl.load(row + EPS_M)
    size = step_size(norm, y_norm, tl.sqrt(guidance_squares), w, eps_m, rho, RULE)
    size = tl.where(living, size, 0.0)
    alpha = tl.load(row + ALPHA)
    per_y = tl.where(alpha > 0.0, 1.0 / tl.where(alpha > 0.0, alpha, 1.0), 0.0)

    x0_squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < n
        # Not read where the step size is 0, so that a NaN there stays where it is.
        moved = size * _gradient(
            base + i,
            base + place(i, channels, pixels, CHANNELS_LAST, GRADIENT_CROSSED),
            base + place(i, channels, pixels, CHANNELS_LAST, BY_INPUTS_CROSSED),
            inside & (tl.full([BLOCK], size, tl.float32) != 0.0), by_x0, by_inputs, half, factor, x0_m, w, DOUBLED,
        )  # fmt: skip
        new = tl.load(z + base + i, mask=inside, other=0.0) - moved / input_scale
        tl.store(z_out + base + i, new, mask=inside)
        if x0_out is not None:
            clean = tl.load(x0 + base + i, mask=inside, other=0.0) - per_y * moved
            tl.store(x0_out + base + i, clean, mask=inside)
            x0_squares += clean * clean
        if input_out is not None:
            y = (input_scale * new).to(input_out.dtype.element_ty)
            input_at = base + place(i, channels, pixels, CHANNELS_LAST, INPUT_CROSSED)
            tl.store(input_out + input_at, y, mask=inside)
            if DOUBLED:
                tl.store(input_out + half + input_at, y, mask=inside)
    if x0_out is not None:
        tl.store(squares_out + sample, guidance_squares)
        tl.store(squares_out + batch + sample, tl.sum(x0_squares))
    tl.store(alive_out + sample, living)


def move_launch(
    z: Tensor,
    prediction: Prediction,
    rows: Tensor,
    step: Tensor,
    alive: Tensor,
    guidance: Guidance,
    by_inputs: Tensor,
    inputs: Tensor | None,
) -> tuple[Launch, Move]:
    """The kernel's call and the tensors that it will fill."""
    batch, channels, height, width = z.shape
    n = channels * height * width
    check_floats(**{"guidance.gradient": guidance.gradient, "by_inputs": by_inputs, "inputs": inputs})
    check_format(prediction, z)
    result = Move(torch.empty_like(z), prediction, torch.empty_like(alive))
    x0_out = squares_out = None
    if inputs is None:
        x0_out = torch.empty_like(z)
        squares_out = torch.empty(2, batch, 1, dtype=torch.float32, device=z.device)
        result = result._replace(prediction=Prediction(x0_out, prediction.eps_hat, squares_out))
    tiles = prediction.squares.shape[2]
    block = min(4096, max(32, power_of_two(n)))
    arguments: dict[str, Any] = {
        "z": z,
        "x0": prediction.x0,
        "squares": prediction.squares,
        "by_x0": guidance.gradient,
        "by_inputs": by_inputs,
        "finite": guidance.finite,
        "scale": guidance.scale,
        "alive": alive,
        "rows": rows,
        "step": step,
        "z_out": result.z,
        "x0_out": x0_out,
        "squares_out": squares_out,
        "input_out": inputs,
        "alive_out": result.alive,
        "rho": float(guidance.rho),
        "batch": batch,
        "n": n,
        "channels": channels,
        "pixels": height * width,
        "tiles": tiles,
        "steps": len(rows),
    }
    constants = {
        "BLOCK": block,
        "TILES": power_of_two(tiles),
        "RULE": RULES.index(guidance.rule),
        "DOUBLED": len(by_inputs) == 2 * batch,
        "CHANNELS_LAST": is_channels_last("z", z),
        "GRADIENT_CROSSED": is_crossed("guidance.gradient", guidance.gradient, z),
        "BY_INPUTS_CROSSED": is_crossed("by_inputs", by_inputs, z),
        "INPUT_CROSSED": inputs is not None and is_crossed("inputs", inputs, z),
    }
    return Launch(_move_kernel, (batch,), arguments, constants, max(1, block // 256)), result


@torch.no_grad()
def move(
    z: Tensor,
    prediction: Prediction,
    rows: Tensor,
    step: Tensor,
    alive: Tensor,
    guidance: Guidance,
    by_inputs: Tensor,
    *,
    inputs: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Move:
    """z [B, c, h, w] moved against dL/dz at the table's row ``step[1]``, before the sampler's step.

    ``guidance`` holds dL/dx0, ``by_inputs`` [B or 2B, c, h, w] what the UNet's vector-Jacobian product makes of it in
    each half of the batch: the weights of prediction type and guidance scale are applied here. With ``inputs``, of its
    shape, mode ``exact``: they receive the UNet's input at the new z, and a prediction is to be made there; without,
    mode ``reuse``. No graph is built. Raises ValueError, before anything is written, for what does not fit.
    """
    batch = len(z)
    check_latents(z)
    check_table(rows, step, z)
    check_prediction(prediction, z)
    check_guidance(guidance, z)
    check_tensor("alive", alive, (batch,), torch.bool, z.device)
    copies = 2 if len(by_inputs) == 2 * batch else 1
    for name, tensor in {"by_inputs": by_inputs, "inputs": inputs}.items():
        check_tensor(name, tensor, (copies * batch, *z.shape[1:]), None, z.device, optional=name == "inputs")
    read = {"z": z, "prediction.x0": prediction.x0, "guidance.gradient": guidance.gradient, "by_inputs": by_inputs}
    refuse_overlap("inputs", inputs, read)
    if settle_kernel(kernel, z.device) == "reference":
        return move_reference(z, prediction, rows, step, alive, guidance, by_inputs, inputs)
    launch, result = move_launch(z, prediction, rows, step, alive, guidance, by_inputs, inputs)
    launch.run()
    return result
