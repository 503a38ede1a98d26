"""Where a classifier's feature maps lie: three stages and the linear layer that reads the last one's mean.

Looked for by one forward of noise. A stage is the last module at its resolution, modules being taken as whole as they
are made: one whose inside knows two or more resolutions beside that of its input is looked into. The classifier is the
last linear layer, and its input has to be the last stage's mean over space, with or without a ReLU before: what class
activation maps (Zhou et al., arXiv 1512.04150) rest on.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.errors import UserError

Side = Literal["teacher", "student"]

OFF = "set distillation.cam_weight and sarc_weight to 0"


@dataclass(frozen=True)
class Stages:
    """By the names that modules have in the network."""

    maps: tuple[str, ...]
    """First to last; the last one's output is what the classifier reads."""
    head: str
    """The linear layer."""
    rectified: bool
    """Whether a ReLU that is no module lies between the last stage and its mean."""


@dataclass(frozen=True)
class _Call:
    name: str
    before: tuple[int, int] | None
    """Height and width of the input, where it is a map."""
    after: tuple[int, int]


class Taps:
    """What a network's stages and classifier see in its last forward, kept while the context lasts."""

    def __init__(self, model: nn.Module, stages: Stages, *, frozen: bool) -> None:
        """`frozen`: no weight asks for a gradient, so that the graph begins at the first stage."""
        self.stages = stages
        self.maps: dict[str, Tensor] = {}
        self.pooled = torch.empty(0)
        self.head: Any = model.get_submodule(stages.head)
        self._modules = [(name, model.get_submodule(name)) for name in stages.maps]
        self._frozen = frozen
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        def keep(name: str, output: Tensor) -> Tensor | None:
            if not (self._frozen and name == self.stages.maps[0] and torch.is_grad_enabled()):
                self.maps[name] = output
                return None
            # A copy, since a leaf could not be written in place, as a ReLU behind it may.
            self.maps[name] = output.detach().requires_grad_().clone()
            return self.maps[name]

        for name, module in self._modules:
            hook = lambda _module, _inputs, output, name=name: keep(name, output)  # noqa: E731
            self._handles.append(module.register_forward_hook(hook))
        self._handles.append(self.head.register_forward_pre_hook(self._keep_pooled))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep_pooled(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.pooled = inputs[0]

    @property
    def last(self) -> Tensor:
        """What the classifier reads the mean of: [B,C,h,w]."""
        features = self.maps[self.stages.maps[-1]]
        return functional.relu(features) if self.stages.rectified else features


def stages_of_both(
    teacher: Classifier, student: Classifier, recipe: DistillationRecipe
) -> tuple[Stages, Stages] | None:
    """Stages of teacher and student, None where no loss reads them; UserError as `stages_of`."""
    if not recipe.reads_maps:
        return None
    return stages_of(teacher, recipe, "teacher"), stages_of(student, recipe, "student")


def stages_of(classifier: Classifier, recipe: DistillationRecipe, side: Side) -> Stages:
    """The stages that the recipe's class-activation losses read in a teacher or student, which is left as it was.

    Three for ``sarc_weight``, otherwise the last one alone. Raises UserError for a name that is no module with a map,
    for a network without enough maps, and where the classifier is not linear over the mean of the last one.
    """
    wanted = 3 if recipe.sarc_weight > 0 else 1
    given = recipe.teacher_stages if side == "teacher" else recipe.student_stages
    field = f"distillation.{side}_stages"
    model = classifier.model
    weight = next(classifier.parameters())
    generator = torch.Generator().manual_seed(0)
    size = classifier.preprocessing.size
    images = torch.rand(2, classifier.preprocessing.channels, size, size, generator=generator).to(weight)
    training = {name: module.training for name, module in classifier.named_modules()}
    classifier.eval()
    try:
        calls, head = _watch(classifier, images, side)
        names = _chosen(model, calls, given, field)[-wanted:] if given else _found(model, calls)[-wanted:]
        if len(names) < wanted:
            raise UserError(
                f"{side}.architecture: has maps of {len(names)} resolution(s) that are found by themselves, but the "
                f"class-activation losses read {wanted}; name modules in {field}, or {OFF}"
            )
        stages = Stages(tuple(names), head, False)
        return _proven(classifier, stages, images, side, field)
    finally:
        for name, module in classifier.named_modules():
            module.training = training[name]


def _watch(classifier: Classifier, images: Tensor, side: Side) -> tuple[list[_Call], str]:
    """Modules that made a map, once each, in the order in which they ended; and the linear layer that ends the
    network."""
    calls: list[_Call] = []
    runs: dict[str, int] = {}
    linear: dict[str, Tensor] = {}
    handles = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        if isinstance(module, nn.Linear):
            linear[name] = output
        if (after := _sides(output)) is not None:
            calls.append(_Call(name, _sides(inputs[0]) if inputs else None, after))

    for name, module in classifier.model.named_modules():
        if name:
            hook = lambda module, inputs, output, name=name: note(name, module, inputs, output)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            logits = classifier(images)
    finally:
        for handle in handles:
            handle.remove()
    # By value: what a hook was given may have passed a layer that changes nothing, such as Identity.
    heads = [name for name, output in linear.items() if runs[name] == 1 and torch.equal(output, logits)]
    if not heads:
        raise UserError(
            f"{side}.architecture: its logits are not the output of a linear layer, which class activation maps are "
            f"read off; take another architecture, or {OFF}"
        )
    return [call for call in calls if runs[call.name] == 1], heads[-1]


def _sides(value: Any) -> tuple[int, int] | None:
    """Height and width of a map of more than one pixel, square as the images are: another has its channels last."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[2] != value.shape[3] or value.shape[2] < 2:
        return None
    return value.shape[2], value.shape[3]


def _found(model: nn.Module, calls: Sequence[_Call]) -> list[str]:
    """Name of the last module at each resolution, in the order in which these are left."""
    by_name = {call.name: call for call in calls}

    def whole(parent: nn.Module, prefix: str) -> Iterator[str]:
        for child, module in parent.named_children():
            name = f"{prefix}{child}"
            call = by_name.get(name)
            inside = {other.after for other in calls if other.name == name or other.name.startswith(f"{name}.")}
            if call is not None and len(inside - {call.before}) < 2:
                yield name
            else:
                yield from whole(module, f"{name}.")

    chain = set(whole(model, ""))
    last: dict[tuple[int, int], str] = {}
    for call in calls:
        if call.name in chain:
            last.pop(call.after, None)
            last[call.after] = call.name
    return list(last.values())


def _chosen(model: nn.Module, calls: Sequence[_Call], given: Sequence[str], field: str) -> list[str]:
    """The recipe's names, if each is a module with a map and they run in this order."""
    known = [name for name, _ in model.named_modules() if name]
    order = [call.name for call in calls]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, order, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"such are {', '.join(_found(model, calls))}"
            raise UserError(f"{field}: the network has no module {name}; {hint}")
        if name not in order:
            raise UserError(
                f"{field}: {name} gives no map [B,C,h,w] of more than one pixel, or runs more than once; such as do "
                f"are {', '.join(_found(model, calls))}"
            )
    places = [order.index(name) for name in given]
    if places != sorted(set(places)):
        raise UserError(f"{field}: got {', '.join(given)}; three modules in the order in which they run")
    return list(given)


def _proven(classifier: Classifier, stages: Stages, images: Tensor, side: Side, field: str) -> Stages:
    """The stages, once the last one is seen to be what the classifier reads the mean of, by way of the others."""
    weights = [weight.requires_grad for weight in classifier.parameters()]
    classifier.requires_grad_(False)
    try:
        with torch.enable_grad(), Taps(classifier.model, stages, frozen=True) as taps:
            classifier(images)
            maps = [taps.maps[name] for name in stages.maps]
            pooled = taps.pooled
            # What does not hang on the first stage is outside the graph, which begins there.
            inside = pooled.requires_grad and all(features.requires_grad for features in maps)
            reached: Sequence[Tensor | None] = [None]
            if inside:
                reached = torch.autograd.grad(pooled.sum(), maps, allow_unused=True)
    finally:
        for weight, wanted in zip(classifier.parameters(), weights, strict=True):
            weight.requires_grad_(wanted)
    for name, gradient in zip(stages.maps, reached, strict=False):
        if gradient is None:
            raise UserError(f"{field}: the logits do not hang on {name} by way of the stages behind it; name others")
    close = 1e-4 * float(pooled.detach().abs().max()) + 1e-30
    for rectified in (False, True):
        read = functional.relu(maps[-1]) if rectified else maps[-1]
        mean = read.detach().mean((2, 3))
        if mean.shape == pooled.shape and bool(((mean - pooled).abs() <= close).all()):
            return Stages(stages.maps, stages.head, rectified)
    raise UserError(
        f"{side}.architecture: {stages.head} does not read the mean over space of {stages.maps[-1]}, so that there are "
        f"no class activation maps; name the module whose mean it reads last in {field}, or {OFF}"
    )
