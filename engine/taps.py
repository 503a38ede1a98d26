"""What a classifier's BatchNorm layers see and what they remember: the two sides of the inversion loss L_bn."""

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.programs import Program
from diffdfkd.kernels.launch import at_least_float32

if TYPE_CHECKING:
    from diffdfkd.engine.recipe import GuidanceRecipe

log = logging.getLogger(__name__)

CLASS_LOSS_ALONE = (
    "guidance: the teacher has no BatchNorm layer to read, so that the class loss guides alone; a first look on "
    "handwritten digits gained nothing by it (86.3 % against 86.4 % unguided), the demo less than with L_bn "
    "(docs/method.md, 'Without BatchNorm'): compare with guidance.mode=none"
)


def tappable(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm layers with running statistics, by name, in the order of their definition."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    }


def untappable(model: nn.Module) -> str:
    """Why a teacher without a tappable layer has none, and what to do."""
    modules = list(model.modules())
    if any(isinstance(module, (Program, torch.jit.ScriptModule)) for module in modules):
        return (
            "the teacher is a compiled or exported program, and L_bn needs the input of each BatchNorm layer, which "
            "a program does not show; set it to 0, or bring the module's code (teacher.architecture: "
            "package.module:factory) and its state dict"
        )
    if any(isinstance(module, _BatchNorm) for module in modules):
        return (
            "the teacher's BatchNorm layers keep no running statistics (track_running_stats=False), so that a batch "
            "has nothing to be compared with; set it to 0"
        )
    return (
        "the teacher has no BatchNorm layer with running statistics, as a ViT or ConvNeXt has none; set it to 0, or "
        "take a teacher with BatchNorm"
    )


def check_taps(model: nn.Module, guidance: "GuidanceRecipe") -> None:
    """Look at the teacher before a run: UserError where L_bn is wanted and cannot be had.

    A teacher without it that guides by its class loss alone is allowed, with one warning of what that is worth.
    """
    if guidance.mode == "none":
        return
    if guidance.batchnorm_weight > 0:
        guidance_taps(model, guidance).remove()
    elif not tappable(model):
        log.warning("%s", CLASS_LOSS_ALONE)


def guidance_taps(model: nn.Module, guidance: "GuidanceRecipe", remembered: nn.Module | None = None) -> "BatchNormTaps":
    """Taps on the layers that the recipe names, with its weights of them."""
    return BatchNormTaps(model, remembered, layers=guidance.layers, layer_weights=guidance.layer_weights)


def chosen_layers(model: nn.Module, layers: str | Sequence[str]) -> dict[str, _BatchNorm]:
    """Tappable layers that names or patterns match, or ``all``, by name and in the order of their definition.

    Raises UserError where the model has none, and for a name or pattern that matches none.
    """
    found = tappable(model)
    if not found:
        raise UserError(f"guidance.batchnorm_weight: {untappable(model)}")
    if layers == "all":
        return found
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise UserError(
                f"guidance.layers: {pattern!r} matches none of the teacher's BatchNorm layers; they are "
                f"{', '.join(found)}"
            )
    return {name: layer for name, layer in found.items() if any(fnmatchcase(name, pattern) for pattern in layers)}


def layer_factors(layers: dict[str, _BatchNorm], layer_weights: str | Sequence[float]) -> Tensor | None:
    """[L, 2], what the distances of each layer's mean and variance count; None where all count 1.

    Raises UserError for a list of another length, and for ``relative`` where a layer remembers zeros.
    """
    if layer_weights == "equal":
        return None
    statistics = [(layer.running_mean, layer.running_var) for layer in layers.values()]
    if layer_weights != "relative":
        if len(layer_weights) != len(layers):
            raise UserError(
                f"guidance.layer_weights: got {len(layer_weights)} numbers for {len(layers)} BatchNorm layers "
                f"({', '.join(layers)}); give one each, in this order"
            )
        like = next(mean for mean, _ in statistics if mean is not None)
        return torch.tensor(list(layer_weights), dtype=torch.float32, device=like.device)[:, None].repeat(1, 2)
    norms = torch.stack(
        [
            torch.stack([torch.linalg.vector_norm(at_least_float32(each)) for each in pair if each is not None])
            for pair in statistics
        ]
    )
    empty = [name for name, pair in zip(layers, norms.tolist(), strict=True) if min(pair) == 0]
    if empty:
        raise UserError(
            f"guidance.layer_weights: relative, but BatchNorm layer {empty[0]} of the teacher remembers a mean or a "
            "variance of zeros, which has no scale; take equal, a list of numbers, or guidance.layers without it"
        )
    return norms.reciprocal()


class BatchNormTaps:
    """Keeps the input of every BatchNorm layer during a forward of `model`, inside the graph that it belongs to.

    A forward that begins at `model` first forgets the one before. A layer that a forward passes twice keeps its last
    input. Layers without running statistics are not tapped, nor those that ``layers`` leaves out; UserError if no layer
    is left, or as of `chosen_layers` and `layer_factors`.

    Of a copy in half precision ``remembered`` is the network that it was made of: its statistics are whole.
    """

    def __init__(
        self,
        model: nn.Module,
        remembered: nn.Module | None = None,
        *,
        layers: str | Sequence[str] = "all",
        layer_weights: str | Sequence[float] = "equal",
    ) -> None:
        tapped = chosen_layers(model, layers)
        kept = tapped if remembered is None else chosen_layers(remembered, layers)
        self.names = list(tapped)
        self.factors = layer_factors(kept, layer_weights)
        """[L, 2], of the distances of mean and variance of each layer; None for ones."""
        self._layers = list(tapped.values())
        self._remembered = list(kept.values())
        self._inputs: list[Tensor | None] = [None] * len(tapped)
        self._versions = [0] * len(tapped)
        self._handles = [model.register_forward_pre_hook(lambda *_: self.clear())]
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._tap(index)))

    def _tap(self, index: int) -> Any:
        def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._inputs[index] = inputs[0]
            self._versions[index] = _version(inputs[0])

        return keep

    @property
    def inputs(self) -> list[Tensor]:
        """Input [B,C,...] of each layer in the order of `names`.

        UserError if the last forward left one out, or wrote over it after the layer had read it.
        """
        missing = [name for name, kept in zip(self.names, self._inputs, strict=True) if kept is None]
        if missing:
            raise UserError(
                f"teacher.architecture: BatchNorm layers {', '.join(missing[:3])} took no part in the forward; build "
                "the teacher without them (such as auxiliary heads), leave them out of guidance.layers, or set "
                "guidance.batchnorm_weight=0"
            )
        found = [kept for kept in self._inputs if kept is not None]
        for name, kept, version in zip(self.names, found, self._versions, strict=True):
            if _version(kept) != version:
                raise UserError(
                    f"teacher.architecture: the input of BatchNorm layer {name} is written over by a later in-place "
                    "operation; build the teacher with inplace=False, or set guidance.batchnorm_weight=0"
                )
        return found

    @property
    def running_means(self) -> list[Tensor]:
        """Stored mean [C] of each layer."""
        return [layer.running_mean for layer in self._remembered if layer.running_mean is not None]

    @property
    def running_variances(self) -> list[Tensor]:
        """Stored variance [C] of each layer."""
        return [layer.running_var for layer in self._remembered if layer.running_var is not None]

    def clear(self) -> None:
        """Forget the inputs, and with them the graph that they hold."""
        self._inputs = [None] * len(self._layers)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.clear()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; not counted under inference mode."""
    return 0 if tensor.is_inference() else tensor._version
