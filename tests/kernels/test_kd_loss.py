import math
from typing import Any

import pytest
import torch
from kernels_tolerances import DTYPES, TOLERANCES
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from diffdfkd.kernels.kd_loss import MOST_CLASSES, adversarial_loss, divergence, kd_loss, row_tiling
from diffdfkd.kernels.launch import Launch

NAN, INF = float("nan"), float("inf")
EXACT = TOLERANCES[torch.float32]

# (samples, classes): one row, a full tile of rows and one more, one block of classes and several.
SHAPES = [(129, 2), (65, 3), (1, 10), (17, 10), (5, 63), (3, 127), (3, 1000), (1, 1000), (2, 21841)]


pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # The interpreter's NumPy warns of what a GPU computes in silence, mostly in places that are masked afterwards.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def draw(batch: int, classes: int, *dtypes: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtypes = dtypes or (torch.float32, torch.float32)
    return [(3 * torch.randn(batch, classes, generator=generator)).to(dtype) for dtype in dtypes]


def plain(student: Tensor, teacher: Tensor, temperature: float, g: Tensor) -> tuple[Tensor, Tensor]:
    """KL [B] by its definition in float64, and the gradient of sum g KL by autograd."""
    student, teacher = student.detach().double().requires_grad_(), teacher.double()
    p, log_q = (teacher / temperature).softmax(1), (student / temperature).log_softmax(1)
    kl = (torch.special.xlogy(p, p) - torch.where(p > 0, p * log_q, 0)).sum(1)
    (gradient,) = torch.autograd.grad(kl, student, g.double())
    return kl.detach(), gradient


