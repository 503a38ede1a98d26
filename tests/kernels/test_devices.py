"""Kernels against references on each device, at the sizes of real models: interpreted on the CPU, compiled on CUDA.

    pytest -m gpu tests

runs the second half where there is a GPU. The first half runs the same lines, on smaller tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from kernels_tolerances import DTYPES, NORMAL_TOLERANCE, TOLERANCES
from torch import Tensor

from diffdfkd.engine.cutmix import plan_cutmix
from diffdfkd.engine.recipe import CutMixRecipe, GuidanceRecipe
from diffdfkd.engine.sampler import Trajectory, sample
from diffdfkd.engine.schedule import make_table
from diffdfkd.engine.stages import Gradient
from diffdfkd.kernels.advance import advance
from diffdfkd.kernels.batchnorm_loss import batchnorm_distance, batchnorm_loss, held_loss
from diffdfkd.kernels.kd_loss import adversarial_loss, kd_loss
from diffdfkd.kernels.launch import INTERPRETED
from diffdfkd.kernels.moments import accumulate_moments
from diffdfkd.kernels.move import move
from diffdfkd.kernels.philox import STEP_NOISE, philox_normal
from diffdfkd.kernels.predict import predict
from diffdfkd.kernels.rho import RULES, Rule
from diffdfkd.kernels.row import COLUMNS, start_counter
from diffdfkd.kernels.step_inputs import Draw, Guidance, Mix, NextInput, checked_mix

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
interpreted = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is on; give -m gpu alone")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu, interpreted])
DEVICES = ["cpu", CUDA]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIG |= {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon"}
SAMPLERS = ("ddim", "ddpm", "euler", "dpmsolver++", "lcm")


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """A convolution in TF32 would turn a difference in the last place into one of a thousandth."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def shapes(device: str) -> list[tuple[int, int, int, int]]:
    """Stable Diffusion's, the demo's and odd ones; on the CPU small."""
    if device == "cpu":
        return [(3, 4, 8, 8), (2, 4, 5, 7), (1, 1, 1, 63)]
    return [(8, 4, 64, 64), (100, 4, 8, 8), (3, 4, 5, 7), (1, 1, 1, 63), (1, 4, 128, 128), (2, 4, 96, 64)]


def draw(shape: Sequence[int], seed: int, device: str, format: str = "contiguous") -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(device).contiguous(memory_format=FORMATS[format])


