"""A recipe as written: found by name or path, read from YAML, its paths and ``key=value`` overrides resolved.

What the fields are and what they allow is in `diffdfkd.engine.recipe`; nothing heavy is imported here either.
"""

import difflib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from diffdfkd.engine.errors import UserError

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"

PATHS = ("prior.path", "teacher.weights", "student.weights", "evaluation.images", "evaluation.labels")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, which YAML 1.1 reads as a string for want of a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+"), list("+-.0123456789")
)


def read_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Plain content of a recipe, not yet validated; raises UserError for what is no recipe and no override."""
    if isinstance(source, Mapping):
        content = json.loads(json.dumps(dict(source), default=str))
    else:
        path = find_recipe(source)
        content = _read_yaml(path)
        # What a run wrote about itself beside its recipe: versions and digests, no part of what is asked for.
        content.pop("frozen", None)
        _resolve_paths(content, path.parent)
    for override in overrides:
        _override(content, override)
    named = {override.partition("=")[0] for override in overrides}
    evaluation = content.get("evaluation")
    if "evaluation.images" in named and "evaluation.labels" not in named and isinstance(evaluation, dict):
        # The recipe's labels belong to the recipe's images; an IDX file finds those beside it by itself.
        evaluation.pop("labels", None)
    return content


def repeating_command(images: str | None) -> str:
    """What repeats the run that left a ``recipe.yaml``, ``images`` being the folder that its student learnt from."""
    return (
        "diffdfkd run recipe.yaml" if images is None else f"diffdfkd distill recipe.yaml --images {shlex.quote(images)}"
    )


def find_recipe(source: str | Path) -> Path:
    """File of a packaged recipe's name or of a path; raises UserError with the nearest names."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file")
        return path
    packaged = CONFIGS / f"{source}.yaml"
    if packaged.is_file() and packaged.parent == CONFIGS:
        return packaged
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(str(source), names, n=3, cutoff=0.4) or names
    raise UserError(f"{source}: no recipe of this name; there are {', '.join(near)}, or give a .yaml file")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of fields, this is {type(content).__name__}")
    return content


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    if isinstance(content.get("prior"), str):
        content["prior"] = {"path": content["prior"]}
    for dotted in PATHS:
        section, _, key = dotted.partition(".")
        value = content.get(section, {}).get(key) if isinstance(content.get(section), dict) else None
        if isinstance(value, str) and value.startswith(("./", "../")):
            content[section][key] = str((folder / value).resolve())
        elif isinstance(value, str) and value.startswith("~/"):
            content[section][key] = str(Path(value).expanduser())


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override}: an override is key=value, such as synthesis.steps=20")
    if key == "synthesis.prompt":
        value: Any = text
    elif key in ("output", "prior", *PATHS) and not text.startswith("{"):
        value = _text(text)
    else:
        value = _value(text)
    *sections, last = key.split(".")
    node = content
    for depth, section in enumerate(sections):
        child = node.setdefault(section, {})
        if section == "prior" and isinstance(child, str):
            child = node[section] = {"path": child}
        if not isinstance(child, dict):
            raise UserError(f"{override}: {'.'.join(sections[: depth + 1])} is a value, not a section")
        node = child
    node[last] = value


def _text(text: str) -> str | None:
    """Path of an override, as typed: a folder may be called 2024. The shell leaves ``~`` to us."""
    if text in ("", "null", "~"):
        return None
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def _value(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError:
        return text


def _fields(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names allowed at the last element of the location, for the nearest-name hint."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem in one line: field path, what was given, what is allowed."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    given = json.dumps(first["input"], default=str)
    given = given if len(given) < 80 else given[:77] + "..."
    if first["type"] == "extra_forbidden":
        allowed = _fields(model, first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f"did you mean {near[0]}? allowed" if near else "allowed"
        return f"{field}: unknown field; {hint}: {', '.join(allowed)}"
    if first["type"] == "missing":
        return f"{field}: missing; add it to the recipe or give {field}=..."
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: got {given}; {message[0].lower()}{message[1:]}"
