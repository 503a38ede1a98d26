"""The class-activation losses' place in training: DeepSpeed's step beside a plain one, resumes, what is journalled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import CLASSES, Pictures
from torch import Tensor
from torch.nn import functional

from diffdfkd.engine import distillation
from diffdfkd.engine.augmentation import augment
from diffdfkd.engine.batches import Batches, derive_seed
from diffdfkd.engine.classifier import Classifier, Preprocessing, build_model
from diffdfkd.engine.distillation import distill, learning_rate
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.kernels.kd_loss import kd_loss


class Killed(BaseException):
    """Stands for a kill at a chosen place."""


def network(architecture: str, seed: int, **options: Any) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(architecture, options, 1, CLASSES, field="student")
    return Classifier(model, Preprocessing(1, 16, (0.5,), (0.5,), "bilinear"), list("abcd"))


def make_teacher() -> Classifier:
    """Of maps at 8, 4 and 2 pixels."""
    return network("resnet18", 5, width=4).requires_grad_(False).eval()


def make_student() -> Classifier:
    """Of maps at 16, 8 and 4 pixels, the last behind a ReLU that is no module."""
    return network("wrn_16_1", 0, dropout=0.2).train()


def toy_recipe(**fields: Any) -> DistillationRecipe:
    maps = {"cam_weight": 0.5, "sarc_weight": 20.0}
    return DistillationRecipe(
        **{
            "steps": 6,
            "batch_size": 16,
            "optimizer": "sgd",
            "learning_rate": 0.02,
            "checkpoint_every": 2,
            **maps,
            **fields,
        }
    )


def train(folder: Path, student: Classifier, recipe: DistillationRecipe) -> None:
    with Journal(folder / "metrics.jsonl") as journal:
        distill(
            student,
            make_teacher(),
            Pictures(),
            recipe,
            folder / "student",
            seed=7,
            data_digest="images",
            journal=journal,
            device="cpu",
            progress=False,
        )


def assert_same(left: Classifier, right: Classifier) -> None:
    for name, value in left.state_dict().items():
        assert torch.equal(value, right.state_dict()[name]), name


def plain_loop(student: Classifier, recipe: DistillationRecipe) -> list[float]:
    """Training as METHOD says, by functions of its own; the sum of both map losses of each step."""
    teacher, batches = make_teacher(), Batches(Pictures(), recipe.batch_size, seed=7)
    teacher.requires_grad_(True)
    optimizer = torch.optim.SGD(student.parameters(), 1.0, recipe.momentum, weight_decay=recipe.weight_decay)
    losses = []

    def forward(network: Classifier, names: list[str], images: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept: list[Tensor] = []
        handles = [
            network.model.get_submodule(name).register_forward_hook(lambda _m, _i, output: kept.append(output))
            for name in names
        ]
        logits = network(images)
        for handle in handles:
            handle.remove()
        return logits, kept

    def gradcams(logits: Tensor, features: list[Tensor], chosen: Tensor, read: Tensor, head: Any) -> list[Tensor]:
        score = functional.one_hot(chosen, CLASSES) * logits
        gradients = torch.autograd.grad(score.sum(), features[:2], retain_graph=True)
        maps = [(g.mean((2, 3), keepdim=True) * f).sum(1) for g, f in zip(gradients, features[:2], strict=True)]
        last = (read * head.weight.detach()[chosen][:, :, None, None]).sum(1) / read[0, 0].numel()
        return [*maps, last]

    with torch.random.fork_rng():
        for step in range(recipe.steps):
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
            torch.manual_seed(derive_seed(7, "step", step, 0))
            generator = torch.Generator().manual_seed(derive_seed(7, "augmentation", step, 0))
            images = augment(batches.read(step)[1].float() / 255, recipe.augmentation, generator)
            images = images.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            targets, theirs = forward(teacher, ["layer2", "layer3", "layer4"], images)
            logits, ours = forward(student, ["block1", "block2", "bn1"], images)
            chosen = targets.detach().argmax(1)
            head: Any = student.model.get_submodule("fc")
            taught: Any = teacher.model.get_submodule("linear")
            read = functional.relu(ours[2])
            cam = torch.einsum("bchw,kc->bkhw", read, head.weight.detach())
            target = torch.einsum("bchw,kc->bkhw", theirs[2], taught.weight).detach()
            side = min(cam.shape[-1], target.shape[-1])
            pool = functional.adaptive_avg_pool2d
            maps = functional.mse_loss(pool(cam, side), pool(target, side))
            sarc = torch.zeros(())
            pairs = zip(
                gradcams(logits, ours, chosen, read, head),
                gradcams(targets, theirs, chosen, theirs[2], taught),
                strict=True,
            )
            for our, their in pairs:
                our = our * (our.shape[-1] / their.shape[-1]) ** 2
                side = min(our.shape[-1], their.shape[-1])
                sarc = sarc + functional.mse_loss(pool(our, side), pool(their.detach(), side))
            loss = kd_loss(logits, targets.detach(), recipe.temperature)
            (loss + recipe.cam_weight * maps + recipe.sarc_weight * sarc).backward()
            optimizer.step()
            losses.append(float((maps + sarc).detach()))
    return losses


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_equals_a_plain_loop(tmp_path: Path, zero_stage: int) -> None:
    recipe = toy_recipe(zero_stage=zero_stage)
    student, plain, without = make_student(), make_student(), make_student()
    train(tmp_path / "maps", student, recipe)
    losses = plain_loop(plain, recipe)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
    events = [event for event in read_journal(tmp_path / "maps" / "metrics.jsonl") if event["event"] == "distill"]
    assert [event["cam"] + event["sarc"] for event in events] == pytest.approx(
        [sum(losses[step : step + 2]) / 2 for step in (0, 2, 4)], rel=1e-4
    )
    for event in events:
        assert event["loss"] == pytest.approx(event["kl"] + 0.5 * event["cam"] + 20.0 * event["sarc"], rel=1e-5)
    plain_loop(without, toy_recipe(cam_weight=0.0, sarc_weight=0.0))
    weight = "model.block1.layer.0.conv1.weight"  # the losses reach the first block, or this would prove nothing
    assert (without.state_dict()[weight] - student.state_dict()[weight]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_continued_equals_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    recipe = toy_recipe(dtype=dtype)
    undisturbed, resumed = make_student(), make_student()
    train(tmp_path / "a", undisturbed, recipe)

    def rate(recipe: DistillationRecipe, at: int) -> float:
        if at == 5:
            raise Killed
        return learning_rate(recipe, at)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distillation, "learning_rate", rate)
        train(tmp_path / "b", make_student(), recipe)
    train(tmp_path / "b", resumed, recipe)
    starts = [event for event in read_journal(tmp_path / "b" / "metrics.jsonl") if event["event"] == "distill_start"]
    assert [start["start_step"] for start in starts] == [0, 4]
    assert_same(resumed, undisturbed)
    assert all(torch.isfinite(value).all() for value in resumed.state_dict().values())


@pytest.mark.parametrize(("cam", "sarc"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_term_alone(tmp_path: Path, cam: float, sarc: float) -> None:
    train(tmp_path, make_student(), toy_recipe(steps=2, cam_weight=cam, sarc_weight=sarc))
    events = read_journal(tmp_path / "metrics.jsonl")
    (event,) = [event for event in events if event["event"] == "distill"]
    assert {"cam", "sarc"} & event.keys() == ({"cam"} if cam else {"sarc"})
    assert {row["name"] for row in events if row["event"] == "scalar"} == {
        "distill/loss",
        "distill/kl",
        "distill/cam" if cam else "distill/sarc",
        "distill/learning_rate",
    }
    assert events[0]["teacher_logits"] == "computed"


def test_named_stages_without_a_weight_change_nothing(tmp_path: Path) -> None:
    off = {"cam_weight": 0.0, "sarc_weight": 0.0, "steps": 2}
    plain, named = make_student(), make_student()
    train(tmp_path / "a", plain, toy_recipe(**off))
    train(tmp_path / "b", named, toy_recipe(**off, student_stages=["no", "such", "modules"]))
    assert_same(plain, named)
    # Nor is a checkpoint made anew that an earlier version left, which did not know the fields.
    assert not {"cam_weight", "sarc_weight", "teacher_stages", "student_stages"} & toy_recipe(**off).course().keys()
    assert toy_recipe().course()["sarc_weight"] == 20.0
    (event,) = [event for event in read_journal(tmp_path / "a" / "metrics.jsonl") if event["event"] == "distill"]
    assert event.keys() == {"event", "time", "step", "loss", "learning_rate"}


def test_nothing_listens_to_the_teacher_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher()
    monkeypatch.setattr(__import__("sys").modules[__name__], "make_teacher", lambda: teacher)
    train(tmp_path, make_student(), toy_recipe(steps=2))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())
    assert not any(weight.requires_grad for weight in teacher.parameters())
