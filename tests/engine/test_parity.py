"""What parity refuses: errors of a whole batch, and those of a single sample that a batch's norm would hide."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from stand_in_stages import WEIGHTS, classifier, open_prior, prior_stage
from torch import Tensor

from diffdfkd.engine.engine_stages import Batches, Stage, student_weights
from diffdfkd.engine.example_student import acting_weights
from diffdfkd.engine.parity import TOLERANCES, Parity, Refused, measure_parity, proven
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.runner import NoEngine
from diffdfkd.engine.specification import Port, Specification

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROWS, SIZE = 100, 64
LOSSES = torch.tensor([8.3, 3.9, 26.5, -0.17])
Spoil = Callable[[Tensor, Tensor, Tensor], None]


def outputs(x: Tensor) -> tuple[Tensor, ...]:
    """Values, a gradient, of which every seventh sample has dropped out, its norm and flags; losses."""
    alive = torch.arange(len(x)) % 7 != 4
    gradient = torch.where(alive[:, None], x, 0)
    return x.flip(1), gradient, gradient.norm(dim=1), alive, LOSSES.clone()


def stage(precision: torch.dtype = BF16, rows: int = ROWS) -> Stage:
    def examples(count: int, seed: int) -> tuple[Tensor, ...]:
        drawn = torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))
        return (drawn * torch.linspace(0.7, 1.5, count)[:, None],)

    latents = (rows, SIZE)
    specification = Specification(
        "chain",
        (Port("x0", latents, F32),),
        (
            *(Port("values", latents, F32), Port("gradient", latents, F32), Port("norm", (rows,), F32)),
            *(Port("finite", (rows,), torch.bool), Port("losses", (4,), F32, batched=False)),
        ),
    )
    return Stage(specification, precision, lambda dtype: outputs, "0" * 64, examples, gradients=("gradient", "norm"))


def judge(spoil: Callable[[list[Tensor]], object], precision: torch.dtype = BF16, rows: int = ROWS) -> Parity:
    def run(x: Tensor) -> Sequence[Tensor]:
        made = list(outputs(x))
        spoil(made)
        return made

    return measure_parity(stage(precision), run, rows=(rows,))


def nudge(value: Tensor, relative: float) -> None:
    """Move every sample by so much, across itself."""
    across = torch.randn(value.shape, generator=torch.Generator().manual_seed(9))
    flat = across.flatten(1)
    flat -= (flat * value).sum(1, keepdim=True) / value.square().sum(1, keepdim=True).clamp(min=1e-9) * value
    value += relative * flat / flat.norm(dim=1, keepdim=True) * value.norm(dim=1, keepdim=True)


def test_the_same_is_right() -> None:
    for precision in TOLERANCES:
        assert judge(lambda made: None, precision) == Parity((ROWS,), 0.0, 0.0, 0.0, pytest.approx(1.0), 0.0, None)


def rounded(made: list[Tensor], precision: torch.dtype) -> None:
    """As eager arithmetic of the precision is off by on the demo, one sample by more than the others."""
    values, gradient, worst = {F32: (1e-6, 5e-6, 2e-2), F16: (5e-4, 4e-2, 0.1), BF16: (7e-3, 0.12, 0.24)}[precision]
    nudge(made[0], values)
    nudge(made[1], gradient)
    nudge(made[1][20:21], worst)
    made[4] *= 1 + values


@pytest.mark.parametrize("precision", TOLERANCES, ids=str)
def test_rounding_is_allowed(precision: torch.dtype) -> None:
    parity = judge(lambda made: rounded(made, precision), precision)
    assert parity.fault is None
    assert parity.gradient is not None and parity.gradient > 0 and parity.sample is not None
    assert parity.sample > {F32: 1e-2, F16: 5e-2, BF16: 0.2}[precision]


def swap(made: list[Tensor]) -> None:
    made[1][[20, 22]] = made[1][[22, 20]]


def zero(made: list[Tensor]) -> None:
    made[1][20] = 0


def negate(made: list[Tensor]) -> None:
    made[1][20] *= -1


def revive(made: list[Tensor]) -> None:
    """A sample that has dropped out."""
    made[1][4] = made[1][5]


@pytest.mark.parametrize("precision", TOLERANCES, ids=str)
@pytest.mark.parametrize("spoil", [swap, zero, negate, revive])
def test_one_wrong_sample_of_a_hundred_is_refused(
    spoil: Callable[[list[Tensor]], None], precision: torch.dtype
) -> None:
    parity = judge(spoil, precision)
    assert parity.fault is not None and parity.fault.startswith("gradient, batch of 100: ")
    assert parity.sample is not None and parity.sample > 0.9
    if precision == BF16:  # where the norm of the batch hides it
        assert parity.gradient is not None and parity.gradient < 0.25 and parity.cosine is not None
        assert parity.cosine > 0.97 and "sample " in parity.fault and "0.75 is allowed" in parity.fault


def test_wrong_sample_is_named() -> None:
    fault = judge(zero).fault
    assert fault is not None and "sample 20: relative error 1.0e+00" in fault


def test_one_wrong_sample_among_values_is_refused() -> None:
    """Of a batch so large that its norm hides it."""

    def spoil(made: list[Tensor]) -> None:
        made[0][700] = 0

    parity = judge(spoil, rows=2000)
    assert parity.relative < 0.04 and parity.fault is not None
    assert parity.fault.startswith("values, batch of 2000: sample 700: relative error 1.0e+00, 0.12 is allowed")


def test_many_samples_that_point_a_little_elsewhere_are_refused() -> None:
    def some(share: int) -> Callable[[list[Tensor]], None]:
        return lambda made: nudge(made[1][::share], 0.45)

    assert judge(some(12)).fault is None  # so few may be kinks
    parity = judge(some(5))
    assert parity.gradient is not None and parity.gradient < 0.25
    assert parity.cosine is not None and parity.cosine > 0.97
    assert parity.fault is not None and "in a tenth of the samples; 0.97 is allowed" in parity.fault


def test_small_samples_are_judged_by_the_size_of_the_others() -> None:
    def shrunk(x: Tensor) -> tuple[Tensor, ...]:
        made = outputs(x)
        made[1][10] *= 1e-3
        return made

    def run(x: Tensor) -> Sequence[Tensor]:
        made = shrunk(x)
        made[1][10] += 0.3 * made[1][12]
        return made

    plain = stage()
    told = Stage(plain.specification, BF16, lambda dtype: shrunk, "0" * 64, plain.examples, plain.gradients)
    parity = measure_parity(told, run, rows=(ROWS,))
    assert parity.fault is None and parity.sample is not None and 0.3 < parity.sample < 0.75


def test_small_loss_that_is_dropped_is_refused() -> None:
    """It is nothing beside the others: 0.6 % of their norm."""

    def drop(made: list[Tensor]) -> None:
        made[4][3] = 0

    parity = judge(drop)
    assert parity.relative < 0.04
    assert parity.fault == "losses, batch of 100: entry 3: relative error 1.0e+00, 0.75 is allowed"

    def tiny(made: list[Tensor]) -> None:
        made[4][3] += 0.01

    assert judge(tiny).fault is None


def whole(made: list[Tensor]) -> None:
    made[0] *= 1.05


def shorter(made: list[Tensor]) -> None:
    made[1] = made[1][:, 1:]


def flags(made: list[Tensor]) -> None:
    made[3][4] = True


def not_a_number(made: list[Tensor]) -> None:
    made[2][3] = float("nan")


def turned(made: list[Tensor]) -> None:
    nudge(made[1], 0.255)
    made[1] *= 0.96


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (whole, "values, batch of 100: relative error 5.0e-02, 0.04 is allowed"),
        (shorter, "gradient, batch of 100: shape [100, 63], [100, 64] expected"),
        (flags, "finite, batch of 100: flags differ from eager"),
        (not_a_number, "norm, batch of 100: not finite"),
        (turned, "relative error 2.5e-01, cosine 0.9690 with eager; 0.25 and 0.97 are allowed"),
    ],
)
def test_what_is_wrong_with_the_batch(spoil: Callable[[list[Tensor]], None], said: str) -> None:
    fault = judge(spoil).fault
    assert fault is not None and said in fault


def test_worst_of_all_batches_counts() -> None:
    def run(x: Tensor) -> Sequence[Tensor]:
        made = list(outputs(x))
        made[0] *= 1.03 if len(x) == ROWS else 1.01
        return made

    parity = measure_parity(stage(), run)
    assert parity.rows == (100, 50)
    assert parity.relative == pytest.approx(0.03, rel=1e-3) and parity.fault is None


def test_reference_that_fits_with_smaller_batches_is_compared_with_those(caplog: pytest.LogCaptureFixture) -> None:
    plain, seen = stage(), []

    def narrow(x: Tensor) -> tuple[Tensor, ...]:
        seen.append(len(x))
        if len(x) > 30:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
        return outputs(x)

    tight = Stage(plain.specification, BF16, lambda dtype: narrow, "0" * 64, plain.examples)
    assert proven(tight, "tensorrt", BF16, outputs).rows == (25, 12)
    assert seen == [100, 50, 25, 12] and "a smaller one is compared" in caplog.text
    with pytest.raises(Refused, match="batch of 25"):
        proven(
            tight,
            "tensorrt",
            BF16,
            lambda x: tuple(1.1 * value if value.is_floating_point() else value for value in outputs(x)),
        )


def test_reference_without_memory_is_said_with_the_cure() -> None:
    def full(x: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")

    plain = stage()
    broken = Stage(plain.specification, BF16, lambda dtype: full, "0" * 64, plain.examples)
    with pytest.raises(NoEngine, match=r"chain: tensorrt: float32 .* memory .*\(synthesis\.batch_size\)"):
        proven(broken, "tensorrt", BF16, outputs)

    def wrong(x: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        proven(Stage(plain.specification, BF16, lambda dtype: wrong, "0" * 64, plain.examples), "x", BF16, outputs)


@pytest.fixture(scope="module")
def prior(tiny_prior: Path) -> Prior:
    return open_prior(tiny_prior)


ADVERSARIAL = WEIGHTS.model_copy(update={"adversarial_weight": 0.1})


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("precision", TOLERANCES, ids=str)
def test_chain_that_drops_the_students_term_is_refused(prior: Prior, seed: int, precision: torch.dtype) -> None:
    """Whatever the student is: the teacher itself (seed 1), whose term is 0, or one that agrees with it nowhere."""
    student = classifier(seed=seed)
    with_student = prior_stage("chain", prior, Batches(12), student=student, weights=ADVERSARIAL)
    alone = prior_stage("chain", prior, Batches(12))
    assert proven(with_student, "right", precision, with_student.function).relative == 0

    def dropped(*inputs: Tensor) -> Sequence[Tensor]:
        return alone.function(*inputs[:4])

    with pytest.raises(Refused, match=r"^chain: dropping differs from eager "):
        proven(with_student, "dropping", precision, dropped)


def test_acting_student_is_the_same_each_time_and_leaves_its_own_alone(prior: Prior) -> None:
    teacher, student = classifier(), classifier(seed=2)
    own = {name: value.clone() for name, value in student_weights(student).items()}
    latents = torch.randn(6, *prior.latent_shape, generator=torch.Generator().manual_seed(0))
    first, second = (acting_weights(student, teacher, prior.decode, latents) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert [value.shape for value in first] == [value.shape for value in own.values()]
    assert any(not torch.equal(*pair) for pair in zip(first, own.values(), strict=True))
    assert all(torch.equal(own[name], value) for name, value in student_weights(student).items())


class Mute(torch.nn.Module):
    """An answer that hangs on nothing, and names no class."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, float("nan"))


def test_student_that_cannot_be_made_to_act_is_told(prior: Prior, caplog: pytest.LogCaptureFixture) -> None:
    teacher, student = classifier(), classifier(seed=2)
    # Of logits that are no numbers argmax names the first one: let the teacher name another.
    teacher.model.head.bias.copy_(torch.tensor([-1e6, 0.0, 0.0]))
    student.model.head = torch.nn.Sequential(student.model.head, Mute())
    latents = torch.randn(6, *prior.latent_shape, generator=torch.Generator().manual_seed(0))
    acting_weights(student, teacher, prior.decode, latents)
    assert caplog.messages == ["chain: no student was found whose term acts; engines are compared where it is 0"]
