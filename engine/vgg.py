"""VGG for 32- and 64-pixel images: Simonyan and Zisserman, arXiv 1409.1556, with BatchNorm and one linear layer.

Module names are those of the VGG teachers that data-free and contrastive distillation publish (RepDistiller, CMI,
Fast-Datafree): five blocks of convolution, BatchNorm and ReLU, whose last ReLU and pooling have no name.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from diffdfkd.engine.options import whole


class VGG(nn.Module):
    """Five blocks with max pooling after the first three, from 64 pixels on also after the fourth; -> [B,K]."""

    def __init__(self, channels: int, classes: int, width: int, depths: Sequence[int]) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 8 * width, 8 * width)
        self.block0 = _block(channels, widths[0], depths[0])
        self.block1 = _block(widths[0], widths[1], depths[1])
        self.block2 = _block(widths[1], widths[2], depths[2])
        self.block3 = _block(widths[2], widths[3], depths[3])
        self.block4 = _block(widths[3], widths[4], depths[4])
        self.classifier = nn.Linear(widths[4], classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        hidden = images
        for block in (self.block0, self.block1, self.block2):
            hidden = functional.max_pool2d(functional.relu(block(hidden)), 2)
        hidden = functional.relu(self.block3(hidden))
        if images.shape[2] >= 64:
            hidden = functional.max_pool2d(hidden, 2)
        return self.classifier(functional.relu(self.block4(hidden)).mean((2, 3)))


def _block(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """`depth` 3x3 convolutions with BatchNorm, ReLU between them; the last ReLU is the network's."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.ReLU()] if index else []
        layers += [nn.Conv2d(outputs if index else inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers)


def vgg8(channels: int, classes: int, width: int = 64) -> nn.Module:
    """3.9 million parameters, 5 BatchNorm layers, 96 million multiply-adds for a 3x32x32 image and 10 classes."""
    return VGG(channels, classes, whole("width", width), (1, 1, 1, 1, 1))


def vgg11(channels: int, classes: int, width: int = 64) -> nn.Module:
    """9.2 million parameters, 8 BatchNorm layers, 209 million multiply-adds for a 3x32x32 image and 10 classes."""
    return VGG(channels, classes, whole("width", width), (1, 1, 2, 2, 2))
