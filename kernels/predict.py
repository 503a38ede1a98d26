"""Clean latent and noise from the UNet's output, with classifier-free guidance (Ho and Salimans, 2022, eq. 6).

    m       = m_u + w (m_c - m_u)
    x0      = x0_z z + x0_m m
    eps_hat = eps_z z + eps_m m                (coefficients: kernels/row.py)

Per element: z and two outputs are read, x0 and eps_hat written; per sample |m_c - m_u| and |x0|, for the rho rules.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffdfkd.kernels.row import named


class Prediction(NamedTuple):
    x0: Tensor
    """[B, c, h, w] float32, predicted clean latent."""
    eps_hat: Tensor
    """[B, c, h, w] float32, predicted noise."""
    guidance_norm: Tensor
    """[B] float32, |m_c - m_u| of the UNet's outputs; zeros without classifier-free guidance. Times |eps_m| of the row
    it is |eps_c - eps_u|, times |x0_m| it is what guidance moves x0 by per unit of scale."""
    x0_norm: Tensor
    """[B] float32, |x0|; not finite where any element of x0 is not."""


def predict_reference(z: Tensor, model_output: Tensor, row: Tensor, scale: Tensor | float) -> Prediction:
    coefficients = named(row)
    z = z.float()
    output = model_output.float()
    if output.shape[0] == 2 * z.shape[0]:
        unconditional, conditional = output.chunk(2)
        difference = conditional - unconditional
        guidance_norm = torch.linalg.vector_norm(difference, dim=(1, 2, 3))
        if isinstance(scale, Tensor):
            scale = scale.float()[:, None, None, None]
        output = unconditional + scale * difference
    else:
        guidance_norm = torch.zeros(z.shape[0], device=z.device)
    x0 = coefficients.x0_z * z + coefficients.x0_m * output
    eps_hat = coefficients.eps_z * z + coefficients.eps_m * output
    return Prediction(x0, eps_hat, guidance_norm, torch.linalg.vector_norm(x0, dim=(1, 2, 3)))


def predict(z: Tensor, model_output: Tensor, row: Tensor, scale: Tensor | float) -> Prediction:
    """Prediction at latents z [B, c, h, w] from the UNet's output and a row of the schedule's table [n_columns].

    ``model_output`` is [2B, c, h, w], unconditional half first, with ``scale`` a number or [B]; or [B, c, h, w] where
    classifier-free guidance is off (scale 1). Any float dtype; arithmetic and results are float32.
    """
    batch = z.shape[0]
    if z.dim() != 4 or model_output.shape[1:] != z.shape[1:] or model_output.shape[0] not in (batch, 2 * batch):
        raise ValueError(f"model_output: got {tuple(model_output.shape)} for latents {tuple(z.shape)}; B or 2B of them")
    if model_output.device != z.device or row.device != z.device:
        raise ValueError(f"devices: z {z.device}, model_output {model_output.device}, row {row.device}; one expected")
    if isinstance(scale, Tensor):
        if scale.shape != (batch,):
            raise ValueError(f"scale: got shape {tuple(scale.shape)} for a batch of {batch}; a number or [B]")
    elif model_output.shape[0] == batch and scale != 1:
        raise ValueError(f"scale: got {scale} with an output that is not doubled; only scale 1 needs no second half")
    return predict_reference(z, model_output, row, scale)