def ours(student: Tensor, teacher: Tensor, temperature: float, g: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    kl, agree = divergence(student, teacher, temperature, kernel="triton")
    assert kl.dtype == torch.float32 and agree.dtype == torch.bool and not agree.requires_grad
    (gradient,) = torch.autograd.grad(kl, student, g)
    return kl.detach(), gradient


def check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    """Forward and gradient against float64 of the same logits, the gradient scaled to be of order 1."""
    signs = 1.0 - 2.0 * (torch.arange(len(student)) % 2)
    g = temperature * student.shape[1] * signs
    kl, gradient = ours(student, teacher, temperature, g)
    expected, expected_gradient = plain(student, teacher, temperature, g)
    torch.testing.assert_close(kl, expected.float(), **EXACT)
    assert gradient.dtype == student.dtype
    torch.testing.assert_close(gradient, expected_gradient.to(student.dtype), **TOLERANCES[student.dtype])


@pytest.mark.parametrize("temperature", [1.0, 4.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "classes"), SHAPES)
def test_divergence_and_gradient(batch: int, classes: int, dtype: torch.dtype, temperature: float) -> None:
    student, teacher = draw(batch, classes, dtype, dtype)
    check(student, teacher, temperature)


@pytest.mark.parametrize(("of_student", "of_teacher"), [(DTYPES[0], DTYPES[1]), (DTYPES[2], DTYPES[0])])
def test_each_logits_may_have_their_own_dtype(of_student: torch.dtype, of_teacher: torch.dtype) -> None:
    student, teacher = draw(5, 100, of_student, of_teacher)
    check(student, teacher, 2.0)


@pytest.mark.parametrize("rising", ["teacher", "student", "both", "apart"])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_maximum_in_a_late_block_rescales_what_came_before(rising: str, temperature: float) -> None:
    student, teacher = draw(2, 5000)
    slope = torch.linspace(0, 6, 5000)
    if rising != "student":
        teacher += slope
    if rising in ("student", "both"):
        student += slope
    if rising == "apart":
        student -= slope
    assert row_tiling(5000)[1] < 2500
    check(student, teacher, temperature)


@pytest.mark.parametrize("classes", [10, 5000])
@pytest.mark.parametrize(("of_student", "of_teacher"), [(1e4, 1e4), (-1e4, 1e4), (0, -1e4)])
def test_a_large_offset_costs_no_digits(of_student: float, of_teacher: float, classes: int) -> None:
    student, teacher = draw(2, classes)
    check(student + of_student, teacher + of_teacher, 4.0)


@pytest.mark.parametrize("size", [1e-30, 1e4, 1e37])
def test_logits_of_extreme_size(size: float) -> None:
    student, teacher = draw(3, 10)
    teacher, student = size * teacher, size * (teacher + 0.01 * student)
    kl, gradient = ours(student, teacher, 1.0, torch.ones(3))
    expected, expected_gradient = plain(student, teacher, 1.0, torch.ones(3))
    torch.testing.assert_close(kl, expected.float(), **EXACT)
    torch.testing.assert_close(gradient, expected_gradient.float(), **EXACT)


@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_equal_logits_have_no_divergence(classes: int) -> None:
    (logits,) = draw(3, classes, torch.float32)
    kl, gradient = ours(logits, logits.clone(), 4.0, torch.full((3,), 1e6))
    assert torch.equal(kl, torch.zeros(3)) and torch.equal(gradient, torch.zeros(3, classes))


@pytest.mark.parametrize("first", [0, 9, 2048, 4990])
def test_a_class_of_probability_zero_adds_nothing(first: int) -> None:
    """Classes that the teacher excludes, at the beginning (a whole block of them) or the end."""
    student, teacher = draw(3, 5000)
    if first < 2500:
        teacher[:, : first + 1] = -INF
    else:
        teacher[:, first:] = -INF
    check(student, teacher, 0.5)
    reference, _ = divergence(student, teacher, 0.5, kernel="reference")
    torch.testing.assert_close(divergence(student, teacher, 0.5, kernel="triton")[0], reference, **EXACT)
    loss = kd_loss(student, teacher, 0.5, kernel="reference")
    torch.testing.assert_close(kd_loss(student, teacher, 0.5, kernel="triton"), loss, **EXACT)


def test_a_class_that_both_exclude_adds_nothing() -> None:
    student, teacher = draw(3, 5000)
    student[:, :2500], teacher[:, :2500] = -INF, -INF
    kl, gradient = ours(student, teacher, 4.0, torch.full((3,), 1e4))
    expected, expected_gradient = plain(student[:, 2500:], teacher[:, 2500:], 4.0, torch.full((3,), 1e4))
    torch.testing.assert_close(kl, expected.float(), **EXACT)
    assert torch.equal(gradient[:, :2500], torch.zeros(3, 2500))
    torch.testing.assert_close(gradient[:, 2500:], expected_gradient.float(), **EXACT)


def test_a_class_that_the_student_excludes_is_infinitely_far() -> None:
    student, teacher = draw(3, 10)
    student[1, 4] = -INF
    kl, _ = divergence(student, teacher, 1.0, kernel="triton")
    assert kl.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("classes", [10, 5000])
def test_both_agree_where_the_first_highest_logit_is_the_same(classes: int) -> None:
    last = classes - 1
    # Places of the highest logits of teacher and student; of several the first counts.
    places = [([3], [3], True), ([3], [4], False), ([last], [last], True), ([0], [last], False)]
    # As far into a later block, where there is one.
    places += [([3], [2051 if classes > 2051 else 5], False)]
    places += [([2, 7], [2], True), ([2, 7], [7], False), ([2, last], [2, 5], True), ([5, last], [last], False)]
    repeats = 3
    student, teacher = torch.zeros(repeats * len(places), classes), torch.zeros(repeats * len(places), classes)
    for row, (of_teacher, of_student, _) in enumerate(repeats * places):
        teacher[row, of_teacher], student[row, of_student] = 5.0, 2.0
    _, agree = divergence(student, teacher, 1.0, kernel="triton")
    assert agree.tolist() == [same for *_, same in repeats * places]
    assert torch.equal(agree, divergence(student, teacher, 1.0, kernel="reference")[1])
    _, agree = divergence(torch.zeros(2, classes), torch.ones(2, classes), 1.0, kernel="triton")
    assert agree.all()


@pytest.mark.parametrize("classes", [10, 5000])
@pytest.mark.parametrize("at", [0, 9, -1])
def test_nan_shows_in_its_row_alone(at: int, classes: int) -> None:
    for whose in (0, 1):
        (teacher,) = draw(3, classes, torch.float32)
        student = 0.5 * teacher
        (student, teacher)[whose][1, at] = NAN
        kl, gradient = ours(student, teacher, 1.0, torch.ones(3))
        # NaN is the highest, as for torch's argmax.
        assert divergence(student, teacher, 1.0, kernel="triton")[1].tolist() == [True, False, True]
        assert kl.isnan().tolist() == [False, True, False]
        assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_row_with_derivative_zero_gets_gradient_zero(bad: float) -> None:
    student, teacher = draw(20, 10)
    g = 10.0 * (torch.arange(20) % 3)
    _, expected = plain(student, teacher, 2.0, g)
    student[g == 0], teacher[::3, 4] = bad, bad
    _, gradient = ours(student, teacher, 2.0, g)
    assert torch.equal(gradient[g == 0], torch.zeros(7, 10))
    torch.testing.assert_close(gradient, expected.float(), **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 30.0])
