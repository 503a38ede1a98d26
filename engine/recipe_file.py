"""A recipe as written: found by name or path, read from YAML, its paths and ``key=value`` overrides resolved.

What the fields are and what they allow is in `diffdfkd.engine.recipe`; nothing heavy is imported here either.
"""

import difflib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe_yaml import parse_yaml

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"

PATHS = (
    *("prior.path", "teacher.weights", "student.weights", "guidance.decoder"),
    *("evaluation.images", "evaluation.labels"),
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
    for lora in _loras(content):
        if isinstance(lora.get("path"), str):
            lora["path"] = _home(lora["path"])
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
    is_yaml = path.suffix in (".yaml", ".yml")
    packaged = CONFIGS / f"{source}.yaml"
    if not is_yaml and packaged.is_file() and packaged.parent == CONFIGS:
        return packaged
    if path.is_dir():
        inside = path / "recipe.yaml"
        raise UserError(f"{path}: a folder; give {inside if inside.is_file() else 'a .yaml file'}")
    if is_yaml:
        if not path.exists():
            raise UserError(f"{path}: no such recipe file; give a .yaml file, or the name of a packaged recipe")
        return path
    beside = [name for name in (f"{source}.yaml", f"{source}.yml") if Path(name).is_file()]
    if beside:
        raise UserError(f"{source}: no packaged recipe; for the file here give {beside[0]}")
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(str(source), names, n=3, cutoff=0.4) or names
    raise UserError(f"{source}: no recipe of this name; there are {', '.join(near)}, or give a .yaml file")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a YAML file in UTF-8 ({error}); save it so") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a .yaml file that can") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path}: a recipe is a mapping of fields, this is {kind}; give it prior, teacher and student")
    return content


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    if isinstance(content.get("prior"), str):
        content["prior"] = {"path": content["prior"]}
    places = [(content.get(section), key) for section, _, key in (dotted.partition(".") for dotted in PATHS)]
    for section, key in (*places, *((lora, "path") for lora in _loras(content))):
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(value, str):
            relative = value.startswith(("./", "../"))
            section[key] = str((folder / value).resolve()) if relative else _home(value)


def _loras(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands in ``prior.loras``, as far as it has the form of one."""
    prior = content.get("prior")
    loras = prior.get("loras") if isinstance(prior, dict) else None
    return [lora for lora in loras if isinstance(lora, dict)] if isinstance(loras, list) else []


def _home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~/") else path


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{override}: an override is key=value, such as synthesis.steps=20")
    if key == "synthesis.prompt" and not (text.startswith("[") and text.endswith("]")):
        value: Any = text
    elif key in ("output", "prior", *PATHS) and not text.startswith("{"):
        value = _text(text)
    else:
        value = _value(text, override)
    if key == "engine" and isinstance(value, str):
        # What else is said of engines, such as their precision, stays.
        given = content.get("engine")
        value = {**(given if isinstance(given, dict) else {}), **engine_section(value)}
    *sections, last = key.split(".")
    node = content
    for depth, section in enumerate(sections):
        child = node.setdefault(section, {})
        if section == "prior" and isinstance(child, str):
            child = node[section] = {"path": child}
        if section == "engine" and isinstance(child, str):
            child = node[section] = engine_section(child)
        if not isinstance(child, dict):
            value = ".".join(sections[: depth + 1])
            raise UserError(f"{override}: {value} is a value, not a section; give {value}=...")
        node = child
    node[last] = value


def engine_section(name: str) -> dict[str, str]:
    """``engine: NAME`` in full."""
    return {"unet": name, "chain": name}


def _text(text: str) -> str | None:
    """Path of an override, as typed: a folder may be called 2024. The shell leaves ``~`` to us."""
    if text in ("", "null", "~"):
        return None
    return _home(text)


def _value(text: str, override: str) -> Any:
    try:
        yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text  # no YAML, such as a name that begins with an @: the field says whether a text will do
    return parse_yaml(text, override)


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
    problems = error.errors()
    # A section's misspelt name is why another is missing.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
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
    if first["type"] == "model_type":
        example = f"{field}.{next(iter(_fields(model, (*first['loc'], ''))), '...')}"
        return f"{field}: got {given}; this is a section, whose fields are given one by one, as in {example}=..."
    message = first["msg"].removeprefix("Value error, ")
    quotes = isinstance(first["input"], bool | int | float) and first["type"] == "string_type"
    hint = "; put it into quotes, since YAML reads it otherwise" if quotes else ""
    return f"{field}: got {given}; {message[0].lower()}{message[1:]}{hint}"