def table(device: str) -> Tensor:
    rows = torch.rand(3, len(COLUMNS), generator=torch.Generator().manual_seed(9)) + 0.2
    return rows.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step(device: str, format: str, dtype: torch.dtype) -> None:
    """Predict, move and advance with everything on: gradient, noise, previous x0, CutMix, the next input."""
    for shape in shapes(device):
        batch, _, height, width = shape
        doubled = (2 * batch, *shape[1:])
        z, gradient, previous = (draw(shape, seed, device, format) for seed in (1, 2, 3))
        output, by_inputs = (draw(doubled, seed, device, format).to(dtype) for seed in (4, 5))
        scale = torch.linspace(1, 4, batch, device=device)
        alive = torch.arange(batch, device=device) != 1
        norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
        partners = torch.arange(batch).roll(1).repeat(3, 1)
        boxes = torch.tensor([height // 4, 0, height, (width + 1) // 2], dtype=torch.int32).repeat(3, batch, 1)
        mix = checked_mix(partners, boxes, height, width, device)
        results = []
        for kernel in ("reference", "triton"):
            rows, step = table(device), start_counter(device, 1)
            inputs = torch.full(doubled, torch.nan, device=device, dtype=dtype).contiguous(
                memory_format=FORMATS[format]
            )
            following = NextInput(
                inputs, torch.empty(2 * batch, device=device), torch.tensor([9.0, 8.0, 7.0], device=device)
            )
            frozen = torch.zeros(3, dtype=torch.int32, device=device)
            prediction = predict(z, output, rows, step, scale, kernel=kernel)
            guidance = Guidance(gradient, norm, torch.ones_like(alive), scale, "cfg", 0.1)
            moved = move(z, prediction, rows, step, alive, guidance, by_inputs, kernel=kernel)
            noise = Draw(5, torch.arange(batch, device=device))
            made = advance(
                *(z, prediction, previous, rows, step, alive),
                guidance=guidance,
                noise=noise,
                mix=mix,
                next_input=following,
                keep_x0=True,
                frozen=frozen,
                kernel=kernel,
            )
            assert made.x0 is not None
            values = [prediction.x0, prediction.eps_hat, prediction.x0_norm, prediction.guidance_norm, made.z, made.x0]
            values += [moved.z, moved.prediction.x0, moved.prediction.x0_norm]
            exact = [made.alive, moved.alive, frozen, step, following.timestep]
            results.append((values, exact, inputs))
        for one, other in zip(results[0][0], results[1][0], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=2e-5)
        for one, other in zip(results[0][1], results[1][1], strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(results[1][2], results[0][2], **TOLERANCES[dtype])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_other_ways_of_a_step(device: str, rule: Rule) -> None:
    """Crossed formats, explicit noise, no doubled half, unaligned views, mode exact, a sample that is not finite."""
    for shape in shapes(device):
        batch = shape[0]
        whole = draw((batch + 1, *shape[1:]), 1, device, "channels_last")
        z = whole[1:]  # its storage begins anywhere
        gradient, previous, noise, output, by_inputs = (draw(shape, seed, device) for seed in (2, 3, 4, 5, 6))
        if batch > 1:
            output[1, 0, 0, 0] = torch.nan
        one, alive = torch.ones(batch, device=device), torch.ones(batch, dtype=torch.bool, device=device)
        results = []
        for kernel in ("reference", "triton"):
            rows, step = table(device), start_counter(device, 1)
            inputs, again = torch.full((2, *shape), torch.nan, device=device).unbind()
            timestep = torch.full((batch,), torch.nan, device=device)
            following = NextInput(inputs, timestep, torch.tensor([9.0, 8.0, 7.0], device=device))
            frozen = torch.zeros(3, dtype=torch.int32, device=device)
            prediction = predict(z, output, rows, step, 1.0, kernel=kernel)
            norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
            guidance = Guidance(gradient, norm, alive, one, rule, 0.1)
            moved = move(z, prediction, rows, step, alive, guidance, by_inputs, inputs=again, kernel=kernel)
            made = advance(
                *(z, prediction, previous, rows, step, alive),
                guidance=guidance,
                noise=noise,
                next_input=following,
                frozen=frozen,
                kernel=kernel,
            )
            assert made.x0 is None
            results.append(([made.z, inputs, moved.z, again], [made.alive, moved.alive, frozen, step, timestep]))
        for expected, found in zip(results[0][0], results[1][0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        for expected, found in zip(results[0][1], results[1][1], strict=True):
            assert torch.equal(expected, found)
        assert int(results[1][1][2][1]) == int(batch > 1)


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_of_micro_batches(device: str) -> None:
    """Accumulated over two, then back-propagated one by one: the gradient of the whole."""
    shape = (4, 3, 5, 7) if device == "cpu" else (32, 64, 28, 28)
    whole = draw(shape, 1, device).requires_grad_()
    running = [torch.full((shape[1],), value, device=device) for value in (0.3, 0.7)]
    weight = torch.arange(shape[0], device=device) != 1
    expected = batchnorm_loss([whole], running[:1], running[1:], weight, kernel="reference")
    (gradient,) = torch.autograd.grad(expected, whole)
    parts = [
        whole.detach()[: shape[0] // 4].clone().requires_grad_(),
        whole.detach()[shape[0] // 4 :].clone().requires_grad_(),
    ]
    weights = [weight[: shape[0] // 4], weight[shape[0] // 4 :]]
    moments = None
    for part, counted in zip(parts, weights, strict=True):
        moments = accumulate_moments([part], counted, moments, kernel="triton")
    assert moments is not None
    distance = batchnorm_distance(moments, running[:1], running[1:])
    found = [
        torch.autograd.grad(held_loss([part], counted, moments, distance, kernel="triton"), part)[0]
        for part, counted in zip(parts, weights, strict=True)
    ]
    torch.testing.assert_close(distance.loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(found), gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_drawn_noise(device: str, format: str) -> None:
    for shape in shapes(device):
        rows = torch.zeros(1, len(COLUMNS), device=device)
        rows[0, COLUMNS.index("noise")] = 1
        z = torch.zeros(shape, device=device).contiguous(memory_format=FORMATS[format])
        output = torch.zeros_like(z)
        step = start_counter(device)
        prediction = predict(z, output, rows, step, 1.0, kernel="triton")
        ids = torch.arange(shape[0], device=device) + 2**41
        alive = torch.ones(shape[0], dtype=torch.bool, device=device)
        made = advance(z, prediction, None, rows, step, alive, noise=Draw(2**40 + 1, ids), kernel="triton")
        expected = philox_normal(2**40 + 1, ids, 0, STEP_NOISE, shape[1:])
        # A GPU's square root is right to a few units.
        tolerance = NORMAL_TOLERANCE if device == "cpu" else {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(made.z, expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_losses_and_their_gradients(device: str, format: str, dtype: torch.dtype) -> None:
    small = device == "cpu"
    layers = [(2, 3, 5, 7), (2, 16, 4, 4)] if small else [(16, 64, 56, 56), (16, 512, 7, 7), (16, 3, 31, 33)]
    batch = layers[0][0]
    weight = (torch.arange(batch, device=device) != 1).float()
    inputs = [draw(shape, seed, device, format).to(dtype).requires_grad_() for seed, shape in enumerate(layers)]
    means = [torch.full((shape[1],), 0.3, device=device) for shape in layers]
    variances = [torch.full((shape[1],), 0.7, device=device) for shape in layers]
    found = []
    for kernel in ("reference", "triton"):
        loss = batchnorm_loss(inputs, means, variances, weight, kernel=kernel)
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    compare(found, dtype)
    for rows, classes in [(3, 10), (2, 345)] if small else [(128, 10), (256, 1000), (64, 21841)]:
        student = draw((rows, classes), 1, device).to(dtype).requires_grad_()
        teacher = draw((rows, classes), 2, device).to(dtype)
        counted = torch.arange(rows, device=device) != 1
        found = []
        for kernel in ("reference", "triton"):
            loss = kd_loss(student, teacher, 4.0, kernel=kernel) + adversarial_loss(
                student, teacher, counted, kernel=kernel
            )
            # Times the batch, as the guidance chain takes it: float16 would hold less in subnormal numbers.
            found.append([loss.detach(), *torch.autograd.grad(rows * loss, student)])
        compare(found, dtype)


def compare(found: list[list[Tensor]], dtype: torch.dtype) -> None:
    """Loss and gradients of both forms; a gradient's tolerance is relative to its largest value."""
    for one, other in zip(*found, strict=True):
        size = float(one.detach().float().abs().max())
        torch.testing.assert_close(other.float(), one.float(), rtol=TOLERANCES[dtype]["rtol"], atol=1e-2 * size)
        assert (
            float((other.float() - one.float()).norm()) <= TOLERANCES[dtype]["rtol"] * float(one.float().norm()) + 1e-12
        )


class Net:
    """A UNet in small: smooth and of the batch's own device."""

    def __init__(self, channels: int, device: str) -> None:
        self.weight = 0.2 * draw((channels, channels, 3, 3), 11, device)

    def __call__(self, inputs: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        made = torch.nn.functional.conv2d(inputs, self.weight, padding=1) + context.mean((1, 2))[:, None, None, None]
        return torch.tanh(made) + 0.1 * inputs * (timestep / 1000)[:, None, None, None]


def towards(goal: Tensor) -> Any:
    def chain(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
        gradient = (x0 - goal).clamp(-1, 1)
        losses = gradient.square().mean().expand(4)
        return Gradient(gradient, torch.linalg.vector_norm(gradient, dim=(1, 2, 3)), alive, losses)

    return chain


def trajectory(
    device: str, sampler: str, kernel: Any, shape: tuple[int, int, int, int], steps: int = 6
) -> Callable[[], Trajectory]:
    """Everything on the device already; the call is the loop alone."""
    batch = shape[0]
    plan = plan_cutmix(
        CutMixRecipe(every=2, partner="any", probability=0.8),
        (torch.arange(batch) % 3).to(device),
        3,
        steps,
        shape[2:],
        7,
        torch.arange(batch),
    )
    net, chain = Net(shape[1], device), towards(draw(shape[1:], 14, device))
    table, context = make_table(sampler, CONFIG, steps, device), draw((2 * batch, 3, 4), 12, device)
    noise, ids = draw(shape, 13, device), torch.arange(batch, device=device)
    guidance = GuidanceRecipe(mode="clean")
    return lambda: sample(
        *(net, table, context),
        scale=3.0,
        noise=noise,
        sample_ids=ids,
        seed=7,
        guidance=guidance,
        plan=plan,
        chain=chain,
        kernel=kernel,
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_trajectory(device: str, sampler: str) -> None:
    shape = (4, 2, 6, 5) if device == "cpu" else (8, 4, 64, 64)
    one, other = (trajectory(device, sampler, kernel, shape)() for kernel in ("reference", "triton"))
    torch.testing.assert_close(other.latents, one.latents, rtol=1e-3, atol=1e-3)
    assert torch.equal(one.alive, other.alive) and torch.equal(one.frozen, other.frozen)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("device", [CUDA])
def test_the_loop_does_not_wait_for_the_device(device: str, kernel: Any) -> None:
    loop = trajectory(device, "dpmsolver++", kernel, (8, 4, 64, 64))
    loop()  # compiled, and cuDNN's plans made
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def replayable(device: str, shape: tuple[int, int, int, int], steps: int) -> Any:
    """One clean step between fixed buffers, driven by the counter on the device alone."""
    batch = shape[0]
    made = make_table("ddim", CONFIG, steps, device)
    net, goal = Net(shape[1], device), towards(draw(shape[1:], 14, device))
    context = draw((2 * batch, 3, 4), 12, device)
    z = draw(shape, 13, device, "channels_last")
    inputs = torch.cat([z, z]).contiguous(memory_format=torch.channels_last)
    following = NextInput(inputs, made.timesteps[:1].repeat(2 * batch), made.timesteps)
    step, alive = start_counter(device), torch.ones(batch, dtype=torch.bool, device=device)
    scale = torch.full((batch,), 3.0, device=device)
    mix = Mix(
        torch.arange(batch, device=device).roll(1).repeat(steps, 1),
        torch.zeros(steps, batch, 4, dtype=torch.int32, device=device),
        checked=True,
    )

    def one_step() -> None:
        prediction = predict(z, net(inputs, following.timestep, context), made.rows, step, scale, kernel="triton")
        found = goal(prediction.x0, None, alive, None)
        guidance = Guidance(found.gradient, found.norm, found.finite, scale, "unit", 0.15)
        result = advance(
            z,
            prediction,
            None,
            made.rows,
            step,
            alive,
            guidance=guidance,
            mix=mix,
            next_input=following,
            kernel="triton",
        )
        z.copy_(result.z)

    return one_step, z, step


@pytest.mark.parametrize("device", DEVICES)
def test_one_captured_step_is_replayed_to_a_trajectory(device: str) -> None:
    """The table's row, the plan's boxes and the timestep follow the counter: on CUDA the graph is captured once."""
    shape = (2, 2, 4, 4) if device == "cpu" else (8, 4, 64, 64)
    steps = 5
    one_step, expected, _ = replayable(device, shape, steps)
    for _ in range(steps):
        one_step()
    again, z, step = replayable(device, shape, steps)
    replay = again
    if device == "cuda":
        fresh = z.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            again()  # compiled before the capture
        torch.cuda.current_stream().wait_stream(side)
        again, z, step = replayable(device, shape, steps)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again()
        assert torch.equal(z, fresh)
        replay = graph.replay  # ``again`` keeps the tensors that the graph reads
    for _ in range(steps):
        replay()
    assert int(step[0]) == steps
    torch.testing.assert_close(z, expected)
