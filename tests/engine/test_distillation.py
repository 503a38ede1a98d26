import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import CLASSES, Pictures
from torch import Tensor, nn

from diffdfkd.engine import checkpoint as checkpoints
from diffdfkd.engine import distillation
from diffdfkd.engine.augmentation import augment
from diffdfkd.engine.batches import Batches, derive_seed
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.deepspeed_engine import deepspeed_config
from diffdfkd.engine.distillation import DistillationSummary, distill, learning_rate
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.kernels.kd_loss import kd_loss

WORKER = Path(__file__).with_name("distillation_worker.py")


class Quadrants(nn.Module):
    """A teacher that needs no training: the brightness of each quadrant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(30.0))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) * self.scale


def make_teacher() -> Classifier:
    return Classifier(Quadrants(), Preprocessing(1, 8, (0.5,), (0.5,), "bilinear"), list("abcd")).requires_grad_(False)


def make_student(seed: int = 0, *, dropout: float = 0.0, norm: bool = True) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, CLASSES),
        )
    return Classifier(model, Preprocessing(1, 8, (0.5,), (0.5,), "bilinear"), list("abcd"))


def toy_recipe(**fields: Any) -> DistillationRecipe:
    return DistillationRecipe(
        **{"steps": 12, "batch_size": 16, "learning_rate": 0.02, "checkpoint_every": 4, "warmup_steps": 2, **fields}
    )


def train(
    folder: Path,
    student: Classifier,
    recipe: DistillationRecipe,
    images: Any = None,
    output: Path | None = None,
    **options: Any,
) -> DistillationSummary:
    """`distill` on the CPU with a journal in the folder."""
    with Journal(folder / "metrics.jsonl") as journal:
        return distill(
            student,
            make_teacher(),
            images or Pictures(),
            recipe,
            output or folder / "student",
            **{"seed": 7, "data_digest": "images", "journal": journal, "device": "cpu", "progress": False, **options},
        )


class Killed(BaseException):
    """Stands for a kill at a chosen place."""


def assert_same_weights(left: Classifier, right: Classifier) -> None:
    one, other = left.state_dict(), right.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def reason(folder: Path) -> str:
    starts = [event for event in read_journal(folder / "metrics.jsonl") if event["event"] == "distill_start"]
    return starts[-1]["reason"]


@contextmanager
def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    """Distillation raises Killed, which is expected, when it asks for the rate of this step."""

    def rate(recipe: DistillationRecipe, at: int) -> float:
        if at == step:
            raise Killed
        return learning_rate(recipe, at)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distillation, "learning_rate", rate)
        yield


def plain_loop(student: Classifier, recipe: DistillationRecipe, seed: int = 7) -> None:
    """What distillation does, without DeepSpeed."""
    teacher, batches = make_teacher().eval(), Batches(Pictures(), recipe.batch_size, seed=seed)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(student.parameters(), 1.0, recipe.momentum, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.AdamW(student.parameters(), weight_decay=recipe.weight_decay)
    student.train()
    with torch.random.fork_rng():
        for step in range(recipe.steps):
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
            torch.manual_seed(derive_seed(seed, "step", step, 0))
            generator = torch.Generator().manual_seed(derive_seed(seed, "augmentation", step, 0))
            images = augment(batches.read(step)[1].float() / 255, recipe.augmentation, generator)
            images = images.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            kd_loss(student(images), teacher(images), recipe.temperature).backward()
            optimizer.step()


def test_importing_it_imports_no_deepspeed() -> None:
    code = "import sys, diffdfkd.engine.distillation; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("optimizer", "zero_stage"), [("sgd", 1), ("adamw", 1), ("adamw", 0), ("adamw", 3)])
def test_deepspeed_equals_a_plain_loop_bit_for_bit(tmp_path: Path, optimizer: str, zero_stage: int) -> None:
    recipe = toy_recipe(optimizer=optimizer, zero_stage=zero_stage, schedule="step", learning_rate=0.1)
    student, plain = make_student(dropout=0.3), make_student(dropout=0.3)
    summary = train(tmp_path, student, recipe)
    plain_loop(plain, recipe)
    assert_same_weights(student, plain)
    assert student.model[1].num_batches_tracked == 12  # type: ignore[index,union-attr]
    assert (summary.steps, summary.start_step, summary.holdout_agreement) == (12, 0, None)


def test_zero_3_leaves_torch_as_it_was(tmp_path: Path) -> None:
    linear = torch.nn.functional.linear
    train(tmp_path, make_student(), toy_recipe(steps=2, zero_stage=3))
    assert torch.nn.functional.linear is linear


@pytest.mark.parametrize(("optimizer", "zero_stage"), [("adamw", 1), ("sgd", 0), ("adamw", 2), ("sgd", 3)])
def test_killed_and_continued_equals_undisturbed_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, zero_stage: int
) -> None:
    recipe = toy_recipe(optimizer=optimizer, zero_stage=zero_stage)
    undisturbed, killed, resumed = (make_student(dropout=0.3) for _ in range(3))
    whole = train(tmp_path / "a", undisturbed, recipe)
    with kill_at(monkeypatch, 10):
        train(tmp_path / "b", killed, recipe)
    assert_same_weights(killed, make_student(dropout=0.3))  # the caller's student is changed at the end only
    summary = train(tmp_path / "b", resumed, recipe)
    assert_same_weights(resumed, undisturbed)
    assert summary.start_step == 8 and reason(tmp_path / "b") == "continued at step 8"
    assert summary.steps == whole.steps == 12
    # Once more: nothing is left to do, and the same student comes out.
    again = make_student(dropout=0.3)
    assert train(tmp_path / "b", again, recipe).start_step == 12
    assert_same_weights(again, undisturbed)


class Conv(nn.Module):
    """A teacher whose arithmetic depends on the size of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images) * 9


