from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from kernels_tolerances import DTYPES, TOLERANCES
from torch import Tensor
from vast import vast

from diffdfkd.kernels import activation as tiles
from diffdfkd.kernels.activation import activation_tiling
from diffdfkd.kernels.moments import (
    Moments,
    accumulate_moments,
    batch_moments,
    combine_launch,
    merge_moments,
    moments_launch,
)

pytestmark = pytest.mark.usefixtures("poisoned")

KERNELS = ("reference", "triton")
Form = Literal["reference", "triton"]
NAN = float("nan")
# Whatever is read is exact, and all that follows is float32.
TOLERANCE = TOLERANCES[torch.float32]
SHAPES = [(2, 1, 3, 63), (3, 5, 127), (2, 3, 4, 5, 7), (1, 4, 6, 8), (5, 70), (2, 3, 1, 1)]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, channels_last: bool = False) -> Tensor:
    """Samples and channels of different means and deviations."""
    generator = torch.Generator().manual_seed(0)
    scale, shift = (torch.rand(*shape[:2], *[1] * (len(shape) - 2), generator=generator) for _ in range(2))
    values = ((0.5 + scale) * torch.randn(shape, generator=generator) + 4 * shift).to(dtype)
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else values


def plain_moments(activation: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    columns = activation[weight > 0].double().transpose(0, 1).flatten(1)
    return columns.mean(1), columns.var(1, unbiased=False)


def check(moments: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: Any) -> None:
    for ours, theirs in zip(moments, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **(tolerance or TOLERANCE))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of two tiles, several of them a sample, at sizes that the interpreter can take."""
    for name, value in {"TILE": 512, "PROGRAMS": 1, "MOST_CHUNKS": 2}.items():
        monkeypatch.setattr(tiles, name, value)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_moments_of_a_batch(kernel: Form, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> None:
    activation = draw(shape, dtype, channels_last=channels_last)
    weight = torch.ones(shape[0])
    moments = batch_moments(activation, weight, kernel=kernel)
    assert {moment.dtype for moment in moments} == {torch.float32}
    check(moments, plain_moments(activation, weight))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("shape", "channels_last"), [((2, 3, 20, 90), False), ((2, 70, 3, 11), True)])
def test_runs_of_several_tiles(shape: tuple[int, ...], channels_last: bool) -> None:
    activation = draw(shape, channels_last=channels_last)
    # Runs of one sample differ too.
    activation += torch.linspace(0, 5, shape[-1])
    cut = activation_tiling(activation)
    assert cut.channels_last == channels_last and cut.chunks == 2 and cut.splits > 1
    weight = torch.tensor([0.0, 1.0])
    check(batch_moments(activation, weight, kernel="triton"), plain_moments(activation, weight))


def test_more_samples_than_are_merged_at_once() -> None:
    activation = draw((300, 3, 4)) + torch.linspace(0, 9, 300)[:, None, None]
    weight = (torch.arange(300) % 7 > 0).float()
    check(batch_moments(activation, weight, kernel="triton"), plain_moments(activation, weight))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_of_weight_one_alone_count(kernel: Form, dtype: torch.dtype) -> None:
    activation = draw((6, 3, 5, 4))
    weight = torch.tensor([0, 1, 1, 0, 1, 0])
    activation[weight == 0] = NAN
    check(batch_moments(activation, weight.to(dtype), kernel=kernel), plain_moments(activation, weight))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_sample_has_moments_zero(kernel: Form) -> None:
    for moment in batch_moments(torch.full((2, 3, 4), NAN), torch.zeros(2), kernel=kernel):
        assert torch.equal(moment, torch.zeros(3))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_counted_nan_shows_in_its_channel_alone(kernel: Form) -> None:
    activation = draw((2, 3, 4))
    activation[1, 1, 2] = NAN
    for moment in batch_moments(activation, torch.ones(2), kernel=kernel):
        assert moment.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_variance_does_not_cancel_at_a_large_mean(kernel: Form, channels_last: bool, small_tiles: None) -> None:
    activation = 1e3 + 1e-2 * draw((4, 2, 30, 40), channels_last=channels_last)
    weight = torch.ones(4)
    mean, variance = batch_moments(activation, weight, kernel=kernel)
    expected_mean, expected_variance = plain_moments(activation, weight)
    # A float32 near 1000 is rounded by up to 3e-5, which the means of samples differ by too.
    torch.testing.assert_close(variance.double(), expected_variance, rtol=3e-3, atol=0)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_constant_has_variance_zero(kernel: Form) -> None:
    mean, variance = batch_moments(torch.full((3, 2, 63), 0.1), torch.ones(3), kernel=kernel)
    torch.testing.assert_close(mean, torch.full((2,), 0.1))
    assert (variance >= 0).all() and (variance < 1e-15).all()


def test_a_scatter_that_rounding_left_below_zero_is_zero() -> None:
    runs = torch.ones(3, 2), torch.full((3, 2), -1e-9)
    launch, (_, variance) = combine_launch(torch.ones(3, 2, 63), runs, torch.ones(3) > 0)
    launch.run()
    assert torch.equal(variance, torch.zeros(2))


def test_runs_of_samples_that_do_not_count_are_not_touched() -> None:
    launch, runs = moments_launch(draw((3, 2, 5)), torch.tensor([True, False, True]))
    launch.run()
    for each in runs:
        assert each.isnan().all(1).tolist() == [False, True, False]


def test_offsets_have_64_bits() -> None:
    """Sample 2 of 2^30 elements begins at element 2^31, where an offset of 32 bits would be negative."""
    activation = vast((3, 1, 2**30))
    launch, (means, _) = moments_launch(activation, torch.tensor([False, False, True]))
    run = launch.constants["CHUNKS"] * launch.constants["BLOCK_P"]
    activation[2, 0, :run] = 3.0
    # Of each sample the first run alone.
    replace(launch, grid=(3,), arguments={**launch.arguments, "splits": 1}).run()
    assert means[2].item() == 3


def test_the_same_bits_every_time() -> None:
    activation, weight = draw((3, 5, 127)), torch.ones(3)
    first, second = (batch_moments(activation, weight, kernel="triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def micro_batches() -> tuple[list[Tensor], Tensor, list[list[Tensor]], list[Tensor]]:
    """Two layers' inputs of 9 samples and their weights, whole and cut in four; of the first part none counts."""
    inputs = [draw((9, 3, 4, 5)), draw((9, 20))]
    weight = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0])
    for activation in inputs:
        activation[weight == 0] = NAN
    sizes = [2, 4, 1, 2]
    parts = [list(part) for part in zip(*(activation.split(sizes) for activation in inputs), strict=True)]
    return inputs, weight, parts, list(weight.split(sizes))


