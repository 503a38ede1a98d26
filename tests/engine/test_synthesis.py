import io
import json
import tarfile
import time

import pytest
import torch
from PIL import Image
from torch import nn

from diffdfkd.engine import denoiser, painter, plan, shards
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.combinations import round_samples
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.engine.painter import Models, Painter
from diffdfkd.engine.preview import preview_pairs
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.engine.synthesis import synthesize

CLASSES = ["boot", "coat", "shirt"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_classifier(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (
            nn.Conv2d(1, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, len(CLASSES)),
        )
        classifier = Classifier(nn.Sequential(*layers), Preprocessing(1, 12, (0.5,), (0.5,), "bilinear"), CLASSES)
    return classifier.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def make(tiny_prior):
    """Recipe with small numbers and the given key=value overrides."""

    def recipe(*overrides):
        content = {
            "prior": str(tiny_prior),
            "teacher": {"architecture": "small_cnn", "classes": CLASSES, "channels": 1, "size": 12, "weights": "t"},
            "student": {"architecture": "small_cnn"},
            "synthesis": {"images_per_class": 4, "batch_size": 3, "batches_per_shard": 2, "steps": 2},
            "device": "cpu",
            "threads": 1,
        }
        return load_recipe(content, overrides)

    return recipe


@pytest.fixture(scope="module")
def models(make):
    return Models(load_prior(make().prior, torch.device("cpu")), make_classifier())


def run(recipe, models, output, round=0):
    with Journal(output / "metrics.jsonl") as journal:
        return synthesize(recipe, models, round, output, journal, progress=False)


def content(output):
    root = output / "synthetic"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read(output, round=0):
    """Record and pixels of every sample of a round, in order."""
    items = []
    for path in sorted((output / "synthetic" / f"round-{round:03d}").glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for name in files:
            if name.endswith(".json"):
                items.append((json.loads(files[name]), Image.open(io.BytesIO(files[name[:-5] + ".png"]))))
    return items


def pixels(output):
    return torch.stack([torch.tensor(list(image.getdata())) for _, image in read(output)])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_images_are_saved_as_the_teacher_sees_them(make, models, interpolation):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with Painter(make(f"teacher.interpolation={interpolation}"), models, 0) as painter:
        images, _ = painter._finish(latents)
        with torch.no_grad():
            seen = Preprocessing(1, 12, (0.5,), (0.5,), interpolation).fit(painter.decode(latents))
    assert torch.equal(images, (seen * 255).round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("statistics", ["batch", "class"])
def test_micro_batches_are_as_one_batch(make, models, statistics):
    fields = ["synthesis.batch_size=7", "guidance.batchnorm_weight=0.5", f"guidance.statistics={statistics}"]
    seen = []
    hooks = [
        network.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        for network in (models.prior.unet, models.prior.vae.decoder, models.teacher.model)
    ]
    ids = torch.arange(7)
    latents = {}
    for size in ("null", 3):
        seen.clear()
        with Painter(make(*fields, f"guidance.micro_batch={size}"), models, 0) as painter:
            latents[size] = painter._denoise(ids[None], ids % len(CLASSES), ids % len(CLASSES), True, False)[1].latents
            painter._finish(latents[size])
        # Of the UNet two rows an image.
        assert max(seen) == {"null": 14, 3: 6}[size]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(latents[3], latents["null"], rtol=1e-3, atol=1e-4)
    with Painter(make(*fields, "synthesis.batch_size=3"), models, 0) as painter:
        alone = painter._denoise(ids[None, :3], ids[:3] % len(CLASSES), ids[:3] % len(CLASSES), True, False)[1].latents
    assert not torch.allclose(alone, latents["null"][:3], rtol=1e-3, atol=1e-4)


def test_shards_say_nothing_of_what_is_by_default(make):
    plain, other = (plan.synthesis_choices(make(*given), "p", "t") for given in ([], ["guidance.rho_schedule=rising"]))
    fields = {"guidance.mode", "guidance.class_weight", "guidance.batchnorm_weight", "guidance.adversarial_weight"}
    fields |= {"guidance.rho", "guidance.rho_rule", "guidance.window", "guidance.every"}
    assert {field for field in plain if field.startswith("guidance.")} == fields
    assert set(other) - set(plain) == {"guidance.rho_schedule"}


def test_two_runs_give_the_same_bytes(make, models, tmp_path):
    summary = run(make(), models, tmp_path / "a")
    run(make(), models, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert sorted(content(tmp_path / "a")) == ["manifest.jsonl"] + [
        f"round-000/shard-0000{i}.{suffix}" for i in range(2) for suffix in ("json", "tar")
    ]
    assert (summary.images, summary.made, summary.dropped, summary.shards) == (12, 12, 0, 2)
    assert run(make("seed=1"), models, tmp_path / "c").images == 12
    assert content(tmp_path / "c")["round-000/shard-00000.tar"] != content(tmp_path / "a")["round-000/shard-00000.tar"]


def test_images_and_records_are_as_the_recipe_says(make, models, tmp_path):
    run(make(), models, tmp_path)
    items = read(tmp_path)
    assert {(image.size, image.mode) for _, image in items} == {((12, 12), "L")}
    assert [record["sample"] for record, _ in items] == list(range(12))
    for record, _ in items:
        assert record["class_name"] == CLASSES[record["class"]]
        assert set(record["losses"]) == {"total", "class", "batchnorm", "adversarial"}
        assert "soft_label" not in record and "parents" not in record
    (event, _) = read_journal(tmp_path / "metrics.jsonl")
    assert (event["event"], event["round"], event["shard"], event["images"]) == ("shard", 0, 0, 6)
    assert event["seconds"] > 0 and event["losses"]["first"]["total"] > 0
    run(make("synthesis.size=20", "synthesis.format=webp"), models, tmp_path / "webp")
    with tarfile.open(tmp_path / "webp" / "synthetic" / "round-000" / "shard-00000.tar") as tar:
        image = Image.open(tar.extractfile("000-00000000.webp"))
        assert (image.size, image.format) == ((20, 20), "WEBP")


def test_a_shards_seconds_are_its_own(make, models, tmp_path, monkeypatch):
    plain = Painter.begin

    def begin(painter, ids, *rest, **options):
        if ids[0] == 6:  # the second of three shards
            time.sleep(1)
        return plain(painter, ids, *rest, **options)

    monkeypatch.setattr(Painter, "begin", begin)
    summary = run(make("synthesis.images_per_class=5"), models, tmp_path)
    first, second, third = (row["seconds"] for row in read_journal(tmp_path / "metrics.jsonl"))
    assert second > 0.5 and second > third > 0
    assert first + second + third <= summary.seconds


def damage_nothing(folder):
    pass


def delete_shard(folder):
    (folder / "shard-00000.tar").unlink()
    (folder / "shard-00000.json").unlink()


def truncate_tar(folder):
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-700])


def lose_sidecar(folder):
    (folder / "shard-00001.json").unlink()


def leave_temporary(folder):
    (folder / "shard-00001.json").unlink()
    (folder / "shard-00001.tar").rename(folder / ".shard-00001.tar.1-0123abcd.tmp")


@pytest.mark.parametrize(
    ("damage", "remade", "reason"),
    [
        (damage_nothing, 0, None),
        (delete_shard, 6, None),
        (truncate_tar, 6, "bytes, its sidecar says"),
        (lose_sidecar, 6, "json is missing"),
        (leave_temporary, 6, None),
    ],
)
def test_run_continues_to_the_same_bytes(make, models, tmp_path, caplog, damage, remade, reason):
    run(make(), models, tmp_path)
    before = content(tmp_path)
    damage(tmp_path / "synthetic" / "round-000")
    summary = run(make(), models, tmp_path)
    assert content(tmp_path) == before
    assert (summary.images, summary.made) == (12, remade)
    assert (summary.seconds > 0) == (remade > 0)
    reasons = [event["reason"] for event in read_journal(tmp_path / "metrics.jsonl") if event["event"] == "remake"]
    if reason is None:
        assert not reasons and not caplog.messages
    else:
        assert len(reasons) == 1 and reason in reasons[0]
        assert len(caplog.messages) == 1 and reason in caplog.messages[0]


def test_interrupt_leaves_whole_shards_only(make, models, tmp_path, monkeypatch):
    run(make(), models, tmp_path / "whole")
    begin, calls = painter.Painter.begin, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:  # the second batch of the second shard
            raise KeyboardInterrupt
        return begin(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(painter.Painter, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(make(), models, tmp_path / "cut")
    assert sorted(content(tmp_path / "cut")) == ["round-000/shard-00000.json", "round-000/shard-00000.tar"]
    assert run(make(), models, tmp_path / "cut").made == 6
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_more_images_keep_the_earlier_shards(make, models, tmp_path):
    run(make(), models, tmp_path)
    before = content(tmp_path)
    summary = run(make("synthesis.images_per_class=7"), models, tmp_path)
    assert (summary.images, summary.made) == (21, 9)
    after = content(tmp_path)
    assert {name: after[name] for name in before if name.startswith("round")} == {
        name: before[name] for name in before if name.startswith("round")
    }
    # The last shard was short and is made again at its new length.
    assert run(make("synthesis.images_per_class=8"), models, tmp_path).made == 6
    run(make("synthesis.images_per_class=8"), models, tmp_path / "at once")
    assert content(tmp_path) == content(tmp_path / "at once")


def test_fewer_images_are_refused(make, models, tmp_path):
    run(make(), models, tmp_path)
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"shard-00001\.tar is more than synthesis.images_per_class=2"):
        run(make("synthesis.images_per_class=2"), models, tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("synthesis.steps=3", "synthesis.steps was 2 and is 3"),
        ("guidance.rho=0.5", "guidance.rho was 0.15 and is 0.5"),
        ("seed=4", "seed was 0 and is 4"),
    ],
)
def test_shards_of_another_recipe_are_refused_by_field(make, models, tmp_path, override, named):
    run(make(), models, tmp_path)
    before = content(tmp_path)
    with pytest.raises(UserError, match=named) as caught:
        run(make(override), models, tmp_path)
    assert str(tmp_path) in str(caught.value) and str(caught.value).startswith("output: ")
    assert content(tmp_path) == before


def test_shards_of_another_teacher_are_refused(make, models, tmp_path):
    run(make(), models, tmp_path)
    with pytest.raises(UserError, match="the teacher's weights differ"):
        run(make(), Models(models.prior, make_classifier(seed=1)), tmp_path)


def test_what_does_not_shape_images_may_change(make, models, tmp_path):
    run(make(), models, tmp_path)
    assert run(make("distillation.steps=9", "output=elsewhere", "evaluation.batch_size=2"), models, tmp_path).made == 0


def test_noise_depends_on_seed_and_sample_alone(make, models, tmp_path, monkeypatch):
    seen = {}
    sample = denoiser.sample

    def recording(*arguments, noise, sample_ids, **options):
        for id, own in zip(sample_ids.tolist(), noise, strict=True):
            seen.setdefault(id, []).append(own.clone())
        return sample(*arguments, noise=noise, sample_ids=sample_ids, **options)

    monkeypatch.setattr(denoiser, "sample", recording)
    splits = ["synthesis.batch_size=5", "synthesis.batch_size=12"]
    for name, split, mode in [("a", splits[0], "clean"), ("b", splits[1], "clean"), ("c", splits[1], "none")]:
        run(make(split, f"guidance.mode={mode}"), models, tmp_path / name)
    assert sorted(seen) == list(range(12))
    for noises in seen.values():
        assert len(noises) == 3 and all(torch.equal(noises[0], noise) for noise in noises)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_unguided_images_do_not_depend_on_the_batch_split(make, models, tmp_path):
    for batch in (5, 12):
        run(make("guidance.mode=none", f"synthesis.batch_size={batch}"), models, tmp_path / str(batch))
    difference = (pixels(tmp_path / "5") - pixels(tmp_path / "12")).abs()
    assert difference.max() <= 1
    assert [record["class"] for record, _ in read(tmp_path / "5")] == [
        record["class"] for record, _ in read(tmp_path / "12")
    ]


def test_guidance_changes_the_images(make, models, tmp_path):
    run(make("guidance.mode=none"), models, tmp_path / "plain")
    run(make("guidance.rho=0.5"), models, tmp_path / "guided")
    assert (pixels(tmp_path / "plain") - pixels(tmp_path / "guided")).abs().max() > 2


def test_without_classifier_free_guidance_the_unet_sees_each_sample_once(make, models, tmp_path):
    rows = []
    with models.prior.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]))):
        run(make("synthesis.guidance_scale=1"), models, tmp_path / "one")
        assert set(rows) == {3}
        rows.clear()
        run(make(), models, tmp_path / "two")
        assert set(rows) == {6}


