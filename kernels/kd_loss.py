"""How far the student's answer is from the teacher's: Kullback-Leibler divergence of two softmaxes, in one pass.

    u, v  = t / tau, s / tau                                             (logits of teacher and student)
    p, q  = softmax(u), softmax(v)
    KL_b  = sum p (log p - log q) = A / Z_t + log(Z_s / Z_t)
    Z_t   = sum e^(u - max u)       Z_s = sum e^(v - max v)       A = sum e^(u - max u) ((u - max u) - (v - max v))
    dKL_b / ds = (q - p) / tau
    L_kd  = tau^2 mean KL_b                                              (Hinton et al. 2015, section 2)
    L_adv = - mean KL_b [argmax t = argmax s], at tau 1                  (DiffDFKD, arXiv 2504.00870)

Maxima and sums run along the classes, and the sums are rescaled where a maximum grows. Both logits are read once
forward and once backward, the gradient of the student's is written: no probabilities. Logits are always taken relative
to their row's maximum, in the gradient too, so that an offset which they share costs no digits; hence maximum and sum
are kept of a row, and not their one log-sum-exp.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffdfkd.kernels.launch import (
    Kernel,
    Launch,
    at_least_float32,
    blocks,
    check_floats,
    check_tensor,
    power_of_two,
    settle_kernel,
)

MOST_CLASSES = 32_768
"""Of the kernels, which give a row to one program; ImageNet-21k has 21,841."""

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""Where a running maximum starts: minus infinity less minus infinity would be NaN."""


