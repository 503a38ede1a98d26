"""Generic augmentation of printed digits: light strokes on black, 32x32, drawn afresh at every call.

Nothing here was fitted to, or compared with, images of handwriting. One thing is knowledge of the test format, as the
makers of MNIST state it: a digit fills a box of 20 in 28 pixels and is centred by its centre of mass.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdfkd.recipes.icon_augmentation import chance, smooth_noise, uniform

GLYPH = 40
SIDE = 32
BOX = 20 / 28
"""Longer side of the digit, in sides of the image."""

CANVAS = 2 * SIDE


def _forward(count: int, generator: torch.Generator) -> Tensor:
    """Random rotation, slant and stretch, [B, 2, 2]."""
    angle = (torch.randn(count, generator=generator) * math.radians(7)).clamp(-math.radians(18), math.radians(18))
    slant = uniform((count,), -0.3, 0.3, generator)
    stretch = torch.exp(uniform((count,), -0.2, 0.2, generator))
    cosine, sine = angle.cos(), angle.sin()
    rows = (stretch * cosine, (slant * cosine - sine) / stretch, stretch * sine, (slant * sine + cosine) / stretch)
    return torch.stack(rows, dim=1).view(count, 2, 2)


def _place(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Transformed, fitted into the box and centred by mass, with a faint warp: [B, 1, 40, 40] to [B, 1, 64, 64]."""
    count = len(glyphs)
    forward = _forward(count, generator)
    axis = (torch.arange(GLYPH) + 0.5) / GLYPH * 2 - 1
    points = torch.stack((axis.expand(GLYPH, -1), axis[:, None].expand(-1, GLYPH)), dim=0).flatten(1)  # [2, P]
    moved = forward @ points  # [B, 2, P]
    ink = glyphs.flatten(2)  # [B, 1, P]
    centre = (moved * ink).sum(2) / ink.sum(2)  # [B, 2]
    outside = ink < 0.5
    low, high = moved.masked_fill(outside, math.inf).amin(2), moved.masked_fill(outside, -math.inf).amax(2)
    scale = 2 * BOX * uniform((count,), 0.9, 1.05, generator) / (high - low).amax(1)
    inverse = torch.linalg.inv(forward)
    shift = uniform((count, 2), -0.06, 0.06, generator)
    offset = inverse @ (centre - shift / scale[:, None])[:, :, None]
    theta = torch.cat((inverse / scale[:, None, None], offset), dim=2)
    grid = F.affine_grid(theta, [count, 1, CANVAS, CANVAS], align_corners=False)
    warp = smooth_noise(count, 2, 4, CANVAS, generator) * uniform((count, 1, 1, 1), 0, 0.06, generator)
    return F.grid_sample(glyphs, grid + warp.permute(0, 2, 3, 1), align_corners=False)


def _stroke(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Strokes made wider or, where enough of them is left, thinner; [B, 1, 64, 64] in and out."""
    count = len(ink)
    width = uniform((count, 1, 1, 1), -1, 2, generator)
    wide = F.max_pool2d(ink, 3, stride=1, padding=1)
    wider = F.max_pool2d(wide, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-ink, 3, stride=1, padding=1)
    enough = thin.sum((1, 2, 3), keepdim=True) > 0.5 * ink.sum((1, 2, 3), keepdim=True)
    thinned = torch.lerp(ink, thin, (-width).clamp(0, 1) * enough)
    return torch.lerp(torch.lerp(thinned, wide, width.clamp(0, 1)), wider, (width - 1).clamp(0, 1))


def augment(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Random light digits on black, [B, 1, 32, 32] in [0, 1], from ink [B, 1, 40, 40]; a function of the generator."""
    image = F.avg_pool2d(_stroke(_place(glyphs, generator), generator), CANVAS // SIDE)
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1)), 3, stride=1)
    count = len(glyphs)
    softness = uniform((count, 1, 1, 1), 0, 0.5, generator) * chance(count, 0.5, generator)
    image = torch.lerp(image, blurred, softness)
    return image.clamp(0, 1) ** torch.exp(uniform((count, 1, 1, 1), -0.3, 0.3, generator))
