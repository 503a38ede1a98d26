"""Train-time augmentation of a batch: each sample draws its own, all from one generator, on the images' device.

Random numbers are drawn on the generator's device (the CPU in distillation), so that they are the same on every
device. Every function takes and gives float images [B,C,H,W] in [0, 1] and leaves its input as it was.
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional

ROTATION = 10.0  # degrees either way
SCALE = 0.1  # zoom of 0.9 to 1.1
SHIFT = 0.08  # of the image's side, either way
ERASE_PROBABILITY = 0.5
ERASE_AREA = (0.02, 0.25)
ERASE_ASPECT = 3.0  # height over width between 1/3 and 3


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Half of the samples mirrored left to right."""
    chosen = _uniform(images, generator) < 0.5
    return torch.where(_per_sample(chosen), images.flip(-1), images)


def crop(images: Tensor, generator: Generator) -> Tensor:
    """Shifted by up to an eighth of the side in whole pixels, black where nothing comes in (He et al. 2016)."""
    batch, _, height, width = images.shape
    reach = max(1, min(height, width) // 8)
    padded = functional.pad(images, (reach,) * 4)
    shifts = torch.randint(0, 2 * reach + 1, (2, batch), generator=generator, device=generator.device)
    tops, lefts = shifts.to(images.device)
    rows = tops[:, None] + torch.arange(height, device=images.device)  # [B,H]
    columns = lefts[:, None] + torch.arange(width, device=images.device)  # [B,W]
    samples = torch.arange(batch, device=images.device)
    # Channels last while indexing, so that each pixel is one contiguous piece.
    shifted = padded.permute(0, 2, 3, 1)[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2)


def affine(images: Tensor, generator: Generator) -> Tensor:
    """A small rotation, zoom and shift, bilinear, black where nothing comes in."""
    _, _, height, width = images.shape
    angle = _between(images, generator, -ROTATION, ROTATION) * (math.pi / 180)
    scale = _between(images, generator, 1 - SCALE, 1 + SCALE)
    # Normalised coordinates span 2 over the side.
    across = _between(images, generator, -2 * SHIFT, 2 * SHIFT)
    down = _between(images, generator, -2 * SHIFT, 2 * SHIFT)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    aspect = height / width
    first = torch.stack([cosine, -sine * aspect, across], dim=1)
    second = torch.stack([sine / aspect, cosine, down], dim=1)
    grid = functional.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.clamp(0, 1)  # the four weights may sum to an ulp above 1


def erase(images: Tensor, generator: Generator) -> Tensor:
    """A black rectangle over 2 to 25 % of the area of half of the samples (Zhong et al. 2020)."""
    chosen = _uniform(images, generator) < ERASE_PROBABILITY
    area = _between(images, generator, *ERASE_AREA)
    aspect = _between(images, generator, -math.log(ERASE_ASPECT), math.log(ERASE_ASPECT)).exp()
    box = _box(images, (area * aspect).sqrt(), (area / aspect).sqrt(), generator)
    return images.masked_fill(box & _per_sample(chosen), 0)


def cutmix(images: Tensor, generator: Generator) -> Tensor:
    """A box of uniformly drawn area replaced by the same box of another sample (Yun et al. 2019, alpha 1).

    The label follows by itself: the teacher answers for the mixed image.
    """
    side = (1 - _uniform(images, generator)).sqrt()
    box = _box(images, side, side, generator)
    return torch.where(box, images[_partners(images, generator)], images)


def mixup(images: Tensor, generator: Generator) -> Tensor:
    """Blended with another sample in a uniformly drawn proportion (Zhang et al. 2018, alpha 1)."""
    share = _per_sample(_uniform(images, generator))
    return torch.lerp(images[_partners(images, generator)], images, share)


AUGMENTATIONS = {"flip": flip, "crop": crop, "affine": affine, "erase": erase, "cutmix": cutmix, "mixup": mixup}


def augment(images: Tensor, names: Sequence[str], generator: Generator) -> Tensor:
    """The named augmentations one after the other; the same generator state gives the same images."""
    for name in names:
        images = AUGMENTATIONS[name](images, generator)
    return images


def _uniform(images: Tensor, generator: Generator) -> Tensor:
    """[B] in [0, 1) on the images' device."""
    return torch.rand(len(images), generator=generator, device=generator.device).to(images.device)


def _between(images: Tensor, generator: Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * _uniform(images, generator)


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _partners(images: Tensor, generator: Generator) -> Tensor:
    return torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)


def _box(images: Tensor, height: Tensor, width: Tensor, generator: Generator) -> Tensor:
    """Boxes [B,1,H,W] around uniformly drawn centres, clipped at the border; heights and widths [B] in shares."""
    rows, columns = images.shape[-2:]
    middle_y, middle_x = _uniform(images, generator), _uniform(images, generator)
    y = (torch.arange(rows, device=images.device) + 0.5) / rows
    x = (torch.arange(columns, device=images.device) + 0.5) / columns
    vertical = (y - middle_y[:, None]).abs() < height[:, None] / 2  # [B,H]
    horizontal = (x - middle_x[:, None]).abs() < width[:, None] / 2  # [B,W]
    return (vertical[:, :, None] & horizontal[:, None, :]).unsqueeze(1)
