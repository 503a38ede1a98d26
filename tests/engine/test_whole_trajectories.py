"""Whole guided trajectories of the demonstration: graphs under ONNX Runtime end where eager ends.

In float32 they cannot in a batch: rounding passes the teacher's kinks, and twelve steps magnify what follows
(docs/engines.md). In float64 nothing is rounded far enough, so that what is left would be a fault of graph, runner or
loop. ONNX Runtime has neither convolution nor error function in float64, here they are sums; and the exporter rounds
numbers that stand in the code to float32, here it does not.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxscript import ir, opset18
from onnxscript.function_libs.torch_lib.ops import common
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch.nn import functional

from diffdfkd.engine import export
from diffdfkd.engine.backends.onnxruntime import OnnxRuntimeRunner
from diffdfkd.engine.backends.serve import EngineChain, EngineUNet, Subject
from diffdfkd.engine.classifier import Classifier, build_classifier
from diffdfkd.engine.engine_stages import Function, Stage
from diffdfkd.engine.painter import Models, Painter
from diffdfkd.engine.prior import Prior, load_prior
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.sampler import Trajectory
from diffdfkd.engine.stages import Chain, Gradient, UNet, decode_stage, guidance_chain, unet_stage
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.engine.trace import trace

F64 = torch.float64
BATCH = 8


class Sinusoids(nn.Module):
    """The timestep's embedding in float64; diffusers' own is float32, whose sines differ between engines."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        assert plain.flip_sin_to_cos and plain.downscale_freq_shift == 0
        half = plain.num_channels // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * torch.arange(half, dtype=F64) / half))

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.double()[:, None] * self.frequencies
        return torch.cat([(angles + math.pi / 2).sin(), angles.sin()], 1)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """[B, C, H, W], as a sum of matrix products."""
    assert groups == 1 and list(dilation) == [1, 1]
    high, wide = weight.shape[2:]
    (down, across), (above, left) = stride, padding
    below, right = above, left
    if transposed:
        weight = weight.flip(2, 3).transpose(0, 1)
        batch, channels, height, width = x.shape
        x = functional.pad(x[:, :, :, None, :, None], (0, across - 1, 0, 0, 0, down - 1))
        x = x.reshape(batch, channels, height * down, width * across)
        above, left = high - 1 - above, wide - 1 - left
        # Behind the last pixel the zeros that were put between two are too many.
        below, right = above + output_padding[0] - (down - 1), left + output_padding[1] - (across - 1)
        down, across = 1, 1
    x = functional.pad(x, (left, right, above, below)).permute(0, 2, 3, 1)
    height, width = ((size - k) // s + 1 for size, k, s in zip(x.shape[1:3], (high, wide), (down, across), strict=True))
    made = x.new_zeros(()) if bias is None else bias
    for i in range(high):
        for j in range(wide):
            rows = x[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * across + 1 : across]
            made = made + rows @ weight[:, :, i, j].t()
    return made.permute(0, 3, 1, 2)


def erf(x: Tensor) -> Tensor:
    """2/sqrt(pi) times the integral of exp(-t^2) from 0 to x, by Gauss's rule; from 6 on it is 1."""
    x = x.clamp(-6, 6)
    places, weights = np.polynomial.legendre.leggauss(48)
    total = sum(w / 2 * torch.exp(-((x * ((p + 1) / 2)) ** 2)) for p, w in zip(places, weights, strict=True))
    return total * x * (2 / math.sqrt(math.pi))


def test_integral_is_the_error_function() -> None:
    x = torch.linspace(-9, 9, 999, dtype=F64)
    torch.testing.assert_close(erf(x), torch.erf(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_sum_of_products_is_the_convolution(stride: int, size: int, transposed: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, bias = torch.randn(2, 3, 8, 6, dtype=F64, generator=draw), torch.randn(5, dtype=F64, generator=draw)
    weight = torch.randn((3, 5, size, size) if transposed else (5, 3, size, size), dtype=F64, generator=draw)
    for padding, more in ((0, 0), (size // 2, 0), (size // 2, stride - 1)):
        options = ([stride] * 2, [padding] * 2, [1, 1], transposed, [more * transposed] * 2, 1)
        given, expected = (call(x, weight, bias, *options) for call in (convolution, torch.convolution))
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


def whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers such as a norm's epsilon reach the graph as they stand in the code."""
    plain = common.cast_to

    def exact(value: Any, dtype: int) -> Any:
        if isinstance(value, int | float) and dtype == ir.DataType.DOUBLE:
            return opset18.Constant(value=ir.tensor(np.array(value, np.float64)))
        return plain(value, dtype)

    monkeypatch.setattr(common, "cast_to", exact)


def in_float64(stage: Stage) -> Stage:
    """The stage computed in float64 between its float32 ports."""

    @functools.cache
    def make(dtype: torch.dtype) -> Function:
        function, ports = stage.make(F64), stage.specification.outputs

        def rounded(*inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(value.to(port.dtype) for value, port in zip(function(*inputs), ports, strict=True))

        return rounded

    return dataclasses.replace(stage, precision=F64, make=make)


def plain_stages(recipe: Recipe, prior: Prior, teacher: Classifier) -> tuple[UNet, Chain]:
    """Those of a run without engines, of networks in float64, between float32 tensors."""
    wide = dataclasses.replace(prior, unet=copy.deepcopy(prior.unet).double(), vae=copy.deepcopy(prior.vae).double())
    master = copy.deepcopy(teacher).double()
    unet = unet_stage(wide)
    chain = guidance_chain(decode_stage(wide), master, BatchNormTaps(master.model), recipe.guidance, kernel="reference")

    def guided(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
        gradient, norm, finite, losses = chain(x0.double(), targets.double(), alive, weights.double())
        return Gradient(gradient.float(), norm.float(), finite, losses.float())

    return lambda sample, timestep, context: unet(sample.double(), timestep, context.double()).float(), guided


@pytest.mark.slow
def test_demo_guided_to_the_end_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_numbers(monkeypatch)
    group_norm = torch.ops.aten.native_group_norm.default
    table = {
        torch.ops.aten.convolution.default: convolution,
        torch.ops.aten.gelu.default: lambda x, approximate="none": x * (1 + erf(x / math.sqrt(2))) / 2,
        group_norm: decomposition_table[group_norm],
    }
    monkeypatch.setattr(export, "trace", lambda stage, doubling: trace(stage, table, doubling))
    recipe = load_recipe("fashion", [f"synthesis.batch_size={BATCH}", "device=cpu", "threads=1", "engine=eager"])
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher").eval().requires_grad_(False)
    prior = load_prior(recipe.prior, "cpu")
    unet: Any = prior.unet
    unet.time_proj = Sinusoids(unet.time_proj)
    with Painter(recipe, Models(prior, teacher), 0) as painter:
        subject = Subject(recipe, prior, teacher, painter.context)
        stages = {name: in_float64(subject.make(name)(F64)) for name in ("unet", "chain")}

        def ends(samples: int) -> Trajectory:
            ids = torch.arange(samples)
            return painter._denoise(ids[None], ids % 10, ids % 10, True, True)[1]

        # The last batch of a round is shorter than what the engine was built for.
        sizes = (BATCH, BATCH - 3)
        painter.denoiser.unet, painter.denoiser.chain = plain_stages(recipe, prior, teacher)
        eager = [ends(samples) for samples in sizes]
        runners = {}
        for name, stage in stages.items():
            folder = tmp_path / name
            folder.mkdir()
            export.export_stage(stage, folder)
            runners[name] = OnnxRuntimeRunner(folder / export.MODEL, stage.specification, stage.device, 1)
        painter.denoiser.unet, painter.denoiser.chain = EngineUNet(runners["unet"]), EngineChain(runners["chain"])
        for samples, expected in zip(sizes, eager, strict=True):
            given = ends(samples)
            assert given.alive.all() and expected.losses.isfinite().all() and len(expected.losses) == 12
            apart = (given.latents - expected.latents).flatten(1).norm(dim=1) / expected.latents.flatten(1).norm(dim=1)
            # Between the stages numbers are float32, and where one comes to lie on the other side of the middle between
            # two of them it may still bring a sample to a kink: so one sample may be further off.
            assert apart.sort().values[:-1].max() <= 1e-5 and apart.max() <= 1e-2, apart