@pytest.mark.parametrize("kernel", KERNELS)
def test_micro_batches_accumulate_to_the_moments_of_all(kernel: Form) -> None:
    inputs, weight, parts, weights = micro_batches()
    moments = None
    for part, own in zip(parts, weights, strict=True):
        moments = accumulate_moments([x.requires_grad_() for x in part], own, moments, kernel=kernel)
    assert moments is not None and moments.samples == 5 and moments.samples.dtype == torch.int64
    for index, activation in enumerate(inputs):
        ours = moments.means[index], moments.variances[index]
        check(ours, plain_moments(activation, weight))
        assert not any(moment.requires_grad for moment in ours)


@pytest.mark.parametrize("kernel", KERNELS)
def test_moments_of_two_processes_merge(kernel: Form) -> None:
    inputs, weight, parts, weights = micro_batches()
    one = accumulate_moments(parts[0], weights[0], kernel=kernel)
    one = accumulate_moments(parts[1], weights[1], one, kernel=kernel)
    two = accumulate_moments(parts[2], weights[2], kernel=kernel)
    two = accumulate_moments(parts[3], weights[3], two, kernel=kernel)
    for moments in (merge_moments(one, two), merge_moments(two, one)):
        for index, activation in enumerate(inputs):
            check((moments.means[index], moments.variances[index]), plain_moments(activation, weight))


def test_the_reference_accumulates_in_float64() -> None:
    inputs, weight, parts, weights = micro_batches()
    moments = None
    for part, own in zip(parts, weights, strict=True):
        moments = accumulate_moments([x.double() for x in part], own, moments)
    assert moments is not None
    for index, activation in enumerate(inputs):
        expected = plain_moments(activation, weight)
        check((moments.means[index], moments.variances[index]), expected, rtol=1e-12, atol=1e-12)


def test_bad_arguments() -> None:
    activation, weight = draw((3, 4, 5, 6)), torch.ones(3)
    for bad in (torch.ones(2), torch.ones(3, 1), torch.ones(())):
        with pytest.raises(ValueError, match=r"weight: .*\(3,\) expected"):
            batch_moments(activation, bad)
    for bad in (torch.ones(3), torch.ones(3, 0, 4), torch.ones(3, 4, 0), torch.ones(3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="activation: got"):
            batch_moments(bad, weight)
    with pytest.raises(ValueError, match="activation: on meta, the weight on cpu"):
        batch_moments(activation.to("meta"), weight)
    with pytest.raises(ValueError, match="float64"):
        batch_moments(activation.double(), weight, kernel="triton")
    for strided in (activation[:, :2], activation.mT, activation[..., ::2], activation[:1].expand(3, 4, 5, 6)):
        with pytest.raises(ValueError, match=r"neither contiguous nor channels_last; give it .contiguous\(\)"):
            batch_moments(strided, weight, kernel="triton")
    with pytest.raises(ValueError, match="inputs: none"):
        accumulate_moments([], weight)
    with pytest.raises(ValueError, match=r"inputs\[1\]: strides"):
        accumulate_moments([activation, activation[:, :2]], weight, kernel="triton")


def test_earlier_moments_of_other_layers_are_refused() -> None:
    activation, weight = draw((3, 4, 5)), torch.ones(3)
    good = accumulate_moments([activation], weight)
    with pytest.raises(ValueError, match="means: of 1 layers, the inputs of 2"):
        accumulate_moments([activation, activation], weight, good)
    with pytest.raises(ValueError, match=r"variances\[0\]: .*\(4,\) expected"):
        accumulate_moments([activation], weight, Moments(good.samples, good.means, [torch.ones(3)]))
