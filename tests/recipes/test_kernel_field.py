"""The recipe's ``kernel``: chosen once, frozen into the run, the same images whichever is taken."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.painter import Models, Painter
from diffdfkd.engine.plan import class_labels, sample_ids, synthesis_choices
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.kernels.advance import advance
from diffdfkd.kernels.batchnorm_loss import batchnorm_loss
from diffdfkd.kernels.launch import Launch
from diffdfkd.kernels.predict import predict
from diffdfkd.recipes.distill import distill
from diffdfkd.recipes.launch import settle_machine
from diffdfkd.recipes.run import load_classifiers, run

Finished = tuple[Path, dict[str, Any]]


def test_auto_is_the_reference_on_the_cpu(tiny_recipe: Path) -> None:
    settled = settle_machine(load_recipe(tiny_recipe, ["device=cpu"]))
    assert settled.kernel == "reference"
    assert settle_machine(load_recipe(tiny_recipe, ["device=cpu", "kernel=triton"])).kernel == "triton"


def test_a_gpu_without_a_compiler_is_said_at_once(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("diffdfkd.kernels.launch.INTERPRETED", False)
    monkeypatch.setattr("diffdfkd.kernels.launch.launch_fault", lambda: "Triton needs a C compiler; install gcc")
    settled = settle_machine(load_recipe(tiny_recipe, ["device=cuda"]))
    assert settled.kernel == "reference" and "Triton needs a C compiler; install gcc" in caplog.text
    with pytest.raises(UserError, match=r"^kernel: Triton needs a C compiler; install gcc; or give kernel=reference"):
        settle_machine(load_recipe(tiny_recipe, ["device=cuda", "kernel=triton"]))
    monkeypatch.setattr("diffdfkd.kernels.launch.launch_fault", lambda: None)
    assert settle_machine(load_recipe(tiny_recipe, ["device=cuda"])).kernel == "triton"


def test_what_a_run_began_with_is_kept(tiny_recipe: Path) -> None:
    before = load_recipe(tiny_recipe, ["device=cpu", "kernel=triton", "threads=1"])
    assert settle_machine(load_recipe(tiny_recipe), before).kernel == "triton"
    assert settle_machine(load_recipe(tiny_recipe, ["kernel=reference"]), before).kernel == "reference"


def test_triton_without_a_gpu_and_without_the_interpreter_is_one_line(tiny_recipe: Path, tmp_path: Path) -> None:
    """In a process of its own, since Triton looks once; nothing is made."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "diffdfkd.recipes.cli", "run", str(tiny_recipe), "kernel=triton"]
    ran = subprocess.run(
        [*command, f"output={tmp_path / 'run'}"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 2
    lines = ran.stderr.strip().splitlines()
    assert len(lines) == 1 and "kernel: triton needs a CUDA device" in lines[0] and "kernel=reference" in lines[0]
    assert not list((tmp_path / "run").glob("[!.]*"))


@pytest.mark.parametrize("command", ["run", "distill"])
def test_distillation_takes_the_kernel_too(
    finished_run: Finished, tiny_recipe: Path, tmp_path: Path, recorded: Callable[[], list[str]], command: str
) -> None:
    """The student of finished shards, trained anew; L_adv of the second round was taken with the images."""
    overrides = [f"output={tmp_path / 'run'}", "distillation.steps=2", "distillation.checkpoint_every=2"]
    overrides += ["evaluation.images=null", "kernel=triton", "synthesis.images_per_class=2", "synthesis.steps=2"]
    overrides += ["cutmix.every=1"]
    if command == "distill":
        distill(load_recipe(tiny_recipe, overrides), finished_run[0], progress=False)
        assert set(recorded()) == {"_divergence_kernel", "_divergence_gradient_kernel"}
    else:
        run(load_recipe(tiny_recipe, overrides), progress=False)
        assert set(recorded()) >= {"_divergence_kernel", "_moments_kernel", "_advance_kernel"}
        # Two steps of distillation, and each guided step of the second round has L_adv.
        assert recorded().count("_divergence_kernel") > 2


def test_a_run_of_another_kernel_is_refused(finished_run: Finished, tiny_recipe: Path) -> None:
    folder, result = finished_run
    assert result["kernel"] == "reference"
    with pytest.raises(UserError, match=r"^kernel: .* holds a run with kernel=reference, now it is triton"):
        run(load_recipe(tiny_recipe, [f"output={folder}", "kernel=triton"]), progress=False)


def test_a_run_older_than_the_field_goes_on(finished_run: Finished, tmp_path: Path, tiny_recipe: Path) -> None:
    copy = Path(shutil.copytree(finished_run[0], tmp_path / "copy"))
    (copy / "result.json").unlink()
    frozen = copy / "recipe.yaml"
    content = yaml.safe_load(frozen.read_text())
    assert content.pop("kernel") == "reference"
    frozen.write_text(yaml.safe_dump(content, sort_keys=False))
    before = {path: path.read_bytes() for path in copy.glob("synthetic/**/*.tar")}
    result = run(load_recipe(tiny_recipe, [f"output={copy}"]), progress=False)
    assert result is not None and result["kernel"] == "reference" and before
    assert {path: path.read_bytes() for path in copy.glob("synthetic/**/*.tar")} == before


def test_shards_of_the_kernels_say_so() -> None:
    recipe = load_recipe("fashion")
    choices = [
        synthesis_choices(recipe.model_copy(update={"kernel": kernel}), "prior", "teacher")
        for kernel in ("reference", "triton")
    ]
    assert "kernel" not in choices[0] and choices[1]["kernel"] == "triton"


def painted(recipe: Recipe, samples: int) -> Any:
    teacher = load_classifiers(recipe)[0]
    models = Models(load_prior(recipe.prior, "cpu"), teacher)
    ids = sample_ids(0, 0, samples)
    classes = class_labels(recipe.seed, 0, 0, samples, len(recipe.teacher.classes))
    with Painter(recipe, models, 0) as painter:
        return painter.paint(ids, classes)


def test_the_demo_makes_the_same_images(recorded: Callable[[], list[str]]) -> None:
    """The demo's recipe, eight images, guided in the first half: a level or two of 255 apart, and that seldom.

    Guidance of the last steps magnifies any rounding (docs/kernels.md), so that it needs the next test's bounds.
    """
    settled = settle_machine(load_recipe("fashion", ["device=cpu", "threads=1", "guidance.window=[0,0.5]"]))
    reference, made = painted(settled, 8), painted(settled.model_copy(update={"kernel": "triton"}), 8)
    names = recorded()
    steps = settled.synthesis.steps
    assert names.count("_predict_kernel") == names.count("_advance_kernel") == steps
    assert {"_moments_kernel", "_batchnorm_gradient_kernel"} <= set(names)
    assert torch.equal(made.alive, reference.alive) and made.alive.all()
    torch.testing.assert_close(made.losses, reference.losses, rtol=1e-3, atol=1e-4, equal_nan=True)
    apart = levels(made, reference)
    assert apart.max() <= 4 and apart.mean() < 0.1
    assert reference.images.float().std() > 20


def test_every_step_of_the_demo_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps guided, with CutMix: both forms of each operation from the same state, the kernels' result taken on."""
    overrides = ["device=cpu", "threads=1", "cutmix.every=3", "cutmix.partner=any"]
    settled = settle_machine(load_recipe("fashion", overrides))
    compared: list[str] = []

    def both(operation: Callable[..., Any]) -> Callable[..., Any]:
        def called(*tensors: Any, kernel: str, **options: Any) -> Any:
            counter = tensors[3] if operation is predict else tensors[4]
            before = counter.clone()
            unwritten = {"frozen": None, "next_input": None} if operation is advance else {}
            expected = operation(*tensors, kernel="reference", **{**options, **unwritten})
            counter.copy_(before)
            made = operation(*tensors, kernel="triton", **options)
            fields = ("x0", "eps_hat", "x0_norm", "guidance_norm") if operation is predict else ("z", "alive")
            for field in fields:
                torch.testing.assert_close(getattr(made, field), getattr(expected, field), rtol=1e-5, atol=1e-5)
            compared.append(operation.__name__)
            return made

        return called

    def statistics(*tensors: Any, kernel: str) -> Any:
        made, expected = (batchnorm_loss(*tensors, kernel=form) for form in ("triton", "reference"))
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
        found = [torch.autograd.grad(loss, tensors[0], retain_graph=True) for loss in (made, expected)]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
        compared.append("batchnorm_loss")
        return made

    reference = painted(settled, 4)
    monkeypatch.setattr("diffdfkd.engine.loop.predict", both(predict))
    monkeypatch.setattr("diffdfkd.engine.loop.advance", both(advance))
    monkeypatch.setattr("diffdfkd.engine.stages.batchnorm_loss", statistics)
    made = painted(settled.model_copy(update={"kernel": "triton"}), 4)
    assert [compared.count(name) for name in ("predict", "advance", "batchnorm_loss")] == [settled.synthesis.steps] * 3
    # Two reference runs whose first noise differs by a unit in the last place were up to 5.8 apart.
    assert levels(made, reference).mean() < 12


def levels(made: Any, reference: Any) -> torch.Tensor:
    """How far the pixels are apart, of 255."""
    return (made.images.int() - reference.images.int()).abs().float()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Names of the kernels that were launched so far."""
    names: list[str] = []
    run_launch = Launch.run

    def recording(launch: Launch) -> None:
        names.append(launch.kernel.fn.__name__)
        run_launch(launch)

    monkeypatch.setattr(Launch, "run", recording)
    return lambda: names