def test_labels_are_balanced_mixed_and_the_same_in_any_batch():
    labels = plan.class_labels(seed=3, round=1, first=0, samples=50, classes=5)
    blocks = labels.view(10, 5)
    assert blocks.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 10
    assert len({tuple(block) for block in blocks.tolist()}) > 3
    assert torch.equal(plan.class_labels(3, 1, 13, 9, 5), labels[13:22])
    assert not torch.equal(plan.class_labels(3, 2, 0, 50, 5), labels)
    assert not torch.equal(plan.class_labels(4, 1, 0, 50, 5), labels)


def test_rounds_share_the_images_out(make):
    recipe = make("rounds=3", "synthesis.images_per_class=4", "distillation.steps=3")
    sizes = [round_samples(recipe, round) for round in range(3)]
    assert sum(sizes) == 12 and all(size % len(CLASSES) == 0 for size in sizes) and max(sizes) - min(sizes) <= 3
    shards_of_round = plan.shard_plan(recipe, 2)
    assert sum(shard.samples for shard in shards_of_round) == sizes[2]
    few = make("rounds=5", "synthesis.images_per_class=2", "distillation.steps=5")
    assert sorted(round_samples(few, round) for round in range(5)) == [1, 1, 1, 1, 2]


def test_cutmix_saves_soft_labels_and_parents(make, models, tmp_path):
    overrides = ["cutmix.every=1", "cutmix.partner=across", "cutmix.probability=1.0", "synthesis.steps=3"]
    run(make(*overrides), models, tmp_path)
    mixed = [record for record, _ in read(tmp_path) if "soft_label" in record]
    assert len(mixed) >= 4
    for record in mixed:
        assert sum(record["soft_label"].values()) == pytest.approx(1, abs=1e-5) and len(record["soft_label"]) > 1
        for parent in record["parents"]:
            top, left, bottom, right = parent["box"]
            assert (bottom - top) * (right - left) == pytest.approx(parent["area"], abs=1e-4)
            assert parent["sample"] != record["sample"]
    run(make(*overrides, "cutmix.partner=within", "synthesis.batch_size=12"), models, tmp_path / "within")
    records = [record for record, _ in read(tmp_path / "within")]
    assert any("parents" in record for record in records) and not any("soft_label" in record for record in records)


