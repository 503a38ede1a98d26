import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdfkd.engine import distillation
from diffdfkd.engine.batches import Batches
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.distillation import distill, learning_rate
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.diversity import COMPARED_AT_ONCE, thumbnails
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.engine.logits import Logits
from diffdfkd.engine.selection import UNIT, Selection, balanced, repeated, select
from diffdfkd.engine.selection_recipe import SelectionRecipe

WORKER = Path(__file__).with_name("selection_worker.py")
CPU = torch.device("cpu")
AS_IT_IS = Preprocessing(1, 8, (0.5,), (0.5,), "bilinear")


class Noise:
    classes: list[str] | None = None

    def __init__(self, images: int) -> None:
        self.pixels = torch.randint(0, 256, (images, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Any) -> tuple[Tensor, Tensor]:
        return self.pixels[list(indices)], torch.zeros(len(indices), dtype=torch.int64)


def pictures(images: int) -> Noise:
    """One bright quadrant in each; among the later ones some that are the same again."""
    made = Noise(images)
    made.pixels //= 3
    for index in range(images):
        row, column = divmod(index % 4, 2)
        made.pixels[index, 0, 4 * row :, 4 * column :][:4, :4] += 150 - index
    made.pixels[40:50] = made.pixels[30:40]
    return made


class Quadrants(nn.Module):
    """A teacher that needs no training: the brightness of each quadrant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) * self.scale


def make_student(seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 4)),
        )
    return Classifier(model, AS_IT_IS, list("abcd"))


def toy_recipe(**fields: Any) -> DistillationRecipe:
    return DistillationRecipe(**{"steps": 12, "batch_size": 16, "checkpoint_every": 4, **fields})


def train(
    folder: Path, student: Classifier, recipe: DistillationRecipe, images: Noise | None = None, **options: Any
) -> int:
    """`distill` on the CPU with a journal in the folder; the step that it began at."""
    teacher = Classifier(Quadrants(), AS_IT_IS, list("abcd")).requires_grad_(False)
    how = {"seed": 7, "data_digest": "one", "device": "cpu", "progress": False, "output": folder / "student", **options}
    with Journal(folder / "metrics.jsonl") as journal:
        return distill(student, teacher, images or pictures(64), recipe, journal=journal, **how).start_step


def assert_same_weights(left: Classifier, right: Classifier) -> None:
    one, other = left.state_dict(), right.state_dict()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Killed(BaseException):
    """Stands for a kill."""


@contextmanager
def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    def rate(recipe: DistillationRecipe, at: int) -> float:
        if at == step:
            raise Killed
        return learning_rate(recipe, at)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distillation, "learning_rate", rate)
        yield


def chosen(
    images: Noise, logits: Tensor, student: Classifier | None = None, *, batch: int = 4, holdout: int = 0, **fields: Any
) -> Selection:
    batches = Batches(images, batch, seed=3, holdout=holdout)
    return select(SelectionRecipe(**fields), batches, Logits([logits]), student, dtype="float32", device=CPU)


def answers_with_top(tops: Tensor) -> Tensor:
    """Logits of two classes [n, 2] whose likeliest has these probabilities."""
    return torch.stack([torch.logit(tops.double()), torch.zeros(len(tops))], 1).float()


def test_images_outside_the_confidences_are_dropped_and_held_back_ones_are_not_counted() -> None:
    tops = torch.linspace(0.5, 0.99, 50)
    found = chosen(Noise(50), answers_with_top(tops), confidence=(0.6, 0.9))
    wanted = (tops >= 0.6) & (tops <= 0.9)
    assert torch.equal(found.weights > 0, wanted) and set(found.weights.tolist()) == {0.0, float(UNIT)}
    assert (found.kept, found.dropped) == (int(wanted.sum()), {"confidence": 50 - int(wanted.sum())})
    assert found.effective == found.kept
    held = Batches(Noise(50), 4, seed=3, holdout=9).held
    apart = chosen(Noise(50), answers_with_top(tops), holdout=9, confidence=(0.6, 0.9))
    wanted[held] = False
    assert torch.equal(apart.weights > 0, wanted) and apart.kept + apart.dropped["confidence"] == 41


def naive_repeated(small: Tensor, distance: float) -> list[bool]:
    kept: list[Tensor] = []
    found = []
    for image in small.double():
        found.append(any((image - other).norm() < distance for other in kept))
        if not found[-1]:
            kept.append(image)
    return found


@pytest.mark.parametrize("count", [5, COMPARED_AT_ONCE, 2 * COMPARED_AT_ONCE + 7])
def test_repeated_images_are_those_of_the_plain_loop(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    # Few directions with some noise: chains of neighbours within blocks and across them.
    small = torch.randn(9, 32, generator=generator)[torch.randint(0, 9, (count,), generator=generator)]
    small = nn.functional.normalize(small + 0.1 * torch.randn(count, 32, generator=generator), dim=1)
    for distance in (0.05, 0.14, 0.2):
        assert repeated(small, distance).tolist() == naive_repeated(small, distance)
    # What is kept stays kept when images are appended.
    assert torch.equal(repeated(small, 0.14)[: count // 2], repeated(small[: count // 2], 0.14))


def test_of_an_image_twice_the_first_is_kept() -> None:
    images = Noise(20)
    images.pixels[17] = images.pixels[4]
    images.pixels[18] = (images.pixels[5].float() * 0.9).byte()  # paler
    found = chosen(images, torch.zeros(20, 2), duplicates=0.1)
    assert (found.weights == 0).nonzero().flatten().tolist() == [17, 18] and found.dropped == {"duplicates": 2}
    assert (thumbnails(images.pixels[5:6]) - thumbnails(images.pixels[18:19])).norm() < 0.1
    # Dropped for its confidence, the first of two does not drop the second.
    logits = answers_with_top(torch.full((20,), 0.9))
    logits[4] = 0
    found = chosen(images, logits, duplicates=0.1, confidence=(0.6, 1.0))
    assert (found.weights == 0).nonzero().flatten().tolist() == [4, 18]
    assert found.dropped == {"confidence": 1, "duplicates": 1}


@pytest.mark.parametrize("sharpness", [1.0, 4.0, 200.0])
def test_balanced_classes_have_equal_totals(sharpness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lean = torch.tensor([1.5, 0.5, 0.0, -0.5, -1.0])
    shares = (sharpness * (torch.randn(400, 5, generator=generator) + lean)).double().softmax(1)
    start = torch.rand(400, generator=generator).double() + 0.5
    masses = start @ shares
    weights, unbalanced, miss = balanced(start, shares, 1.0)
    totals = weights @ shares
    assert unbalanced == [] and miss < 1e-3
    torch.testing.assert_close(totals, torch.full_like(totals, masses.sum().item() / 5), rtol=2e-3, atol=0)
    # In between, the masses' powers; at 0 nothing moves.
    half, _, _ = balanced(start, shares, 0.5)
    powers = masses.sqrt()
    torch.testing.assert_close(half @ shares, powers * masses.sum() / powers.sum(), rtol=2e-3, atol=0)
    torch.testing.assert_close(balanced(start, shares, 0.0)[0], start)


def test_of_sure_answers_balance_is_one_over_the_class_s_count() -> None:
    classes = torch.tensor([0] * 30 + [1] * 10 + [2] * 5)
    logits = 90 * nn.functional.one_hot(classes, 4).float()
    found = chosen(Noise(45), logits, balance=1.0)
    share = found.weights / found.weights.sum()
    expected = 1 / (3 * torch.tensor([30.0, 10.0, 5.0]).double())[classes]
    torch.testing.assert_close(share, expected, rtol=1e-4, atol=0)
    assert found.unbalanced == [3] and found.event()["unbalanced"] == [3]  # which the teacher sees nowhere
    assert found.effective == pytest.approx(1 / (expected**2).sum().item(), rel=1e-4)


def test_what_cannot_be_balanced_stays_finite_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    same = torch.tensor([2.0, 0.0, 0.0]).expand(30, 3)
    found = chosen(Noise(30), same, balance=1.0)
    assert set(found.weights.tolist()) == {float(UNIT)} and found.effective == 30
    assert found.balance_miss is not None and found.balance_miss > 0.5
    assert "selection.balance: no weights bring the classes nearer" in caplog.text
    # Three lean the way that all would have to, and not far enough: they get the weight, and all numbers stay finite.
    few = torch.tensor([9.0, 0.0, -9.0]).repeat(30, 1)
    few[7:10] = torch.tensor([0.4, 0.0, -9.0])
    found = chosen(Noise(30), few, balance=1.0)
    assert torch.isfinite(found.weights).all() and (found.weights > 0).all() and found.unbalanced == [2]
    assert found.effective == pytest.approx(3, abs=0.1) and found.weights.topk(3).indices.sort().values.tolist() == [
        7,
        8,
        9,
    ]


def test_disagreement_weighs_by_the_divergence_from_the_student() -> None:
    images, student = Noise(30), make_student(1)
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)) * 3
    found = chosen(images, logits, student, disagreement=2.0)
    assert student.training
    with torch.no_grad():
        theirs = student.eval()(images.pixels.float() / 255).double().softmax(1)
    own = logits.double().softmax(1)
    divergence = (own * (own.log() - theirs.log())).sum(1)
    expected = 1 + 2 * divergence
    torch.testing.assert_close(found.weights / UNIT, expected / expected.mean(), rtol=1e-5, atol=1e-5)
    assert found.disagreement == pytest.approx(divergence.mean().item(), abs=1e-5)
    assert set(chosen(images, logits, disagreement=2.0).weights.tolist()) == {float(UNIT)}  # no student yet


def test_less_than_a_batch_is_refused_with_the_counts() -> None:
    images = Noise(20)
    images.pixels[1] = images.pixels[0]
    tops = torch.tensor([0.9] * 6 + [0.6] * 14)
    with pytest.raises(UserError) as error:
        chosen(images, answers_with_top(tops), batch=8, confidence=(0.8, 1.0), duplicates=0.1)
    assert "leaves 5 of 20 images, fewer than one batch (distillation.batch_size=8)" in str(error.value)
    assert "14 by selection.confidence=[0.8, 1.0], 1 by selection.duplicates=0.1" in str(error.value)
    # Nothing dropped, few images: as without a selection.
    assert chosen(images, answers_with_top(tops), batch=64, confidence=(0.5, 1.0)).kept == 20


def test_a_selection_that_selects_nothing_changes_no_bit(tmp_path: Path) -> None:
    plain, same = make_student(), make_student()
    train(tmp_path / "a", plain, toy_recipe())
    train(tmp_path / "b", same, toy_recipe(), selection=SelectionRecipe())
    assert_same_weights(plain, same)
    assert (tmp_path / "a" / "student" / "checkpoints" / "latest").read_text() == (
        tmp_path / "b" / "student" / "checkpoints" / "latest"
    ).read_text()
    assert not (tmp_path / "b" / "student" / "logits").exists()
    # Disagreement waits for a student of an earlier round.
    train(tmp_path / "c", first := make_student(), toy_recipe(), selection=SelectionRecipe(disagreement=3.0))
    assert_same_weights(plain, first)


@pytest.mark.parametrize("augmentation", [[], ["crop"]])
def test_killed_and_continued_over_two_rounds_equals_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augmentation: list[str]
) -> None:
    recipe = toy_recipe(augmentation=augmentation, holdout=5)
    how: dict[str, Any] = {"selection": SelectionRecipe(disagreement=2.0, balance=0.7, duplicates=0.15)}
    first = {**how, "until_step": 6, "data_digest": "one"}
    second = {**how, "later_round": True, "data_digest": "two"}
    undisturbed, plain, resumed = make_student(), make_student(), make_student()
    train(tmp_path / "a", undisturbed, recipe, pictures(64), **first)
    between = {name: value.clone() for name, value in undisturbed.state_dict().items()}
    train(tmp_path / "a", undisturbed, recipe, pictures(96), **second)
    events = [event for event in read_journal(tmp_path / "a" / "metrics.jsonl") if event["event"] == "selection"]
    assert [event["kept"] + event["dropped"]["duplicates"] for event in events] == [59, 91]
    assert "disagreement" not in events[0] and events[1]["disagreement"] > 0
    assert events[1]["effective_sample_size"] < events[1]["kept"]

    train(tmp_path / "b", resumed, recipe, pictures(64), **first)
    with kill_at(monkeypatch, 9):
        train(tmp_path / "b", resumed, recipe, pictures(96), **second)
    resumed.load_state_dict(between)
    assert train(tmp_path / "b", resumed, recipe, pictures(96), **second) == 8
    assert_same_weights(resumed, undisturbed)

    train(tmp_path / "c", plain, recipe, pictures(64), until_step=6, data_digest="one")
    assert not torch.equal(plain.model[0].weight, between["model.0.weight"])
    # Another selection is another training.
    train(tmp_path / "b", make_student(), recipe, pictures(64), until_step=6, data_digest="one")
    starts = [event for event in read_journal(tmp_path / "b" / "metrics.jsonl") if event["event"] == "distill_start"]
    assert "another recipe" in starts[-1]["reason"]


@pytest.mark.slow
def test_two_processes_select_and_train_as_one(tmp_path: Path) -> None:
    launches = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    for name, launch in launches.items():
        command = [sys.executable, *launch, str(WORKER), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    one, first, second = (
        torch.load(tmp_path / name, weights_only=True) for name in ("one/0.pt", "two/0.pt", "two/1.pt")
    )
    for name, value in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
