"""Classifiers saved by ``torch.jit.save``: looked through before they are loaded, since TorchScript is code.

Its language knows tensors and little else, but it can write and read files (``aten::save``, ``aten::from_file``), and a
``__setstate__`` runs while the file is being loaded. A file is loaded only without the latter, hooks and native
classes, and called only if every operator of its inlined graph is on the list below. Python's pickle has no part in it.

What torch loads is an archive written here, of the entries that were looked through and nothing else: its own reader
ignores the case of names and may find another directory in the file than Python's does.
"""

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.exported import INTERNAL, beyond

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

BEYOND = ("get_gradients", "to_here", "local_value", "owner", "wait", "set_grad_enabled")
"""ATen operators of the language that reach beyond the values that they are given, beside those of programs."""

ENTRIES = re.compile(r"(data|constants)(\.pkl|/[^/]+)|code/.+\.py|(\.data/)?version|byteorder")
"""Entries of an archive that torch.jit.load needs, below its folder; debugging information and the like is left out."""

AT_LOAD = re.compile(rb"__setstate__|__forward_hooks__|__forward_pre_hooks__|torch\W*\.\W*classes\b")
"""What runs while a file is loaded, or at a call beside the graph."""

GLOBALS = re.compile(
    r"collections OrderedDict|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|torch device"
    r"|torch\._utils _rebuild_tensor_v2|torch\.jit\._pickle (build_\w+list|restore_type_tag)|__torch__[\w.]* \w+"
)
"""Modules and names in the archive's pickles: plain tensors, lists, and classes of the archive's own code."""


class ScriptedNetwork(nn.Module):
    """A TorchScript module that computes the same way from its first call on."""

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.script = script

    def forward(self, images: Tensor) -> Tensor:
        # The optimiser profiles the first calls and fuses from then on, which shows in an image's last bit.
        with torch.jit.optimized_execution(False):
            # Not the module itself, which would run hooks that are no part of the graph.
            return self.script.forward(images)


def read_torchscript(path: Path, channels: int, size: int, *, where: str) -> ScriptedNetwork:
    """The network of a TorchScript file, on the CPU; raises UserError for a file that could do more than compute."""
    content = path.read_bytes()
    name = f"{where}: {path}"
    try:
        content = _looked_through(content, name)
        with warnings.catch_warnings():
            # TorchScript is deprecated, and its files are around.
            warnings.simplefilter("ignore", FutureWarning)
            script: Any = torch.jit.load(io.BytesIO(content), map_location="cpu")
        _refuse_hooks(script, name)
        kinds = {kind for graph in _graphs(script) for kind in _kinds(graph)}
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


def _looked_through(content: bytes, where: str) -> bytes:
    """The archive that torch may load, written anew; raises UserError for what would run while it is loaded."""
    anew = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        zipfile.ZipFile(anew, "w", zipfile.ZIP_STORED) as checked,
    ):
        names = archive.namelist()
        if len({name.lower() for name in names}) < len(names):
            raise UserError(f"{where} holds two files of one name, and is not loaded")
        if not any("/code/" in name and name.endswith(".py") for name in names):
            raise UserError(
                f"{where} is not a TorchScript file; a state dict needs teacher.architecture to name a network"
            )
        folder = names[0].partition("/")[0] + "/"
        for name in names:
            entry = name.removeprefix(folder)
            if not name.startswith(folder) or not ENTRIES.fullmatch(entry):
                continue
            text = archive.read(name)
            # Tensors are plain bytes; all else is TorchScript code, or its pickles, which name classes.
            if entry.endswith((".py", ".pkl")):
                found = [match.group().decode(errors="replace") for match in AT_LOAD.finditer(text)]
                if entry.endswith(".pkl"):
                    found += _strange_globals(text)
                if found:
                    raise UserError(
                        f"{where} holds {found[0]} ({name}), which runs while the file is loaded or called, as in "
                        "quantised networks; bring the module's code (package.module:factory) and its state dict"
                    )
            checked.writestr(f"archive/{entry}", text)
    return anew.getvalue()


def _strange_globals(pickled: bytes) -> Iterator[str]:
    """What a pickle names, or how it names it, that no pickle of a plain network does."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            if not GLOBALS.fullmatch(str(argument)) or "torch.classes" in str(argument).replace(" ", "."):
                yield str(argument).replace(" ", ".")
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX") or opcode.name.startswith("EXT"):
            yield opcode.name


def _refuse_hooks(script: Any, where: str) -> None:
    """Hooks run around the graph, which does not show those of the outermost module."""
    for module in script.modules():
        if module._c._get_forward_hooks() or module._c._get_forward_pre_hooks():
            raise UserError(f"{where} has forward hooks, which are not run; save it without them")


def _graphs(script: Any) -> Iterator[Any]:
    """The graph of a call, and those of the methods that Python's own syntax would call, such as ``__bool__``."""
    yield script.inlined_graph
    for module in script.modules():
        for name in module._c._method_names():
            if name.startswith("__"):
                yield module._c._get_method(name).inlined_graph


def _kinds(graph: Any) -> Iterator[str]:
    """Operators of a graph and of all blocks inside it."""
    for node in graph.nodes():
        yield node.kind()
        for block in node.blocks():
            yield from _kinds(block)


def _allowed(kind: str) -> bool:
    space, _, name = kind.partition("::")
    if space == "aten":
        return name in ATEN_INTERNAL if name.startswith("_") else not (beyond(name) or name in BEYOND)
    return space == "prim" and name in PRIM