def test_kept_answers_teach_as_computed_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    conv = Conv()
    teacher = Classifier(conv, make_teacher().preprocessing, list("abcd")).requires_grad_(False)
    monkeypatch.setattr(sys.modules[__name__], "make_teacher", lambda: teacher)
    cached, computed = make_student(), make_student()
    train(tmp_path / "a", cached, toy_recipe(augmentation=[]))
    train(tmp_path / "b", computed, toy_recipe(augmentation=[], teacher_logits="computed"))
    for name, value in cached.state_dict().items():
        torch.testing.assert_close(value, computed.state_dict()[name], rtol=1e-4, atol=1e-5)
    starts = [json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0]) for run in "ab"]
    assert [start["teacher_logits"] for start in starts] == ["cached", "computed"]
    assert not (tmp_path / "b" / "student" / "logits").exists()

    # The files decide and not the teacher, who is not asked a second time.
    monkeypatch.setattr(conv, "forward", None)
    shutil.rmtree(tmp_path / "a" / "student" / "checkpoints")
    again = make_student()
    train(tmp_path / "a", again, toy_recipe(augmentation=[]))
    assert_same_weights(again, cached)


@pytest.mark.parametrize("lost", ["nothing", "answers", "damaged"])
def test_killed_with_kept_answers_and_continued_equals_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    recipe = toy_recipe(augmentation=[])
    undisturbed, resumed = make_student(), make_student()
    train(tmp_path / "a", undisturbed, recipe)
    with kill_at(monkeypatch, 10):
        train(tmp_path / "b", make_student(), recipe)
    file = tmp_path / "b" / "student" / "logits" / "part-00000.safetensors"
    content = file.read_bytes()
    if lost == "answers":
        file.unlink()
    elif lost == "damaged":
        file.write_bytes(content[:100])
    assert train(tmp_path / "b", resumed, recipe).start_step == 8
    assert_same_weights(resumed, undisturbed)
    assert file.read_bytes() == content


