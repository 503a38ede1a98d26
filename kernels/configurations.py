"""The uses that the kernels are compiled for ahead of time: real sizes and options, as launches on empty tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdfkd.kernels import batchnorm_loss, kd_loss
from diffdfkd.kernels.advance import advance_launch
from diffdfkd.kernels.launch import Launch, blocks
from diffdfkd.kernels.machine_code import Coverage
from diffdfkd.kernels.moments import combine_launch, moments_launch
from diffdfkd.kernels.move import move_launch
from diffdfkd.kernels.predict import Prediction, predict_launch
from diffdfkd.kernels.rho import Rule
from diffdfkd.kernels.row import COLUMNS, start_counter
from diffdfkd.kernels.step_inputs import Draw, Guidance, Mix, NextInput

STEPS = 20
"""Of the sampler's table."""


def covers(
    *sizes: str, trips: Callable[[Launch], int] = lambda launch: 1, first: int = 0
) -> Callable[[Launch], Coverage]:
    """Coverage whose tile is the product of these constants of the kernel."""
    return lambda launch: Coverage(math.prod(launch.constants[size] for size in sizes), trips(launch), first)


ONE_TILE = covers("BLOCK")


@dataclass(frozen=True)
class Configuration:
    """A kernel at the sizes and options of one use."""

    kernel: str
    name: str
    launch: Callable[[], Launch]
    data: str | None
    """An argument with one number per element; so have all tensors with once or twice as many. None: no argument."""
    minimum: int | None = None
    """Bytes per element that have to be read and written; None states nothing."""
    wide: bool = True
    skipped: tuple[str, ...] = ()
    """Such arguments that a sample need not touch."""
    coverage: Callable[[Launch], Coverage] = ONE_TILE


def tensor(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, *, copies: int = 1, channels_last: bool = False
) -> Tensor:
    """[copies B, ...], its values never read."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((copies * shape[0], *shape[1:]), dtype=dtype, memory_format=memory_format)


def vector(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(n, dtype=dtype)


def place_in_table() -> tuple[Tensor, Tensor]:
    return torch.empty(STEPS, len(COLUMNS)), start_counter("cpu")


def prediction(z: Tensor) -> Prediction:
    return predict_launch(z, z, *place_in_table(), vector(len(z)))[1]


def guidance(z: Tensor, rule: Rule) -> Guidance:
    return Guidance(torch.empty_like(z), vector(len(z)), vector(len(z), torch.bool), vector(len(z)), rule, 0.1)


def predict_use(
    name: str, shape: Sequence[int], dtype: torch.dtype, *, copies: int = 2, channels_last: bool = False
) -> Configuration:
    def launch() -> Launch:
        z = tensor(shape, channels_last=channels_last)
        output = tensor(shape, dtype, copies=copies, channels_last=channels_last)
        return predict_launch(z, output, *place_in_table(), vector(len(z)))[0]

    minimum = 4 + copies * dtype.itemsize + 4 + 4  # z and the outputs read, x0 and eps_hat written
    return Configuration("predict", name, launch, "z", minimum)


def advance_use(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float16,
    *,
    copies: int = 2,
    channels_last: bool = False,
    rule: Rule | None = "unit",
    drawn: bool = False,
    mixed: bool = True,
    multistep: bool = False,
    by_z: bool = False,
) -> Configuration:
    """``by_z``: the sampler's row has a coefficient of z, which is otherwise not read."""
    batch = shape[0]

    def launch() -> Launch:
        z = tensor(shape, channels_last=channels_last)
        inputs = tensor(shape, dtype, copies=copies, channels_last=channels_last)
        plan = Mix(tensor((STEPS, batch), torch.int64), tensor((STEPS, batch, 4), torch.int32))
        return advance_launch(
            z,
            prediction(z),
            torch.empty_like(z) if multistep else None,
            *place_in_table(),
            vector(batch, torch.bool),
            guidance=guidance(z, rule) if rule is not None else None,
            noise=Draw(0, vector(batch, torch.int64)) if drawn else None,
            mix=plan if mixed else None,
            next_input=NextInput(inputs, vector(copies * batch), vector(STEPS)),
            keep_x0=multistep,
            frozen=vector(STEPS, torch.int32),
        )[0]

    minimum = 4 + 4 + 4 + copies * dtype.itemsize  # x0 and eps_hat read, z' and the UNet's input written
    minimum += 4 * (rule is not None) + 8 * multistep + 4 * by_z
    return Configuration("advance", name, launch, "z", minimum, skipped=() if by_z else ("z",))


