"""Classifiers saved by ``torch.jit.save``: looked through before they are loaded, since TorchScript is code.

Its language knows tensors and little else, but it can write and read files (``aten::save``, ``aten::from_file``), and a
``__setstate__`` runs while the file is being loaded. A file is loaded only without the latter and without native
classes, and called only if every operator of its inlined graph is on the list below. Python's pickle has no part in it.
"""

import io
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.exported import INTERNAL, REFUSED

PRIM = (
    *("Constant", "ConstantChunk", "DictConstruct", "DictIndex", "GetAttr", "If", "ListConstruct", "ListUnpack"),
    *("Loop", "NumToTensor", "RaiseException", "Return", "TupleConstruct", "TupleIndex", "TupleSlice", "TupleUnpack"),
    *("Uninitialized", "abs", "data", "device", "dtype", "index", "is_cpu", "is_cuda", "is_meta", "is_nested"),
    *("isinstance", "layout", "max", "min", "rangelist", "requires_grad", "tolist", "type", "unchecked_cast"),
    "unchecked_unwrap_optional",
)
"""Operators of the language itself that compute on values."""

ATEN_INTERNAL = (
    *(*INTERNAL, "_convolution", "_convolution_mode", "_infer_size", "_list_to_tensor", "_set_item"),
    *("_size_if_not_equal", "_unwrap_optional", "__and__", "__contains__", "__derive_index", "__getitem__"),
    *("__interpolate", "__is__", "__isnot__", "__not__", "__or__", "__range_length", "__round_to_zero_floordiv"),
    "__upsample",
)
"""Internal ATen operators that scripted and traced classifiers hold."""

BEYOND = (*REFUSED, "get_gradients", "to_here", "local_value", "owner", "wait", "set_grad_enabled")
"""ATen operators that reach beyond the tensors that they are given."""


class ScriptedNetwork(nn.Module):
    """A TorchScript module that computes the same way from its first call on."""

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.script = script

    def forward(self, images: Tensor) -> Tensor:
        # The optimiser profiles the first calls and fuses from then on, which shows in an image's last bit.
        with torch.jit.optimized_execution(False):
            return self.script(images)


def read_torchscript(path: Path, channels: int, size: int, *, where: str) -> ScriptedNetwork:
    """The network of a TorchScript file, on the CPU; raises UserError for a file that could do more than compute."""
    content = path.read_bytes()
    name = f"{where}: {path}"
    try:
        _look_through(content, name)
        with warnings.catch_warnings():
            # TorchScript is deprecated, and its files are around.
            warnings.simplefilter("ignore", FutureWarning)
            script: Any = torch.jit.load(io.BytesIO(content), map_location="cpu")
        kinds = set(_kinds(script.inlined_graph))
    except (RuntimeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        problem = str(error).strip().splitlines()
        raise UserError(
            f"{name} is not a TorchScript file, or is damaged ({problem[0] if problem else type(error).__name__})"
        ) from error
    strange = sorted(kind for kind in kinds if not _allowed(kind))
    if strange:
        raise UserError(
            f"{name} uses {', '.join(strange[:3])}, which may do more than compute, and is not called; bring the "
            "module's code (package.module:factory) and its state dict"
        )
    return ScriptedNetwork(script)


def _look_through(content: bytes, where: str) -> None:
    """Refuse what would run while the file is loaded."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise UserError(f"{where} holds two files of one name, and is not loaded")
        if not any("/code/" in name and name.endswith(".py") for name in names):
            raise UserError(
                f"{where} is not a TorchScript file; a state dict needs teacher.architecture to name a network"
            )
        for name in names:
            # Tensors are plain bytes; all else is TorchScript code, or its pickles, which name classes.
            if name.endswith((".py", ".pkl")):
                text = archive.read(name)
                for word in (b"__setstate__", b"torch.classes"):
                    if word in text:
                        raise UserError(
                            f"{where} holds {word.decode()} ({name}), which runs while the file is loaded, as in "
                            "quantised networks; bring the module's code (package.module:factory) and its state dict"
                        )


def _kinds(graph: Any) -> Iterator[str]:
    """Operators of a graph and of all blocks inside it."""
    for node in graph.nodes():
        yield node.kind()
        for block in node.blocks():
            yield from _kinds(block)


def _allowed(kind: str) -> bool:
    space, _, name = kind.partition("::")
    if space == "aten":
        return name in ATEN_INTERNAL if name.startswith("_") else name not in BEYOND
    return space == "prim" and name in PRIM