def divergence_reference(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    teacher, student = at_least_float32(teacher.detach()), at_least_float32(student)
    log_p = _finite_log(functional.log_softmax(teacher / temperature, dim=1))
    log_q = functional.log_softmax(student / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1), teacher.argmax(1) == student.argmax(1)


def kd_loss_reference(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    student = functional.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = _finite_log(functional.log_softmax(teacher_logits.detach().float() / temperature, dim=1))
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _finite_log(log_p: Tensor) -> Tensor:
    """A class of probability 0 adds 0 times this, and 0 times infinity would be NaN."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


@triton.jit
def _load_logits(logits, row, column, batch, K: tl.constexpr):
    """[ROWS, BLOCK] float32, minus infinity outside: a class of probability 0. K is known when the kernel is compiled,
    and with it how far rows and their end are aligned."""
    inside = (row < batch)[:, None] & (column < K)[None, :]
    return tl.load(logits + row[:, None] * K + column[None, :], mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _grow(maximum, place, logits, start):
    """Running maximum and its first place, both [ROWS], after a block of logits [ROWS, BLOCK]; NaN counts as infinity,
    so that it shows in the sums on every device."""
    comparable = tl.where(logits == logits, logits, float("inf"))
    highest, at = tl.max(comparable, axis=1, return_indices=True)
    grows = highest > maximum
    return tl.where(grows, highest, maximum), tl.where(grows, start + at, place)


@triton.jit
def _divergence_kernel(
    student,  # [B, K]
    teacher,  # [B, K]
    divergence,  # [B] float32
    agree,  # [B] bool
    statistics,  # [4, B] float32: maxima of teacher and student, Z_t, Z_s
    batch,
    scale,  # log2(e) / tau: powers of two are what the hardware has
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    t_max = tl.full([ROWS], LOWEST, tl.float32)
    s_max = tl.full([ROWS], LOWEST, tl.float32)
    t_place = tl.zeros([ROWS], tl.int32)
    s_place = tl.zeros([ROWS], tl.int32)
    t_sum = tl.zeros([ROWS], tl.float32)
    s_sum = tl.zeros([ROWS], tl.float32)
    difference = tl.zeros([ROWS], tl.float32)  # A, in units of log 2
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)  # [BLOCK]
        t = _load_logits(teacher, row, column, batch, K)  # [ROWS, BLOCK]
        s = _load_logits(student, row, column, batch, K)
        t_before, s_before = t_max, s_max
        t_max, t_place = _grow(t_max, t_place, t, start)
        s_max, s_place = _grow(s_max, s_place, s, start)
        u = (t - t_max[:, None]) * scale
        v = (s - s_max[:, None]) * scale
        exp_u = tl.exp2(u)
        # What came before is told again relative to the new maxima; where nothing did, the steps are not finite.
        t_step, s_step = (t_before - t_max) * scale, (s_before - s_max) * scale
        shrunk = tl.exp2(t_step)
        moved = tl.where(t_sum > 0.0, shrunk * (difference + t_sum * (t_step - s_step)), 0.0)
        # A class of probability 0 adds nothing, however unlikely the student finds it.
        difference = moved + tl.sum(tl.where(exp_u > 0.0, exp_u * (u - v), 0.0), axis=1)
        t_sum = t_sum * shrunk + tl.sum(exp_u, axis=1)
        s_sum = s_sum * tl.exp2(s_step) + tl.sum(tl.exp2(v), axis=1)

    inside = row < batch
    kl = (difference / t_sum + tl.log2(s_sum / t_sum)) * 0.6931471805599453  # log 2
    tl.store(divergence + row, kl, mask=inside)
    tl.store(agree + row, t_place == s_place, mask=inside)
    tl.store(statistics + row, t_max, mask=inside)
    tl.store(statistics + batch + row, s_max, mask=inside)
    tl.store(statistics + 2 * batch + row, t_sum, mask=inside)
    tl.store(statistics + 3 * batch + row, s_sum, mask=inside)


@triton.jit
def _divergence_gradient_kernel(
    by_divergence,  # [B] float32
    student,  # [B, K]
    teacher,  # [B, K]
    statistics,  # [4, B] float32
    gradient,  # [B, K], as student
    batch,
    scale,  # log2(e) / tau
    inverse_temperature,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < batch
    g = tl.load(by_divergence + row, mask=inside, other=0.0)
    t_max = tl.load(statistics + row, mask=inside, other=0.0)
    s_max = tl.load(statistics + batch + row, mask=inside, other=0.0)
    t_sum = tl.load(statistics + 2 * batch + row, mask=inside, other=1.0)
    s_sum = tl.load(statistics + 3 * batch + row, mask=inside, other=1.0)
    t = _load_logits(teacher, row, column, batch, K)  # [ROWS, BLOCK]
    s = _load_logits(student, row, column, batch, K)
    p = tl.exp2((t - t_max[:, None]) * scale) * (1.0 / t_sum)[:, None]
    q = tl.exp2((s - s_max[:, None]) * scale) * (1.0 / s_sum)[:, None]
    # A row that does not count may hold NaN, which no factor 0 removes.
    ds = tl.where((g != 0.0)[:, None], (g * inverse_temperature)[:, None] * (q - p), 0.0)
    here = inside[:, None] & (column < K)[None, :]
    tl.store(gradient + row[:, None] * K + column[None, :], ds.to(gradient.dtype.element_ty), mask=here)


def row_tiling(classes: int) -> tuple[int, int, int]:
    """(rows of a tile, classes of a block, warps), from the number of classes alone.

    Eight elements of each logits a thread are two 128-bit loads of float32 and one of float16. A row of at most
    256 classes is summed within one warp, which takes as many rows as it can; one of more than 2,048 takes several
    blocks, or its elements would not fit the registers.
    """
    block = min(2048, power_of_two(classes))
    rows = max(1, 256 // block)
    return rows, block, rows * block // 256


class RowStatistics(NamedTuple):
    """What the forward pass leaves of each row."""

    divergence: Tensor
    """[B] float32, KL_b."""
    agree: Tensor
    """[B] bool: one class is the first of the highest of both."""
    statistics: Tensor
    """[4, B] float32: maxima of teacher and student, Z_t, Z_s."""


def divergence_launch(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Launch, RowStatistics]:
    """The forward kernel's call on logits [B, K] and the tensors that it will fill."""
    batch, classes = student.shape
    rows, block, warps = row_tiling(classes)
    result = RowStatistics(
        torch.empty(batch, dtype=torch.float32, device=student.device),
        torch.empty(batch, dtype=torch.bool, device=student.device),
        torch.empty(4, batch, dtype=torch.float32, device=student.device),
    )
    launch = Launch(
        _divergence_kernel,
        (blocks(batch, rows),),
        {
            "student": student,
            "teacher": teacher,
            "divergence": result.divergence,
            "agree": result.agree,
            "statistics": result.statistics,
            "batch": batch,
            "scale": math.log2(math.e) / temperature,
        },
        {"K": classes, "ROWS": rows, "BLOCK": block},
        warps,
    )
    return launch, result


def gradient_launch(
    by_divergence: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, temperature: float
) -> tuple[Launch, Tensor]:
    """The backward kernel's call for a derivative [B] float32 with respect to KL_b, and the gradient [B, K] that it
    will fill, in the student's dtype."""
    batch, classes = student.shape
    rows, block, warps = row_tiling(classes)
    gradient = torch.empty_like(student)
    launch = Launch(
        _divergence_gradient_kernel,
        (blocks(batch, rows), blocks(classes, block)),
        {
            "by_divergence": by_divergence,
            "student": student,
            "teacher": teacher,
            "statistics": statistics,
            "gradient": gradient,
            "batch": batch,
            "scale": math.log2(math.e) / temperature,
            "inverse_temperature": 1 / temperature,
        },
        {"K": classes, "ROWS": rows, "BLOCK": block},
        warps,
    )
    return launch, gradient


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        launch, rows = divergence_launch(student, teacher, temperature)
        launch.run()
        ctx.save_for_backward(student, teacher, rows.statistics)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(rows.agree)
        return rows.divergence, rows.agree

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, statistics = ctx.saved_tensors
        launch, gradient = gradient_launch(gradients[0].contiguous(), student, teacher, statistics, ctx.temperature)
        launch.run()
        return gradient, None, None


def divergence(
    student: Tensor, teacher: Tensor, temperature: float, *, kernel: Kernel = "auto"
) -> tuple[Tensor, Tensor]:
    """KL(softmax(teacher / tau) || softmax(student / tau)) [B] float32, and where both name the same class [B] bool.

    Logits [B, K] of any float dtypes; the teacher's are constants, and one of minus infinity adds nothing. Of several
    highest logits the first counts. Under the kernel a row with derivative 0 gets gradient 0 whatever it holds. Raises
    ValueError for what does not fit together, or, under the kernel, cannot be read. The reference keeps float64, but
    for that of `kd_loss`.
    """
    if _settle(student, teacher, temperature, kernel) == "reference":
        return divergence_reference(student, teacher, temperature)
    kl, agree = _Divergence.apply(student, teacher.detach(), float(temperature))
    return kl, agree


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, kernel: Kernel = "auto") -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), the batch's mean, as a float32 scalar.

    Hinton et al. 2015, section 2: the factor tau^2 keeps the gradient's size when tau changes. Logits and errors as
    `divergence` has them.
    """
    if _settle(student_logits, teacher_logits, temperature, kernel) == "reference":
        return kd_loss_reference(student_logits, teacher_logits, temperature)
    kl, _ = _Divergence.apply(student_logits, teacher_logits.detach(), float(temperature))
    return temperature**2 * kl.mean()


def adversarial_loss(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor, *, kernel: Kernel = "auto"
) -> Tensor:
    """L_adv: minus the mean of KL(teacher || student) where both name the same class, over samples of weight 1.

    ``weight`` [B] is bool or a number, 0 or 1. A sample of weight 0 is masked, never multiplied: its NaN reaches
    neither the loss nor the others' gradients. 0 where no sample counts. The teacher's logits are constants: the
    gradient reaches the image through the student alone. Logits and errors as `divergence` has them.
    """
    if weight.shape != teacher_logits.shape[:1] or weight.device != teacher_logits.device:
        raise ValueError(
            f"weight: got {tuple(weight.shape)} on {weight.device} for logits {tuple(teacher_logits.shape)} on "
            f"{teacher_logits.device}; [B] there"
        )
    kl, agree = divergence(student_logits, teacher_logits, 1.0, kernel=kernel)
    # Selected twice, so that a row without agreement counts in the mean.
    return -counted_mean(torch.where(agree, kl, 0), weight)


def counted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of [B] over the samples of weight 1, the others masked, whatever they hold; 0 where none counts."""
    counts = weight > 0
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


def _settle(student: Tensor, teacher: Tensor, temperature: float, kernel: Kernel) -> str:
    """The kernel that is meant; raises ValueError for what it cannot take."""
    if student.dim() != 2 or teacher.shape != student.shape:
        raise ValueError(f"logits: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; [B, K] twice")
    if teacher.device != student.device:
        raise ValueError(f"devices: student {student.device}, teacher {teacher.device}; one expected")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}; a finite number above 0 expected")
    for name, logits in (("student", student), ("teacher", teacher)):
        if not logits.is_floating_point():
            raise ValueError(f"{name}: got {logits.dtype}; a float dtype expected")
    form = settle_kernel(kernel, student.device)
    if form == "reference":
        return form
    check_floats(student=student, teacher=teacher)
    if not 2 <= student.shape[1] <= MOST_CLASSES:
        raise ValueError(
            f"logits: {student.shape[1]} classes; the Triton kernel takes 2 to {MOST_CLASSES}: give kernel=reference"
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        check_tensor(name, logits, tuple(student.shape), None, student.device)
    return form
