"""A stage made ready to run: the same call whatever engine stands behind it, on input buffers of its own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffdfkd.engine.specification import Specification


class NoEngine(Exception):
    """This engine cannot be had here; the message is the reason and, where there is one, the cure, in one line."""

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        """``lasting``: whether the same code and packages would refuse the same stage again, so that it may be kept."""
        super().__init__(message)
        self.lasting = lasting


class Runner(ABC):
    """Calls a stage on its own input buffers, from which an engine reads.

    A caller may write into ``inputs`` itself and hand these same tensors, or views of their first rows, to the call:
    they are not copied then. A batch below the smallest one that the engine takes is padded with zeros, and of the
    outputs only its rows are returned. Outputs are valid until the next call.
    """

    engine: str
    """Name of the backend, as in a recipe."""

    def __init__(self, specification: Specification, device: torch.device) -> None:
        self.specification, self.device = specification, device
        most = specification.range[2]
        self.inputs = {
            port.name: torch.zeros(port.shape_at(most), dtype=port.dtype, device=device)
            for port in specification.inputs
        }

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the specification's order; ValueError, naming the port, for inputs that it does not take."""
        specification = self.specification
        rows = specification.rows_of(inputs)
        run = max(rows, specification.range[0])
        for value, port in zip(inputs, specification.inputs, strict=True):
            buffer = self.inputs[port.name]
            part = buffer[:rows] if port.batched else buffer
            if value.data_ptr() != part.data_ptr() or value.stride() != part.stride():
                part.copy_(value)
            if port.batched and run > rows:
                buffer[rows:run].zero_()
        outputs = self.run(run)
        if run == rows:
            return outputs
        ports = specification.outputs
        return tuple(value[:rows] if port.batched else value for value, port in zip(outputs, ports, strict=True))

    @abstractmethod
    def run(self, rows: int) -> tuple[Tensor, ...]:
        """Outputs for the first ``rows`` of the input buffers, in the specification's order."""

    def views(self, rows: int) -> Sequence[Tensor]:
        """The first ``rows`` of each input buffer, in the specification's order; ValueError for more than there are."""
        self.specification.check_rows(rows)
        ports = self.specification.inputs
        return [self.inputs[port.name][:rows] if port.batched else self.inputs[port.name] for port in ports]

    def close(self) -> None:  # noqa: B027  (nothing to give back by default)
        """Give back what the engine holds; it cannot be called afterwards."""
