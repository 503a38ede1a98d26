"""What is done to a batch right after latent CutMix: prompts are blended, and seams denoised again.

Both act between two steps, with launches of their own, so that recorded steps are replayed as they are.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffdfkd.engine.cutmix import Repair
from diffdfkd.kernels.box import seam_band
from diffdfkd.kernels.philox import REPAIR, philox_normal
from diffdfkd.kernels.row import named, start_counter

if TYPE_CHECKING:
    from diffdfkd.engine.loop import Loop


def blend(context: Tensor, shares: Tensor, prompts: Tensor) -> None:
    """Write the blend of prompts [B, T, D] by shares [B, B] into the conditional half of a context [B or 2B, T, D].

    In place, where the UNet reads it, be it an engine's own buffer.
    """
    mixed = shares @ prompts.flatten(1).float()
    context[-len(prompts) :].copy_(mixed.view(prompts.shape))


def repair_seams(loop: "Loop", z: Tensor, alive: Tensor, index: int, boxes: Tensor, repair: Repair) -> Tensor:
    """Latents [B, c, h, w] after step ``index`` of DDIM, the bands around the boxes [B, 4] denoised again.

    A pass (RePaint, Lugmayr et al., 2022, algorithm 1, with jumps of one step) takes all of z one noise level up, by
    q(z_t | z_t') = N(a z_t', sigma_t^2 - a^2 sigma_t'^2) with a = alpha_t / alpha_t', and back down by the UNet without
    the teacher; of the result the bands alone are kept, and everything else is as it was before. Samples that are
    not alive stay as they are. The UNet's input is that of the next step afterwards.
    """
    row = named(loop.rows[index])
    height, width = z.shape[2], z.shape[3]
    band = seam_band(boxes, repair.band, height, width) & alive[:, None, None, None]
    # DDIM's coefficients of x0 and eps_hat are signal and noise level that the step leads to.
    up = row.alpha / row.x0
    spread = (row.sigma**2 - (up * row.eps) ** 2).clamp(min=0).sqrt()
    at = start_counter(z.device, index)
    for turn in range(repair.passes):
        noise = philox_normal(loop.draw.seed, loop.draw.sample_ids, index * repair.passes + turn, REPAIR, z.shape[1:])
        noised = (up * z + spread * noise).contiguous(memory_format=torch.channels_last)
        lane = loop.place(noised, index)
        at.fill_(index)
        output = lane.unet(lane.input.sample, lane.input.timestep, lane.context)
        prediction = loop.predict(noised, output, at)
        again = row.x0 * prediction.x0 + row.eps * prediction.eps_hat
        z = torch.where(band, again, z).contiguous(memory_format=torch.channels_last)
    loop.place(z, index + 1)
    return z
