"""Whether an ONNX file, as an engine has read it, has the inputs and outputs that a specification names."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from diffdfkd.engine.runner import NoEngine
from diffdfkd.engine.specification import Specification


class Found(NamedTuple):
    """One input or output of a file."""

    name: str
    dtype: torch.dtype | None
    """None: one that no stage has."""
    shape: tuple[int | None, ...]
    """None: a dimension that is settled when the engine is called."""


def compare_ports(specification: Specification, found: Sequence[Found], where: Path) -> None:
    """NoEngine, naming the port, where a file's inputs and outputs, in their order, are not the specification's."""
    ports = (*specification.inputs, *specification.outputs)
    if [port.name for port in found] != [port.name for port in ports]:
        have, wanted = (", ".join(port.name for port in side) for side in (found, ports))
        raise NoEngine(f"{where}: a graph of {have}; {wanted} expected ({specification.name})")
    least, _, most = specification.range
    for port, (name, dtype, shape) in zip(ports, found, strict=True):
        fits = len(shape) == len(port.shape) and all(a in (None, b) for a, b in zip(shape, port.shape, strict=True))
        free = port.batched and not specification.static
        if not fits or dtype != port.dtype or (free and shape[0] is not None):
            was = "of another type" if dtype is None else dtype
            batches = f" for batches of {least} to {most}" if free else ""
            raise NoEngine(
                f"{where}: {name} is {was} {['any' if size is None else size for size in shape]}; {port.dtype} "
                f"{list(port.shape)}{batches} expected"
            )
