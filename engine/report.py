"""One self-contained HTML page about a run, from the files in its folder; sections without data are left out."""

from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

from diffdfkd.engine.accounts import Accounts, accounts
from diffdfkd.engine.alarms import alarms_in
from diffdfkd.engine.charts import bars, line_chart
from diffdfkd.engine.diversity_section import diversity_section
from diffdfkd.engine.evaluation_section import evaluation_section
from diffdfkd.engine.gallery import cutmix_gallery, guidance_gallery, training_gallery
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.origin_section import product_section, provenance_section, reproduction_section
from diffdfkd.engine.page import Part, facts, page
from diffdfkd.engine.preview_file import read_preview
from diffdfkd.engine.quantities import counted, duration, memory, percent, rate
from diffdfkd.engine.result_file import read_result
from diffdfkd.engine.run_recipe import read_run_recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.engine.steering_section import steering_section

Rows = list[dict[str, Any]]
Content = dict[str, Any]


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` and return its path; UserError where the folder holds no run, or a damaged one."""
    _, recipe = read_run_recipe(folder)
    result = read_result(folder / "result.json") if (folder / "result.json").is_file() else {}
    preview = read_preview(folder) or {}
    journal = folder / "metrics.jsonl"
    rows = read_journal(journal) if journal.is_file() else []
    account = accounts(rows)
    parts = [
        guidance_gallery(folder, preview),
        cutmix_gallery(folder, preview),
        training_gallery(folder, recipe["teacher"]["classes"]),
        steering_section(preview, rows),
        diversity_section(folder, result),
        _curves(rows),
        evaluation_section(result),
        product_section(folder, result),
        _cost(result, account),
        provenance_section(recipe, result),
        reproduction_section(recipe),
    ]
    path = folder / "report.html"
    title = f"{folder.resolve().name}: a distilled student"
    head = _head(folder, recipe, result, account) + _alarms(rows)
    write_atomic(path, page(title, head, [part for part in parts if part]).encode("utf-8"))
    return path


def _head(folder: Path, recipe: Content, result: Content, account: Accounts) -> str:
    student, teacher = recipe["student"]["architecture"], recipe["teacher"]["architecture"]
    rounds = recipe["rounds"]
    begun = (
        ", begun with a part of the teacher's weights" if recipe["student"].get("initialization") == "teacher" else ""
    )
    sentence = (
        f"A {_described(student, recipe['student'])} student of a {_described(teacher, recipe['teacher'])} teacher "
        f"with {len(recipe['teacher']['classes'])} classes, trained for {recipe['distillation']['steps']} steps on "
        f"synthetic images alone{begun}; {rounds} round{'s' if rounds > 1 else ''}, seed {recipe['seed']}."
    )
    numbers = [
        (percent(result.get("student_accuracy")), "student accuracy", *_interval(result)),
        (percent(result.get("teacher_accuracy")), "teacher accuracy"),
        (percent(result.get("agreement")), "agreement"),
        (f"{result.get('images') or account.images:,}", "synthetic images"),
        (rate(result.get("images_per_second") or account.images_per_second), "images per second"),
        (duration(result.get("wall_seconds") or account.wall_seconds), "wall time"),
        (memory(result.get("peak_memory_mib") or account.peak_memory_mib), "peak memory"),
    ]
    cells = "".join(
        f"<div><b>{escape(value)}</b>{''.join(f'<span>{escape(word)}</span>' for word in words)}</div>"
        for value, *words in numbers
    )
    state = "The run is not finished; this is what it has so far."
    if (folder / "student" / "student.safetensors").is_file():
        state = "There is a student, but no result.json: the run's command, given again, evaluates it."
    unfinished = "" if result else f'<p class="note">{state}</p>'
    return (
        f'<header><h1>{escape(folder.resolve().name)}</h1><p class="muted">{escape(sentence)}</p>{unfinished}'
        f'<div class="numbers">{cells}</div></header>'
    )


def _interval(result: Content) -> list[str]:
    interval = result.get("accuracy_interval")
    return [f"95 %: {interval[0] * 100:.1f}–{interval[1] * 100:.1f}"] if interval else []


def _described(architecture: str, recipe: Content) -> str:
    options = ", ".join(f"{key} {value}" for key, value in (recipe.get("options") or {}).items())
    return f"{architecture} ({options})" if options else architecture


def _alarms(rows: Rows) -> str:
    """A box with what was odd in the run, or the word that nothing was."""
    alarms = alarms_in(rows)
    if not alarms:
        return '<p class="note calm">No alarms in the guidance.</p>'
    lines = []
    for alarm in alarms:
        places = [f"{kind} {alarm[kind]}" for kind in ("round", "shard") if alarm.get(kind) is not None]
        where = f" ({', '.join(places)})" if places else ""
        lines.append(f"<li>{escape(str(alarm.get('message', alarm.get('kind', ''))))}{where}</li>")
    return f'<div class="alarms" role="alert"><b>{counted(len(alarms), "alarm")}</b><ul>{"".join(lines)}</ul></div>'


def _curves(rows: Rows) -> Part | None:
    scalars: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["event"] == "scalar" and row["value"] is not None:
            scalars[row["name"]].append((row["step"], row["value"]))
    charts = []
    for name, points in sorted(scalars.items()):
        # A session that was killed after its last checkpoint has left points that the next one drew again.
        points = sorted(dict(points).items())
        title = name.replace("distill/", "distillation: ").replace("_", " ")
        charts.append(line_chart(title, {name.rpartition("/")[2].replace("_", " "): points}, "step"))
    charts = [chart for chart in charts if chart]
    return Part("training", "How it learnt", f'<div class="charts">{"".join(charts)}</div>') if charts else None


def _cost(result: Content, account: Accounts) -> Part | None:
    stages = dict(account.stages)
    if account.synthesis_seconds:
        stages["synthesis"] = account.synthesis_seconds
    if account.distillation_seconds:
        stages["distillation"] = account.distillation_seconds
    if not stages:
        return None
    if (rest := account.wall_seconds - sum(stages.values())) > 0.5:
        stages["loading, and the rest"] = rest
    highest = max(stages.values())
    lines = [(name, seconds, duration(seconds)) for name, seconds in stages.items()]
    kind = {"rss": "resident memory of the process", "gpu_allocated": "allocated on the GPU"}.get(
        result.get("memory_kind", ""), "memory"
    )
    rows = [
        ("Wall time", f"{duration(account.wall_seconds)} in {counted(account.sessions, 'session')}"),
        ("Images per second", f"{rate(account.images_per_second)}, synthesis alone"),
        ("Peak memory", f"{memory(account.peak_memory_mib)} ({kind})"),
    ]
    if "device" in result:
        kernels = f", {result['kernel']} kernels" if "kernel" in result else ""
        rows.append(("Device", f"{result['device']}, {counted(result.get('threads'), 'CPU thread')}{kernels}"))
    if "dropped" in result:
        rows.append(("Dropped samples", f"{result['dropped']} (not finite)"))
    body = f'<div class="columns"><div>{bars(lines, highest)}</div><div>{facts(rows)}</div></div>'
    return Part("cost", "Cost", body)
