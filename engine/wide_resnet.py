"""Wide residual networks: Zagoruyko and Komodakis, arXiv 1605.07146; WRN-d-k has d layers and k times the width.

Normalisation comes before each convolution, so that a BatchNorm layer sees the residual stream itself. Module names
are those of the WRN teachers that data-free distillation publishes (ZSKT, CMI, Fast-Datafree).
"""

from torch import Tensor, nn
from torch.nn import functional

from diffdfkd.engine.options import share


class WideBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice; where the width changes, the first activation feeds the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, images: Tensor) -> Tensor:
        active = functional.relu(self.bn1(images))
        stream = images if self.convShortcut is None else self.convShortcut(active)
        hidden = functional.relu(self.bn2(self.conv1(active)))
        return stream + self.conv2(self.dropout(hidden))


class Group(nn.Module):
    """The blocks of one resolution; a module of its own because published keys have its ``layer``."""

    def __init__(self, inputs: int, outputs: int, blocks: int, stride: int, dropout: float) -> None:
        super().__init__()
        rest = [WideBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(WideBlock(inputs, outputs, stride, dropout), *rest)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


class WideResNet(nn.Module):
    """Three groups of (depth - 4) / 6 blocks at full, half and quarter resolution; [B,C,H,W] -> [B,K]."""

    def __init__(self, channels: int, classes: int, depth: int, widening: int, dropout: float) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = Group(16, 16 * widening, blocks, 1, dropout)
        self.block2 = Group(16 * widening, 32 * widening, blocks, 2, dropout)
        self.block3 = Group(32 * widening, 64 * widening, blocks, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * widening)
        self.fc = nn.Linear(64 * widening, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(functional.relu(self.bn1(hidden)).mean((2, 3)))


def wrn_16_1(channels: int, classes: int, dropout: float = 0.0) -> nn.Module:
    """0.18 million parameters, 13 BatchNorm layers, 27 million multiply-adds for a 3x32x32 image and 10 classes."""
    return WideResNet(channels, classes, 16, 1, share("dropout", dropout))


def wrn_16_2(channels: int, classes: int, dropout: float = 0.0) -> nn.Module:
    """0.69 million parameters, 13 BatchNorm layers, 101 million multiply-adds for a 3x32x32 image and 10 classes."""
    return WideResNet(channels, classes, 16, 2, share("dropout", dropout))


def wrn_40_1(channels: int, classes: int, dropout: float = 0.0) -> nn.Module:
    """0.56 million parameters, 37 BatchNorm layers, 83 million multiply-adds for a 3x32x32 image and 10 classes."""
    return WideResNet(channels, classes, 40, 1, share("dropout", dropout))


def wrn_40_2(channels: int, classes: int, dropout: float = 0.0) -> nn.Module:
    """2.24 million parameters, 37 BatchNorm layers, 328 million multiply-adds for a 3x32x32 image and 10 classes."""
    return WideResNet(channels, classes, 40, 2, share("dropout", dropout))
