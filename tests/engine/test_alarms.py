import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from diffdfkd.engine import synthesis
from diffdfkd.engine.alarms import Signs, Watch, alarms_in, find_alarms
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.engine.painter import Models, Painter
from diffdfkd.engine.preview import preview_pairs
from diffdfkd.engine.preview_file import PREVIEW
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.recipe import GuidanceRecipe, load_recipe

UNGUIDED = Signs(images=20, batchnorm=24.0, agreement=0.3, saturated=0.45, latents=0.9, distance=0.9)
GUIDED = Signs(images=20, batchnorm=9.0, agreement=0.7, saturated=0.2, latents=1.1, distance=1.0)
LOSSES = {"first": {"batchnorm": 35.0}, "last": {"batchnorm": 9.0}}
GUIDANCE = GuidanceRecipe(class_weight=0.1, batchnorm_weight=0.3, rho=0.2)


def kinds(signs=GUIDED, reference=UNGUIDED, losses=LOSSES, **guidance):
    return [alarm.kind for alarm in find_alarms(GUIDANCE.model_copy(update=guidance), signs, reference, losses)]


def test_figures_like_those_of_the_demo_raise_nothing():
    assert kinds() == [] and kinds(losses=None) == []


@pytest.mark.parametrize(
    ("changed", "kind", "knob"),
    [
        ({"batchnorm": 24.0}, "batchnorm", "guidance.batchnorm_weight"),
        ({"latents": 1.9}, "saturation", "guidance.window"),
        ({"saturated": 0.76}, "saturation", "guidance.rho (now 0.2)"),
        ({"distance": 0.44}, "diversity", "guidance.class_weight"),
        ({"agreement": 0.9, "batchnorm": 21.7}, "agreement", "guidance.batchnorm_weight"),
    ],
)
def test_each_alarm_names_its_knob_and_fires_beyond_its_threshold_alone(changed, kind, knob):
    (alarm,) = find_alarms(GUIDANCE, replace(GUIDED, **changed), UNGUIDED, LOSSES)
    assert alarm.kind == kind and knob in alarm.message and "\n" not in alarm.message
    half_way = {name: (value + getattr(GUIDED, name)) / 2 for name, value in changed.items()}
    assert kinds(replace(GUIDED, **half_way)) == []


def test_l_bn_that_rises_from_the_first_to_the_last_guided_step_is_an_alarm():
    assert kinds(losses={"first": {"batchnorm": 9.0}, "last": {"batchnorm": 9.1}}) == ["batchnorm"]
    # A single guided step is first and last.
    assert kinds(losses={"first": {"batchnorm": 9.0}, "last": {"batchnorm": 9.0}}) == []


def test_without_a_batchnorm_loss_only_agreement_speaks_of_l_bn():
    bad = replace(GUIDED, batchnorm=30.0)
    assert kinds(bad, batchnorm_weight=0.0) == []
    assert kinds(replace(bad, agreement=1.0), batchnorm_weight=0.0) == ["agreement"]


def test_a_shard_of_other_noise_is_given_allowance():
    # Half as much again is what twenty images of other noise can come to; three times is not.
    for times, found in ((1.5, []), (3.0, ["batchnorm"])):
        signs = replace(GUIDED, batchnorm=times * UNGUIDED.batchnorm)
        assert [alarm.kind for alarm in find_alarms(GUIDANCE, signs, UNGUIDED, LOSSES, paired=False)] == found
        assert [alarm.kind for alarm in find_alarms(GUIDANCE, signs, UNGUIDED, LOSSES)] == ["batchnorm"]


def test_figures_that_are_not_known_raise_nothing():
    unknown = replace(GUIDED, batchnorm=None, distance=None, agreement=1.0)
    assert kinds(unknown) == kinds(unknown, replace(UNGUIDED, batchnorm=None, distance=None)) == []
    assert kinds(replace(GUIDED, latents=99.0), mode="none") == []


