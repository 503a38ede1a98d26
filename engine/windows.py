"""Guidance over the steps of a trajectory: which steps a window holds, what each loss term weighs there, how rho runs.

Plain arithmetic; nothing heavy is imported.
"""

from typing import TYPE_CHECKING

from diffdfkd.engine.errors import UserError

if TYPE_CHECKING:
    from diffdfkd.engine.recipe import GuidanceRecipe

TERMS = ("class", "batchnorm", "adversarial")
"""Of the inversion loss, in the order of the weights."""


def window_steps(window: tuple[float, float], steps: int) -> list[int]:
    """Of so many steps those that begin inside a window of fractions; its end is outside."""
    # Rounded, so that 0.07 of 100 steps is 7.
    start, end = (round(edge * steps, 9) for edge in window)
    return [step for step in range(steps) if start <= step < end]


def term_weights(guidance: "GuidanceRecipe", steps: int) -> list[tuple[float, float, float]]:
    """Per step, the weights of class, BatchNorm and adversarial loss: 0 outside of a term's window."""
    held = [set(window_steps(getattr(guidance, f"{term}_window"), steps)) for term in TERMS]
    weights = [float(getattr(guidance, f"{term}_weight")) for term in TERMS]
    by_class, by_statistics, by_student = (
        [weight if step in inside else 0.0 for step in range(steps)]
        for weight, inside in zip(weights, held, strict=True)
    )
    return list(zip(by_class, by_statistics, by_student, strict=True))


def acting_steps(guidance: "GuidanceRecipe", chosen: list[int], steps: int) -> set[int]:
    """Of the steps that are to be guided those at which a term acts.

    Raises UserError where a term has a weight and acts at none of them.
    """
    weights = term_weights(guidance, steps)
    for index, term in enumerate(TERMS):
        if getattr(guidance, f"{term}_weight") > 0 and not any(weights[step][index] for step in chosen):
            raise UserError(
                f"guidance.{term}_window: {list(getattr(guidance, f'{term}_window'))} holds none of the {len(chosen)} "
                f"guided steps of {steps}; widen it, or set guidance.{term}_weight=0"
            )
    return {step for step in chosen if any(weights[step])}


def rho_factors(guidance: "GuidanceRecipe", guided: list[bool]) -> list[float]:
    """Per step, what ``guidance.rho`` is multiplied by: of mean 1 over the n guided steps, i = 1 ... n of them.

    falling: 2 (n + 1 - i) / (n + 1); rising: 2 i / (n + 1); constant, and of steps that are not guided: 1.
    """
    factors = [1.0] * len(guided)
    if guidance.rho_schedule == "constant":
        return factors
    acting = [step for step, acts in enumerate(guided) if acts]
    if guidance.rho_schedule == "falling":
        acting.reverse()
    for place, step in enumerate(acting, start=1):
        factors[step] = 2 * place / (len(acting) + 1)
    return factors
