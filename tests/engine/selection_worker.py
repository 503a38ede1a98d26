"""Run by the tests of selection, by itself or under torchrun: folder."""

import os
import sys
from pathlib import Path

import torch
from test_selection import make_student, toy_recipe, train
from torch import nn

from diffdfkd.engine.selection_recipe import SelectionRecipe


def main(folder: Path) -> None:
    """Without what differs between processes by design: a batch's statistics, dropout, augmentation."""
    rank = int(os.environ.get("RANK", 0))
    student = make_student()
    student.model[1] = student.model[5] = nn.Identity()  # type: ignore[index,operator]
    how = {"selection": SelectionRecipe(balance=0.8, duplicates=0.15, disagreement=1.0), "later_round": True}
    runs = folder if rank == 0 else folder / f"rank-{rank}"
    train(runs, student, toy_recipe(augmentation=[]), output=folder / "student", **how)
    torch.save(student.state_dict(), folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
