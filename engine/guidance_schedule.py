"""What changes in guidance from step to step, as tensors that a step on the device reads by its own counter."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.windows import rho_factors, term_weights


@dataclass(frozen=True)
class GuidanceSchedule:
    """Weights of the loss terms, and what becomes of rho, over the S steps of a trajectory."""

    weights: Tensor
    """[S, 3] float32 of class, BatchNorm and adversarial loss; [1, 3] where all steps have the same."""
    factors: list[float]
    """S of them, of rho."""
    rho: Tensor | None
    """[S] float32, the factors; None where all are 1."""

    @classmethod
    def of(cls, guidance: GuidanceRecipe, guided: list[bool], device: torch.device) -> Self:
        """Of the recipe, for steps that are ``guided`` or not; what others have is of no account."""
        rows = [row for row, acts in zip(term_weights(guidance, len(guided)), guided, strict=True) if acts]
        constant = len(set(rows)) == 1
        rows = rows[:1] if constant else term_weights(guidance, len(guided))
        factors = rho_factors(guidance, guided)
        return cls(
            torch.tensor(rows, dtype=torch.float32, device=device),
            factors,
            None if set(factors) == {1.0} else torch.tensor(factors, dtype=torch.float32, device=device),
        )

    def weights_at(self, step: Tensor) -> Tensor:
        """[3] at the counter's ``step[1]``, int32 [2] of kernels/row.py: one launch, none where they are constant."""
        return self.weights[0] if len(self.weights) == 1 else self.weights.index_select(0, step[1:])[0]

    def followed(self, gradient: Tensor, step: Tensor) -> Tensor:
        """The gradient times rho's factor at ``step[1]``: its norm stays as it was, so the step is as much longer."""
        return gradient if self.rho is None else gradient * self.rho.index_select(0, step[1:])