def poison(monkeypatch, ids):
    """The initial noise of these samples becomes NaN."""
    normal = painter.philox_normal

    def poisoned(seed, sample_ids, *arguments):
        noise = normal(seed, sample_ids, *arguments)
        noise[torch.isin(sample_ids, torch.tensor(ids))] = torch.nan
        return noise

    monkeypatch.setattr(painter, "philox_normal", poisoned)


LARGE = ["synthesis.images_per_class=40", "synthesis.batch_size=60", "synthesis.steps=1"]


def test_a_sample_that_is_not_finite_is_dropped_and_counted(make, models, tmp_path, monkeypatch):
    poison(monkeypatch, [5])
    summary = run(make(*LARGE), models, tmp_path)
    assert (summary.images, summary.dropped) == (119, 1)
    (sidecar,) = shards.list_shards(tmp_path / "synthetic", 0)
    assert (sidecar.images, sidecar.dropped) == (119, 1)
    assert [record["sample"] for record, _ in read(tmp_path)] == [id for id in range(120) if id != 5]
    assert run(make(*LARGE), models, tmp_path).made == 0


def test_one_in_a_hundred_is_of_the_whole_run_and_not_of_its_first_shard(make, models, tmp_path, monkeypatch):
    poison(monkeypatch, [5])
    summary = run(make(*LARGE, "synthesis.batches_per_shard=1"), models, tmp_path)
    assert (summary.shards, summary.images, summary.dropped) == (2, 119, 1)


