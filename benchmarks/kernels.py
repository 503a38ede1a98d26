"""The operations of kernels/ against their plain torch references and against torch.compile of these.

    python -m diffdfkd.benchmarks.kernels --json kernels.json
    python -m diffdfkd.benchmarks.kernels --count
    python -m diffdfkd.benchmarks.kernels --only advance --repetitions 200

Before anything is timed, each form's result is compared with the reference's, and the largest error is reported; where
it is beyond the tolerance, or the kernel fails, the row says so, has no time, and the exit status is 1. Repetitions of
the forms of an operation are interleaved. On CUDA they are timed with events, on a cleared cache and with all launches
enqueued before the first one runs; the bandwidth is that of the bytes that must move at least. A step at Stable
Diffusion's sizes moves a few MB: there a bandwidth far below the card's is the price of a launch, and times are what
counts. Without CUDA the kernels cannot be timed (the interpreter says nothing of a GPU): only the two references are,
by the clock.

``--count`` times nothing: on tensors without data it counts the operations of the reference, views left out, and the
bytes of their inputs and outputs, beside what has to move at least. A compiler may fuse some of them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from diffdfkd.benchmarks.conditions import QUANTILES, conditions
from diffdfkd.kernels.advance import advance, advance_reference
from diffdfkd.kernels.batchnorm_loss import batchnorm_loss, batchnorm_loss_reference
from diffdfkd.kernels.kd_loss import kd_loss, kd_loss_reference
from diffdfkd.kernels.move import move, move_reference
from diffdfkd.kernels.predict import Prediction, predict, predict_reference
from diffdfkd.kernels.row import COLUMNS, start_counter
from diffdfkd.kernels.step_inputs import Draw, Guidance, Mix, NextInput

FORMS: tuple[str, ...] = ("triton", "reference", "compiled")
CACHE = 256 * 2**20
"""Bytes written between repetitions on CUDA: more than any L2 cache holds."""
AHEAD, FARTHEST = 2_000_000, 128_000_000
"""Cycles of a GPU, some 1 ms and 70 ms, that the host is given to get ahead: doubled until it does."""
STEPS = 20
TOLERANCE = 2e-2
"""Of a result's largest error, relative to its largest value: the inputs are half precision."""

Outputs = Sequence[Tensor]


class Operation(NamedTuple):
    """What is timed: a call that takes the form, and the bytes that it must read and write at least."""

    call: Callable[[str], Outputs]
    bytes: float
    buffers: Sequence[Tensor] = ()
    """That the call writes into; poisoned before a result is looked at."""


@dataclass(frozen=True)
class Timing:
    """One form of one operation."""

    operation: str
    configuration: str
    form: str
    error: float | None
    """Largest absolute difference from the reference over the largest absolute value."""
    microseconds: dict[str, float] | None
    """Quantiles over the repetitions; None where it was not timed."""
    gigabytes_per_second: float | None
    """At the median; on CUDA alone."""
    note: str = ""