def move_use(
    name: str, shape: Sequence[int], dtype: torch.dtype, *, exact: bool, channels_last: bool = False
) -> Configuration:
    def launch() -> Launch:
        z = tensor(shape, channels_last=channels_last)
        by_inputs, inputs = (tensor(shape, dtype, copies=2, channels_last=channels_last) for _ in range(2))
        alive = vector(len(z), torch.bool)
        given = (*place_in_table(), alive, guidance(z, "unit"), by_inputs, inputs if exact else None)
        return move_launch(z, prediction(z), *given)[0]

    # z and both gradients are read twice, since their norm comes first; z' is written, and the UNet's input, or x0 is
    # read and x0' written.
    minimum = 2 * (4 + 4 + 2 * dtype.itemsize) + 4 + (2 * dtype.itemsize if exact else 8)
    return Configuration(
        "move", name, launch, "z", minimum, skipped=("x0",) if exact else (),
        coverage=covers("BLOCK", trips=lambda launch: blocks(launch.arguments["n"], launch.constants["BLOCK"])),
    )  # fmt: skip


def batchnorm_uses(
    shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool = False, wide: bool = True
) -> list[Configuration]:
    """Of one layer: moments of runs of positions, their combination, and the gradient."""
    batch, channels = shape[:2]
    name = f"{list(shape)}, {str(dtype).removeprefix('torch.')}{', channels_last' if channels_last else ''}"
    activation, counted = tensor(shape, dtype, channels_last=channels_last), vector(batch, torch.bool)
    partials = moments_launch(activation, counted)[1]
    number, running = torch.tensor(0), (vector(channels), vector(channels))

    def combine() -> Launch:
        differences = torch.empty(2, channels)
        return combine_launch(activation, partials, counted, running=running, differences=differences)[0]

    def gradient() -> Launch:
        mean, by_mean, by_variance = (vector(channels) for _ in range(3))
        upstream = torch.tensor(0.0)
        return batchnorm_loss.gradient_launch(activation, counted, number, mean, by_mean, by_variance, upstream)[0]

    return [
        Configuration(
            "moments", name, lambda: moments_launch(activation, counted)[0], "x", dtype.itemsize, wide,
            coverage=covers("BLOCK_P", "BLOCK_C", trips=lambda launch: launch.constants["CHUNKS"] - 1, first=1),
        ),
        Configuration("combine", name, combine, None, wide=False),
        Configuration(
            "batchnorm_gradient", name, gradient, "x", 2 * dtype.itemsize, wide,
            coverage=covers("BLOCK_P", "BLOCK_C"),
        ),
    ]  # fmt: skip


def distances(weighted: bool = False) -> Launch:
    factors = torch.empty(2 * 40) if weighted else None
    return batchnorm_loss.distance_launch(torch.empty(2 * 40, 2048), factors)[0]


def divergence_uses(shape: tuple[int, int], dtype: torch.dtype, *, wide: bool = True) -> list[Configuration]:
    """Forward and gradient. Not ``wide``: rows of so many classes do not start at multiples of 128 bits."""
    batch, classes = shape
    name = f"{list(shape)}, {str(dtype).removeprefix('torch.')}"
    student, teacher, by_divergence = tensor(shape, dtype), tensor(shape, dtype), vector(batch)

    def gradient() -> Launch:
        return kd_loss.gradient_launch(by_divergence, student, teacher, tensor((4, batch)), 4.0)[0]

    return [
        Configuration(
            "divergence", name, lambda: kd_loss.divergence_launch(student, teacher, 4.0)[0], "student",
            2 * dtype.itemsize, wide,
            coverage=covers("ROWS", "BLOCK", trips=lambda launch: blocks(classes, launch.constants["BLOCK"])),
        ),
        Configuration(
            "divergence_gradient", name, gradient, "student", 3 * dtype.itemsize, wide, coverage=covers("ROWS", "BLOCK")
        ),
    ]  # fmt: skip


DEMO, SD15, SDXL = (100, 4, 8, 8), (8, 4, 64, 64), (4, 4, 128, 128)