def test_more_than_one_in_a_hundred_dropped_fails_now_and_again(make, models, tmp_path, monkeypatch):
    poison(monkeypatch, [5, 70])
    for _ in range(2):
        with pytest.raises(UserError, match=r"guidance.rho: 2 of 120 samples .* more than 1%"):
            run(make(*LARGE), models, tmp_path)


ADVERSARIAL = ["rounds=2", "guidance.adversarial_weight=1.0"]


def test_student_snapshot_counts_from_the_second_round_on(make, models, tmp_path):
    recipe = make(*ADVERSARIAL)
    first, second = (Models(models.prior, models.teacher, make_classifier(seed)) for seed in (1, 2))
    run(recipe, first, tmp_path)
    run(recipe, first, tmp_path, round=1)
    assert run(recipe, second, tmp_path).made == 0
    with pytest.raises(UserError, match="the student's snapshot differs"):
        run(recipe, second, tmp_path, round=1)
    with pytest.raises(ValueError, match="snapshot"):
        run(recipe, models, tmp_path, round=1)
    plain = make("rounds=2")
    run(plain, first, tmp_path / "plain")
    run(plain, first, tmp_path / "plain", round=1)
    assert run(plain, second, tmp_path / "plain", round=1).made == 0
    assert [record["sample"] for record, _ in read(tmp_path, 1)] == [2**40 + i for i in range(6)]