def latents(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def guided_step(
    device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Iterator[tuple[str, Operation]]:
    """Predict, advance with and without CutMix, and move, at latents of a shape and a UNet of a dtype."""
    batch, n = shape[0], shape[1] * shape[2] * shape[3]
    size = dtype.itemsize
    rows = torch.rand(STEPS, len(COLUMNS), device=device) + 0.1
    rows[:, [COLUMNS.index(name) for name in ("z", "previous", "noise")]] = 0
    z, output = latents(shape, device), latents((2 * batch, *shape[1:]), device, dtype)
    x0, eps_hat, gradient = (latents(shape, device) for _ in range(3))
    scale, alive = torch.full((batch,), 3.0, device=device), torch.ones(batch, dtype=torch.bool, device=device)
    prediction = Prediction(x0, eps_hat, torch.rand(2, batch, 1, device=device) + 0.5)
    guidance = Guidance(gradient, torch.ones(batch, device=device), alive, scale, "unit", 0.15)
    inputs = latents((2 * batch, *shape[1:]), device, dtype)
    following = NextInput(inputs, torch.zeros(2 * batch, device=device), torch.zeros(STEPS, device=device))
    partners = torch.arange(batch, device=device).roll(1).repeat(STEPS, 1)
    box = torch.tensor([0, 0, shape[2] // 2, shape[3] // 2], dtype=torch.int32, device=device)
    mix = Mix(partners, box.repeat(STEPS, batch, 1), checked=True)
    draw = Draw(0, torch.arange(batch, device=device))
    # Each operation reads one number of its counter and writes the other.
    step, again = start_counter(device, 3), start_counter(device, 3)

    def stepped(form: str, mix: Mix | None = None, noise: Draw | None = None) -> Outputs:
        given = (z, prediction, None, rows, step, alive)
        if form == "triton":
            made = advance(*given, guidance=guidance, mix=mix, noise=noise, next_input=following, kernel="triton")
        else:
            options: dict[str, Any] = {"keep_x0": False, "frozen": None}
            made = advance_reference(*given, guidance=guidance, mix=mix, noise=noise, next_input=following, **options)
        return made.z, inputs

    def predicted(form: str) -> Outputs:
        if form == "triton":
            return predict(z, output, rows, again, scale, kernel="triton")[:2]
        return predict_reference(z, output, rows, again, scale)[:2]

    def moved(form: str) -> Outputs:
        given = (z, prediction, rows, again, alive, guidance, output)
        if form == "triton":
            return move(*given, inputs=inputs, kernel="triton").z, inputs
        return move_reference(*given, inputs).z, inputs

    yield "predict", Operation(predicted, batch * n * (4 + 2 * size + 8))
    # eps_hat, x0, gradient in; z and both halves of the input out.
    least = batch * n * (12 + 4 + 2 * size)
    yield "advance", Operation(stepped, least, [inputs])
    # In a quarter of the pixels the partner's three tensors are read too.
    yield "advance, CutMix", Operation(lambda form: stepped(form, mix=mix), least + batch * n * 12 / 4, [inputs])
    yield "advance, drawn noise", Operation(lambda form: stepped(form, noise=draw), least, [inputs])
    # z and the gradients once; the second time they come from the cache.
    yield "move (exact)", Operation(moved, batch * n * (4 + 4 + 2 * size + 4 + 2 * size), [inputs])


def statistics(device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Operation:
    """L_bn of one layer, forward and gradient."""
    activation = latents(shape, device, dtype).requires_grad_()
    mean, variance = torch.zeros(shape[1], device=device), torch.full((shape[1],), 0.5, device=device)
    weight = torch.ones(shape[0], device=device)

    def call(form: str) -> Outputs:
        given = ([activation], [mean], [variance], weight)
        loss = batchnorm_loss(*given, kernel="triton") if form == "triton" else batchnorm_loss_reference(*given)
        return loss.detach(), *torch.autograd.grad(loss, activation)

    # Read forward; read backward, and the gradient written.
    return Operation(call, 3 * activation.numel() * activation.element_size())


def distillation(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Operation:
    """The distillation loss, forward and gradient."""
    teacher = torch.randn(shape, device=device).to(dtype)
    student = torch.randn(shape, device=device).to(dtype).requires_grad_()

    def call(form: str) -> Outputs:
        given = (student, teacher, 4.0)
        loss = kd_loss(*given, kernel="triton") if form == "triton" else kd_loss_reference(*given)
        return loss.detach(), *torch.autograd.grad(loss, student)

    # Both logits forward, both backward, the gradient written.
    return Operation(call, 5 * student.numel() * student.element_size())


def operations(device: torch.device) -> Iterator[tuple[str, str, Operation]]:
    """(operation, configuration, what to time); the sizes of Stable Diffusion on CUDA, smaller ones without."""
    large = device.type != "cpu"
    half = torch.float16 if large else torch.float32
    name = str(half).removeprefix("torch.")
    # The sampler's UNet stage takes and gives float32 today; an engine's buffers may be half precision.
    for dtype in dict.fromkeys((torch.float32, half)):
        for shape in ((8, 4, 64, 64), (100, 4, 8, 8)):
            for operation, what in guided_step(device, shape, dtype):
                yield operation, f"{list(shape)} {str(dtype).removeprefix('torch.')}", what
    layer = (32, 64, 56, 56) if large else (16, 64, 28, 28)
    yield "batchnorm_loss", f"{list(layer)} {name}", statistics(device, layer, half)
    for logits in ((256, 1000), (64, 21841), (128, 10)):
        yield "kd_loss", f"{list(logits)} {name}", distillation(device, logits, half)


def forms_of(operation: Operation, device: torch.device) -> dict[str, Callable[[], Outputs]]:
    """What is timed, by form; the kernel on CUDA alone."""
    torch.compiler.reset()  # what was compiled for other operations
    compiled = torch.compile(lambda: operation.call("reference"), dynamic=False)
    forms: dict[str, Callable[[], Outputs]] = {"reference": lambda: operation.call("reference"), "compiled": compiled}
    if device.type == "cuda":
        forms = {"triton": lambda: operation.call("triton"), **forms}
    return forms


def checked(operation: Operation, call: Callable[[], Outputs]) -> Outputs:
    """A call's results, with nothing left in its buffers of an earlier one."""
    for buffer in operation.buffers:
        buffer.fill_(torch.nan)
    return call()


def error_of(made: Outputs, expected: Outputs) -> float:
    """Largest error of any output, relative to that output's largest value; NaN where an output has one."""
    errors = [
        (one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)
        for one, other in zip(made, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def measure(
    name: str, configuration: str, operation: Operation, device: torch.device, repetitions: int
) -> list[Timing]:
    """One row a form: first whether it is right, then how long it takes, the forms taking turns."""
    expected = [tensor.clone() for tensor in checked(operation, lambda: operation.call("reference"))]
    forms, errors, notes = forms_of(operation, device), {}, {}
    for form, call in list(forms.items()):
        try:
            errors[form] = error_of(checked(operation, call), expected)
        except Exception as error:  # torch.compile fails in many ways; the other forms are still of interest
            if form == "reference":
                raise
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
            notes[form] = f"does not compile: {said}" if form == "compiled" else f"FAILS: {said}"
        if form in notes or not errors[form] <= TOLERANCE:
            notes.setdefault(form, "WRONG: not timed")
            del forms[form]
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for repetition in range(-max(3, repetitions // 10), repetitions):
        for form, call in forms.items():
            taken = _time(call, device)
            if repetition >= 0:
                seconds[form].append(taken)
    rows = []
    for form in FORMS:
        if form not in forms and form not in notes:
            continue
        times = seconds.get(form)
        quantiles = gigabytes = None
        if times:
            values = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
            quantiles = {f"p{round(100 * q)}": 1e6 * float(v) for q, v in zip(QUANTILES, values, strict=True)}
            if device.type == "cuda":
                gigabytes = operation.bytes / quantiles["p50"] / 1e3
        rows.append(Timing(name, configuration, form, errors.get(form), quantiles, gigabytes, notes.get(form, "")))
    return rows


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    cycles, ahead = AHEAD, False
    while not ahead:
        torch.empty(CACHE, dtype=torch.int8, device=device).zero_()
        torch.cuda._sleep(cycles)  # meanwhile the host enqueues the whole call: what is timed is the device
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        ahead = not start.query() or cycles >= FARTHEST  # a call that waits for the device is never ahead
        end.synchronize()
        cycles *= 2
    return start.elapsed_time(end) / 1e3


class Counting(TorchDispatchMode):
    """Counts operations that do work, and the bytes of what they read and write."""

    VIEWS = (
        *("view", "expand", "unsqueeze", "select", "slice", "split", "alias", "permute", "t", "transpose", "detach"),
        *("unbind", "as_strided", "squeeze", "empty", "empty_like", "scalar_tensor"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function.__name__.split(".")[0] not in self.VIEWS:
            self.operations += 1
            touched = [value for value in tree_flatten((args, kwargs, made))[0] if isinstance(value, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in touched)
        return made


def count(only: str) -> None:
    """Prints, for each operation at its sizes on a GPU, what the reference does and what has to move at least."""
    print(f"{'':48}{'operations':>10}{'bytes':>14}{'at least':>14}{'ratio':>7}")
    for name, configuration, operation in operations(torch.device("meta")):
        if only in name:
            with Counting() as counting:
                operation.call("reference")
            ratio = counting.bytes / operation.bytes
            print(
                f"{name:22}{configuration:26}{counting.operations:10}{counting.bytes:14,}{operation.bytes:14,.0f}"
                f"{ratio:7.1f}"
            )


def line(row: Timing) -> str:
    """One row for people."""
    times = (
        "not timed" if row.microseconds is None else " ".join(f"{row.microseconds[q]:9.1f}" for q in row.microseconds)
    )
    rate = f"{row.gigabytes_per_second:7.0f} GB/s" if row.gigabytes_per_second is not None else ""
    error = "" if row.error is None else f"error {row.error:.1e}"
    return f"{row.operation:22}{row.configuration:26}{row.form:11}{times:31}{rate:14}{error} {row.note}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m diffdfkd.benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows and the conditions")
    parser.add_argument("--only", help="operations whose name contains this")
    parser.add_argument("--count", action="store_true", help="count operations and bytes, and time nothing")
    parser.add_argument("--repetitions", type=int, default=100, help="of each form [100]")
    given = parser.parse_args(arguments)
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"--json: {given.json.parent} is no folder; make it, or name another file")
    if given.count:
        count(given.only or "")
        return 0
    if given.repetitions < 1:
        parser.error(f"--repetitions: got {given.repetitions}; 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if device.type != "cuda":
        print("No CUDA device: the Triton kernels cannot be timed here. The two references alone, on the CPU:")
    print(f"{'':59}{'p10 us':>9} {'p50 us':>9} {'p90 us':>9}")
    rows: list[Timing] = []
    told = conditions(device) if given.json is not None else {}
    for name, configuration, operation in operations(device):
        if given.only and given.only not in name:
            continue
        for row in measure(name, configuration, operation, device, given.repetitions):
            rows.append(row)
            print(line(row), flush=True)
        if given.json is not None:  # after each operation: what was measured stays when the next one is the last
            content = {"conditions": told, "rows": [asdict(row) for row in rows]}
            given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not rows:
        parser.error(f"--only: no operation's name contains {given.only!r}")
    return int(any(row.note.startswith(("FAILS", "WRONG")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
