"""Networks as a stage holds them: frozen copies in its precision, and a student whose weights come with each call."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.guidance_decoder import GuidanceDecoder
from diffdfkd.engine.prior import Prior, quiet


def in_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in a dtype: itself, or a frozen copy."""
    parameter = next(network.parameters())
    if parameter.dtype == dtype:
        return network
    with quiet():
        lowered: nn.Module = copy.deepcopy(network).to(dtype)
    return lowered.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def decoder(prior: Prior, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`Prior.decode` in a precision, on a copy of the VAE where its own is another; differentiable."""
    lowered = copy.copy(prior)
    lowered.vae = in_precision(prior.vae, dtype)

    def decode(latents: Tensor) -> Tensor:
        return lowered.decode(latents.contiguous(memory_format=torch.channels_last))

    return decode


def light_decoder(light: GuidanceDecoder, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The same of a light decoder."""
    lowered = in_precision(light, dtype)

    def decode(latents: Tensor) -> Tensor:
        return lowered(latents.to(dtype).contiguous(memory_format=torch.channels_last)).float()

    return decode


def student_weights(student: Classifier) -> dict[str, Tensor]:
    """Parameters and float buffers of the student's network, by name: the last inputs of a chain that knows one."""
    return {
        name: value.detach().float() for name, value in student.model.state_dict().items() if value.is_floating_point()
    }


class Lowered(nn.Module):
    """A classifier whose network computes in ``dtype`` on a copy of its own; its preprocessing stays float32."""

    def __init__(self, classifier: Classifier, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(classifier.model).to(dtype=dtype).eval().requires_grad_(False)
        self.preprocessing: Preprocessing = classifier.preprocessing
        self.dtype = dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.preprocessing(images).to(self.dtype))


class Answering(nn.Module):
    """A classifier whose weights are handed to it with each call, by way of ``given``."""

    def __init__(self, classifier: Classifier, dtype: torch.dtype, names: Sequence[str]) -> None:
        super().__init__()
        lowered = Lowered(classifier, dtype)
        self._call = [lowered]  # in a list, so that its own weights are no part of this module
        self.dtype, self.names = dtype, names
        self.given: dict[str, Tensor] = {}
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        (lowered,) = self._call
        weights = {name: value.to(self.dtype) for name, value in self.given.items()}
        return functional_call(lowered.model, weights, (lowered.preprocessing(images).to(self.dtype),))
