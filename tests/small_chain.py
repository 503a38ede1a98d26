"""A decoder and classifiers so small that a guidance chain of them is quick in float64, and smooth."""

import torch
from torch import Tensor, nn

from diffdfkd.engine.recipe import GuidanceRecipe

CLASSES, LATENT = 3, (2, 4, 4)


class Decoder(nn.Module):
    """[B, 2, 4, 4] -> [B, 1, 8, 8] in [0, 1]; smooth, so that finite differences hold."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose2d(2, 1, 2, stride=2)

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.convolution(latents).tanh() / 2 + 0.5
        return images


def classifier(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.BatchNorm1d(8),
        nn.SiLU(),
        nn.Linear(8, CLASSES),
    )
    for layer in network:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return network.double().eval().requires_grad_(False)


def batch(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x0, soft targets, and that all are alive."""
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(n, *LATENT, generator=generator, dtype=dtype)
    targets = torch.randn(n, CLASSES, generator=generator, dtype=dtype).softmax(1)
    return x0, targets, torch.ones(n, dtype=torch.bool)


WEIGHTS = GuidanceRecipe(class_weight=0.7, batchnorm_weight=0.3, adversarial_weight=0.5)
