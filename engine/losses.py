"""How far the student looks elsewhere than the teacher: class activation maps and Grad-CAMs, compared.

    CAM       [B,K,h,w]  the classifier's weights as a 1x1 convolution of the last map     (Zhou, 1512.04150)
    Grad-CAM  [B,h,w]    sum over channels of a_k F_k, a_k = mean over space of dy/dF_k    (Selvaraju, 1610.02391)
    mSARC     sum over three stages of the Grad-CAMs' mean squared difference              (SpaceshipNet, CVPR 2023)

y is the logit of the class that the teacher names, for both. As in SpaceshipNet's published code no ReLU and no
normalisation follows, and neither a_k nor the classifier's weights are differentiated: what learns is the feature maps.
Of the last stage a_k is the classifier's weight over the map's area, so that its Grad-CAM needs no gradient.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.feature_stages import Stages, Taps
from diffdfkd.engine.logits import answers
from diffdfkd.kernels.launch import at_least_float32


def class_maps(features: Tensor, weight: Tensor) -> Tensor:
    """CAM [B,K,h,w] of a map [B,C,h,w] and a classifier's weight [K,C], which is not differentiated."""
    return functional.conv2d(at_least_float32(features), at_least_float32(weight.detach())[:, :, None, None])


def grad_cams(taps: Taps, chosen: Tensor, *, keep: bool) -> list[Tensor]:
    """Grad-CAM [B,h,w] per stage, first to last, of the logits `chosen` [B]; `keep` the graph for another backward."""
    earlier = [taps.maps[name] for name in taps.stages.maps[:-1]]
    weight = at_least_float32(taps.head.weight.detach())[chosen]  # [B, C]
    # From the classifier's input, since the training engine listens to the gradient of its output.
    score = (weight * at_least_float32(taps.pooled)).sum()
    gradients = torch.autograd.grad(score, earlier, retain_graph=keep) if earlier else ()
    means = [at_least_float32(gradient).mean((2, 3)) for gradient in gradients]
    area = taps.last.shape[2] * taps.last.shape[3]
    pairs = zip([*earlier, taps.last], [*means, weight / area], strict=True)
    return [(at_least_float32(features) * mean[:, :, None, None]).sum(1) for features, mean in pairs]


def cam_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two CAMs [B,K,.,.] at the coarser one's resolution."""
    return functional.mse_loss(*_matched(student, teacher))


def sarc_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Sum over the stages of two Grad-CAMs' mean squared difference, in the scale of the teacher's resolution.

    a_k is a mean, so that a map of a quarter of the pixels has four times the Grad-CAM.
    """
    total = torch.zeros((), device=student[0].device, dtype=student[0].dtype)
    for ours, theirs in zip(student, teacher, strict=True):
        scale = ours[0].numel() / theirs[0].numel()
        total = total + functional.mse_loss(*_matched(ours * scale, theirs))
    return total


def _matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both at the coarser resolution, by areas."""
    height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (-2, -1))
    return averaged(student, height, width), averaged(teacher, height, width)


def averaged(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps [...,h,w] as [...,height,width]: each pixel the mean over its area, also where sizes do not divide.

    The mean of a map stays what it was, and with it that CAM's mean is the logit. As matrix products, whose gradient
    has the same bits each time, which that of adaptive pooling has not on CUDA.
    """
    if maps.shape[-1] != width:
        maps = maps @ _areas(maps.shape[-1], width, maps.dtype, maps.device).t()
    if maps.shape[-2] != height:
        maps = _areas(maps.shape[-2], height, maps.dtype, maps.device) @ maps
    return maps


@lru_cache(maxsize=64)
def _areas(fine: int, coarse: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[coarse, fine]: the share of each fine pixel in each coarse one; rows sum to 1."""
    edges = torch.arange(coarse + 1, dtype=torch.float64) * (fine / coarse)
    left = torch.arange(fine, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
    return (overlap.clamp(min=0) * (coarse / fine)).to(device, dtype)


class ActivationLosses:
    """The class-activation losses of one step: the teacher's `answers`, the student's forward, then what is `added`."""

    def __init__(self, teacher: Classifier, theirs: Taps, ours: Taps, recipe: DistillationRecipe) -> None:
        self._teacher, self._theirs, self._ours, self._recipe = teacher, theirs, ours, recipe

    def answers(self, images: Tensor) -> Tensor:
        """The teacher's logits [B,K], with what its maps need of the graph."""
        return answers(self._teacher, images, self._recipe.dtype, graph=self._recipe.sarc_weight > 0)

    def added(self, kl: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """``loss``, which is minimised, and its terms of the last forwards, unweighted: ``kl``, as given, and those of
        ``cam`` and ``sarc`` whose weight is not 0. `logits` [B,K] are the teacher's."""
        loss, terms = kl, {"kl": kl}
        if self._recipe.cam_weight > 0:
            with torch.no_grad():
                target = class_maps(self._theirs.last, self._theirs.head.weight)
            terms["cam"] = cam_loss(class_maps(self._ours.last, self._ours.head.weight), target)
            loss = loss + self._recipe.cam_weight * terms["cam"]
        if self._recipe.sarc_weight > 0:
            chosen = logits.argmax(1)
            targets = [cam.detach() for cam in grad_cams(self._theirs, chosen, keep=False)]
            terms["sarc"] = sarc_loss(grad_cams(self._ours, chosen, keep=True), targets)
            loss = loss + self._recipe.sarc_weight * terms["sarc"]
        return {"loss": loss, **terms}


@contextmanager
def activation_losses(
    teacher: Classifier, student: Classifier, stages: tuple[Stages, Stages] | None, recipe: DistillationRecipe
) -> Iterator[ActivationLosses | None]:
    """The losses while the context lasts, None without stages; `student` is the module that is trained."""
    if stages is None:
        yield None
        return
    with ExitStack() as stack:
        theirs = stack.enter_context(Taps(teacher.model, stages[0], frozen=True))
        ours = stack.enter_context(Taps(student.model, stages[1], frozen=False))
        yield ActivationLosses(teacher, theirs, ours, recipe)
