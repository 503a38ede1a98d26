"""What a teacher makes of finished images, and the few figures of a batch from which alarms are raised."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffdfkd.engine.alarms import Signs
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.diversity import compare, thumbnails
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.painter import Painting, round_
from diffdfkd.engine.taps import BatchNormTaps, tappable, untappable
from diffdfkd.kernels.moments import batch_moments

LOOKED_AT_ONCE = 25
"""Images of a forward pass: the inputs of all BatchNorm layers are held."""


@dataclass(frozen=True)
class Layer:
    """A BatchNorm layer: what it was given, over all images and positions, and what it remembers; each [C] float64."""

    name: str
    mean: Tensor
    variance: Tensor
    """Biased, as in L_bn."""
    running_mean: Tensor
    running_variance: Tensor

    @property
    def distances(self) -> tuple[float, float]:
        """The layer's two terms of L_bn: |mean - running mean|_2, |variance - running variance|_2."""
        by_mean, by_variance = self.mean - self.running_mean, self.variance - self.running_variance
        return torch.linalg.vector_norm(by_mean).item(), torch.linalg.vector_norm(by_variance).item()


@dataclass(frozen=True)
class Look:
    """A teacher's view of N images."""

    probabilities: Tensor
    """[N, K] float32."""
    layers: list[Layer]
    """BatchNorm layers in the order of the teacher's modules; empty where they cannot be read."""
    unreadable: str | None
    """Why not."""

    @property
    def batchnorm(self) -> float | None:
        """L_bn of the images as one batch; None where no layer can be read."""
        return sum(sum(layer.distances) for layer in self.layers) if self.layers else None


@torch.no_grad()
def look(model: nn.Module, inputs: Iterable[Tensor]) -> Look:
    """A network's view of inputs [n, C, H, W], which are taken batch by batch, each already preprocessed."""
    taps = BatchNormTaps(model) if tappable(model) else None
    unreadable = None if taps is not None else untappable(model)
    answers: list[Tensor] = []
    sums: list[list[Tensor]] = []
    try:
        for batch in inputs:
            answers.append(model(batch).float().softmax(1).cpu())
            if taps is None or unreadable is not None:
                continue
            try:
                activations = taps.inputs
            except UserError as reason:  # a layer that takes no part in the forward: L_bn is off, or guidance refuses
                unreadable = str(reason)
                continue
            for index, activation in enumerate(activations):
                moments = batch_moments(activation, torch.ones(len(batch), device=batch.device), kernel="reference")
                mean, variance = (moment.double().cpu() for moment in moments)
                if index == len(sums):
                    sums.append([torch.zeros_like(mean), torch.zeros_like(mean)])
                sums[index][0] += len(batch) * mean
                sums[index][1] += len(batch) * (variance + mean**2)
            taps.clear()
    finally:
        if taps is not None:
            taps.remove()
    probabilities = torch.cat(answers)
    layers = []
    if taps is not None and unreadable is None:
        stored = zip(taps.names, sums, taps.running_means, taps.running_variances, strict=True)
        for name, (first, second), running_mean, running_variance in stored:
            mean = first / len(probabilities)
            variance = (second / len(probabilities) - mean**2).clamp(min=0)
            layers.append(Layer(name, mean, variance, running_mean.double().cpu(), running_variance.double().cpu()))
    return Look(probabilities, layers, unreadable)


def look_at(teacher: Classifier, images: Tensor) -> Look:
    """A teacher's view of images uint8 [N, C, H, W], on its device."""
    return look(teacher.model, preprocessed(teacher, images))


def preprocessed(teacher: Classifier, images: Tensor) -> Iterator[Tensor]:
    """Images uint8 [N, C, H, W] in batches as the teacher's network takes them."""
    device = next(teacher.parameters()).device
    for part in images.split(LOOKED_AT_ONCE):
        yield teacher.preprocessing(part.to(device).float() / 255)


class Observation:
    """Gathers what the signs of a shard or preview are taken from, batch by batch, in little memory."""

    def __init__(self, teacher: Classifier, seen: int | None = None) -> None:
        """``seen`` is how many images, the first ones, the teacher is to look at; all by default."""
        self._teacher, self._seen = teacher, seen
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._thumbnails: list[Tensor] = []
        self._latents: list[Tensor] = []
        self._extreme: list[Tensor] = []

    def add(self, painting: Painting) -> None:
        """The finished samples of a batch; those that are not alive are left out."""
        images, labels = painting.images[painting.alive], painting.targets[painting.alive].argmax(1)
        room = None if self._seen is None else max(0, self._seen - sum(map(len, self._images)))
        self._images.append(images[:room])
        self._labels.append(labels)
        self._thumbnails.append(thumbnails(images))
        self._latents.append(painting.latents[painting.alive])
        self._extreme.append(((images == 0) | (images == 255)).float().flatten(1).mean(1))

    @property
    def labels(self) -> Tensor:
        """[N] int64, of the images that the teacher looks at; the class that has most of a mixed one."""
        return torch.cat(self._labels)[: sum(map(len, self._images))]

    def look(self) -> Look:
        """The teacher's view of the images."""
        return look_at(self._teacher, torch.cat(self._images))

    def signs(self, look: Look) -> Signs | None:
        """The figures, given the teacher's view; None without a finished image."""
        labels = torch.cat(self._labels)
        if not len(labels):
            return None
        classes = look.probabilities.shape[1]
        distance = compare(torch.cat(self._thumbnails), labels, classes).mean
        return Signs(
            images=len(look.probabilities),
            batchnorm=None if look.batchnorm is None else round_(look.batchnorm),
            agreement=round_((look.probabilities.argmax(1) == self.labels).float().mean().item()),
            saturated=round_(torch.cat(self._extreme).mean().item()),
            latents=round_(torch.cat(self._latents).mean().item()),
            distance=None if distance is None else round_(distance),
        )
