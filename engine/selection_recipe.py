"""The recipe's section on which synthetic images the student learns from, and how often it sees each."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from diffdfkd.engine.recipe_section import Fraction, Section, Weight

LEAST_DISTANCE = 0.01
"""Of near-duplicates: below it rounding decides."""


class SelectionRecipe(Section):
    confidence: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.0, 1.0)
    """Images are kept whose likeliest class has a probability from the first to the second by the teacher, both
    included; at temperature 1, of the image as it is stored."""
    disagreement: Weight = 0.0
    """d of the sampling weight 1 + d KL(teacher || student), with the student that the round before left; acts from the
    second round on."""
    balance: Fraction = 0.0
    """How far the classes, as the teacher sees them, are made equally frequent by sampling weights: 0 leaves them, 1
    makes them equal, in between a class of mass m gets m to the power of 1 - balance."""
    duplicates: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Images are dropped whose thumbnail is nearer than this to that of an earlier one that is kept, in the measure of
    the report's near-duplicates (engine/diversity.py), which counts those below 0.1; 0 turns it off."""

    @field_validator("confidence", mode="before")
    @classmethod
    def _two(cls, confidence: Any) -> Any:
        if isinstance(confidence, Sequence) and len(confidence) != 2:
            raise ValueError("a lowest and a highest probability, as in [0.5, 1.0]")
        return confidence

    @field_validator("confidence")
    @classmethod
    def _ordered(cls, confidence: tuple[float, float]) -> tuple[float, float]:
        if confidence[0] >= confidence[1]:
            raise ValueError("the lowest must lie below the highest, as in [0.5, 1.0]")
        return confidence

    @field_validator("duplicates")
    @classmethod
    def _measurable(cls, distance: float) -> float:
        if 0 < distance < LEAST_DISTANCE:
            raise ValueError(f"0 turns it off; otherwise {LEAST_DISTANCE} or more, below which rounding decides")
        return distance

    @property
    def by_confidence(self) -> bool:
        """Whether any image could be dropped for the teacher's confidence."""
        return self.confidence != (0.0, 1.0)

    def acts(self, later_round: bool) -> bool:
        """Whether anything is dropped or weighted; ``later_round``: a student of an earlier round exists."""
        weighted = self.balance > 0 or (self.disagreement > 0 and later_round)
        return weighted or self.by_confidence or self.duplicates > 0