def configurations() -> list[Configuration]:
    """Every kernel at its uses, kernel by kernel."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    known = [
        predict_use("demo, CFG, fp32", DEMO, single),
        predict_use("SD-1.5, CFG, fp16", SD15, half),
        predict_use("SD-1.5, CFG, bf16", SD15, brain),
        predict_use("SD-1.5, CFG, fp32", SD15, single),
        predict_use("SD-1.5, CFG, fp16, channels_last", SD15, half, channels_last=True),
        predict_use("SD-1.5, CFG, bf16, channels_last", SD15, brain, channels_last=True),
        predict_use("SD-1.5, CFG, fp32, channels_last", SD15, single, channels_last=True),
        predict_use("SD-1.5, no CFG, fp16", SD15, half, copies=1),
        predict_use("SD-1.5, no CFG, bf16", SD15, brain, copies=1),
        predict_use("SD-1.5, no CFG, fp32", SD15, single, copies=1),
        predict_use("SDXL, CFG, fp16", SDXL, half),
        # A size of 1 is a constant to Triton.
        predict_use("SD-1.5, CFG, fp16, batch 1", (1, *SD15[1:]), half),
        advance_use("demo, DDIM, CutMix, fp32", DEMO, single),
        advance_use("SD-1.5, DDIM, CutMix", SD15),
        advance_use("SD-1.5, DDIM", SD15, mixed=False),
        advance_use("SD-1.5, DDIM, CutMix, channels_last", SD15, channels_last=True),
        advance_use("SD-1.5, DDIM, CutMix, cfg rule", SD15, rule="cfg"),
        advance_use("SD-1.5, DDIM, CutMix, unguided", SD15, rule=None),
        advance_use("SD-1.5, DDPM, CutMix", SD15, drawn=True),
        advance_use("SD-1.5, DDPM, CutMix, channels_last", SD15, drawn=True, channels_last=True),
        advance_use("SD-1.5, DPM-Solver++, CutMix", SD15, multistep=True),
        advance_use("SD-1.5, LCM, CutMix", SD15, copies=1, drawn=True, by_z=True),
        advance_use("SDXL, DDIM, CutMix", SDXL),
        # As the sampler calls it today: channels_last, and a UNet stage that takes and gives float32.
        advance_use("SD-1.5, DDIM, CutMix, fp32, channels_last", SD15, single, channels_last=True),
        advance_use("SD-1.5, cfg rule, CutMix, fp32, channels_last", SD15, single, rule="cfg", channels_last=True),
        advance_use(
            "SD-1.5, DPM-Solver++, CutMix, fp32, channels_last", SD15, single, multistep=True, channels_last=True
        ),
        advance_use(
            "SD-1.5, LCM, CutMix, fp32, channels_last",
            SD15,
            single,
            copies=1,
            drawn=True,
            by_z=True,
            channels_last=True,
        ),
        advance_use(
            "demo, DPM-Solver++, CutMix, fp32, channels_last", DEMO, single, multistep=True, channels_last=True
        ),
        advance_use("SD-1.5, DDPM, CutMix, batch 1", (1, *SD15[1:]), drawn=True),
        move_use("demo, exact, fp32", DEMO, single, exact=True),
        move_use("demo, reuse, fp32", DEMO, single, exact=False),
        move_use("SD-1.5, exact, fp16", SD15, half, exact=True),
        move_use("SD-1.5, reuse, fp16", SD15, half, exact=False),
        move_use("SD-1.5, exact, fp32, channels_last", SD15, single, exact=True, channels_last=True),
        move_use("SD-1.5, reuse, fp32, channels_last", SD15, single, exact=False, channels_last=True),
        *(
            configuration
            for shape in ((32, 64, 56, 56), (100, 32, 32, 32))
            for dtype in (half, single)
            for channels_last in (False, True)
            for configuration in batchnorm_uses(shape, dtype, channels_last=channels_last)
        ),
        *batchnorm_uses((8, 256, 14, 14), half, channels_last=True),
        *batchnorm_uses((8, 512, 7, 7), half, channels_last=True),
        # 196 and 49 positions do not fill pieces of eight.
        *batchnorm_uses((8, 256, 14, 14), half, wide=False),
        *batchnorm_uses((8, 512, 7, 7), half, wide=False),
        Configuration("distance", "40 layers of up to 2048", distances, None, wide=False),
        Configuration("distance", "40 weighted layers", lambda: distances(weighted=True), None, wide=False),
        *divergence_uses((128, 10), single, wide=False),
        *divergence_uses((128, 100), single),
        *divergence_uses((256, 1000), single),
        *divergence_uses((256, 1000), half),
        *divergence_uses((64, 21_841), half, wide=False),
    ]
    return sorted(known, key=lambda one: one.kernel)
