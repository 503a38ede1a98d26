from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from kernels_tolerances import DTYPES, TOLERANCES
from torch import Tensor
from vast import vast

from diffdfkd.kernels.predict import Prediction, predict, predict_launch, step_tiling
from diffdfkd.kernels.row import COLUMNS, start_counter

KERNELS = ("reference", "triton")
SHAPES = [(1, 4, 8, 8), (3, 4, 5, 7), (2, 1, 1, 63), (1, 1, 1, 1), (2, 3, 1, 127), (2, 4, 33, 32), (1, 127, 3, 3)]
# The second row is the one that is meant; the others would show.
ROWS = torch.full((3, len(COLUMNS)), torch.nan)
ROWS[1] = torch.tensor([{"x0_z": 1.5, "x0_m": -0.8, "eps_z": 0.3, "eps_m": 0.9}.get(name, 0.0) for name in COLUMNS])

Form = Literal["reference", "triton"]


def called(z: Tensor, output: Tensor, scale: Tensor | float, kernel: Form) -> Prediction:
    return predict(z, output, ROWS, start_counter("cpu", 1), scale, kernel=kernel)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_guided_prediction(kernel: Form, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z, output = torch.randn(shape), torch.randn(2 * shape[0], *shape[1:]).to(dtype)
    scale = 1 + torch.rand(shape[0])
    result = called(z, output, scale, kernel)
    # What is read is exact, and all that follows is float32.
    tolerance = TOLERANCES[torch.float32]
    for b in range(shape[0]):
        unconditional, conditional = output[b].double(), output[shape[0] + b].double()
        m = unconditional + scale[b] * (conditional - unconditional)
        x0 = 1.5 * z[b].double() - 0.8 * m
        torch.testing.assert_close(result.x0[b].double(), x0, **tolerance)
        torch.testing.assert_close(result.eps_hat[b].double(), 0.3 * z[b].double() + 0.9 * m, **tolerance)
        torch.testing.assert_close(result.guidance_norm[b].double(), (conditional - unconditional).norm(), **tolerance)
        torch.testing.assert_close(result.x0_norm[b].double(), x0.norm(), **tolerance)
    assert {tensor.dtype for tensor in result} == {torch.float32}


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_number_serves_all_samples(kernel: Form) -> None:
    z, output = torch.randn(3, 4, 2, 2), torch.randn(6, 4, 2, 2)
    for one, other in zip(
        called(z, output, 2.5, kernel), called(z, output, torch.full((3,), 2.5), kernel), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernel", KERNELS)
def test_without_classifier_free_guidance(kernel: Form) -> None:
    z, output = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    result = called(z, output, 1.0, kernel)
    torch.testing.assert_close(result.x0, 1.5 * z - 0.8 * output)
    assert torch.equal(result.guidance_norm, torch.zeros(3))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("z_last", "output_last"), [(True, True), (True, False), (False, True)])
def test_memory_formats_are_the_same_and_that_of_z_is_kept(kernel: Form, z_last: bool, output_last: bool) -> None:
    z, output = torch.randn(3, 4, 5, 6), torch.randn(6, 4, 5, 6)
    formats = {False: torch.contiguous_format, True: torch.channels_last}
    expected = called(z, output, 2.0, "reference")
    result = called(
        z.contiguous(memory_format=formats[z_last]), output.contiguous(memory_format=formats[output_last]), 2.0, kernel
    )
    torch.testing.assert_close(result.x0, expected.x0)
    torch.testing.assert_close(result.eps_hat, expected.eps_hat)
    torch.testing.assert_close(result.x0_norm, expected.x0_norm)
    torch.testing.assert_close(result.guidance_norm, expected.guidance_norm)
    assert result.x0.stride() == result.eps_hat.stride() == z.contiguous(memory_format=formats[z_last]).stride()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("where", [1, 4])
def test_a_sample_that_is_not_finite_shows_in_its_norm_alone(kernel: Form, where: int) -> None:
    z, output = torch.randn(3, 4, 20, 20), torch.randn(6, 4, 20, 20)
    output[where, 3, 19, 19] = torch.nan
    result = called(z, output, 1.0, kernel)
    assert torch.isfinite(result.x0_norm).tolist() == [True, False, True]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_step_is_noted_for_advance_and_not_moved(kernel: Form) -> None:
    step = torch.tensor([1, 7], dtype=torch.int32)
    predict(torch.randn(2, 1, 3, 3), torch.randn(4, 1, 3, 3), ROWS, step, 2.0, kernel=kernel)
    assert step.tolist() == [1, 1]


def test_sums_of_a_sample_do_not_depend_on_its_batch() -> None:
    """Bit by bit: the order of summation is a function of the sample's size."""
    z, output = torch.randn(3, 4, 40, 40), torch.randn(3, 4, 40, 40)
    together = called(z, output, 1.0, "triton")
    for b in range(3):
        alone = called(z[b : b + 1], output[b : b + 1], 1.0, "triton")
        assert torch.equal(alone.x0_norm[0], together.x0_norm[b])
    assert together.squares.shape == (2, 3, -(-4 * 40 * 40 // step_tiling(4 * 40 * 40)[0]))


def test_offsets_have_64_bits() -> None:
    """Sample 2 of 2^30 elements begins at element 2^31, and its second half at 5 * 2^30."""
    shape = (3, 1, 1, 2**30)
    z, x0, eps_hat = (vast(shape) for _ in range(3))
    output = vast((6, *shape[1:]), torch.float16)
    z[2, 0, 0, :32], output[2, 0, 0, :32], output[5, 0, 0, :32] = 1.0, 2.0, 3.0
    launch, _ = predict_launch(z, output, ROWS, start_counter("cpu", 1), torch.full((3,), 2.0))
    squares = torch.zeros(2, 3, launch.arguments["tiles"])
    written = {"x0_out": x0, "eps_out": eps_hat, "squares": squares}
    # Of each sample the first tile alone: the others are never touched.
    replace(launch, grid=(3, 1), arguments={**launch.arguments, **written}).run()
    torch.testing.assert_close(x0[2, 0, 0, :32], torch.full((32,), 1.5 * 1 - 0.8 * 4))
    torch.testing.assert_close(eps_hat[2, 0, 0, :32], torch.full((32,), 0.3 * 1 + 0.9 * 4))
    torch.testing.assert_close(squares[:, 2, 0], torch.tensor([32 * 1.0, 32 * 1.7**2]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_graph_is_built(kernel: Form) -> None:
    z, output = torch.randn(2, 1, 3, 3).requires_grad_(), torch.randn(4, 1, 3, 3).requires_grad_()
    assert not any(tensor.requires_grad for tensor in called(z, output, 2.0, kernel))


@pytest.mark.parametrize("count", [-3, 3, 9])
def test_a_counter_outside_the_table_stays_inside_the_memory(count: int) -> None:
    z, output, rows = torch.randn(2, 1, 3, 3), torch.randn(4, 1, 3, 3), torch.rand(3, len(COLUMNS))
    step = torch.tensor([count, 0], dtype=torch.int32)
    inside = start_counter("cpu", min(max(count, 0), 2))
    made, expected = (predict(z, output, rows, at, 2.0, kernel="triton") for at in (step, inside))
    assert torch.equal(made.x0, expected.x0) and step.tolist() == [count, int(inside[0])]


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "three halves": ("model_output: got", {"model_output": torch.randn(4, 4, 2, 2)}),
    "another width": ("model_output: got", {"model_output": torch.randn(6, 4, 2, 3)}),
    "scale without a half": ("scale: got 2.0", {"model_output": torch.randn(3, 4, 2, 2)}),
    "scale of another batch": ("scale: got", {"scale": torch.ones(6)}),
    "scale in double": ("scale: got torch.float64", {"scale": torch.ones(3, dtype=torch.float64)}),
    "no scale": ("scale: got None", {"scale": None}),
    "scale as text": ("scale: got '2'", {"scale": "2"}),
    "output of integers": ("model_output: got torch.int64", {"model_output": torch.ones(6, 4, 2, 2).long()}),
    "complex output": ("model_output: got torch.complex64", {"model_output": torch.ones(6, 4, 2, 2) * 1j}),
    "no sample": ("at least one sample", {"z": torch.randn(0, 4, 2, 2), "model_output": torch.randn(0, 4, 2, 2)}),
    "no table": ("rows: got", {"rows": torch.ones(3)}),
    "empty table": ("rows: got", {"rows": torch.ones(0, len(COLUMNS))}),
    "table in double": ("rows: got", {"rows": ROWS.double()}),
    "step of another type": ("step: got", {"step": torch.zeros(2, dtype=torch.int64)}),
    "step alone": ("step: got", {"step": torch.zeros(1, dtype=torch.int32)}),
    "latents in half": ("z: got torch.float16", {"z": torch.randn(3, 4, 2, 2).half()}),
    "flat latents": ("z: got", {"z": torch.randn(3, 16)}),
    "empty latents": ("z: got", {"z": torch.randn(3, 4, 0, 2)}),
    "another device": ("devices: z cpu, model_output meta", {"model_output": torch.randn(6, 4, 2, 2, device="meta")}),
    "another kernel": ("kernel: got 'fast'", {"kernel": "fast"}),
}
BAD_FOR_TRITON: dict[str, tuple[str, dict[str, Any]]] = {
    "output in double": (
        "model_output: torch.float64; the Triton kernel reads",
        {"model_output": torch.randn(6, 4, 2, 2).double()},
    ),
    "strides of z": ("z: strides", {"z": torch.randn(3, 4, 2, 4)[..., ::2]}),
    "strides of the output": ("model_output: strides", {"model_output": torch.randn(6, 4, 2, 4)[..., ::2]}),
    "expanded output": ("model_output: strides", {"model_output": torch.randn(1, 4, 2, 2).expand(6, 4, 2, 2)}),
}


@pytest.mark.parametrize(
    ("case", "kernel"),
    [(case, kernel) for case in [*BAD, *BAD_FOR_TRITON] for kernel in KERNELS[case in BAD_FOR_TRITON :]],
)
def test_bad_arguments_are_refused_before_anything_is_written(case: str, kernel: Form) -> None:
    words, options = {**BAD, **BAD_FOR_TRITON}[case]
    step = start_counter("cpu")
    given = {"z": torch.randn(3, 4, 2, 2), "model_output": torch.randn(6, 4, 2, 2), "rows": ROWS, "step": step}
    with pytest.raises(ValueError, match=words):
        predict(**{**given, "scale": 2.0, "kernel": kernel, **options})
    assert step.tolist() == [0, 0]