def test_kd_loss_is_its_reference(temperature: float, dtype: torch.dtype) -> None:
    student, teacher = draw(7, 100, dtype, dtype)
    results = []
    for kernel in ("reference", "triton"):
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, teacher, temperature, kernel=kernel)
        assert loss.dtype == torch.float32 and loss.shape == ()
        # Scaled to be of order 1.
        results.append((loss.detach() / temperature**2, torch.autograd.grad(100 * loss, leaf)[0]))
    torch.testing.assert_close(results[1][0], results[0][0], **EXACT)
    torch.testing.assert_close(results[1][1], results[0][1], **TOLERANCES[dtype])


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_adversarial_loss_counts_where_both_agree(kernel: Any, kind: torch.dtype) -> None:
    student, teacher = draw(20, 10)
    student[::2] += teacher[::2]
    weight = (torch.arange(20) % 5 != 1).to(kind)
    counts, agree = weight > 0, teacher.argmax(1) == student.argmax(1)
    assert (counts & agree).any() and (counts & ~agree).any()
    kl, _ = plain(student, teacher, 1.0, torch.ones(20))
    _, by_student = plain(student, teacher, 1.0, (counts & agree) / -counts.sum())
    student[~counts], teacher[6] = NAN, NAN
    student.requires_grad_()
    teacher.requires_grad_()
    loss = adversarial_loss(student, teacher, weight, kernel=kernel)
    gradient, by_teacher = torch.autograd.grad(loss, [student, teacher], allow_unused=True)
    assert loss < 0 and by_teacher is None
    torch.testing.assert_close(loss, -(kl[counts & agree].sum() / counts.sum()).float(), **EXACT)
    torch.testing.assert_close(gradient[counts], by_student[counts].float(), **EXACT)
    if kernel == "triton":
        assert torch.equal(gradient[~counts], torch.zeros(4, 10))


