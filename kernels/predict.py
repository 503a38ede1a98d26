"""Clean latent and noise from the UNet's output, with classifier-free guidance (Ho and Salimans, 2022, eq. 6).

    m       = m_u + w (m_c - m_u)
    x0      = x0_z z + x0_m m
    eps_hat = eps_z z + eps_m m                (coefficients: kernels/row.py)

Per element: z and two outputs are read, x0 and eps_hat written. Per sample |m_c - m_u| and |x0|, for the rho rules, as
sums of squares over tiles of the sample: whoever needs a norm adds them up, always in the same order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffdfkd.kernels.launch import Kernel, Launch, blocks, check_floats, power_of_two, settle_kernel
from diffdfkd.kernels.memory_format import is_channels_last, is_crossed, place
from diffdfkd.kernels.row import EPS_M, EPS_Z, N_COLUMNS, X0_M, X0_Z, check_table, counted_step, inside_table, row_at

MOST_ELEMENTS = 65_535 * 1024
"""Of one sample, whose tiles lie along the second axis of a grid; over the batch, offsets have 64 bits."""


class Prediction(NamedTuple):
    x0: Tensor
    """[B, c, h, w] float32, predicted clean latent."""
    eps_hat: Tensor
    """[B, c, h, w] float32, predicted noise."""
    squares: Tensor
    """[2, B, tiles] float32, sums over tiles of a sample of (m_c - m_u)^2 and of x0^2."""

    @property
    def guidance_norm(self) -> Tensor:
        """[B] float32, |m_c - m_u| of the UNet's outputs; zeros without classifier-free guidance. Times |eps_m| of the
        row it is |eps_c - eps_u|, times |x0_m| it is what guidance moves x0 by per unit of scale."""
        return self.squares[0].sum(1).sqrt()

    @property
    def x0_norm(self) -> Tensor:
        """[B] float32, |x0|; not finite where any element of x0 is not."""
        return self.squares[1].sum(1).sqrt()


def sum_of_squares(values: Tensor) -> Tensor:
    """Per sample, [B, ...] -> [B, 1]: one tile that is the whole sample."""
    return values.flatten(1).square().sum(1, keepdim=True)


def predict_reference(z: Tensor, model_output: Tensor, rows: Tensor, step: Tensor, scale: Tensor) -> Prediction:
    now = inside_table(step[:1], rows)
    step[1:].copy_(now)
    row = row_at(rows, now)
    z = z.float()
    output = model_output.float()
    if output.shape[0] == 2 * z.shape[0]:
        unconditional, conditional = output.chunk(2)
        difference = conditional - unconditional
        guidance_squares = sum_of_squares(difference)
        output = unconditional + scale.float()[:, None, None, None] * difference
    else:
        guidance_squares = torch.zeros(z.shape[0], 1, device=z.device)
    x0 = row.x0_z * z + row.x0_m * output
    eps_hat = row.eps_z * z + row.eps_m * output
    return Prediction(x0, eps_hat, torch.stack([guidance_squares, sum_of_squares(x0)]))


@triton.jit(do_not_specialize=["batch"])  # a batch of 1 would become a Python number
def _predict_kernel(
    z,  # [B, n] float32
    output,  # [B, n] or [2B, n]
    rows,  # [S, N_COLUMNS] float32
    step,  # [2] int32
    scale,  # [B] float32
    x0_out,  # [B, n] float32
    eps_out,  # [B, n] float32
    squares,  # [2, B, tiles] float32
    batch,
    n,
    channels,
    pixels,
    tiles,
    steps,
    BLOCK: tl.constexpr,
    DOUBLED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OUTPUT_CROSSED: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    now = counted_step(step, steps)
    if (tl.program_id(0) == 0) & (tile == 0):
        tl.store(step + 1, now)
    i = tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < n
    own = sample * n + i
    output_at = sample * n + place(i, channels, pixels, CHANNELS_LAST, OUTPUT_CROSSED)
    m = tl.load(output + output_at, mask=inside, other=0.0).to(tl.float32)
    squares_at = squares + sample * tiles + tile
    if DOUBLED:
        conditional = tl.load(output + batch.to(tl.int64) * n + output_at, mask=inside, other=0.0).to(tl.float32)
        difference = conditional - m
        m += tl.load(scale + sample) * difference
        tl.store(squares_at, tl.sum(difference * difference))
    else:
        tl.store(squares_at, 0.0)
    # Not before they are needed: on sm_80 their registers would spill.
    row = rows + now * N_COLUMNS
    x0_z, x0_m = tl.load(row + X0_Z), tl.load(row + X0_M)
    eps_z, eps_m = tl.load(row + EPS_Z), tl.load(row + EPS_M)
    z_own = tl.load(z + own, mask=inside, other=0.0)
    x0 = x0_z * z_own + x0_m * m
    tl.store(x0_out + own, x0, mask=inside)
    tl.store(eps_out + own, eps_z * z_own + eps_m * m, mask=inside)
    tl.store(squares_at + batch.to(tl.int64) * tiles, tl.sum(x0 * x0))


def step_tiling(n: int) -> tuple[int, int]:
    """(elements of a tile, warps) of the kernels of a step, from a sample's size alone: sums do not depend on tuning.

    Eight elements a thread are two 128-bit loads of float32 and one of float16; above 1,024 elements more programs
    serve the machine better than larger ones.
    """
    block = min(1024, max(32, power_of_two(n)))
    return block, max(1, block // 256)


def predict_launch(
    z: Tensor, model_output: Tensor, rows: Tensor, step: Tensor, scale: Tensor
) -> tuple[Launch, Prediction]:
    """The kernel's call and the tensors that it will fill."""
    batch, channels, height, width = z.shape
    n = channels * height * width
    check_floats(model_output=model_output)
    block, warps = step_tiling(n)
    tiles = blocks(n, block)
    result = Prediction(
        torch.empty_like(z), torch.empty_like(z), torch.empty(2, batch, tiles, dtype=torch.float32, device=z.device)
    )
    launch = Launch(
        _predict_kernel,
        (batch, tiles),
        {
            "z": z,
            "output": model_output,
            "rows": rows,
            "step": step,
            "scale": scale,
            "x0_out": result.x0,
            "eps_out": result.eps_hat,
            "squares": result.squares,
            "batch": batch,
            "n": n,
            "channels": channels,
            "pixels": height * width,
            "tiles": tiles,
            "steps": len(rows),
        },
        {
            "BLOCK": block,
            "DOUBLED": len(model_output) == 2 * batch,
            "CHANNELS_LAST": is_channels_last("z", z),
            "OUTPUT_CROSSED": is_crossed("model_output", model_output, z),
        },
        warps,
    )
    return launch, result


