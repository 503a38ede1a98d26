"""The files of a prior: found on this machine or on the hub, and looked at before anything of them is loaded.

Nothing here needs torch or diffusers, so that a half-downloaded folder costs a second. Only safetensors and JSON count
as weights and configuration: neither can run code.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import PriorRecipe

COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
UNUSED = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")
"""Further parts of a Stable Diffusion folder, which a prior does without or reads by itself."""
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""Name of each component's weights, before its variant, its shard and ``.safetensors``."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5")

# What is fetched from the hub: one copy of the weights, safetensors only.
HUB_FILES = [
    "model_index.json",
    "README.md",
    "scheduler/*.json",
    "tokenizer/*",
    "*/config.json",
    *(
        f"{component}/{stem}{end}"
        for component, stem in STEMS.items()
        for end in (".safetensors", "-*-of-*.safetensors")
    ),
    *(f"{component}/{stem}.safetensors.index.json" for component, stem in STEMS.items()),
]


def find_prior(recipe: PriorRecipe) -> Path:
    """Folder of the prior; a hub id is fetched at its commit, or found in the hub library's cache.

    Of a hub repository the half-precision weights are fetched for the components that have no others.
    """
    folder = Path(recipe.path)
    if folder.is_dir():
        return folder
    refuse_nowhere(recipe)
    with hub("prior", recipe.path, recipe.revision) as fetch:
        # The model index alone first, so that another kind of model is refused before its gigabytes arrive.
        folder = Path(fetch(["model_index.json"]))
        component_classes(folder, complete=False)
        folder = Path(fetch(HUB_FILES))
        lacking = [name for name, stem in STEMS.items() if not _names(folder / name, stem, None)]
        if lacking:
            fetch([f"{name}/{STEMS[name]}*fp16*{end}" for name in lacking for end in (".safetensors", ".json")])
    return folder


def refuse_nowhere(recipe: PriorRecipe) -> None:
    """UserError unless the prior is a folder on this machine or a hub id with its commit; nothing is fetched."""
    if Path(recipe.path).is_file():
        raise UserError(f"prior.path: {recipe.path}: {_single_file(Path(recipe.path))}")
    if not Path(recipe.path).is_dir():
        _refuse_no_hub_id("prior", recipe.path, recipe.revision)


@contextmanager
def hub(field: str, repository: str, revision: str | None) -> Iterator[Any]:
    """A function that fetches files by patterns from a hub repository at its commit and returns their folder.

    Raises UserError that begins with ``field`` for what is no hub id, for no commit, and for what cannot be fetched.
    """
    _refuse_no_hub_id(field, repository, revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    # Its retries are warnings; the progress bars of a download stay.
    logging.set_verbosity_error()
    try:
        yield lambda patterns: snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{field}.path: {repository} at {revision} cannot be fetched from the hub ({first_line(error)}); "
            "check id, commit, network and access, or give a folder"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _refuse_no_hub_id(field: str, repository: str, revision: str | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repository):
        raise UserError(f"{field}.path: {repository}: no such folder or file; give one, or a hub id")
    if not is_commit(revision):
        raise UserError(
            f"{field}.revision: {repository} is no folder here, and as a hub id it needs a commit of 40 hexadecimal "
            f"digits, got {revision or 'none'}: branches move, and a run must be repeatable"
        )


def is_commit(revision: str | None) -> bool:
    """Whether it names one state of a repository for good, as no branch and no tag does."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def component_classes(folder: Path, *, complete: bool = True) -> dict[str, str]:
    """Class of each component by model_index.json, checked against what we know how to run, and that its folder is
    there if the prior is to be ``complete``."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{file}: missing; {_what_it_is(folder)}")
    index = read_json(file)
    kind = index.get("_class_name", "no pipeline")
    for part, entry in index.items():
        given = isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
        if given and part not in COMPONENTS and part not in UNUSED:
            raise UserError(
                f"{file}: {kind} has a {part} ({entry[1]}), which no Stable Diffusion 1.x or 2.x model has; take one "
                "of those (SDXL, SD 3, Flux and ControlNet pipelines are not supported)"
            )
    found: dict[str, str] = {}
    for component, allowed in COMPONENTS.items():
        entry = index.get(component)
        name: str | None = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name not in allowed:
            raise UserError(
                f"{file}: {component} is {name or 'missing'} in this {kind}; "
                f"a Stable Diffusion 1.x or 2.x model has {' or '.join(allowed)}"
            )
        if complete and not (folder / component).is_dir():
            raise UserError(f"{folder / component}: missing, though model_index.json names it; {_incomplete(folder)}")
        found[component] = name
    return found


def weight_files(folder: Path, component: str) -> list[Path]:
    """Files of a component's weights as `find_weights` finds them; UserError as there."""
    return _names(folder / component, STEMS[component], find_weights(folder, component))


def find_weights(folder: Path, component: str) -> str | None:
    """Variant of a component's weights in a prior's folder: None for plain ones, else ``fp16``.

    Every file is looked at: UserError names one that is missing, cut short, a Git LFS pointer or pickled.
    """
    path, stem = folder / component, STEMS[component]
    read_json(path / "config.json")
    for variant in (None, "fp16"):
        for file in _names(path, stem, variant):
            if not file.is_file():
                raise UserError(f"{file}: missing, though the index beside it names it; {_incomplete(folder)}")
            check_safetensors(file)
        if _names(path, stem, variant):
            return variant
    pickled = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickled and not _partial(folder):
        raise UserError(
            f"{path}: has only pickled weights ({pickled[0]}), which are not read since a pickle can run code; where "
            "you trust them: StableDiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of diffusers "
            "writes .safetensors"
        )
    others = sorted(file.name for file in path.glob("*.safetensors"))
    there = f" (there is {', '.join(others[:3])})" if others else ""
    raise UserError(f"{path}: has no weights: {stem}.safetensors is missing{there}; {_incomplete(folder)}")