def test_manifest_is_made_of_the_sidecars_of_all_rounds(make, models, tmp_path):
    recipe = make("rounds=2")
    run(recipe, models, tmp_path)
    run(recipe, models, tmp_path, round=1)
    lines = [json.loads(line) for line in (tmp_path / "synthetic" / "manifest.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["images"]) for line in lines] == [
        ("round-000/shard-00000.tar", 6),
        ("round-001/shard-00000.tar", 6),
    ]
    assert [line["sha256"] for line in lines] == [
        shards.verify_shard(tmp_path / "synthetic" / line["shard"]).sha256 for line in lines
    ]


def test_no_hook_stays_on_the_teacher(make, models, tmp_path):
    run(make(), models, tmp_path)
    assert not any(module._forward_pre_hooks for module in models.teacher.modules())


def test_preview_shows_pairs_and_mixes(make, models, tmp_path):
    overrides = ["synthesis.batch_size=6", "cutmix.every=1", "cutmix.partner=across", "cutmix.probability=1.0"]
    recipe = make(*overrides)
    with Journal(tmp_path / "metrics.jsonl") as journal:
        file = preview_pairs(recipe, models, tmp_path, journal)
        preview = json.loads(file.read_text())
        written = {path.name: path.stat().st_mtime_ns for path in file.parent.iterdir()}
        assert preview_pairs(recipe, models, tmp_path, journal) == file
        assert {path.name: path.stat().st_mtime_ns for path in file.parent.iterdir()} == written
    assert [pair["class_name"] for pair in preview["pairs"]] == sorted(CLASSES * 2)
    for pair in preview["pairs"]:
        images = [Image.open(file.parent / pair[kind]) for kind in ("unguided", "guided")]
        assert {image.size for image in images} == {(12, 12)}
    assert 1 <= len(preview["mixes"]) <= 3
    for mix in preview["mixes"]:
        assert all((file.parent / mix[kind]).is_file() for kind in ("owner", "partner", "child"))
        top, left, bottom, right = mix["box"]
        assert 0 <= top < bottom <= 12 and 0 <= left < right <= 12 and mix["owner_class"] != mix["partner_class"]


def test_preview_has_the_samples_of_the_shards(make, models, tmp_path):
    recipe = make("guidance.mode=none", "synthesis.batch_size=6")
    run(recipe, models, tmp_path)
    with Journal(tmp_path / "metrics.jsonl") as journal:
        file = preview_pairs(recipe, models, tmp_path, journal)
    saved = {record["sample"]: image for record, image in read(tmp_path)}
    for pair in json.loads(file.read_text())["pairs"]:
        assert pair["guided"] is None
        shown = Image.open(file.parent / pair["unguided"])
        assert list(shown.getdata()) == list(saved[pair["sample"]].getdata())


FAN_OUT = ("synthesis.fan_out=2", "synthesis.fork=0.5", "cutmix.partner=any")


def test_fan_out_fills_shards_with_whole_blocks(make, models, tmp_path):
    recipe = make(*FAN_OUT, "synthesis.images_per_class=6", "synthesis.batches_per_shard=1", "synthesis.batch_size=4")
    rows = []
    with models.prior.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]))):
        summary = run(recipe, models, tmp_path / "forked")
    # Blocks of 8, 8 and 2 images: one step for the trunk, one for each child.
    assert (summary.images, summary.shards, summary.dropped) == (18, 3, 0) and rows == [8] * 6 + [2] * 3
    records = [record for record, _ in read(tmp_path / "forked")]
    assert [record["sample"] for record in records] == list(range(18))
    assert [sum(record["class"] == label for record in records) for label in range(3)] == [6, 6, 6]
    for start, parents in ((0, 4), (8, 4), (16, 1)):
        for b in range(parents):
            parent, child = records[start + b], records[start + parents + b]
            assert "forked_from" not in parent and "parents" not in parent
            assert child["forked_from"] == parent["sample"] and child["class"] == parent["class"]
            if parents > 1:
                (patch,) = child["parents"]
                assert patch["step"] == 0 and start <= patch["sample"] < start + parents != patch["sample"]
                other = records[patch["sample"]]["class"]
                expected = None if other == child["class"] else pytest.approx(patch["area"], abs=1e-6)
                assert child.get("soft_label", {}).get(str(other)) == expected
    # The first children are what the same samples are without fan-out.
    forked = pixels(tmp_path / "forked")
    with Painter(recipe, models, 0) as plain:
        for start, count in ((0, 4), (8, 4), (16, 1)):
            ids, labels = plan.trajectories(recipe, 0, start // 2, count)
            assert ids.tolist() == list(range(start, start + count))
            images = plain.paint(ids, labels, mixed=False).images
            assert torch.equal(forked[start : start + count], images.flatten(1).long())
    assert (forked[4:8] != forked[0:4]).any(1).all()


def test_more_images_leave_the_full_shards_of_a_fan_out_as_they_were(make, models, tmp_path):
    for per_class in (6, 8):
        run(make(*FAN_OUT, f"synthesis.images_per_class={per_class}"), models, tmp_path / str(per_class))
    few, many = content(tmp_path / "6"), content(tmp_path / "8")
    assert few["round-000/shard-00000.tar"] == many["round-000/shard-00000.tar"]
    assert few["round-000/shard-00000.json"] == many["round-000/shard-00000.json"]


def test_a_preview_shows_the_trajectories_of_a_fan_out_and_their_children(make, models, tmp_path):
    recipe = make(*FAN_OUT, "synthesis.batch_size=4")
    with Journal(tmp_path / "metrics.jsonl") as journal:
        found = json.loads(preview_pairs(recipe, models, tmp_path, journal).read_text())
    assert sorted(pair["sample"] for pair in found["pairs"]) == [0, 1, 2, 3, 8, 9]
    assert len(found["mixes"]) == 3
    run(recipe, models, tmp_path)
    of_run = {record["sample"]: record["class"] for record, _ in read(tmp_path)}
    assert all(of_run[pair["sample"]] == pair["class"] for pair in found["pairs"])


def test_each_sample_draws_its_prompt_and_a_child_has_its_parents(make, models, tmp_path):
    several = ('synthesis.prompt=["a {}", "one {}"]', "synthesis.words=[boot,[coat,jacket],shirt]")
    run(make(*several), models, tmp_path / "a")
    run(make(*several, "synthesis.batch_size=6", "synthesis.batches_per_shard=1"), models, tmp_path / "b")
    prompts = [[record["prompt"] for record, _ in read(tmp_path / name)] for name in "ab"]
    assert prompts[0] == prompts[1] and len(set(prompts[0])) > 3
    for record, _ in read(tmp_path / "a"):
        assert (
            record["prompt"].split()[-1]
            in {"boot": ["boot"], "coat": ["coat", "jacket"], "shirt": ["shirt"]}[record["class_name"]]
        )
    run(make(*several, *FAN_OUT), models, tmp_path / "c")
    records = {record["sample"]: record for record, _ in read(tmp_path / "c")}
    assert all(
        record["prompt"] == records[record.get("forked_from", record["sample"])]["prompt"]
        for record in records.values()
    )


def test_the_prompt_reaches_the_unet(make, models, tmp_path):
    run(make('synthesis.prompt=["a {}", "a {}", "one {}"]', "guidance.mode=none"), models, tmp_path / "several")
    run(make("synthesis.prompt=a {}", "guidance.mode=none"), models, tmp_path / "one")
    same = (pixels(tmp_path / "several") == pixels(tmp_path / "one")).all(1)
    told = torch.tensor([record["prompt"].startswith("a ") for record, _ in read(tmp_path / "several")])
    assert torch.equal(same, told) and 0 < told.sum() < len(told)
