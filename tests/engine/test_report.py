"""The report: one page that holds all it needs, whatever the names in the recipe are."""

import base64
import io
import itertools
import json
import math
import random
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diffdfkd.engine.alarms import Signs
from diffdfkd.engine.charts import line_chart, thinned, tick_labels, ticks
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.gallery import PER_CLASS
from diffdfkd.engine.recipe import dump_recipe, load_recipe
from diffdfkd.engine.report import write_report
from diffdfkd.engine.shards import Sample, round_folder, write_shard

HOSTILE = '<script>alert("x")</script>'
CLASSES = ["coat & tie", HOSTILE]
VOID = {"meta", "img", "line", "polyline", "circle", "br", "link", "input"}


class Page(HTMLParser):
    """Tags with their attributes, and text; fails on tags that are closed in another order than opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def png(shade: int, size: int = 28, mode: str = "L") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (size, size), shade if mode == "L" else (shade,) * 3).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with every kind of file that the report reads, names that are hostile to HTML among them."""
    recipe = load_recipe(
        {
            "prior": f"priors/{HOSTILE}",
            "teacher": {"architecture": "small_cnn", "weights": "t.safetensors", "classes": CLASSES},
            "student": {"architecture": "small_cnn", "options": {"width": 8}},
            "cutmix": {"every": 2, "partner": "any"},
        }
    )
    frozen = {"digests": {"prior": "ab12"}, "versions": {"torch": "2.14.1"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**dump_recipe(recipe), "frozen": frozen}))
    result = {
        "student_accuracy": 0.8125,
        "teacher_accuracy": 0.9,
        "agreement": 0.75,
        "images": 30,
        "images_per_second": 12.5,
        "wall_seconds": 75.0,
        "peak_memory_mib": 2048.0,
        "memory_kind": "rss",
        "calibration_error": 0.05,
        "per_class": dict(zip(CLASSES, (0.75, 0.875), strict=True)),
        "test_images": 16,
        "accuracy_interval": [0.57, 0.9341],
        "per_class_images": dict(zip(CLASSES, (8, 8), strict=True)),
        "teacher_per_class": dict(zip(CLASSES, (0.875, 0.925), strict=True)),
        "synthetic_per_class": dict(zip(CLASSES, (14, 16), strict=True)),
        "calibration": [
            {"low": 0.5, "high": 0.9, "images": 12, "confidence": 0.7, "accuracy": 0.75},
            {"low": 0.9, "high": 1.0, "images": 4, "confidence": 0.97, "accuracy": 1.0},
        ],
        "licences": {"prior": "creativeml-openrail-m", "LoRA 1": HOSTILE, "teacher": None},
        "onnx": {"reason": f"no operator {HOSTILE}"},
        "diversity": {
            "intra_class_distance": {"mean": 1.234, "per_class": [1.2, None]},
            "near_duplicates": {"count": 2, "share": 1 / 15, "examples": [[3, 29]]},
            "images": 30,
            "measure": f"a distance of {HOSTILE}",
        },
        "classes": CLASSES,
        "confusion": [[6, 2], [1, 7]],
        "device": "cpu",
        "threads": 2,
        "dropped": 1,
        "student_sha256": "cd34",
        "prior_licence": "cc0-1.0",
        "synthesis_seconds": 2.5,
        "distillation_seconds": 1.0,
        "seed": 0,
        "rounds": 1,
        "distillation_steps": 900,
        "distillation_loss": 0.5,
        "holdout_agreement": None,
        "versions": {"diffdfkd": "0.1.0", "triton": None},
        "evaluation": {},
        "alarms": [],
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    losses = {
        "first": {"total": 9.0, "class": 2.0, "batchnorm": 30.0, "adversarial": 0.0},
        "last": {"total": 3.0, "class": 1.0, "batchnorm": 10.0, "adversarial": 0.0},
    }
    rows: list[dict[str, Any]] = [
        {"event": "session", "time": 0.0},
        {"event": "shard", "round": 0, "shard": 0, "images": 30, "seconds": 2.4, "losses": losses, "time": 3.0},
        {"event": "shard", "round": 0, "shard": 1, "images": 0, "seconds": 0.1, "losses": None, "time": 3.0},
        {
            "event": "alarm",
            "kind": "diversity",
            "message": f"collapse of {HOSTILE}",
            "round": 0,
            "shard": 1,
            "time": 3.5,
        },
        {"event": "stage", "stage": "evaluation", "seconds": 1.5, "peak_memory_mib": 2048.0, "time": 9.0},
    ]
    rows += [
        {"event": "scalar", "name": "distill/loss", "value": 5 / step, "step": step, "time": 4.0}
        for step in range(1, 900)
    ]
    rows.append({"event": "scalar", "name": "distill/loss", "value": None, "step": 900, "time": 4.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [
        Sample(f"000-{i:08d}", png(8 * i), {"class": i % 2, "class_name": CLASSES[i % 2], "sample": i})
        for i in range(30)
    ]
    write_shard(round_folder(tmp_path / "synthetic", 0), 0, samples, round=0, digest="d", choices={})
    preview = tmp_path / "preview"
    preview.mkdir()
    for name, shade in (("u.png", 10), ("g.png", 200)):
        (preview / name).write_bytes(png(shade))
    pair = {"class": 1, "class_name": HOSTILE, "sample": 1, "unguided": "u.png", "guided": "g.png"}
    mix = {
        "owner": "u.png",
        "partner": "g.png",
        "child": None,
        "box": [0, 0, 14, 14],
        "area": 0.25,
        "owner_class": CLASSES[0],
        "partner_class": HOSTILE,
        "soft_label": {"0": 0.75, "1": 0.25},
    }
    kinds = {"unguided": {"mean": 3.0, "variance": 5.0}, "guided": {"mean": 0.5, "variance": 1.5}}
    layers = [
        {"name": "features.0", "channels": 16, **kinds},
        {"name": HOSTILE, "channels": 32, "unguided": {"mean": 0.5, "variance": 1.5}, "guided": None},
    ]
    answers = {"unguided": {"confidence": 0.25, "agreement": 0.5}, "guided": {"confidence": 0.875, "agreement": 1.0}}
    content = {
        "digest": "d",
        "size": 28,
        "pairs": [pair],
        "mixes": [mix],
        "batchnorm": {"unguided": 10.0, "guided": 4.0},
        "layers": layers,
        "by_class": [{"class": 1, "class_name": HOSTILE, **answers}],
        "signs": {"unguided": asdict(Signs(8, 10.0, 0.5, 0.1, 1.0, None)), "guided": None},
    }
    (preview / "preview.json").write_text(json.dumps(content))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "student.safetensors").write_bytes(b"x" * 2048)
    return tmp_path


def test_page_is_well_formed_and_loads_nothing(folder: Path) -> None:
    text = write_report(folder).read_text()
    page = Page(text)
    loads = [
        value
        for _, attributes in page.tags
        for key in ("src", "href", "srcset", "data")
        if (value := attributes.get(key))
    ]
    assert loads and all(value.startswith(("data:image/png;base64,", "#")) for value in loads)
    places = [attributes.get("id") for _, attributes in page.tags if attributes.get("id")]
    assert len(set(places)) == len(places)
    assert [value[1:] for value in loads if value[0] == "#"] == places
    assert not re.search(r"url\(|@import", text)
    assert {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags} == set()


def test_strings_are_escaped(folder: Path) -> None:
    text = write_report(folder).read_text()
    assert "<script" not in text
    page = Page(text)
    words = " ".join(page.text)
    # In galleries, layers, the teacher's answers, alarm, classes, confusion, diversity, ONNX, licences and settings.
    assert words.count(HOSTILE) >= 14
    assert "coat & tie" in words


def test_figures_are_shown(folder: Path) -> None:
    words = " ".join(Page(write_report(folder).read_text()).text)
    for figure in (
        "81.25 %",
        "90.00 %",
        "75.00 %",
        "12.5",
        "1 min 15 s",
        "2.00 GiB",
        "0.050",
        "87.5 %",
        "57.00 % to 93.41 %",
        "92.5 %",
        f"{HOSTILE}, 25.0 %",
        "1.23",
        "6.7 %",
        "creativeml-openrail-m",
        "2 KiB",
        "ab12",
        "cd34",
    ):
        assert figure in words


def test_pictures_of_each_kind_are_there(folder: Path) -> None:
    page = Page(write_report(folder).read_text())
    alternatives = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert alternatives.count(f"synthetic images of {HOSTILE}") == 1
    assert f"{HOSTILE}, unguided" in alternatives and f"{HOSTILE}, guided" in alternatives
    assert "owner: coat & tie" in alternatives and f"partner: {HOSTILE}" in alternatives
    # The child was lost: a box says so.
    assert any(attributes.get("class") == "missing" for _, attributes in page.tags)
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert labels == ["guidance: class loss", "guidance: BatchNorm loss", "distillation: loss", "calibration"]
    assert "image 3" in alternatives and "image 29, almost the same" in alternatives


def test_strip_holds_the_first_images_of_its_class(folder: Path) -> None:
    text = write_report(folder).read_text()
    source = re.search(r'alt="synthetic images of coat &amp; tie"[^>]*base64,([^"]+)"', text)
    assert source is not None
    strip = Image.open(io.BytesIO(base64.b64decode(source.group(1))))
    shades = [strip.getpixel((place * 29 + 14, 14)) for place in range(PER_CLASS)]
    assert shades == [(16 * place, 255) for place in range(PER_CLASS)]


def test_unfinished_run_shows_what_it_has(folder: Path) -> None:
    (folder / "result.json").unlink()
    (folder / "preview" / "preview.json").unlink()
    text = write_report(folder).read_text()
    assert "not finished" not in text and "There is a student, but no result.json" in text
    (folder / "student" / "student.safetensors").unlink()
    text = write_report(folder).read_text()
    Page(text)
    assert "not finished" in text and "What the student saw" in text
    assert "On real images" not in text and "What guidance does" not in text


def test_shares_say_of_how_many_images_they_are(folder: Path) -> None:
    assert "puts into that class, of the preview's 8 images in all." in write_report(folder).read_text()


def test_bars_of_the_cost_add_up_to_the_wall_time(folder: Path) -> None:
    """9 seconds: 2.5 of synthesis, 1.5 of evaluation, and what no stage counts."""
    with (folder / "metrics.jsonl").open("a") as journal:
        journal.write('{"event": "end", "time": 9.0}\n')
    words = " ".join(" ".join(Page(write_report(folder).read_text()).text).split())
    assert "Cost evaluation 1.5 s synthesis 2.5 s loading, and the rest 5.0 s Wall time 9.0 s" in words


def test_page_stays_small_with_large_images(folder: Path) -> None:
    noise = Image.frombytes("RGB", (512, 512), random.Random(0).randbytes(512 * 512 * 3))
    for name in ("u.png", "g.png"):
        noise.save(folder / "preview" / name)
    content = json.loads((folder / "preview" / "preview.json").read_text())
    content["size"] = 512
    content["pairs"] *= 40
    (folder / "preview" / "preview.json").write_text(json.dumps(content))
    assert write_report(folder).stat().st_size < 3e6


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a folder of a run"):
        write_report(tmp_path)


def test_thinning_keeps_the_mean_and_drops_what_is_not_finite() -> None:
    points = [(float(i), float(i % 2)) for i in range(1200)] + [(5000.0, math.nan)]
    thin = thinned(points)
    assert len(thin) == 300
    assert all(value == 0.5 for _, value in thin)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.0, 3.1e-5), (-2.0, 7.0), (4.0, 4.0), (0.0, 0.0), (100.0, 101.0)]
)
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    marks = ticks(low, high, 4)
    assert marks[0] <= low and marks[-1] >= high
    assert 2 <= len(marks) <= 7
    steps = {round((after - before) / (marks[1] - marks[0]), 6) for before, after in itertools.pairwise(marks)}
    assert steps == {1.0}


