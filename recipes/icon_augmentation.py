"""Generic augmentation of icon glyphs: light grey-level objects on black, 32x32, drawn afresh at every call.

Nothing here was fitted to, or compared with, images of the teacher's domain.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GLYPH = 64
SIDE = 32


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def chance(count: int, probability: float, generator: torch.Generator) -> Tensor:
    return (torch.rand((count, 1, 1, 1), generator=generator) < probability).float()


def smooth_noise(count: int, channels: int, cells: int, size: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn((count, channels, cells, cells), generator=generator)
    return F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=True)


def _place(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Random affine map with a faint elastic warp; [B, 2, 64, 64] in and out."""
    count = len(glyphs)
    scale = uniform((count,), 0.68, 1.02, generator)
    stretch = torch.exp(uniform((count,), -0.2, 0.2, generator))
    angle = (torch.randn(count, generator=generator) * math.radians(5)).clamp(-math.radians(12), math.radians(12))
    shear = uniform((count,), -0.12, 0.12, generator)
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    # The longer side keeps the drawn scale, so that a stretch never pushes the object out of the frame.
    longest = torch.maximum(stretch.sqrt(), 1 / stretch.sqrt())
    wide, tall = scale * stretch.sqrt() / longest, scale / stretch.sqrt() / longest
    cosine, sine = angle.cos(), angle.sin()
    forward = torch.stack(
        (wide * flip * cosine, tall * (shear * cosine - sine), wide * flip * sine, tall * (shear * sine + cosine)),
        dim=1,
    ).view(count, 2, 2)
    inverse = torch.linalg.inv(forward)
    room = (1 - scale).clamp_min(0)[:, None] * 0.8 + 0.03
    shift = uniform((count, 2), -1, 1, generator) * room
    theta = torch.cat((inverse, -(inverse @ shift[:, :, None])), dim=2)
    grid = F.affine_grid(theta, [count, 2, GLYPH, GLYPH], align_corners=False)
    warp = smooth_noise(count, 2, 4, GLYPH, generator) * uniform((count, 1, 1, 1), 0, 0.035, generator)
    return F.grid_sample(glyphs, grid + warp.permute(0, 2, 3, 1), align_corners=False)


def _surface(count: int, generator: torch.Generator) -> Tensor:
    """Multiplicative shading and texture [B, 1, 32, 32] around 1."""
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = axis.view(1, 1, -1, 1), axis.view(1, 1, 1, -1)

    def along(angle: Tensor) -> Tensor:
        return x * angle.cos() + y * angle.sin()

    def part(low: float, high: float) -> Tensor:
        return uniform((count, 1, 1, 1), low, high, generator)

    angle = part(0, 2 * math.pi)
    surface = 1 + part(0, 0.35) * along(angle)
    surface = surface + part(0, 0.16) * smooth_noise(count, 1, 5, SIDE, generator)
    surface = surface + part(0, 0.1) * chance(count, 0.5, generator) * smooth_noise(count, 1, 16, SIDE, generator)
    level = torch.where(torch.rand((count, 1, 1, 1), generator=generator) < 0.6, math.pi / 2, angle)
    frequency, phase, sharpness = part(2, 7) * math.pi, part(0, 2 * math.pi), part(1, 5)
    wave = torch.tanh(sharpness * torch.sin(frequency * along(level) + phase))
    cross = torch.tanh(sharpness * torch.sin(frequency * along(level + math.pi / 2) + phase))
    stripes, checks = chance(count, 0.14, generator), chance(count, 0.4, generator)
    surface = surface + stripes * part(0.08, 0.4) * (wave + checks * cross) / (1 + checks)
    # A second tone beyond a straight edge: soles, yokes, colour blocks.
    block = torch.sigmoid((along(level) - part(-0.6, 0.7)) * 20)
    surface = surface * (1 + chance(count, 0.15, generator) * part(-0.5, 0.5) * block)
    # A soft-edged patch near the middle: prints and labels.
    distance = ((x - part(-0.2, 0.2)) / part(0.1, 0.4)) ** 2 + ((y - part(-0.3, 0.2)) / part(0.1, 0.4)) ** 2
    patch = torch.sigmoid((1 - distance) * 6)
    grain = 1 + 0.5 * smooth_noise(count, 1, 12, SIDE, generator)
    return surface * (1 + chance(count, 0.12, generator) * part(-0.5, 0.5) * patch * grain)


def augment(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Random light objects on black, [B, 1, 32, 32] in [0, 1], from glyph planes [B, 2, 64, 64] (`Glyphs.batch`).

    Affine placement, fill, shading, texture, inner lines, edge shading, blur and gamma; a function of the generator.
    """
    count = len(glyphs)
    placed = _place(glyphs, generator)
    detail, silhouette = placed[:, :1], placed[:, 1:]

    def part(low: float, high: float) -> Tensor:
        return uniform((count, 1, 1, 1), low, high, generator)

    fill = part(0.25, 1)
    strength = part(0.1, 0.85) * chance(count, 0.92, generator)
    sign = torch.where(torch.rand((count, 1, 1, 1), generator=generator) < 0.5, -1.0, 1.0)
    lines = (1 + sign * strength * detail).clamp_min(0)
    drawn, cover = F.avg_pool2d(lines * silhouette, GLYPH // SIDE), F.avg_pool2d(silhouette, GLYPH // SIDE)
    tone = fill * _surface(count, generator)
    depth = F.avg_pool2d(cover, 5, stride=1, padding=2)
    tone = tone * (1 - part(0, 0.7) * chance(count, 0.5, generator) * (1 - depth))
    image = (tone.clamp_min(0.04) * drawn).clamp(max=1)
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image = torch.lerp(image, blurred, part(0, 0.6) * chance(count, 0.5, generator))
    return image.clamp(0, 1) ** torch.exp(part(-0.35, 0.35))
