"""The report's part on real images: accuracy by class, what is taken for what, calibration."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diffdfkd.engine.charts import heat_table, reliability_chart
from diffdfkd.engine.page import Part, table
from diffdfkd.engine.quantities import NONE, percent

Content = Mapping[str, Any]

MOST_CELLS = 30
"""Classes of the largest confusion matrix that is shown whole."""
MOST_CLASSES = 40
MOST_PAIRS = 30


def evaluation_section(result: Content) -> Part | None:
    """From ``result.json``; None without an evaluation."""
    if not result.get("per_class"):
        return None
    about = (
        f"{result.get('test_images', 0):,} real test images, read by this evaluation alone. The student is right on "
        f"{percent(result.get('student_accuracy'))}"
    )
    if interval := result.get("accuracy_interval"):
        low, high = map(percent, interval)
        about += f"; the 95 % interval that this number of images leaves is {low} to {high}"
    body = f'<p class="note">{escape(about)}.</p>{_classes(result)}{_confusion(result)}{_calibration(result)}'
    return Part("evaluation", "On real images", body)


def _classes(result: Content) -> str:
    shares: Mapping[str, float] = result["per_class"]
    names = list(shares)
    rest = ""
    if len(names) > MOST_CLASSES:
        chosen = set(sorted(names, key=lambda name: shares[name])[:MOST_CLASSES])
        names = [name for name in names if name in chosen]
        rest = f'<p class="note">The {MOST_CLASSES} weakest of {len(shares)} classes; result.json has them all.</p>'
    worst = _worst(result)
    teacher: Content = result.get("teacher_per_class") or {}
    columns: list[tuple[str, Content]] = [
        ("teacher", {name: percent(share, 1) for name, share in teacher.items()}),
        ("test images", _counts(result.get("per_class_images"))),
        ("synthetic images", _counts(result.get("synthetic_per_class"))),
        ("most often taken for", worst),
    ]
    columns = [(title, values) for title, values in columns if values]
    lines = [[name, percent(shares[name], 1), *(values.get(name, NONE) for _, values in columns)] for name in names]
    head = ["class", "student", *(title for title, _ in columns)]
    words = [0, len(head) - 1] if worst else [0]
    return f"<h3>By class</h3>{rest}{table(head, lines, words)}"


def _counts(counts: Content | None) -> dict[str, str]:
    return {name: f"{count:,}" for name, count in (counts or {}).items()}


def _worst(result: Content) -> dict[str, str]:
    """The wrong answer that each class is given most often, where it is given any."""
    classes: Sequence[str] = result.get("classes") or []
    found = {}
    for index, row in enumerate(result.get("confusion") or []):
        wrong = [0 if answer == index else count for answer, count in enumerate(row)]
        if any(wrong):
            answer = wrong.index(max(wrong))
            found[classes[index]] = f"{classes[answer]}, {percent(max(wrong) / sum(row), 1)}"
    return found


def _confusion(result: Content) -> str:
    counts: Sequence[Sequence[int]] = result.get("confusion") or []
    classes: Sequence[str] = result.get("classes") or []
    if not counts:
        return ""
    if len(classes) <= MOST_CELLS:
        note = "Rows: what it is. Columns: what the student says."
        return f'<h3>Confusion</h3><p class="note">{note}</p>{heat_table(classes, counts)}'
    pairs = [
        (count, truth, answer)
        for truth, row in enumerate(counts)
        for answer, count in enumerate(row)
        if count and truth != answer
    ]
    pairs.sort(key=lambda pair: -pair[0])
    lines = [
        (classes[truth], classes[answer], f"{count:,}", percent(count / sum(counts[truth]), 1))
        for count, truth, answer in pairs[:MOST_PAIRS]
    ]
    note = f"The {len(lines)} most frequent of {len(pairs):,} kinds of mistake; result.json has the whole matrix."
    head = ("it is", "the student says", "images", "of the class")
    return f'<h3>Confusion</h3><p class="note">{note}</p>{table(head, lines, (0, 1))}'


def _calibration(result: Content) -> str:
    error, bins = result.get("calibration_error"), result.get("calibration")
    if error is None:
        return ""
    note = (
        f"Expected calibration error {error:.3f} (15 bins): how far confidence and accuracy of a bin lie apart, in the "
        "mean over the images. Bars below the dashes: surer than right."
    )
    chart = f'<div class="charts alone">{reliability_chart("calibration", bins)}</div>' if bins else ""
    return f'<h3>Calibration</h3><p class="note">{escape(note)}</p>{chart}'