def test_line_chart_puts_the_highest_point_highest() -> None:
    chart = line_chart("t", {"a": [(0, 1.0), (1, 3.0), (2, 2.0)]}, "step")
    match = re.search(r'points="([^"]+)"', chart)
    assert match is not None
    heights = [float(point.split(",")[1]) for point in match.group(1).split()]
    assert heights[1] < heights[2] < heights[0]


def test_line_chart_of_one_point_and_of_none() -> None:
    assert "<circle" in line_chart("t", {"a": [(3, 1.0)]}, "step")
    assert line_chart("t", {"a": [(0, math.nan)], "b": []}, "step") == ""


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 5e-6, 1e-5, 1.5e-5], ["0", "5.0e-06", "1.0e-05", "1.5e-05"]),
        ([0, 0.0005, 0.001, 0.0015, 0.002], ["0", "0.0005", "0.001", "0.0015", "0.002"]),
        ([0, 500, 1000, 1500, 2000], ["0", "500", "1000", "1500", "2000"]),
        ([0, 10, 20], ["0", "10", "20"]),
    ],
)
def test_tick_labels_are_distinct_and_of_one_notation(values: list[float], labels: list[str]) -> None:
    assert tick_labels(values) == labels


def test_steps_have_no_halves() -> None:
    svg = line_chart("loss", {"a": [(0, 1.0), (1, 2.0)]}, "shard")
    assert ">0.5</text>" not in svg.split("middle", 1)[1]


