"""One fraction from TensorRT's phases within phases."""

import pytest

from diffdfkd.engine.backends.tensorrt_progress import Attention, Phases


def test_fraction_of_nested_phases() -> None:
    phases = Phases()
    phases.start("build", None, 4)
    phases.step("build", 0)
    assert phases.fraction == 0.25
    phases.start("optimize", "build", 2)
    phases.start("time", "optimize", 5)
    phases.step("time", 0)
    assert phases.fraction == pytest.approx(0.25 * (1 + 0.5 * 0.2))
    phases.step("time", 4)
    phases.finish("time")
    phases.step("optimize", 0)
    assert phases.fraction == pytest.approx(0.25 * 1.5)
    phases.finish("optimize")
    phases.step("build", 1)
    assert phases.fraction == 0.5
    # A phase may end early.
    phases.finish("build")
    assert phases.fraction == 1.0


def test_fraction_never_falls_or_passes_one() -> None:
    phases = Phases()
    seen = []
    phases.start("build", None, 2)
    for _ in range(3):
        phases.start("again", "build", 2)
        for step in range(4):
            phases.step("again", step)
            seen.append(phases.fraction)
        phases.finish("again")
    phases.step("build", 1)
    phases.step("unheard of", 0)
    phases.finish("unheard of")
    assert seen == sorted(seen)
    assert phases.fraction == 1.0


def test_phase_that_is_its_own_parent() -> None:
    phases = Phases()
    phases.start("round", "round", 2)
    phases.step("round", 0)
    assert 0.5 <= phases.fraction <= 1


def test_attention_keeps_the_first_error_and_calls_no_more() -> None:
    attention, calls = Attention(), []
    assert attention.call(calls.append, 1)
    assert not attention.call(int, "no number")
    assert not attention.call(calls.append, 2)
    assert calls == [1]
    assert isinstance(attention.failure, ValueError)
