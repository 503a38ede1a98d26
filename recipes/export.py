"""The student as a product: ``student.onnx`` and a model card beside ``student.safetensors``.

diffdfkd export runs/fashion
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.licences import TEST_IMAGES
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.result_file import read_result
from diffdfkd.engine.run_recipe import read_run_recipe

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

ONNX, CARD = "student.onnx", "README.md"
SHARD_IMAGES = 16
"""Images of the run's first shard that parity is checked on."""


def export(folder: Path) -> str:
    """Write both again from what lies in a run's folder, and what ``result.json`` says of them; what to tell a person.

    Raises UserError where the folder holds no finished run or another process works on it, and where the student cannot
    be written as ONNX.
    """
    from diffdfkd.recipes.run_folder import hold

    read_run_recipe(folder)
    with hold(folder):
        return _export(folder)


def _export(folder: Path) -> str:
    from diffdfkd.engine.weights import digest

    student, file = folder / "student" / "student.safetensors", folder / "result.json"
    recipe, _ = read_run_recipe(folder)
    if not student.is_file() or not file.is_file():
        raise UserError(f"{folder}: the run is not finished; give its command again, then export")
    result = read_result(file)
    if result["student_sha256"] != digest(student):
        raise UserError(f"{file}: of another student than {student}; give the command of the run again")
    result = remake(folder, recipe, result, anew=True)
    onnx = result["onnx"]
    if "reason" in onnx:
        raise UserError(f"student.architecture: no ONNX file is written: {onnx['reason']}; {student} is complete")
    return (
        f"wrote {folder / 'student' / ONNX}, {onnx['bytes'] / 2**20:.2f} MiB; it differs from torch by at most "
        f"{onnx['max_abs']:.1e} ({onnx['runtime']}, {onnx['images']} images)\nwrote {folder / 'student' / CARD}"
    )


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Write ``result.json``."""
    from diffdfkd.engine.shards import write_atomic

    write_atomic(file, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def complete(folder: Path, result: dict[str, Any]) -> bool:
    """Whether card and ONNX file are there as ``result.json`` describes them."""
    return (folder / "student" / CARD).is_file() and _exported(folder, result)


def _exported(folder: Path, result: dict[str, Any]) -> bool:
    from diffdfkd.engine.weights import digest

    onnx, model = result.get("onnx") or {}, folder / "student" / ONNX
    return "reason" in onnx or (model.is_file() and digest(model) == onnx.get("sha256"))


def remake(folder: Path, recipe: Recipe, result: dict[str, Any], *, anew: bool = False) -> dict[str, Any]:
    """What is lost of both files, or both `anew`, ``result.json`` and the report with them; returns the result."""
    from diffdfkd.engine.report import write_report

    _, content = read_run_recipe(folder)
    licences = run_licences(folder, recipe, content["frozen"].get("images"), result["licences"])
    if anew or not _exported(folder, result):
        onnx = export_student(folder, recipe, licences, result["student_sha256"])
    else:
        onnx = result["onnx"]
    described = {**result, "licences": licences, "onnx": onnx}
    write_card(folder, recipe, described)
    if described != result:
        (folder / "report.html").unlink(missing_ok=True)
        write_result(folder / "result.json", described)
        write_report(folder)
    return described


def export_student(folder: Path, recipe: Recipe, licences: dict[str, str | None], sha256: str) -> dict[str, Any]:
    """Write ``student.onnx``; returns its file, bytes, SHA-256 and parity, or the reason why there is none."""
    from dataclasses import asdict

    from diffdfkd.engine.licences import inherited_licence
    from diffdfkd.engine.onnx_export import NotExportable, export_onnx
    from diffdfkd.engine.weights import digest
    from diffdfkd.recipes.figures import load_student

    path = folder / "student" / ONNX
    licence, name = inherited_licence(licences)
    metadata = {"licence": name or licence, "source": f"student.safetensors, SHA-256 {sha256}"}
    student = load_student(path.with_name("student.safetensors"), recipe).eval()
    try:
        parity = export_onnx(student, path, metadata=metadata, images=shard_images(folder, recipe))
    except NotExportable as problem:
        path.unlink(missing_ok=True)  # of an earlier student
        log.warning("student.onnx is not written: %s", problem)
        return {"reason": str(problem)}
    return {"file": f"student/{ONNX}", "bytes": path.stat().st_size, "sha256": digest(path), **asdict(parity)}


def shard_images(folder: Path, recipe: Recipe) -> list["Tensor"]:
    """A batch [n,C,H,W] in [0, 1] of the first images of the run's own shards, none for a run without."""
    from diffdfkd.engine.images import open_images
    from diffdfkd.engine.shards import DamagedShard, round_folder, shard_path, verify_shard

    tar, teacher = shard_path(round_folder(folder / "synthetic", 0), 0), recipe.teacher
    if not tar.is_file():
        return []
    try:
        verify_shard(tar)
    except DamagedShard as reason:
        raise UserError(f"{tar}: {reason}; give the command of the run again, which makes the shard anew") from None
    images = open_images(
        tar, channels=teacher.channels, size=teacher.size, interpolation=teacher.interpolation, labelled=False
    )
    pixels, _ = images.read(range(min(SHARD_IMAGES, len(images))))
    return [pixels.float() / 255]


def run_licences(
    folder: Path, recipe: Recipe, images: str | None, known: dict[str, str | None] | None = None
) -> dict[str, str | None]:
    """Of all that the run used; the prior's as its card stated it when the images were made.

    ``known`` is what ``result.json`` says, for images of another place that have been taken away since. Raises
    UserError for a sidecar that is not whole.
    """
    from diffdfkd.engine.licences import image_licences, licences
    from diffdfkd.engine.shards import DamagedShard, list_shards

    if images is not None:
        if Path(images).exists():
            return licences(recipe, None, image_licences(Path(images)))
        kept = {name: licence for name, licence in (known or {}).items() if "images" in name and name != TEST_IMAGES}
        return licences(recipe, None, kept or {"images": None})
    try:
        sidecar = next(list_shards(folder / "synthetic", 0), None)
    except DamagedShard as reason:
        raise UserError(
            f"{folder / 'synthetic'}: {reason}; give the command of the run again, which makes the shard anew"
        ) from None
    return licences(recipe, sidecar.licence if sidecar else None)


def write_card(folder: Path, recipe: Recipe, result: dict[str, Any]) -> None:
    """Write ``README.md`` beside the student, unless it says the same already."""
    from diffdfkd.engine.model_card import model_card
    from diffdfkd.engine.shards import write_atomic

    _, written = read_run_recipe(folder)
    frozen = written["frozen"]
    content = model_card(recipe, result, frozen.get("digests") or {}, frozen.get("images")).encode("utf-8")
    path = folder / "student" / CARD
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)