def test_no_sample_counts() -> None:
    student, teacher = torch.full((3, 10), NAN, requires_grad=True), torch.full((3, 10), NAN)
    loss = adversarial_loss(student, teacher, torch.zeros(3), kernel="triton")
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, student)[0], torch.zeros(3, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_references_are_to_the_bit_what_runs_have_used(dtype: torch.dtype) -> None:
    """Their formulas without what the references add for probabilities of 0 and temperatures of 1."""
    student, teacher = draw(33, 100, dtype, dtype)
    student[::2] += teacher[::2]
    student.requires_grad_()
    weight = torch.arange(33) % 4
    log_q = functional.log_softmax(student.float() / 30.0, dim=1)
    log_p = functional.log_softmax(teacher.float() / 30.0, dim=1)
    distilled = 30.0**2 * functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    log_p, log_q = functional.log_softmax(teacher, dim=1), functional.log_softmax(student, dim=1)
    kl = torch.where(teacher.argmax(1) == student.argmax(1), (log_p.exp() * (log_p - log_q)).sum(1), 0)
    opposed = -(torch.where(weight > 0, kl, 0).sum() / (weight > 0).sum())
    for loss, expected in (
        (kd_loss(student, teacher, 30.0), distilled),
        (adversarial_loss(student, teacher, weight), opposed),
    ):
        assert torch.equal(loss, expected)
        assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in (loss, expected)))


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and "fill_" not in func.__name__:
            self.elements.append(result.numel())
        return result


def test_only_the_gradient_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", lambda self: None)  # the interpreter makes copies of its own
    student, teacher = draw(4, 1000)
    student.requires_grad_()
    with Allocations() as forward:
        loss = kd_loss(student, teacher, 4.0, kernel="triton")
        loss = loss + adversarial_loss(student, teacher, torch.ones(4), kernel="triton")
    assert max(forward.elements) < 1000
    with Allocations() as backward:
        torch.autograd.grad(loss, student)
    # Of each loss, and their sum.
    assert [n for n in backward.elements if n >= 1000] == [4000] * 3


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_bad_arguments(kernel: Any) -> None:
    student, teacher = draw(4, 10)
    for temperature in (0, -1.0, INF, NAN):
        with pytest.raises(ValueError, match="temperature"):
            kd_loss(student, teacher, temperature, kernel=kernel)
    for bad in (teacher[:3], teacher[:, :9], teacher[0], teacher[None]):
        with pytest.raises(ValueError, match="logits"):
            divergence(student, bad, 1.0, kernel=kernel)
    with pytest.raises(ValueError, match=r"teacher.*float"):
        kd_loss(student, teacher.long(), 1.0, kernel=kernel)
    with pytest.raises(ValueError, match="devices"):
        kd_loss(student, teacher.to("meta"), 1.0, kernel=kernel)
    for weight in (torch.ones(3), torch.ones(4, 1), torch.ones(4, device="meta")):
        with pytest.raises(ValueError, match="weight"):
            adversarial_loss(student, teacher, weight, kernel=kernel)


def test_what_the_kernel_cannot_read() -> None:
    student, teacher = draw(4, 10)
    with pytest.raises(ValueError, match=r"student.*contiguous"):
        kd_loss(student.T.contiguous().T, teacher, 1.0, kernel="triton")
    with pytest.raises(ValueError, match=r"teacher.*contiguous"):
        kd_loss(student, teacher.repeat(1, 2)[:, :10], 1.0, kernel="triton")
    with pytest.raises(ValueError, match=r"student.*float64"):
        kd_loss(student.double(), teacher, 1.0, kernel="triton")
    for classes in (1, MOST_CLASSES + 1):
        logits = torch.zeros(2, classes)
        with pytest.raises(ValueError, match=f"{classes} classes"):
            adversarial_loss(logits, logits, torch.ones(2), kernel="triton")
        assert adversarial_loss(logits, logits, torch.ones(2), kernel="reference") == 0


def test_tiles_cover_every_number_of_classes() -> None:
    for classes in range(2, MOST_CLASSES + 1):
        rows, block, warps = row_tiling(classes)
        assert math.log2(rows * block * warps).is_integer() and rows * block == 256 * warps <= 2048
        assert block >= min(classes, 2048)


def test_a_high_temperature_keeps_the_size_of_the_gradient() -> None:
    student = torch.tensor([[1.0, -1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0, -2.0]])
    norms = [torch.autograd.grad(kd_loss(student, teacher, tau), student)[0].norm() for tau in (20.0, 40.0)]
    torch.testing.assert_close(norms[0], norms[1], rtol=0.1, atol=0)
