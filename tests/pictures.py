"""Images to train on, held in memory."""

from typing import Any

import torch
from torch import Tensor

CLASSES = 4


class Pictures:
    """Random bright quadrants with noise, held in memory."""

    classes: list[str] | None = None

    def __init__(self, images: int = 96, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, CLASSES, (images,), generator=generator)
        pixels = torch.rand(images, 1, 8, 8, generator=generator) * 90
        for image, label in zip(pixels, self.labels.tolist(), strict=True):
            image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 120
        self.pixels = pixels.to(torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Any) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]
