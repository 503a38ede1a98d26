import pytest

from diffdfkd.engine.combinations import guided_steps
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.windows import rho_factors, term_weights


def test_a_term_weighs_inside_its_window_alone() -> None:
    guidance = GuidanceRecipe(
        class_weight=0.5,
        batchnorm_weight=0.3,
        adversarial_weight=2.0,
        class_window=(0.5, 1.0),
        batchnorm_window=(0, 0.6),
    )
    assert term_weights(guidance, 4) == [(0, 0.3, 2.0), (0, 0.3, 2.0), (0.5, 0.3, 2.0), (0.5, 0, 2.0)]
    assert len({*term_weights(GuidanceRecipe(), 7)}) == 1


def test_steps_at_which_no_term_acts_are_not_guided() -> None:
    def chosen(**fields: object) -> list[int]:
        guidance = GuidanceRecipe.model_validate(fields)
        return [step for step, on in enumerate(guided_steps(guidance, 10)) if on]

    assert chosen(class_window=[0, 0.2], batchnorm_window=[0.7, 1]) == [0, 1, 7, 8, 9]
    assert chosen(class_window=[0, 0.2], batchnorm_window=[0.7, 1], batchnorm_weight=0) == [0, 1]
    assert chosen(class_window=[0, 0.5], batchnorm_window=[0, 0.5], window=[0.3, 1]) == [3, 4]
    with pytest.raises(UserError, match=r"guidance.class_window: \[0.0, 0.2\] holds none of the 7 guided steps of 10"):
        chosen(class_window=[0, 0.2], window=[0.3, 1])
    assert chosen(class_window=[0, 0.2], window=[0.3, 1], class_weight=0) == list(range(3, 10))


def test_rho_runs_linearly_with_the_recipes_as_its_mean() -> None:
    guided = [False, True, True, False, True, True]
    falling, rising, constant = (
        rho_factors(GuidanceRecipe(rho_schedule=how), guided) for how in ("falling", "rising", "constant")
    )
    assert constant == [1.0] * 6
    assert falling == pytest.approx([1, 1.6, 1.2, 1, 0.8, 0.4])
    assert rising == pytest.approx([1, 0.4, 0.8, 1, 1.2, 1.6])
    assert sum(factor for factor, on in zip(falling, guided, strict=True) if on) == pytest.approx(4)
    assert rho_factors(GuidanceRecipe(rho_schedule="rising"), [True]) == [1.0]
