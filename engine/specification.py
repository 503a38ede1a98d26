"""What a stage takes and gives: the one description that export, builders, runners, cache and tests all read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Port(NamedTuple):
    """One input or output of a stage."""

    name: str
    shape: tuple[int, ...]
    """At the usual batch."""
    dtype: torch.dtype
    batched: bool = True
    """Whether the first dimension is the batch; weights and means over the batch have none."""

    def shape_at(self, rows: int) -> tuple[int, ...]:
        """Its shape at a batch of ``rows``."""
        return (rows, *self.shape[1:]) if self.batched else self.shape


@dataclass(frozen=True)
class Specification:
    """Names, shapes and dtypes of a stage's inputs and outputs, in the order of its call, and its batches."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    least: int | None = None
    """Smallest batch, in rows of the inputs; None: the usual one alone (a static engine)."""
    most: int | None = None
    """Largest batch, likewise."""

    def __post_init__(self) -> None:
        names = [port.name for port in (*self.inputs, *self.outputs)]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: two ports have one name")
        if any(port.batched and not port.shape for port in (*self.inputs, *self.outputs)):
            raise ValueError(f"{self.name}: a port without dimensions has no batch; batched=False expected")
        batches = {port.shape[0] for port in (*self.inputs, *self.outputs) if port.batched}
        if len(batches) != 1 or not any(port.batched for port in self.inputs):
            raise ValueError(
                f"{self.name}: its ports have batches of {sorted(batches)} rows; one, of an input, expected"
            )
        least, usual, most = self.range
        if not 1 <= least <= usual <= most:
            raise ValueError(f"{self.name}: batches from {least} over {usual} to {most}; ascending ones expected")

    @property
    def rows(self) -> int:
        """The usual batch, for which an engine is tuned."""
        return next(port.shape[0] for port in self.inputs if port.batched)

    @property
    def range(self) -> tuple[int, int, int]:
        """Smallest, usual and largest batch in rows."""
        rows = self.rows
        return rows if self.least is None else self.least, rows, rows if self.most is None else self.most

    @property
    def static(self) -> bool:
        """Whether one batch alone is served; smaller ones are padded to it."""
        least, _, most = self.range
        return least == most

    def rows_of(self, inputs: Sequence[Tensor]) -> int:
        """Rows of a call's inputs; ValueError, naming the port, for what this stage does not take."""
        if len(inputs) != len(self.inputs):
            wanted = ", ".join(port.name for port in self.inputs)
            raise ValueError(f"{self.name}: got {len(inputs)} inputs; it takes {wanted}")
        first = next(value for value, port in zip(inputs, self.inputs, strict=True) if port.batched)
        # One without dimensions is refused below, by its name.
        rows = len(first) if first.dim() else 1
        self.check_rows(rows)
        for value, port in zip(inputs, self.inputs, strict=True):
            if tuple(value.shape) != port.shape_at(rows) or value.dtype != port.dtype:
                raise ValueError(
                    f"{self.name}: {port.name} is {value.dtype} {list(value.shape)}; {port.dtype} "
                    f"{list(port.shape_at(rows))} expected"
                )
        return rows

    def check_rows(self, rows: int) -> None:
        """ValueError for a batch that this stage does not take; one below the range is padded."""
        most = self.range[2]
        if rows < 1:
            raise ValueError(f"{self.name}: an empty batch; at least one row expected")
        if rows > most:
            raise ValueError(
                f"{self.name}: a batch of {rows} rows is more than this engine was built for, {most}; give smaller "
                "batches, or build it for larger ones (synthesis.batch_size)"
            )

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        least, usual, most = self.range
        return {
            "name": self.name,
            "inputs": [_describe(port) for port in self.inputs],
            "outputs": [_describe(port) for port in self.outputs],
            "batches": [least, usual, most],
        }


def _describe(port: Port) -> Mapping[str, Any]:
    dtype = str(port.dtype).removeprefix("torch.")
    return {"name": port.name, "dtype": dtype, "shape": list(port.shape), "batched": port.batched}