def test_layers_say_how_they_moved_and_what_their_share_is(folder: Path) -> None:
    text = write_report(folder).read_text()
    words = " ".join(Page(text).text)
    assert "is 10 without and 4 with guidance" in words
    assert "features.0 (80 %)" in words and "8 → 2" in words
    # On the scale of the largest, 8: from its end to a quarter.
    assert 'class="from" style="left:100.0%"' in text and 'class="to" style="left:25.0%"' in text
    for share in ("25.0 %", "87.5 %", "50.0 %", "100.0 %"):
        assert share in words


def test_alarms_stand_at_the_top_or_their_absence_does(folder: Path) -> None:
    text = write_report(folder).read_text()
    assert text.index('class="alarms"') < text.index("<nav") < text.index('<details class="part"')
    assert "collapse of" in text and "(round 0, shard 1)" in text and "No alarms" not in text
    journal = folder / "metrics.jsonl"
    journal.write_text("".join(line for line in journal.open() if "alarm" not in line))
    text = write_report(folder).read_text()
    assert "No alarms in the guidance." in text and 'class="alarms"' not in text


def test_near_duplicates_are_shown_as_they_lie_in_the_shards(folder: Path) -> None:
    text = write_report(folder).read_text()
    shades = []
    for index, more in ((3, ""), (29, ", almost the same")):
        source = re.search(rf'alt="image {index}{more}"[^>]*base64,([^"]+)"', text)
        assert source is not None
        shades.append(Image.open(io.BytesIO(base64.b64decode(source.group(1)))).getpixel((5, 5)))
    assert shades == [24, 232]