@torch.no_grad()
def predict(
    z: Tensor, model_output: Tensor, rows: Tensor, step: Tensor, scale: Tensor | float, *, kernel: Kernel = "auto"
) -> Prediction:
    """Prediction at latents z [B, c, h, w] from the UNet's output and the schedule's table at row ``step[0]``.

    ``model_output`` is [2B, c, h, w], unconditional half first, with ``scale`` a number or [B]; or [B, c, h, w] where
    classifier-free guidance is off (scale 1). Any float dtype; z, arithmetic and results are float32. ``rows``
    [S, n_columns] and the step counter int32 [2]: kernels/row.py. No graph is built. Raises ValueError, before anything
    is written, for what does not fit together.
    """
    batch = z.shape[0]
    check_latents(z)
    if model_output.shape[1:] != z.shape[1:] or model_output.shape[0] not in (batch, 2 * batch):
        raise ValueError(f"model_output: got {tuple(model_output.shape)} for latents {tuple(z.shape)}; B or 2B of them")
    if not model_output.is_floating_point():
        raise ValueError(f"model_output: got {model_output.dtype}; a float dtype expected")
    if model_output.device != z.device:
        raise ValueError(f"devices: z {z.device}, model_output {model_output.device}; one expected")
    check_table(rows, step, z)
    if not isinstance(scale, Tensor | float | int):
        raise ValueError(f"scale: got {scale!r}; a number, or float32 [B]")
    if isinstance(scale, Tensor):
        if scale.shape != (batch,) or scale.device != z.device or scale.dtype != torch.float32:
            raise ValueError(
                f"scale: got {scale.dtype} {tuple(scale.shape)} on {scale.device} for a batch of {batch}; a number, or "
                f"float32 [B] on {z.device}"
            )
    elif model_output.shape[0] == batch and scale != 1:
        raise ValueError(f"scale: got {scale} with an output that is not doubled; only scale 1 needs no second half")
    else:
        scale = torch.full((batch,), scale, dtype=torch.float32, device=z.device)
    if settle_kernel(kernel, z.device) == "reference":
        return predict_reference(z, model_output, rows, step, scale)
    launch, result = predict_launch(z, model_output, rows, step, scale.contiguous())
    launch.run()
    return result


def check_latents(z: Tensor) -> None:
    """Raises ValueError unless z is float32 [B, c, h, w] with at least one element."""
    if z.dim() == 4 and not len(z):
        raise ValueError(f"z: got {tuple(z.shape)}; at least one sample expected")
    if z.dim() != 4 or z.dtype != torch.float32 or not 0 < z[:1].numel() <= MOST_ELEMENTS:
        raise ValueError(
            f"z: got {z.dtype} {tuple(z.shape)}; float32 latents [B, c, h, w] with 1 to {MOST_ELEMENTS:,} elements a "
            "sample expected"
        )
