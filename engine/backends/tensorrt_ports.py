"""Whether a TensorRT network or engine has the tensors that a specification names."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from diffdfkd.engine.runner import NoEngine
from diffdfkd.engine.specification import Port, Specification

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
"""By TensorRT's name of a data type."""
FREE = -1
"""A dimension that is settled when the engine is called."""


class Tensor(NamedTuple):
    """One input or output as TensorRT tells it."""

    dtype: str
    """TensorRT's name."""
    shape: tuple[int, ...]


def expected_shape(port: Port, specification: Specification) -> tuple[int, ...]:
    """With a free first dimension where the port is batched and the specification serves a range of batches."""
    if port.batched and not specification.static:
        return (FREE, *port.shape[1:])
    return port.shape


def compare(
    specification: Specification, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], where: str
) -> None:
    """NoEngine, naming the tensor at fault, what it is and what is expected; ``where`` begins the message.

    TensorRT may leave an output's later dimensions open until the engine is called: the runner looks at them then.
    """
    for kind, ports, found in (("input", specification.inputs, inputs), ("output", specification.outputs, outputs)):
        wanted = [port.name for port in ports]
        if set(found) != set(wanted):
            have = ", ".join(found) or f"no {kind}"
            raise NoEngine(f"{where}: its {kind}s are {have}; {', '.join(wanted)} expected ({specification.name})")
        for port in ports:
            tensor, shape = found[port.name], expected_shape(port, specification)
            open_ends = kind == "output"
            if DTYPES.get(tensor.dtype) != port.dtype or not _fits(tensor.shape, shape, open_ends):
                was = DTYPES.get(tensor.dtype, tensor.dtype)
                raise NoEngine(
                    f"{where}: {kind} {port.name} is {_words(was, tensor.shape)}; {_words(port.dtype, shape)} expected"
                )


def _fits(found: tuple[int, ...], expected: tuple[int, ...], open_ends: bool) -> bool:
    if len(found) != len(expected) or found[:1] != expected[:1]:
        return False
    return all(a == b or (open_ends and a == FREE) for a, b in zip(found[1:], expected[1:], strict=True))


def _words(dtype: object, shape: tuple[int, ...]) -> str:
    sizes = ", ".join("any" if size == FREE else str(size) for size in shape)
    return f"{str(dtype).removeprefix('torch.')} [{sizes}]"