def check_safetensors(file: Path) -> None:
    """UserError unless the file's header reads and describes the file to its last byte."""
    from safetensors import SafetensorError, safe_open

    refuse_pointer(file)
    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: cut short, or no safetensors file ({first_line(error)}); copy or download it again"
        ) from None


def refuse_pointer(file: Path) -> None:
    """UserError where Git LFS has left a pointer in the place of the file."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs.github.com/"):
        raise UserError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` in {file.parent}")


def read_scheduler_config(folder: Path) -> dict[str, Any]:
    """Scheduler configuration of a prior's folder, with the two fields that the stock pipeline corrects in old ones.

    Raises UserError for a schedule that is none of a diffusion model as Stable Diffusion's, such as flow matching.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise UserError(
            f"{file}: {config.get('_class_name', 'the scheduler')} has no beta_schedule, so its noise levels are "
            "unknown; a Stable Diffusion 1.x or 2.x model has scaled_linear"
        )
    for field, value in _noise_levels(config):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise UserError(
                f"{file}: {field} is {value}; the share of noise that a step adds is a number between 0 and 1 "
                "(Stable Diffusion: 0.00085 to 0.012)"
            )
    total = config.get("num_train_timesteps", 1000)
    if type(total) is not int or total < 1:
        raise UserError(f"{file}: num_train_timesteps is {total}; a positive whole number is needed (1000)")
    trained = config.get("trained_betas")
    if trained is not None and (not isinstance(trained, list) or len(trained) != total):
        held = f"{len(trained)} numbers" if isinstance(trained, list) else "no list"
        raise UserError(
            f"{file}: trained_betas is {held}; one number for each of num_train_timesteps={total} is needed"
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"{file}: prediction_type={prediction_type}; allowed: {', '.join(PREDICTION_TYPES)}")
    return config | {"steps_offset": 1, "clip_sample": False}


def _noise_levels(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """Fields of a scheduler's configuration that hold variances of steps, and their values."""
    trained = config.get("trained_betas")
    if trained is not None:
        values = trained if isinstance(trained, list) else [trained]
        return [("trained_betas", value) for value in values]
    return [(field, config[field]) for field in ("beta_start", "beta_end") if field in config]


def read_licence(card: Path) -> str | None:
    """Licence that a model card's YAML front matter states, or None."""
    if not card.is_file():
        return None
    match = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        # A stranger's card that is not valid YAML states no licence; it is no reason to refuse the model.
        return None
    if not isinstance(front, dict):
        return None
    name = front.get("license")
    if name == "other":
        name = front.get("license_name") or name
    return None if name is None else str(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError that names it."""
    if not path.is_file():
        raise UserError(f"{path}: missing; a prior is a complete folder in diffusers' Stable Diffusion format")
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a JSON file ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object expected, this is {type(content).__name__}; copy or download it again")
    return content


def first_line(error: Exception) -> str:
    """First line of a library's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _names(path: Path, stem: str, variant: str | None) -> list[Path]:
    """Files of a component's weights in one variant, all shards of them; none where there is no such variant."""
    infix = "" if variant is None else f".{variant}"
    single, index = path / f"{stem}{infix}.safetensors", path / f"{stem}.safetensors.index{infix}.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise UserError(f"{index}: names no shards in a weight_map; download it again")
    return [path / name for name in sorted(set(shards.values()))]


def _partial(folder: Path) -> list[Path]:
    """What the hub's downloader leaves of files that it has not finished."""
    found = [*folder.rglob("*.incomplete")]
    if folder.parent.name == "snapshots":
        found += folder.parent.parent.glob("blobs/*.incomplete")
    return found


def _incomplete(folder: Path) -> str:
    """The cure of a folder that lacks a file."""
    if partial := _partial(folder):
        return f"the download was interrupted ({partial[0].name[-60:]} is left): run it again, it continues"
    return "complete the folder, for example by downloading it again"


def _what_it_is(folder: Path) -> str:
    """Of a folder without a model index: what seems to be in it, and what to give in its place."""
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("_class_name") or "a single model"
        return f"the folder is one component ({kind}); prior.path is the folder of a whole Stable Diffusion model"
    if not any((folder / component).is_dir() for component in COMPONENTS):
        for file in sorted(folder.glob("*")):
            if file.suffix in SINGLE_FILES and file.is_file():
                return f"{file.name} is {_single_file(file)}"
    if _partial(folder):
        return _incomplete(folder)
    return "a prior is a complete folder in diffusers' Stable Diffusion format"


def _single_file(file: Path) -> str:
    if file.suffix not in SINGLE_FILES:
        return "a file; a prior is a folder in diffusers' Stable Diffusion format"
    return (
        "a single-file checkpoint; a prior is a folder, which StableDiffusionPipeline.from_single_file("
        f"'{file.name}').save_pretrained('FOLDER') of diffusers makes of it"
    )
