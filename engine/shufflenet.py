"""ShuffleNetV2 for 32-pixel images: Ma et al., arXiv 1807.11164, with a stem that keeps the resolution.

Module names are those of RepDistiller, CMI and Fast-Datafree, whose networks have a 1x1 stem (``stem: 1``).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffdfkd.engine.options import one_of

WIDTHS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
"""Channels of the three stages and the last convolution: the paper's table 5."""


def _shuffled(left: Tensor, right: Tensor) -> Tensor:
    """Channels of both halves in turn."""
    return torch.stack([left, right], dim=2).flatten(1, 2)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class Unit(nn.Module):
    """Half of the channels pass; the other half crosses a 1x1, a depthwise 3x3 and a 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, images: Tensor) -> Tensor:
        passing, hidden = images.chunk(2, dim=1)
        hidden = functional.relu(self.bn1(self.conv1(hidden)))
        hidden = self.bn2(self.conv2(hidden))
        return _shuffled(passing, functional.relu(self.bn3(self.conv3(hidden))))


class DownUnit(nn.Module):
    """Two branches of half the output channels each, at half the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = _depthwise(inputs, 2)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, images: Tensor) -> Tensor:
        left = self.bn1(self.conv1(images))
        left = functional.relu(self.bn2(self.conv2(left)))
        right = functional.relu(self.bn3(self.conv3(images)))
        right = self.bn4(self.conv4(right))
        return _shuffled(left, functional.relu(self.bn5(self.conv5(right))))


class ShuffleNetV2(nn.Module):
    """Stem of 24 channels, stages of 4, 8 and 4 units at half, quarter and eighth resolution; [B,C,H,W] -> [B,K]."""

    def __init__(self, channels: int, classes: int, width: float, stem: int) -> None:
        super().__init__()
        first, second, third, last = WIDTHS[width]
        self.conv1 = nn.Conv2d(channels, 24, stem, padding=stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, first, 3)
        self.layer2 = _stage(first, second, 7)
        self.layer3 = _stage(second, third, 3)
        self.conv2 = nn.Conv2d(third, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.linear(functional.relu(self.bn2(self.conv2(hidden))).mean((2, 3)))


def _stage(inputs: int, outputs: int, units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(inputs, outputs), *(Unit(outputs) for _ in range(units)))


def shufflenet_v2(channels: int, classes: int, width: float = 1.0, stem: int = 3) -> nn.Module:
    """1.3 million parameters, 56 BatchNorm layers, 45 million multiply-adds for a 3x32x32 image and 10 classes.

    ``width`` is the paper's multiplier; ``stem`` the size of the first convolution, 3 or 1.
    """
    return ShuffleNetV2(channels, classes, float(one_of("width", width, tuple(WIDTHS))), one_of("stem", stem, (3, 1)))
