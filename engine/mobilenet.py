"""MobileNetV2 for 32-pixel images: Sandler et al., arXiv 1801.04381, with strides that leave 4x4 before the mean.

Module names are torchvision's, so a published ImageNet state dict fits too; but it was trained with other strides:
take ``torchvision:mobilenet_v2`` for it.
"""

from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.options import share

SETTING = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, width, blocks and first stride of each stage: the paper's table 2, its first two strides set to 1."""


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU6."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Widening 1x1, depthwise 3x3 and linear 1x1 convolution; with the identity beside it where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([_convolution(inputs, hidden, 1)] if expansion > 1 else []),
            _convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images)
        return images + hidden if self.residual else hidden


class MobileNetV2(nn.Module):
    """Stem, seven stages of inverted residuals, 1x1 convolution, spatial mean, linear layer; [B,C,H,W] -> [B,K]."""

    def __init__(self, channels: int, classes: int, width: float, dropout: float) -> None:
        super().__init__()
        inputs, last = _rounded(32 * width), _rounded(1280 * max(1.0, width))
        features: list[nn.Module] = [_convolution(channels, inputs, 3)]
        for expansion, size, blocks, first in SETTING:
            outputs = _rounded(size * width)
            for index in range(blocks):
                features.append(InvertedResidual(inputs, outputs, 1 if index else first, expansion))
                inputs = outputs
        features.append(_convolution(inputs, last, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, classes))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def _rounded(width: float) -> int:
    """Nearest multiple of 8, never less than nine tenths of `width`: the rounding of the published weights."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * width else nearest + 8


def mobilenet_v2(channels: int, classes: int, width: float = 1.0, dropout: float = 0.2) -> nn.Module:
    """2.2 million parameters, 52 BatchNorm layers, 88 million multiply-adds for a 3x32x32 image and 10 classes.

    ``width`` multiplies the channels of every layer but the last.
    """
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= 4:
        raise UserError(f"options.width: got {width!r}; a number above 0 and up to 4")
    return MobileNetV2(channels, classes, float(width), share("dropout", dropout))