def test_each_kind_is_raised_once_to_terminal_and_journal(tmp_path, caplog):
    burnt = replace(GUIDED, latents=50.0)
    with Journal(tmp_path / "metrics.jsonl") as journal:
        watch = Watch(GUIDANCE, journal, "d", UNGUIDED)
        watch.look(GUIDED, LOSSES, round=0, shard=0)
        watch.look(burnt, LOSSES, round=0, shard=1)
        assert len(watch.look(burnt, LOSSES, round=0, shard=2)) == 1  # found, not raised again
    (row,) = read_journal(tmp_path / "metrics.jsonl")
    assert (row["event"], row["kind"], row["round"], row["shard"]) == ("alarm", "saturation", 0, 1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "shard 1 of round 0" in record.message
    assert row["message"] in record.message


def test_a_run_that_continues_neither_repeats_nor_loses_an_alarm(tmp_path, caplog):
    burnt, path = replace(GUIDED, latents=50.0), tmp_path / "metrics.jsonl"
    noted = {"round": 0, "shard": 4, "images": 20, "seconds": 1.0, "losses": LOSSES}
    with Journal(path) as journal:
        Watch(GUIDANCE, journal, "d", UNGUIDED).look(replace(GUIDED, distance=0.1), round=0, shard=0)
        # Killed between noting the shard and raising its alarm; beside it what another recipe left.
        journal.log("shard", **noted, signs=burnt.__dict__, digest="d")
        journal.log("shard", **noted, signs=replace(GUIDED, batchnorm=99.0).__dict__, digest="other")
    caplog.clear()
    for _ in range(2):
        with Journal(path) as journal:
            watch = Watch(GUIDANCE, journal, "d", UNGUIDED)
            watch.look(replace(burnt, distance=0.1), round=0, shard=5)
    rows = [row for row in read_journal(path) if row["event"] == "alarm"]
    assert [(row["kind"], row["shard"]) for row in rows] == [("diversity", 0), ("saturation", 4)]
    assert len(caplog.records) == 1


def test_without_a_preview_nothing_is_raised(tmp_path):
    with Journal(tmp_path / "metrics.jsonl") as journal:
        assert Watch(GUIDANCE, journal, "d", None).look(replace(GUIDED, latents=99.0), LOSSES, round=0, shard=0) == []


def test_alarms_in_a_journal_are_one_of_each_kind_and_of_the_choices_that_stand():
    def alarm(kind, digest, **more):
        return {"event": "alarm", "kind": kind, "digest": digest, **more}

    rows = [
        alarm("batchnorm", "old"),
        {"event": "preview", "digest": "new"},
        alarm("saturation", "new", shard=1),
        alarm("saturation", "new", shard=2),
        {"event": "shard", "digest": "new"},
        {"event": "stage"},
    ]
    assert [(row["kind"], row["shard"]) for row in alarms_in(rows)] == [("saturation", 1)]
    assert [row["kind"] for row in alarms_in([{"event": "alarm", "kind": "agreement"}])] == ["agreement"]
    assert alarms_in([]) == []


CLASSES = ["boot", "coat", "shirt"]


@pytest.fixture(scope="module")
def make(tiny_prior):
    """Recipe and models; the teacher's memory is that of the prior's own unguided images, shifted a little."""

    def built(*overrides):
        content = {
            "prior": str(tiny_prior),
            "teacher": {"architecture": "small_cnn", "classes": CLASSES, "channels": 1, "size": 12, "weights": "t"},
            "student": {"architecture": "small_cnn"},
            "synthesis": {"images_per_class": 4, "batch_size": 6, "steps": 3, "guidance_scale": 1.0},
            "guidance": {"rho": 0.05},
            "device": "cpu",
            "threads": 1,
        }
        recipe = load_recipe(content, overrides)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
            model = nn.Sequential(*layers, nn.Linear(32, 3))
        teacher = Classifier(model, Preprocessing(1, 12, (0.5,), (0.5,), "bilinear"), CLASSES)
        return recipe, Models(load_prior(recipe.prior, "cpu"), teacher.requires_grad_(False).eval())

    return built


def go(recipe, models, output):
    with Journal(output / "metrics.jsonl") as journal:
        preview_pairs(recipe, models, output, journal)
        synthesis.synthesize(recipe, models, 0, output, journal, progress=False)
    return read_journal(output / "metrics.jsonl")


def test_a_run_raises_what_its_preview_shows_once_and_notes_each_shard(make, tmp_path):
    rows = go(*make("guidance.rho=20"), tmp_path)
    alarms = [row for row in rows if row["event"] == "alarm"]
    assert [row["kind"] for row in alarms].count("saturation") == 1
    assert alarms == alarms_in(rows)
    assert {(row["round"], row["shard"]) for row in alarms if row["kind"] == "saturation"} == {(None, None)}
    shards = [row for row in rows if row["event"] == "shard"]
    assert [set(row["signs"]) for row in shards] == [set(Signs.__dataclass_fields__)] * 2
    assert shards[0]["signs"]["images"] == 6
    assert len({row["digest"] for row in (*alarms, *shards)}) == 1
    # Typed again: nothing is made, and nothing raised.
    assert len(go(*make("guidance.rho=20"), tmp_path)) == len(rows)


def test_an_alarm_that_only_a_shard_shows_is_raised_there(make, tmp_path, monkeypatch):
    recipe, models = make()
    begin = Painter.begin

    def alike(self, ids, classes, **how):
        finish = begin(self, ids, classes, **how)

        def same():
            painting = finish()
            # Every image of the second shard is the same one.
            return replace(painting, images=painting.images[:1].expand_as(painting.images)) if ids[0] == 6 else painting

        return same

    monkeypatch.setattr(Painter, "begin", alike)
    rows = go(recipe, models, tmp_path)
    found = [(row["kind"], row["shard"]) for row in rows if row["event"] == "alarm"]
    assert ("diversity", 1) in found and not [kind for kind, shard in found if kind == "diversity" and shard != 1]


def test_an_alarm_that_a_kill_kept_from_being_raised_comes_with_the_next_start(make, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    recipe, models = make("guidance.rho=20")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Watch, "look", killed)
        go(recipe, models, tmp_path)
    assert (tmp_path / PREVIEW).is_file()
    assert not [row for row in read_journal(tmp_path / "metrics.jsonl") if row["event"] == "alarm"]
    assert "saturation" in [row["kind"] for row in alarms_in(go(recipe, models, tmp_path))]


def test_watching_leaves_the_images_as_they_are(make, tmp_path):
    recipe, models = make()
    go(recipe, models, tmp_path / "watched")
    with Journal(tmp_path / "plain" / "metrics.jsonl") as journal:
        synthesis.synthesize(recipe, models, 0, tmp_path / "plain", journal, progress=False)
    shards = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("shard-*")]
    assert len(shards) == 4
    for path in shards:
        assert (tmp_path / "plain" / path).read_bytes() == (tmp_path / "watched" / path).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), set()),
        (("guidance.rho=20",), {"batchnorm", "saturation"}),
        (("guidance.batchnorm_weight=0", "guidance.class_weight=1"), {"agreement"}),
    ],
)
def test_alarms_of_the_demo(overrides, expected, tmp_path):
    from diffdfkd.recipes.synthesize import synthesize

    output = tmp_path / "run"
    recipe = load_recipe("fashion", [f"output={output}", "synthesis.images_per_class=20", "threads=1", *overrides])
    synthesize(recipe, progress=False)
    rows = read_journal(output / "metrics.jsonl")
    assert {row["kind"] for row in alarms_in(rows)} == expected
    preview = json.loads((Path(output) / PREVIEW).read_text())
    assert [layer["channels"] for layer in preview["layers"]] == [32, 32, 32, 64, 64, 64, 128, 128]
    assert preview["batchnorm"]["unguided"] > 20
    total = sum(sum(layer["guided"].values()) for layer in preview["layers"])
    assert total == pytest.approx(preview["batchnorm"]["guided"], abs=1e-4)
