"""Built-in classifiers: plain convolutional networks whose BatchNorm layers guidance can read."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.mobilenet import mobilenet_v2
from diffdfkd.engine.options import whole
from diffdfkd.engine.resnet import resnet18, resnet34
from diffdfkd.engine.shufflenet import shufflenet_v2
from diffdfkd.engine.vgg import vgg8, vgg11
from diffdfkd.engine.wide_resnet import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class SmallCNN(nn.Module):
    """Convolutions at full, half, quarter and eighth resolution, spatial mean, linear layer; [B,C,H,W] -> [B,K]."""

    def __init__(self, channels: int, classes: int, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        layers = [_convolution(channels, width)]
        inputs = width
        for factor, count in zip((1, 2, 4), blocks, strict=True):
            layers.append(_convolution(inputs, factor * width, stride=2))
            inputs = factor * width
            layers += [_convolution(inputs, inputs) for _ in range(count)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


def small_cnn(channels: int, classes: int, width: int = 32, blocks: Sequence[int] = (1, 2, 1)) -> nn.Module:
    """CNN for images of 16 to 64 pixels; ``blocks`` counts the further convolutions after each of three strides.

    The defaults give 335,000 parameters, 8 BatchNorm layers and 12 million multiply-adds for a 28x28 image.
    """
    whole("width", width)
    if len(blocks) != 3 or any(not isinstance(count, int) or count < 0 for count in blocks):
        raise UserError(f"options.blocks: got {blocks!r}; three whole numbers from 0 on, such as [1, 2, 1]")
    return SmallCNN(channels, classes, width, blocks)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": small_cnn,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "wrn_16_1": wrn_16_1,
    "wrn_16_2": wrn_16_2,
    "wrn_40_1": wrn_40_1,
    "wrn_40_2": wrn_40_2,
    "vgg8": vgg8,
    "vgg11": vgg11,
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v2": shufflenet_v2,
}
"""Name in a recipe -> function of (channels, classes, **options)."""
