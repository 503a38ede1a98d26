"""What a teacher makes of images one layer before its answer: a space in which sets of images can be compared."""

from typing import Any

import torch
from torch import Tensor, nn

from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.signs import preprocessed

PENULTIMATE = "penultimate features"
LOGITS = "logits"


class FeatureTap:
    """Keeps what the network's last linear layer with an output for each class is given; a context manager."""

    def __init__(self, teacher: Classifier) -> None:
        self._teacher = teacher
        self._given: Tensor | None = None
        heads = [layer for layer in teacher.model.modules() if _is_head(layer, len(teacher.classes))]
        self._handles = [head.register_forward_pre_hook(self._keep) for head in heads]

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._given = inputs[0]

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, str]:
        """Features float32 [N, D] on the CPU of images uint8 [N, C, H, W], and what they are.

        Logits where no such layer ran, as in a network that ends in a convolution, or in a program.
        """
        found, kind = [], PENULTIMATE
        for batch in preprocessed(self._teacher, images):
            self._given = None
            logits = self._teacher.model(batch)
            own: Tensor | None = self._given
            if own is None or own.shape[0] != len(batch):
                own, kind = logits, LOGITS
            found.append(own.flatten(1).float().cpu())
        return torch.cat(found), kind

    def __enter__(self) -> "FeatureTap":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _is_head(layer: nn.Module, classes: int) -> bool:
    return isinstance(layer, nn.Linear) and layer.out_features == classes
