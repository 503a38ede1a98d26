"""What a classifier's BatchNorm layers see and what they remember: the two sides of the inversion loss L_bn."""

from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffdfkd.engine.errors import UserError


class BatchNormTaps:
    """Keeps the input of every BatchNorm layer during a forward of `model`, inside the graph that it belongs to.

    A forward that begins at `model` first forgets the one before. A layer that a forward passes twice keeps its last
    input. Layers without running statistics are not tapped; UserError if no layer is left.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
        }
        if not layers:
            raise UserError(
                "guidance.batchnorm_weight: the teacher has no BatchNorm layer with running statistics; set it to 0"
            )
        self.names = list(layers)
        self._layers = list(layers.values())
        self._inputs: list[Tensor | None] = [None] * len(layers)
        self._handles = [model.register_forward_pre_hook(lambda *_: self.clear())]
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._tap(index)))

    def _tap(self, index: int) -> Any:
        def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._inputs[index] = inputs[0]

        return keep

    @property
    def inputs(self) -> list[Tensor]:
        """Input [B,C,...] of each layer in the order of `names`; UserError if the last forward left one out."""
        missing = [name for name, kept in zip(self.names, self._inputs, strict=True) if kept is None]
        if missing:
            raise UserError(
                f"teacher.architecture: BatchNorm layers {', '.join(missing[:3])} took no part in the forward; build "
                "the teacher without them (such as auxiliary heads), or set guidance.batchnorm_weight=0"
            )
        return [kept for kept in self._inputs if kept is not None]

    @property
    def running_means(self) -> list[Tensor]:
        """Stored mean [C] of each layer."""
        return [layer.running_mean for layer in self._layers if layer.running_mean is not None]

    @property
    def running_variances(self) -> list[Tensor]:
        """Stored variance [C] of each layer."""
        return [layer.running_var for layer in self._layers if layer.running_var is not None]

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