def test_kept_answers_with_augmentation_are_a_choice_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached, computed = make_student(), make_student()
    train(tmp_path / "a", cached, toy_recipe(augmentation=["crop"], teacher_logits="cached"))
    assert "the teacher's answers are those to the images before crop" in caplog.text
    train(tmp_path / "b", computed, toy_recipe(augmentation=["crop"]))
    assert not torch.equal(cached.model[0].weight, computed.model[0].weight)  # type: ignore[index,arg-type]


def test_kill_during_a_save_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, student = make_student(), make_student()
    train(tmp_path / "a", undisturbed, toy_recipe())

    def half(folder: Path, state: checkpoints.State) -> None:
        if state.step == 8:
            raise Killed
        checkpoints.publish(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr("diffdfkd.engine.deepspeed_engine.publish", half)
        with pytest.raises(Killed):
            train(tmp_path / "b", make_student(), toy_recipe())
    folder = tmp_path / "b" / "student" / "checkpoints"
    torn = next(folder.glob("step-00000008-*"))
    for file in torn.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert train(tmp_path / "b", student, toy_recipe()).start_step == 4
    assert_same_weights(student, undisturbed)
    assert sorted(path.name[:13] for path in folder.glob("step-*")) == ["step-00000008", "step-00000012"]


def test_rounds_continue_and_changed_inputs_start_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, first, second = toy_recipe(), Pictures(64), Pictures(96)
    student = make_student()
    train(tmp_path, student, recipe, first, until_step=6, data_digest="one")
    between = make_student()
    between.load_state_dict(student.state_dict())
    summary = train(tmp_path, student, recipe, second, data_digest="two")
    assert (summary.start_step, summary.steps) == (6, 12)
    assert reason(tmp_path) == "new images from step 6 on"
    moved = [event for event in read_journal(tmp_path / "metrics.jsonl") if event["event"] == "distill"]
    assert [event["step"] for event in moved] == [4, 6, 8, 12]

    # The second round killed, then the same call with the student that the first round left.
    shutil.rmtree(tmp_path / "student")
    train(tmp_path, make_student(), recipe, first, until_step=6, data_digest="one")
    resumed = make_student()
    resumed.load_state_dict(between.state_dict())
    with kill_at(monkeypatch, 9):
        train(tmp_path, resumed, recipe, second, data_digest="two")
    assert train(tmp_path, resumed, recipe, second, data_digest="two").start_step == 8
    assert_same_weights(resumed, student)

    afresh: list[tuple[Classifier, DistillationRecipe, dict[str, Any], str]] = [
        (make_student(), recipe, {"data_digest": "three"}, "other images"),
        (make_student(1), recipe, {"data_digest": "three"}, "another student"),
        (make_student(), toy_recipe(temperature=2.0), {"data_digest": "three"}, "another recipe"),
        (make_student(), recipe, {"data_digest": "three", "seed": 8}, "seed"),
    ]
    for given, changed, options, expected in afresh:
        assert train(tmp_path, given, changed, until_step=4, **options).start_step == 0
        assert expected in reason(tmp_path)
    # How often checkpoints are made changes nothing in the student.
    often = toy_recipe(checkpoint_every=2)
    assert train(tmp_path, make_student(), often, until_step=4, data_digest="three", seed=8).start_step == 4
    # Other images are a next round only for the student that the last one left.
    assert train(tmp_path, make_student(), often, until_step=6, data_digest="four", seed=8).start_step == 0


def test_a_student_learns_and_the_hold_out_says_so(tmp_path: Path) -> None:
    recipe = toy_recipe(steps=60, holdout=40, augmentation=["crop"], checkpoint_every=100)
    teacher_before = make_teacher().state_dict()
    student = make_student()
    start = train(tmp_path / "none", make_student(), recipe, Pictures(200), until_step=1)
    summary = train(tmp_path, student, recipe, Pictures(200))
    assert start.holdout_agreement is not None and summary.holdout_agreement is not None
    assert start.holdout_agreement < 0.7 < 0.9 < summary.holdout_agreement
    curve = [event["loss"] for event in read_journal(tmp_path / "metrics.jsonl") if event["event"] == "distill"]
    assert len(curve) == 3 and curve[-1] < 0.5 * curve[0] and summary.loss == curve[-1]
    assert all(torch.equal(value, teacher_before[name]) for name, value in make_teacher().state_dict().items())
    assert summary.images_per_second > 0


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_student_with_an_odd_number_of_weights_trains(tmp_path: Path, zero_stage: int) -> None:
    student = make_student()
    student.model[2] = nn.PReLU()
    assert sum(parameter.numel() for parameter in student.parameters()) % 2 == 1
    assert train(tmp_path, student, toy_recipe(steps=2, zero_stage=zero_stage)).steps == 2


def test_bfloat16_trains_close_to_float32(tmp_path: Path) -> None:
    single, half = make_student(), make_student()
    expected = train(tmp_path / "a", single, toy_recipe())
    summary = train(tmp_path / "b", half, toy_recipe(dtype="bfloat16"))
    assert summary.loss == pytest.approx(expected.loss, rel=0.03) and summary.loss != expected.loss
    assert all(value.dtype != torch.bfloat16 for value in half.state_dict().values())


class Hostile:
    """Writes a file if anything unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    recipe = toy_recipe()
    train(tmp_path, make_student(), recipe, until_step=4)
    file = next((tmp_path / "student" / "checkpoints").rglob(name))
    content = torch.load(file, weights_only=False)
    torch.save({**content, "ds_version": Hostile(tmp_path / "ran")}, file)
    with pytest.raises(UserError, match=f"{name}: damaged, or not a checkpoint of this program"):
        train(tmp_path, make_student(), recipe)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("broken", ["pointer", "state", "other"])
def test_a_broken_checkpoint_folder_is_named(tmp_path: Path, broken: str) -> None:
    recipe = toy_recipe()
    train(tmp_path, make_student(), recipe, until_step=4)
    folder = tmp_path / "student" / "checkpoints"
    state = next(folder.rglob("state.json"))
    if broken == "pointer":
        (folder / "latest").write_text("../../elsewhere")
    elif broken == "state":
        state.write_text("{}")
    else:
        state.write_text(json.dumps({**json.loads(state.read_text()), "step": 3}))
    with pytest.raises(UserError, match=r"delete .* to start afresh"):
        train(tmp_path, make_student(), recipe)


def test_checkpoint_of_other_processes_is_refused(tmp_path: Path) -> None:
    student = make_student()
    segment = checkpoints.Segment(first_step=0, data="d", student="s")
    state = checkpoints.State(step=4, recipe="r", processes=2, history=[segment], loss=1.0)
    given: dict[str, Any] = {"recipe": "r", "data": "d", "student": "s", "until_step": 12, "folder": tmp_path}
    assert checkpoints.continuation(state, processes=2, **given)[1]
    with pytest.raises(UserError, match=r"made by 2 process\(es\), now there are 1"):
        checkpoints.continuation(state, processes=1, **given)
    digest = checkpoints.state_digest(student.state_dict())
    assert digest == checkpoints.state_digest(make_student().state_dict())
    with torch.no_grad():
        student.model[1].running_mean[0] += 1  # type: ignore[index,operator]
    assert digest != checkpoints.state_digest(student.state_dict())


def test_learning_rate_follows_its_schedule() -> None:
    cosine = DistillationRecipe(steps=110, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate(cosine, step) for step in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert 0 < learning_rate(cosine, 109) < 0.001
    step = DistillationRecipe(steps=100, schedule="step", milestones=[0.5, 0.75], learning_rate=1.0)
    assert [learning_rate(step, at) for at in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    constant = DistillationRecipe(steps=100, schedule="constant", learning_rate=0.3)
    assert {learning_rate(constant, at) for at in range(100)} == {0.3}


def test_own_deepspeed_keys_are_merged_and_ours_refused(tmp_path: Path) -> None:
    merged = deepspeed_config(
        DistillationRecipe(deepspeed={"gradient_clipping": 1.5, "zero_optimization": {"overlap_comm": True}}), 1000, 2
    )
    assert merged["gradient_clipping"] == 1.5 and merged["train_micro_batch_size_per_gpu"] == 64
    assert merged["zero_optimization"] == {
        "stage": 1, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "overlap_comm": True
    }  # fmt: skip
    same = DistillationRecipe(deepspeed={"train_batch_size": 128})
    assert deepspeed_config(same, 1000, 1)["train_batch_size"] == 128
    refused: list[tuple[dict[str, Any], str]] = [
        ({"train_batch_size": 64}, r"deepspeed\.train_batch_size: got 64, but distillation\.batch_size"),
        ({"zero_optimization": {"stage": 3}}, r"deepspeed\.zero_optimization\.stage: got 3, but distillation\.zero_st"),
        ({"optimizer": {"type": "Adam"}}, r"but distillation\.optimizer decides this"),
        ({"bf16": {"enabled": True}}, r"but distillation\.dtype decides this"),
    ]
    for given, message in refused:
        with pytest.raises(UserError, match=message):
            deepspeed_config(DistillationRecipe(deepspeed=given), 1000, 1)
    with pytest.raises(UserError, match=r"distillation\.deepspeed: DeepSpeed refuses it"):
        train(tmp_path, make_student(), toy_recipe(deepspeed={"zero_optimization": {"stge": 1}}))


def test_clipping_from_the_users_keys_acts(tmp_path: Path) -> None:
    free, clipped = make_student(), make_student()
    train(tmp_path / "a", free, toy_recipe(optimizer="sgd"))
    train(tmp_path / "b", clipped, toy_recipe(optimizer="sgd", deepspeed={"gradient_clipping": 1e-6}))
    start = make_student().model[0].weight  # type: ignore[index]
    assert (clipped.model[0].weight - start).abs().max() < 1e-4  # type: ignore[index,operator,union-attr]
    assert (free.model[0].weight - start).abs().max() > 1e-3  # type: ignore[index,operator,union-attr]


def test_a_loss_that_is_not_finite_stops_with_the_cure(tmp_path: Path) -> None:
    recipe = toy_recipe(optimizer="sgd", learning_rate=1e30, warmup_steps=0)
    with pytest.raises(UserError, match=r"distillation\.learning_rate: the loss is nan at step 4"):
        train(tmp_path, make_student(norm=False), recipe)


def test_one_process_leaves_no_trace_in_environment_random_state_or_output(tmp_path: Path) -> None:
    done = _run([sys.executable, str(WORKER), str(tmp_path), "--quietly"])
    assert (done.stdout, done.stderr) == ("", "")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _run([*launch, str(WORKER), str(tmp_path / "two")])
    one, norm = make_student(norm=False), make_student()
    two = torch.load(tmp_path / "two" / "student.pt", weights_only=True)
    train(tmp_path / "one", one, toy_recipe(augmentation=[]))
    assert len(list((tmp_path / "two" / "student" / "logits").iterdir())) == 5
    train(tmp_path / "norm", norm, toy_recipe(augmentation=[], learning_rate=1e-6))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two["plain"][name], value, rtol=1e-3, atol=1e-4)
    mean = norm.model[1].running_mean  # type: ignore[index]
    torch.testing.assert_close(two["mean"], mean, rtol=1e-3, atol=1e-4)
    losses = [
        [event["loss"] for event in read_journal(tmp_path / run / "metrics.jsonl") if event["event"] == "distill"]
        for run in ("one", "two")
    ]
    assert len(losses[0]) == len(losses[1]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done
