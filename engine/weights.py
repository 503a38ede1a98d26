"""A classifier's weights on disk: read without executing anything, written so that equal weights give equal bytes."""

import hashlib
import json
import logging
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.shards import write_atomic

if TYPE_CHECKING:
    from diffdfkd.engine.classifier import Classifier

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Entries under which training scripts keep the state dict, beside epoch, accuracy and optimizer."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every key."""

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a network's floating-point tensors may be stored as."""

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
"""And the others, such as counters and masks."""

ZIP = b"PK\x03\x04"
"""How files of torch.save begin."""

COUNTER = "num_batches_tracked"
"""Of a BatchNorm layer; no output depends on it, and state dicts older than PyTorch 0.4.1 have none."""


def load_weights(model: nn.Module, path: str | Path, *, field: str) -> None:
    """Load a state dict that fits the model exactly; a pickle is read as plain tensors or not at all.

    Exactly but for the prefixes of DataParallel and torch.compile, which are taken off, and BatchNorm's counters of
    batches, which may be missing or too many. Raises UserError that names the file and the first three missing,
    unknown or mis-shaped keys.
    """
    where = f"{field}.weights"
    expected = model.state_dict()
    state = without_prefixes(read_state(Path(path), where), set(expected))
    state = {key: value for key, value in state.items() if key in expected or not key.endswith(f".{COUNTER}")}
    state |= {key: value for key, value in expected.items() if key.endswith(COUNTER) and key not in state}
    for key, value in state.items():
        if key in expected and (problem := _no_plain_tensor(value, expected[key])):
            raise UserError(
                f"{where}: {path}: {key} is {problem}, but a plain tensor of {_short(expected[key].dtype)} is needed; "
                "save the network's own state dict on the CPU, for example after model.float()"
            )
    shapes = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    head = next((name for name, layer in reversed(list(model.named_modules())) if isinstance(layer, nn.Linear)), None)
    if shapes and all(key in (f"{head}.weight", f"{head}.bias") for key in shapes):
        raise UserError(
            f"{where}: {path} has {len(state[shapes[0]])} classes ({shapes[0]}), the {field} has "
            f"{len(expected[shapes[0]])}; teacher.classes must name the classes of the weights, in order"
        )
    problems = {
        "missing": [key for key in expected if key not in state],
        "unknown": [key for key in state if key not in expected],
        "mis-shaped": [f"{key} {list(state[key].shape)} for {list(expected[key].shape)}" for key in shapes],
    }
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if found:
        raise UserError(
            f"{where}: {path} does not fit the architecture: {'; '.join(found)}; "
            f"check {field}.architecture and {field}.options"
        )
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{where}: {path} holds numbers that are not finite ({', '.join(broken[:3])}); "
            "fetch the file, or train the network, again"
        )
    negative = [key for key, value in state.items() if key.endswith("running_var") and (value < 0).any()]
    if negative:
        raise UserError(
            f"{where}: {path} holds negative variances ({', '.join(negative[:3])}); fetch the file, or train the "
            "network, again"
        )
    model.load_state_dict(state)


def _program(path: Path) -> str | None:
    """``exported`` or ``torchscript`` for a file of torch.export.save or torch.jit.save; None for others."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("models/model.json") for name in names):
        return "exported"
    return "torchscript" if any(name.endswith("/constants.pkl") for name in names) else None


def read_state(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds a state dict alone or beside other plain data.

    Nothing in a pickle is executed; raises UserError that begins with `where` for all else.
    """
    if not path.is_file():
        problem = "a folder; name the file in it" if path.is_dir() else "no such file; name the file of the state dict"
        raise UserError(f"{where}: {path}: {problem}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read ({error.strerror}); let it be read") from None
    if not start:
        raise UserError(f"{where}: {path} is empty; copy or download it again")
    if start == ZIP and not zipfile.is_zipfile(path):
        raise UserError(f"{where}: {path} is cut short; copy or download it again")
    if (program := _program(path)) is not None:
        raise UserError(
            f"{where}: {path} is a whole program and no state dict; as a teacher it is teacher.architecture={program} "
            "with guidance.batchnorm_weight=0"
        )
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(
                f"{where}: {path} is not a safetensors file, or is truncated ({error}); copy or download it again"
            ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make the reader fail in any way
        culprit = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        raise UserError(
            f"{where}: {path} is neither a safetensors nor a plain torch state dict, and is not executed"
            f"{f' (it holds {culprit[1]}, which is no tensor and no plain number)' if culprit else ''}; "
            "save it with safetensors, or torch.save(model.state_dict(), file)"
        ) from None
    if isinstance(state, dict) and not _is_state(state):
        for wrapper in WRAPPERS:
            if _is_state(state.get(wrapper)):
                log.info("%s: took the entry %s of %s", where, wrapper, path)
                return dict(state[wrapper])
    if not _is_state(state):
        held = (
            f"a dict with {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        )
        raise UserError(
            f"{where}: {path} is not a plain state dict but {held}; save the state dict alone, or as one of "
            f"{', '.join(WRAPPERS)}"
        )
    return dict(state)


def _no_plain_tensor(value: Tensor, wanted: Tensor) -> str | None:
    """What a tensor is that cannot be copied into the network's own as numbers of the same kind, or None."""
    if value.is_meta:
        return "a tensor without data (meta)"
    if value.is_quantized:
        return f"quantised ({_short(value.dtype)})"
    if value.layout != torch.strided or value.is_nested:
        return f"not dense ({_short(value.layout)})"
    known = PLAIN if wanted.is_floating_point() else (*PLAIN, *INTEGERS)
    return None if value.dtype in known else _short(value.dtype)


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _is_state(content: object) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def without_prefixes(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """The state dict with the prefixes that all of its keys share taken off, unless the model's own keys have them."""
    while state and not expected & state.keys():
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def save_classifier(classifier: "Classifier", path: str | Path, metadata: dict[str, str]) -> None:
    """Write the network's state dict as safetensors; equal weights and metadata give equal bytes."""
    write_atomic(Path(path), stable_safetensors(classifier.model.state_dict(), metadata))


def stable_safetensors(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of the tensors; equal tensors and metadata give equal bytes."""
    content = safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in state.items()})
    # safetensors writes its own metadata in hash order: we put ours into the header, sorted.
    length = int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (math.ceil(len(text) / 8) * 8 - len(text))
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def digest(path: str | Path) -> str:
    """SHA-256 in hexadecimal of a file, or of a folder's sorted relative names and file digests.

    Of a folder without its Markdown and hidden files (model card, ``.git``), which decide nothing.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    total = hashlib.sha256()
    names = [file.relative_to(path) for file in path.rglob("*") if file.is_file() and file.suffix.lower() != ".md"]
    for name in sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)):
        total.update(f"{name}\0{digest(path / name)}\n".encode())
    return total.hexdigest()
