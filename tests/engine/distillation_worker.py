"""Run by the tests of distillation, by itself or under torchrun: folder [--quietly]."""

import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # of a script only its own folder is there

from test_distillation import make_student, toy_recipe, train

from diffdfkd.engine import logits


def main(folder: Path, quietly: bool) -> None:
    environment, state = dict(os.environ), torch.get_rng_state()
    rank = int(os.environ.get("RANK", 0))
    runs = folder if rank == 0 else folder / f"rank-{rank}"
    output = {"output": folder / "student"}
    if quietly:
        train(folder, make_student(), toy_recipe())
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # deepspeed sets it when it is imported
        environment.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
        assert dict(os.environ) == environment
        assert torch.equal(torch.get_rng_state(), state)
        return
    logits.PART = 20  # several files, so that the processes share their making
    plain, norm, again = make_student(norm=False), make_student(), make_student()
    train(runs, plain, toy_recipe(augmentation=[]), **output)
    # Two processes see other images, and so gather other statistics: the saved ones are their mean, on both.
    recipe = toy_recipe(zero_stage=2, augmentation=[], learning_rate=1e-6)
    train(runs / "norm", norm, recipe, output=folder / "norm-student")
    mean = norm.model[1].running_mean  # type: ignore[index]
    gathered = [torch.empty_like(mean) for _ in range(2)]
    torch.distributed.all_gather(gathered, mean)
    assert torch.equal(gathered[0], gathered[1])
    # A resume with nothing left to do brings the same student back on both.
    assert train(runs / "norm", again, recipe, output=folder / "norm-student").start_step == recipe.steps
    for name, value in norm.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    if rank == 0:
        torch.save({"plain": plain.state_dict(), "mean": mean}, folder / "student.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--quietly" in sys.argv)
