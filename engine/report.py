"""One self-contained HTML page about a run, from the files in its folder; sections without data are left out."""

import json
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

import yaml

from diffdfkd.engine.accounts import Accounts, accounts
from diffdfkd.engine.charts import bars, heat_table, line_chart
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.gallery import cutmix_gallery, guidance_gallery, training_gallery
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.page import facts, page
from diffdfkd.engine.recipe_file import repeating_command
from diffdfkd.engine.shards import write_atomic

Rows = list[dict[str, Any]]
Content = dict[str, Any]


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` and return its path; raises UserError where the folder holds no run."""
    recipe_file = folder / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{folder}: not a folder of a run (it has no recipe.yaml); name the output of diffdfkd run")
    recipe = _read_recipe(recipe_file)
    result = _read_json(folder / "result.json")
    journal = folder / "metrics.jsonl"
    rows = read_journal(journal) if journal.is_file() else []
    account = accounts(rows)
    sections = [
        _head(folder, recipe, result, account),
        guidance_gallery(folder),
        cutmix_gallery(folder),
        training_gallery(folder, recipe["teacher"]["classes"]),
        _curves(rows),
        _evaluation(result),
        _cost(result, account),
        _configuration(recipe, result),
    ]
    path = folder / "report.html"
    title = f"{folder.resolve().name}: a distilled student"
    write_atomic(path, page(title, "\n".join(filter(None, sections))).encode("utf-8"))
    return path


def _read_recipe(path: Path) -> Content:
    problem = "it is not what a run writes"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(recipe, dict) and isinstance(recipe.get("frozen"), dict):
            return recipe
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"{path}: damaged; put it back from a copy, or run into another folder ({problem})")


def _read_json(path: Path) -> Content:
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged; give the command of the run again, which writes the file anew")
    return content


def _head(folder: Path, recipe: Content, result: Content, account: Accounts) -> str:
    student, teacher = recipe["student"]["architecture"], recipe["teacher"]["architecture"]
    rounds = recipe["rounds"]
    sentence = (
        f"A {_described(student, recipe['student'])} student of a {_described(teacher, recipe['teacher'])} teacher "
        f"with {len(recipe['teacher']['classes'])} classes, trained for {recipe['distillation']['steps']} steps on "
        f"synthetic images alone; {rounds} round{'s' if rounds > 1 else ''}, seed {recipe['seed']}."
    )
    numbers = [
        (_percent(result.get("student_accuracy")), "student accuracy"),
        (_percent(result.get("teacher_accuracy")), "teacher accuracy"),
        (_percent(result.get("agreement")), "agreement"),
        (f"{result.get('images') or account.images:,}", "synthetic images"),
        (_rate(result.get("images_per_second") or account.images_per_second), "images per second"),
        (_duration(result.get("wall_seconds") or account.wall_seconds), "wall time"),
        (_memory(result.get("peak_memory_mib") or account.peak_memory_mib), "peak memory"),
    ]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in numbers)
    unfinished = "" if result else '<p class="note">The run is not finished; this is what it has so far.</p>'
    return (
        f'<header><h1>{escape(folder.resolve().name)}</h1><p class="muted">{escape(sentence)}</p>{unfinished}'
        f'<div class="numbers">{cells}</div></header>'
    )


def _described(architecture: str, recipe: Content) -> str:
    options = ", ".join(f"{key} {value}" for key, value in (recipe.get("options") or {}).items())
    return f"{architecture} ({options})" if options else architecture


def _curves(rows: Rows) -> str:
    charts = [_guidance_chart(rows, name, title) for name, title in GUIDANCE_CURVES]
    scalars: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["event"] == "scalar" and row["value"] is not None:
            scalars[row["name"]].append((row["step"], row["value"]))
    for name, points in sorted(scalars.items()):
        # A session that was killed after its last checkpoint has left points that the next one drew again.
        points = sorted(dict(points).items())
        title = name.replace("distill/", "distillation: ").replace("_", " ")
        charts.append(line_chart(title, {name.rpartition("/")[2].replace("_", " "): points}, "step"))
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    return f'<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>'


GUIDANCE_CURVES = (("class", "class loss"), ("batchnorm", "BatchNorm loss"), ("adversarial", "student's disagreement"))


def _guidance_chart(rows: Rows, name: str, title: str) -> str:
    """A guidance loss at the first and the last guided step, across the shards in the order of the data set."""
    shards: dict[tuple[int, int], Content] = {}
    for row in rows:
        if row["event"] == "shard" and row.get("losses"):
            shards[row["round"], row["shard"]] = row["losses"]
    series: dict[str, list[tuple[float, float]]] = {"first guided step": [], "last guided step": []}
    for place, key in enumerate(sorted(shards)):
        for which, points in zip(("first", "last"), series.values(), strict=True):
            value = (shards[key].get(which) or {}).get(name)
            if value is not None:
                points.append((place, value))
    if all(value == 0 for points in series.values() for _, value in points):
        return ""
    return line_chart(f"guidance: {title}", series, "shard")


def _evaluation(result: Content) -> str:
    if not result.get("per_class"):
        return ""
    lines = [(name, share, f"{share:.1%}") for name, share in result["per_class"].items()]
    calibration = result.get("calibration_error")
    about = f"{result.get('test_images', 0):,} real test images, read by this evaluation alone."
    if calibration is not None:
        about += f" Expected calibration error of the student: {calibration:.3f} (15 bins)."
    confusion = ""
    if result.get("confusion"):
        table = heat_table(result["classes"], result["confusion"])
        confusion = f'<h3>Confusion</h3><p class="note">Rows: what it is. Columns: what the student says.</p>{table}'
    return (
        f'<section><h2>On real images</h2><p class="note">{escape(about)}</p><h3>Accuracy by class</h3>'
        f"{bars(lines, 1.0)}{confusion}</section>"
    )


def _cost(result: Content, account: Accounts) -> str:
    stages = dict(account.stages)
    if account.synthesis_seconds:
        stages["synthesis"] = account.synthesis_seconds
    if account.distillation_seconds:
        stages["distillation"] = account.distillation_seconds
    if not stages:
        return ""
    highest = max(stages.values())
    lines = [(name, seconds, _duration(seconds)) for name, seconds in stages.items()]
    kind = {"rss": "resident memory of the process", "gpu_allocated": "allocated on the GPU"}.get(
        result.get("memory_kind", ""), "memory"
    )
    rows = [
        ("Wall time", f"{_duration(account.wall_seconds)} in {_counted(account.sessions, 'session')}"),
        ("Images per second", f"{_rate(account.images_per_second)}, synthesis alone"),
        ("Peak memory", f"{_memory(account.peak_memory_mib)} ({kind})"),
    ]
    if "device" in result:
        rows.append(("Device", f"{result['device']}, {_counted(result.get('threads'), 'CPU thread')}"))
    if "dropped" in result:
        rows.append(("Dropped samples", f"{result['dropped']} (not finite)"))
    return (
        f'<section><h2>Cost</h2><div class="columns"><div>{bars(lines, highest)}</div><div>{facts(rows)}</div></div>'
        "</section>"
    )


def _configuration(recipe: Content, result: Content) -> str:
    frozen = recipe.get("frozen") or {}
    tables = []
    top = {key: value for key, value in recipe.items() if not isinstance(value, dict) and key != "frozen"}
    for name, section in [("run", top), *((k, v) for k, v in recipe.items() if isinstance(v, dict) and k != "frozen")]:
        rows = [(key, _plain(value)) for key, value in section.items()]
        tables.append(f"<div><h3>{escape(name)}</h3>{facts(rows)}</div>")
    provenance = [(f"{name}, SHA-256", value) for name, value in (frozen.get("digests") or {}).items()]
    if result.get("student_sha256"):
        provenance.append(("student, SHA-256", result["student_sha256"]))
    if result.get("prior_licence"):
        provenance.append(("licence of the prior", result["prior_licence"]))
    provenance += [(f"version of {name}", str(version)) for name, version in (frozen.get("versions") or {}).items()]
    again = f"{repeating_command(frozen.get('images'))} output=ANOTHER-FOLDER"
    return (
        '<section><h2>How it was made</h2><p class="note">The recipe.yaml beside this page holds all of this; the '
        f"command below repeats the run.</p><pre>{escape(again)}</pre>"
        f'<details open><summary>Configuration</summary><div class="columns">{"".join(tables)}</div></details>'
        f"<details open><summary>Provenance and versions</summary>{facts(provenance)}</details></section>"
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _counted(count: int | None, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.2f} %"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _memory(value: float | None) -> str:
    return "–" if value is None else f"{value / 1024:.2f} GiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
