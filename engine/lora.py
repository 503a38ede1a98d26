"""LoRA: low-rank updates of linear and convolution weights, fused into a prior when it is loaded.

    W' = W + scale (alpha / rank) B A        Hu et al., 2021 (arXiv 2106.09685), section 4.1

A [rank, in, ...] and B [out, rank, ...] come from a safetensors file in one of the published key formats. Layers are
found by the names that this prior's own networks have, so every key of a file leads to one layer or to an error, and
after fusing the networks are as before: plain layers with other weights.
"""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior_files import check_safetensors, hub
from diffdfkd.engine.recipe import LoraRecipe
from diffdfkd.engine.weights import INTEGERS, PLAIN

log = logging.getLogger(__name__)

PUBLISHED_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers' scripts call the file."""

LONGEST_PATTERN = 300

_PARTS = (
    (re.compile(r"[._]lora[._](?:linear_layer\.)?(?:down|A)(?:\.default)?\.weight$"), "down"),
    (re.compile(r"[._]lora[._](?:linear_layer\.)?(?:up|B)(?:\.default)?\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
)
"""Ends of keys: kohya's ``.lora_down.weight``, PEFT's ``.lora_A.weight``, early diffusers' ``_lora.down.weight``."""


@dataclass
class Update:
    """What a file says about one layer."""

    layer: nn.Linear | nn.Conv2d
    name: str
    """As in the file, without the end."""
    path: str
    """Of the layer in its network, as PEFT's alpha_pattern names it."""
    component: str
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


def fuse_loras(loras: Sequence[LoraRecipe], unet: nn.Module, text_encoder: nn.Module) -> None:
    """Add the updates to the weights of the two networks, in place and in this order, in float32.

    Raises UserError for a file that is missing, no LoRA, of another model, or not finite.
    """
    for index, lora in enumerate(loras):
        field = f"prior.loras.{index}"
        file = find_lora(lora, field)
        if lora.revision is not None and Path(lora.path).exists():
            log.warning(
                "%s.revision: %s is not looked at, since %s is on this machine", field, lora.revision, lora.path
            )
        updates = read_updates(file, unet, text_encoder, field)
        for update, factor in updates:
            _fuse(update, lora.scale * factor)
        log.info("%s: fused into %d layers with scale %g", file, len(updates), lora.scale)


def find_lora(lora: LoraRecipe, field: str) -> Path:
    """File of a LoRA: the one named, the only one of a folder, or one of a hub repository, fetched at its commit."""
    path = Path(lora.path)
    if path.is_file():
        if lora.file is not None:
            raise UserError(f"{field}.file: got {lora.file}, but {field}.path is a file already; leave one away")
        return _safetensors(path, field)
    if lora.file is not None and (Path(lora.file).is_absolute() or ".." in Path(lora.file).parts):
        raise UserError(f"{field}.file: got {lora.file}; the name of a file inside {lora.path} is allowed")
    if path.is_dir():
        return _of_folder(path, lora.file, field)
    if path.suffix == ".safetensors":
        raise UserError(f"{field}.path: {path}: no such file")
    name = lora.file or PUBLISHED_NAME
    with hub(field, lora.path, lora.revision) as fetch:
        file = Path(fetch([name])) / name
    if not file.is_file():
        raise UserError(f"{field}.file: {lora.path} at {lora.revision} has no {name}; name one of its files")
    return _safetensors(file, field)


def read_updates(file: Path, unet: nn.Module, text_encoder: nn.Module, field: str) -> list[tuple[Update, float]]:
    """Updates of a file with alpha / rank of each; raises UserError unless every key leads to a layer that it fits."""
    from safetensors import safe_open

    check_safetensors(file)
    with safe_open(file, "pt") as content:
        metadata = content.metadata() or {}
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118  # no mapping
    layers = {**dict(_spellings(text_encoder, "text_encoder")), **dict(_spellings(unet, "unet"))}
    updates: dict[tuple[str, str], Update] = {}
    strange, lost = [], []
    for key, tensor in tensors.items():
        name, part = _split(key)
        if part is None or (part == "alpha" and tensor.numel() != 1):
            strange.append(key)
        elif name not in layers:
            lost.append(key)
        else:
            component, path, layer = layers[name]
            update = updates.setdefault((component, path), Update(layer, name, path, component))
            if getattr(update, part) is not None or update.name != name:
                raise UserError(f"{field}.path: {file}: updates {component}.{path} twice, the second time by {key}")
            if tensor.dtype not in (PLAIN if part != "alpha" else (*PLAIN, *INTEGERS)):
                raise UserError(
                    f"{field}.path: {file}: {key} is {str(tensor.dtype).removeprefix('torch.')}; convert it to "
                    "float32, float16 or bfloat16"
                )
            if not torch.isfinite(tensor).all():
                raise UserError(f"{field}.path: {file}: {key} has NaN or infinite values; download it again")
            setattr(update, part, float(tensor) if part == "alpha" else tensor.float())
    if not any(_split(key)[1] in ("down", "up") for key in tensors):
        raise UserError(
            f"{field}.path: {file}: no LoRA; its tensors are {_named([*tensors])}, not lora_down and lora_up"
        )
    if strange:
        raise UserError(
            f"{field}.path: {file}: {len(strange)} tensors are of no plain LoRA: {_named(strange)}; LoHa, LoKr, DoRA "
            "and biases are not supported"
        )
    if lost:
        raise UserError(
            f"{field}.path: {file}: {len(lost)} of {len(tensors)} keys match nothing of this prior: {_named(lost)}; "
            "take a LoRA of the prior's own model family, in kohya's or diffusers' format"
        )
    configuration = _configuration(metadata, file, field)
    return [(update, _ratio(update, configuration, file, field)) for update in updates.values()]


def _configuration(metadata: Mapping[str, str], file: Path, field: str) -> dict[str, Any]:
    """PEFT's configuration, where diffusers has written it into the file."""
    try:
        content = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{field}.path: {file}: its lora_adapter_metadata is no JSON object; download it again")
    return content


def _ratio(update: Update, configuration: Mapping[str, Any], file: Path, field: str) -> float:
    """Alpha / rank of a complete update whose matrices fit its layer; sqrt of the rank where the file says rsLoRA.

    Alpha stands beside the matrices, or in the configuration; without a word about it it is the rank, as in diffusers.
    """
    down, up = update.down, update.up
    if down is None or up is None:
        raise UserError(f"{field}.path: {file}: {update.name} has only one of its two matrices; download it again")
    rows, columns, rank = len(update.layer.weight), update.layer.weight[0].numel(), len(down)
    fits = down.dim() > 1 and up.dim() > 1 and rank > 0 and len(up) == rows
    if not fits or down[0].numel() != columns or up[0].numel() != rank:
        raise UserError(
            f"{field}.path: {file}: {update.name} has matrices {[*down.shape]} and {[*up.shape]}, which do not update "
            f"a weight {[*update.layer.weight.shape]}; take a LoRA of the prior's own model family"
        )

    def value(key: str) -> Any:
        return configuration.get(f"{update.component}.{key}", configuration.get(key))

    alpha = update.alpha
    if alpha is None:
        alpha = value("lora_alpha")
        patterns = value("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise UserError(
                f"{field}.path: {file}: alpha_pattern in its lora_adapter_metadata is {patterns}; an object of layers "
                "and their alphas is needed, or none"
            )
        # As PEFT looks it up: the first expression that the path, or its end behind a dot, is an instance of.
        fitting = (given for pattern, given in patterns.items() if _matches(pattern, update.path, file, field))
        alpha = next(fitting, alpha)
    if alpha is None:
        alpha = rank
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{field}.path: {file}: alpha of {update.name} is {alpha}; a finite number is needed")
    return alpha / (math.sqrt(rank) if value("use_rslora") else rank)


def _matches(pattern: str, path: str, file: Path, field: str) -> bool:
    """Whether a key of PEFT's alpha_pattern means the layer; being a stranger's expression, it has to be simple."""
    where = f"{field}.path: {file}: alpha_pattern in its lora_adapter_metadata has {pattern[:100]}"
    # A layer's number is as good as a letter: it can be read in one way only.
    plain = pattern.replace(r"\d+", "0")
    choices, repeats = len(re.findall(r"[?|]", plain)), len(re.findall(r"[*+{]", plain))
    if len(pattern) > LONGEST_PATTERN or re.search(r"\)[*+{]", plain) or choices > 8 or repeats > 3:
        raise UserError(f"{where}, which could take for ever to search for; save the LoRA with names of layers")
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{where}, which is no regular expression ({error}); save the LoRA again") from None


@torch.no_grad()
def _fuse(update: Update, factor: float) -> None:
    """W + factor B A; both matrices flattened, since a convolution's B is 1x1 and its A has the layer's kernel."""
    assert update.down is not None and update.up is not None
    weight = update.layer.weight
    down, up = (matrix.flatten(1).to(weight.device) for matrix in (update.down, update.up))
    weight.copy_(weight.float() + factor * (up @ down).view(weight.shape))


def _split(key: str) -> tuple[str, str | None]:
    """A key's layer and which part of the update it is; None for a key of another kind."""
    for pattern, part in _PARTS:
        if match := pattern.search(key):
            return key[: match.start()], part
    return key, None


def _spellings(network: nn.Module, component: str) -> Iterator[tuple[str, tuple[str, str, nn.Linear | nn.Conv2d]]]:
    """Every layer under each name that a published file may give it."""
    for path, layer in network.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        place = (component, path, layer)
        if component == "unet":
            yield f"lora_unet_{path.replace('.', '_')}", place
            # Early diffusers: attention processors held the updates.
            processed = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1", path)
            for spelling in {path, processed}:
                yield spelling, place
                yield f"unet.{spelling}", place
        else:
            # CLIP's own level, which files name and some versions of transformers have not.
            short = path.removeprefix("text_model.")
            for spelling in (short, f"text_model.{short}"):
                underscored = spelling.replace(".", "_")
                yield f"lora_te_{underscored}", place
                yield f"lora_te1_{underscored}", place
                yield f"text_encoder.{spelling}", place
                early = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", spelling)
                yield f"text_encoder.{early}", place


def _of_folder(folder: Path, name: str | None, field: str) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if name is not None:
        if not (folder / name).is_file():
            raise UserError(f"{field}.file: {folder / name}: no such file; there is {_named([f.name for f in files])}")
        return _safetensors(folder / name, field)
    if (folder / PUBLISHED_NAME).is_file():
        return folder / PUBLISHED_NAME
    if len(files) != 1:
        raise UserError(
            f"{field}.path: {folder}: has {len(files)} .safetensors files ({_named([f.name for f in files])}) and none "
            f"is called {PUBLISHED_NAME}; name one with {field}.file"
        )
    return files[0]


def _safetensors(file: Path, field: str) -> Path:
    if file.suffix != ".safetensors":
        raise UserError(f"{field}.path: {file}: LoRA weights are read from .safetensors alone; convert it")
    return file


def _named(names: Sequence[str]) -> str:
    """The first three."""
    return (", ".join(names[:3]) or "none") + (", ..." if len(names) > 3 else "")
