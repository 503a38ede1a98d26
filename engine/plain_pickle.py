"""Pickles of plain data, as CIFAR is published, read so that nothing named in them is ever called.

A pickle is a program. Here the few names that numbers in an array need stand for functions of this module, which take
apart what NumPy would have been handed; every other name is refused, and the file with it.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffdfkd.engine.errors import UserError

TYPES = {"u1": "|u1", "i4": "<i4", "i8": "<i8"}
"""Element types that images and labels come in."""


class _Name:
    """What the pickle gets for a name: it may call it, and do nothing else to it."""

    __slots__ = ("_made",)

    def __init__(self, made: Callable[..., Any]) -> None:
        self._made = made

    def __call__(self, *arguments: Any) -> Any:
        return self._made(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a name")


class _Type:
    """Stands for a NumPy dtype; its state, where it has one, says the order of the bytes."""

    __slots__ = ("name",)

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = _text(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if _text(state[1]) not in "|<":
            raise pickle.UnpicklingError("it holds big-endian numbers")


class _Array:
    """Stands for a NumPy array until its state comes."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, type_, fortran, content = state
        self.array = _numbers(content, type_, shape, "F" if fortran else "C")


def _from_buffer(content: Any, type_: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.array = _numbers(content, type_, shape, _text(order))
    return made


def _numbers(content: Any, type_: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(type_, _Type) or type_.name not in TYPES or not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError(f"it holds an array that is not of {', '.join(TYPES)}")
    dtype = np.dtype(TYPES[type_.name])
    if math.prod(shape) * dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"it holds an array {shape} of {len(content)} bytes")
    return np.frombuffer(bytes(content), dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: Any, encoding: Any) -> bytes:
    # Bytes, as Python 3 writes them for readers of Python 2.
    if _text(encoding) != "latin1":
        raise pickle.UnpicklingError(f"it encodes to {encoding}")
    return text.encode("latin1")


def _forbidden(*_: Any) -> Any:
    raise pickle.UnpicklingError("it calls numpy.ndarray")


NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _forbidden,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _Name(NAMES[module, name])


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """A pickled dict of numbers, strings, lists and integer arrays, its keys as text; 8-bit strings come as bytes.

    UserError that names the file if it is damaged, or refers to anything besides; nothing of it is executed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); unpack the data set again") from None
    try:
        held = _Reader(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(held, dict):
            raise pickle.UnpicklingError(f"it holds a {type(held).__name__}")
        return {str(_text(key)): value.array if isinstance(value, _Array) else value for key, value in held.items()}
    except Exception as error:  # bytes that are no pickle make the reader fail in any way
        problem = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: not a pickle of plain numbers and names ({problem}), and not executed; unpack the data set again"
        ) from None


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def texts(values: Any, path: Path, key: str) -> list[str]:
    """A list of strings or 8-bit strings as text; UserError names the file and what was to be a list of names."""
    names = [_text(value) for value in values] if isinstance(values, list) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: has no list of names {key}; unpack the data set again")
    return names