@pytest.mark.parametrize("classes", [100, 1000])
def test_many_classes_make_no_large_page(folder: Path, classes: int) -> None:
    names = [f"class number {i} {HOSTILE}" for i in range(classes)]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["teacher"]["classes"] = names
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = json.loads((folder / "result.json").read_text())
    confusion = [
        [90 if i == j else i % 7 if j == (i + 1) % classes else 0 for j in range(classes)] for i in range(classes)
    ]
    shares = {name: 90 / sum(row) for name, row in zip(names, confusion, strict=True)}
    result |= {"classes": names, "per_class": shares, "confusion": confusion, "teacher_per_class": shares}
    result["per_class_images"] = {name: sum(row) for name, row in zip(names, confusion, strict=True)}
    result["diversity"]["intra_class_distance"]["per_class"] = [1.0 + i / classes for i in range(classes)]
    (folder / "result.json").write_text(json.dumps(result))
    preview = json.loads((folder / "preview" / "preview.json").read_text())
    preview["by_class"] = [{**preview["by_class"][0], "class": i, "class_name": name} for i, name in enumerate(names)]
    preview["layers"] = [{**preview["layers"][0], "name": f"stage.{i}.bn"} for i in range(300)]
    (folder / "preview" / "preview.json").write_text(json.dumps(preview))
    report = write_report(folder)
    page = Page(report.read_text())
    assert report.stat().st_size < 500_000
    assert sum(tag == "td" for tag, _ in page.tags) < 3000
    words = " ".join(page.text)
    assert f"class number 6 {HOSTILE} class number 7 {HOSTILE} 6 6.2 %" in words
    assert "The 40 weakest of" in words and "The 60 largest of 300 layers" in words


def test_run_on_images_of_ones_own_names_them(folder: Path) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["frozen"]["images"] = f"/data/{HOSTILE}"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for path in [*folder.glob("synthetic/*/*"), *folder.glob("preview/*")]:
        path.unlink()
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "diversity": None, "licences": {"images": None}}))
    words = " ".join(Page(write_report(folder).read_text()).text)
    assert f"images {HOSTILE[:8]}" in words.replace("data/", "") and "diffdfkd distill recipe.yaml --images" in words
    assert "Diversity" not in words and "What guidance does" not in words
