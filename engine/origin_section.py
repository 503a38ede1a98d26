"""The report's parts on the student's files, on where everything comes from, and on how to do it again."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from diffdfkd.engine.licences import NOT_STATED, TEST_IMAGES, digest_name, inherited_licence
from diffdfkd.engine.page import Part, facts, fold, table
from diffdfkd.engine.quantities import size
from diffdfkd.engine.recipe_file import repeating_command

Content = Mapping[str, Any]


def product_section(folder: Path, result: Content) -> Part | None:
    """The files in ``student``, and whether the ONNX file answers as the network does; None before there are any."""
    onnx: Content = result.get("onnx") or {}
    names = ("student.safetensors", "student.onnx", "README.md")
    files = [(name, folder / "student" / name) for name in names if (folder / "student" / name).is_file()]
    if not files or not result:
        return None
    what = {
        "student.safetensors": "weights, architecture and preprocessing; read_student() loads it",
        "student.onnx": "the same with the normalisation inside, any number of images at once",
        "README.md": "model card: figures, how to use it, licences",
    }
    lines = [(f"student/{name}", size(path.stat().st_size), what[name]) for name, path in files]
    note = ""
    if "reason" in onnx:
        note = f"There is no ONNX file: {onnx['reason']}."
    elif onnx:
        note = (
            f"ONNX beside torch on {onnx['images']} images, by {onnx['runtime']}: logits differ by at most "
            f"{onnx['max_abs']:.1e}, {onnx['max_rel']:.1e} of the largest (allowed: {onnx['tolerance']:.0e})."
        )
    body = f'{table(("file", "size", "what"), lines, (0, 2))}<p class="note">{escape(note)}</p>'
    return Part("student", "The student", body)


def provenance_section(recipe: Content, result: Content) -> Part:
    """Prior, LoRAs, teacher and data: where from, which bytes, under which licence."""
    frozen = recipe.get("frozen") or {}
    digests: Content = frozen.get("digests") or {}
    used: Content = result.get("licences") or {}
    prior, teacher, evaluation = recipe["prior"], recipe["teacher"], recipe["evaluation"]
    prior_licence = used.get("prior") or prior.get("licence") or result.get("prior_licence")
    lines: list[tuple[str, str, str | None]] = []
    if frozen.get("images"):
        stated = {name: licence for name, licence in used.items() if "images" in name and name != TEST_IMAGES}
        lines += [(name, _short(frozen["images"]), licence) for name, licence in (stated or {"images": None}).items()]
    else:
        lines.append(("prior", _source(prior), prior_licence))
        for number, lora in enumerate(prior.get("loras") or [], 1):
            licence = used.get(f"LoRA {number}") or lora.get("licence")
            lines.append((f"LoRA {number}, scale {lora['scale']}", _source(lora), licence))
    licence = used.get("teacher") or teacher.get("licence")
    lines.append(("teacher", _short(teacher.get("weights") or ""), licence))
    if evaluation.get("images"):
        lines.append(("test images", _short(evaluation["images"]), evaluation.get("licence")))
    rows = [(what, where, licence or NOT_STATED) for what, where, licence in lines]
    hashes = [(f"{digest_name(name)}, SHA-256", value) for name, value in digests.items()]
    if result.get("student_sha256"):
        hashes.append(("student, SHA-256", result["student_sha256"]))
    inherited = ""
    if used:
        licence, name = inherited_licence(used)
        says = f"{licence} ({name})" if name else licence
        inherited = (
            f'<p class="note">The card of the student says: {escape(says)}. '
            "An OpenRAIL licence counts models trained on its model&#39;s output as derivatives, and its use "
            "restrictions go with them.</p>"
        )
    versions = [(f"version of {name}", str(version)) for name, version in (frozen.get("versions") or {}).items()]
    body = f"{table(('what', 'from', 'licence'), rows, (0, 1, 2))}{inherited}{facts(hashes)}"
    return Part("provenance", "Provenance and licences", body + fold("Versions", facts(versions)))


def reproduction_section(recipe: Content) -> Part:
    """The command that repeats the run, and every setting."""
    frozen = recipe.get("frozen") or {}
    sections = {key: value for key, value in recipe.items() if isinstance(value, dict) and key != "frozen"}
    top = {key: value for key, value in recipe.items() if key not in sections and key != "frozen"}
    tables = [
        f"<div><h3>{escape(name)}</h3>{facts((key, _plain(value)) for key, value in section.items())}</div>"
        for name, section in {"run": top, **sections}.items()
    ]
    settings = f'<div class="columns">{"".join(tables)}</div>'
    again = f"{repeating_command(frozen.get('images'))} output=ANOTHER-FOLDER"
    body = (
        '<p class="note">The recipe.yaml beside this page holds all of this; the command repeats the run, from its '
        f"folder.</p><pre>{escape(again)}</pre>{fold('Every setting', settings)}"
    )
    return Part("reproduction", "How to repeat it", body)


def _source(thing: Content) -> str:
    return f"{thing['path']} at {thing['revision']}" if thing.get("revision") else _short(thing["path"])


def _short(path: str) -> str:
    """The end of a path: pages are passed on, and the settings below hold the whole."""
    return "/".join(Path(path).parts[-2:])


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
