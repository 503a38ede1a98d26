"""Each operation of kernels/ against its plain torch reference and against torch.compile of that reference.

    python -m diffdfkd.benchmarks.kernels --json kernels.json
    python -m diffdfkd.benchmarks.kernels --only advance --repetitions 200

Before anything is timed, each form's result is compared with the reference's, and the largest error is reported; where
it is beyond the tolerance the row says so, has no time, and the exit status is 1. Repetitions of the forms of an
operation are interleaved. On CUDA they are timed with events on a cache that was cleared, and the achieved bandwidth is
that of the bytes that must move at least. Without CUDA the kernels cannot be timed (the interpreter says nothing of a
GPU): only the two references are, by the clock.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdfkd.kernels.advance import advance
from diffdfkd.kernels.batchnorm_loss import batchnorm_loss
from diffdfkd.kernels.kd_loss import kd_loss
from diffdfkd.kernels.launch import Kernel
from diffdfkd.kernels.move import move
from diffdfkd.kernels.predict import Prediction, predict
from diffdfkd.kernels.row import COLUMNS, start_counter
from diffdfkd.kernels.step import Draw, Guidance, Mix, NextInput

FORMS: tuple[str, ...] = ("triton", "reference", "compiled")
QUANTILES = (0.1, 0.5, 0.9)
CACHE = 256 * 2**20
"""Bytes written between repetitions on CUDA: more than any L2 cache holds."""
STEPS = 20
TOLERANCE = 2e-2
"""Of a result's largest error, relative to its largest value: the inputs are half precision."""

Outputs = Sequence[Tensor]


class Operation(NamedTuple):
    """What is timed: a call that takes the form, and the bytes that it must read and write at least."""

    call: Callable[[Kernel], Outputs]
    bytes: float


@dataclass(frozen=True)
class Row:
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
    size, samples = torch.finfo(dtype).bits // 8, shape[0]
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
    mix = Mix(partners, box.repeat(STEPS, batch, 1))
    draw = Draw(0, torch.arange(batch, device=device))

    def stepped(kernel: Kernel, **options: Any) -> Outputs:
        step = start_counter(device, 3)
        made = advance(
            z, prediction, None, rows, step, alive, guidance=guidance, next_input=following, kernel=kernel, **options
        )
        return made.z, inputs

    def predicted(kernel: Kernel) -> Outputs:
        made = predict(z, output, rows, start_counter(device, 3), scale, kernel=kernel)
        return made.x0, made.eps_hat, made.x0_norm, made.guidance_norm

    def moved(kernel: Kernel) -> Outputs:
        made = move(
            z, prediction, rows, start_counter(device, 3), alive, guidance, output, inputs=inputs, kernel=kernel
        )
        return made.z, inputs

    yield "predict", Operation(predicted, samples * n * (4 + 2 * size + 8))
    # eps_hat, x0, gradient in; z and both halves of the input out.
    least = samples * n * (12 + 4 + 2 * size)
    yield "advance", Operation(stepped, least)
    # In a quarter of the pixels the partner's three tensors are read too.
    yield "advance, CutMix", Operation(lambda kernel: stepped(kernel, mix=mix), least + samples * n * 12 / 4)
    yield "advance, drawn noise", Operation(lambda kernel: stepped(kernel, noise=draw), least)
    yield "move (exact)", Operation(moved, samples * n * (4 + 4 + 2 * size + 4 + 2 * size))


def statistics(device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Operation:
    """L_bn of one layer, forward and gradient."""
    activation = latents(shape, device, dtype).requires_grad_()
    mean, variance = torch.zeros(shape[1], device=device), torch.full((shape[1],), 0.5, device=device)
    weight = torch.ones(shape[0], device=device)

    def call(kernel: Kernel) -> Outputs:
        loss = batchnorm_loss([activation], [mean], [variance], weight, kernel=kernel)
        return loss.detach(), *torch.autograd.grad(loss, activation)

    # Read forward; read backward, and the gradient written.
    return Operation(call, 3 * activation.numel() * activation.element_size())


def distillation(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Operation:
    """The distillation loss, forward and gradient."""
    teacher = torch.randn(shape, device=device).to(dtype)
    student = torch.randn(shape, device=device).to(dtype).requires_grad_()

    def call(kernel: Kernel) -> Outputs:
        loss = kd_loss(student, teacher, 4.0, kernel=kernel)
        return loss.detach(), *torch.autograd.grad(loss, student)

    # Both logits forward, both backward, the gradient written.
    return Operation(call, 5 * student.numel() * student.element_size())


def operations(device: torch.device) -> Iterator[tuple[str, str, Operation]]:
    """(operation, configuration, what to time); the sizes of Stable Diffusion on CUDA, smaller ones without."""
    large = device.type == "cuda"
    half = torch.float16 if large else torch.float32
    name = str(half).removeprefix("torch.")
    for shape in ((8, 4, 64, 64), (100, 4, 8, 8)):
        for operation, what in guided_step(device, shape, half):
            yield operation, f"{list(shape)} {name}", what
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


def error_of(made: Outputs, expected: Outputs) -> float:
    """Largest error of any output, relative to that output's largest value."""
    return max(
        float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30))
        for one, other in zip(made, expected, strict=True)
    )


def measure(name: str, configuration: str, operation: Operation, device: torch.device, repetitions: int) -> list[Row]:
    """One row a form: first whether it is right, then how long it takes, the forms taking turns."""
    expected = [tensor.clone() for tensor in operation.call("reference")]
    forms, errors, notes = forms_of(operation, device), {}, {}
    for form, call in list(forms.items()):
        try:
            errors[form] = error_of(call(), expected)
        except Exception as error:  # torch.compile fails in many ways; the other forms are still of interest
            if form != "compiled":
                raise
            notes[form] = f"does not compile: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
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
        if form == "triton" and device.type != "cuda":
            continue
        times = seconds.get(form)
        quantiles = gigabytes = None
        if times:
            values = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
            quantiles = {f"p{round(100 * q)}": 1e6 * float(v) for q, v in zip(QUANTILES, values, strict=True)}
            if device.type == "cuda":
                gigabytes = operation.bytes / quantiles["p50"] / 1e3
        rows.append(Row(name, configuration, form, errors.get(form), quantiles, gigabytes, notes.get(form, "")))
    return rows


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    torch.empty(CACHE, dtype=torch.int8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def conditions(device: torch.device) -> dict[str, Any]:
    """When, where and with what it was measured."""
    from diffdfkd.recipes.machine import examine_processor
    from diffdfkd.recipes.run_folder import versions

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "gpu": gpu,
        "processor": examine_processor()["model"],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions(),
    }


def line(row: Row) -> str:
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
    parser.add_argument("--repetitions", type=int, default=100, help="of each form [100]")
    given = parser.parse_args(arguments)
    if given.repetitions < 1:
        parser.error(f"--repetitions: got {given.repetitions}; 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if device.type != "cuda":
        print("No CUDA device: the Triton kernels cannot be timed here. The two references alone, on the CPU:")
    print(f"{'':59}{'p10 us':>9} {'p50 us':>9} {'p90 us':>9}")
    rows: list[Row] = []
    for name, configuration, operation in operations(device):
        if given.only and given.only not in name:
            continue
        for row in measure(name, configuration, operation, device, given.repetitions):
            rows.append(row)
            print(line(row), flush=True)
    if not rows:
        parser.error(f"--only: no operation's name contains {given.only!r}")
    if given.json is not None:
        content = {"conditions": conditions(device), "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(row.note.startswith("WRONG") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
