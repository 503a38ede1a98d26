"""Residual networks for 32-pixel images: He et al., Deep Residual Learning, arXiv 1512.03385, with a CIFAR stem.

Their 3x3 stem keeps the resolution and no pooling follows it. Module names are those of the networks that data-free
distillation publishes teachers of (DAFL, CMI, Fast-Datafree), so that such state dicts load as they are.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from diffdfkd.engine.options import whole


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.bn2(self.conv2(hidden))
        return functional.relu(hidden + self.shortcut(images))


class ResNet(nn.Module):
    """Four stages of basic blocks at full, half, quarter and eighth resolution; [B,C,H,W] -> [B,K]."""

    def __init__(self, channels: int, classes: int, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], stride=2)
        self.linear = nn.Linear(8 * width, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.linear(hidden.mean((2, 3)))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet18(channels: int, classes: int, width: int = 64) -> nn.Module:
    """11.2 million parameters, 20 BatchNorm layers, 555 million multiply-adds for a 3x32x32 image and 10 classes."""
    return ResNet(channels, classes, whole("width", width), (2, 2, 2, 2))


def resnet34(channels: int, classes: int, width: int = 64) -> nn.Module:
    """21.3 million parameters, 36 BatchNorm layers, 1,159 million multiply-adds for a 3x32x32 image and 10 classes."""
    return ResNet(channels, classes, whole("width", width), (3, 4, 6, 3))
