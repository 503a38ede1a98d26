from typing import Any, Literal

import pytest
import torch
from kernels_tolerances import DTYPES, TOLERANCES
from torch import Tensor

from diffdfkd.kernels.move import Move, move
from diffdfkd.kernels.predict import Prediction, sum_of_squares
from diffdfkd.kernels.row import COLUMNS, start_counter
from diffdfkd.kernels.step_inputs import Guidance

KERNELS = ("reference", "triton")
Form = Literal["reference", "triton"]
SHAPES = [(1, 4, 8, 8), (3, 4, 5, 7), (2, 1, 1, 63), (2, 4, 33, 40)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
VALUES = {"input_scale": 0.8, "x0_z": 1.3, "x0_m": -0.7, "eps_m": 0.9, "alpha": 0.4}
ROWS = torch.full((2, len(COLUMNS)), torch.nan)
ROWS[1] = torch.tensor([VALUES.get(name, 0.0) for name in COLUMNS])


def tensors(shape: tuple[int, ...], format: str = "contiguous") -> list[Tensor]:
    """z, x0, eps_hat, dL/dx0 and the gradient by both halves of the UNet's input."""
    torch.manual_seed(0)
    whole = [torch.randn(shape) for _ in range(4)] + [torch.randn(2 * shape[0], *shape[1:])]
    return [tensor.contiguous(memory_format=FORMATS[format]) for tensor in whole]


def moved(
    given: list[Tensor],
    kernel: Form,
    rule: Any = "unit",
    *,
    inputs: Tensor | None = None,
    rows: Tensor = ROWS,
    alive: Tensor | None = None,
    finite: Tensor | None = None,
) -> Move:
    z, x0, eps_hat, by_x0, by_inputs = given
    batch = len(z)
    norms = torch.linspace(0.5, 1.5, batch)
    prediction = Prediction(x0, eps_hat, torch.stack([norms.square()[:, None], sum_of_squares(x0)]))
    yes = torch.ones(batch, dtype=torch.bool)
    guidance = Guidance(
        by_x0, torch.ones(batch), yes if finite is None else finite, torch.linspace(2, 3, batch), rule, 0.2
    )
    alive = yes if alive is None else alive
    return move(z, prediction, rows, start_counter("cpu", 1), alive, guidance, by_inputs, inputs=inputs, kernel=kernel)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rule", ["raw", "unit", "cfg"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("doubled", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_z_moves_against_the_whole_gradient(kernel: Form, doubled: bool, shape: tuple[int, ...], rule: str) -> None:
    given = tensors(shape)
    if not doubled:
        given[4] = given[4][: shape[0]]
    z, x0, _, by_x0, by_inputs = (tensor.double() for tensor in given)
    inputs = torch.full_like(given[4], torch.nan)
    exact, reuse = moved(given, kernel, rule, inputs=inputs), moved(given, kernel, rule)
    w = torch.linspace(2, 3, shape[0])[:, None, None, None]
    through = (1 - w) * by_inputs[: shape[0]] + w * by_inputs[shape[0] :] if doubled else by_inputs
    gradient = 1.3 / 0.8 * by_x0 - 0.7 * through
    for b in range(shape[0]):
        size = {
            "raw": 0.2,
            "unit": 0.2 * (0.8 * z[b]).norm() / gradient[b].norm(),
            "cfg": 0.2
            * torch.linspace(2, 3, shape[0])[b]
            * 0.9
            * torch.linspace(0.5, 1.5, shape[0])[b]
            / gradient[b].norm(),
        }[rule]
        step = size * gradient[b]  # of the UNet's input
        tolerance = TOLERANCES[torch.float32]
        for made in (exact, reuse):
            torch.testing.assert_close(made.z[b].double(), z[b] - step / 0.8, **tolerance)
        for half in range(len(inputs) // shape[0]):
            torch.testing.assert_close(inputs[half * shape[0] + b].double(), 0.8 * z[b] - step, **tolerance)
        clean = x0[b] - step / 0.4
        torch.testing.assert_close(reuse.prediction.x0[b].double(), clean, **tolerance)
        torch.testing.assert_close(reuse.prediction.x0_norm[b].double(), clean.norm(), **tolerance)
        torch.testing.assert_close(reuse.prediction.guidance_norm[b], torch.linspace(0.5, 1.5, shape[0])[b])
    assert torch.equal(reuse.prediction.eps_hat, given[2])
    assert exact.alive.all() and reuse.alive.all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("z_format", "other"), [("contiguous", "channels_last"), ("channels_last", "contiguous")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_formats_and_dtypes(kernel: Form, z_format: str, other: str, dtype: torch.dtype) -> None:
    shape = (3, 4, 5, 6)
    given = [*tensors(shape, z_format)[:3], *(tensor.to(dtype) for tensor in tensors(shape, other)[3:])]
    inputs = torch.full((6, 4, 5, 6), torch.nan, dtype=dtype).contiguous(memory_format=FORMATS[other])
    plain = torch.full((6, 4, 5, 6), torch.nan)
    made, expected = (
        moved(given, kernel, inputs=inputs),
        moved([tensor.contiguous().float() for tensor in given], "reference", inputs=plain),
    )
    torch.testing.assert_close(made.z, expected.z, **TOLERANCES[torch.float32])
    torch.testing.assert_close(inputs.float(), plain, **TOLERANCES[dtype])
    assert made.z.stride() == given[0].stride()


@pytest.mark.parametrize("mode", ["exact", "reuse"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_without_a_finite_gradient_stays_where_it_is(kernel: Form, mode: str) -> None:
    """Sample 0 was not alive, 1 has no finite image, 2 no finite gradient through the UNet; 3 has a gradient of 0."""
    given = tensors((5, 4, 3, 3))
    sound = moved(given, kernel)
    given[4][2] = torch.nan
    given[3][3] = given[4][3] = given[4][8] = 0
    inputs = torch.full_like(given[4], torch.nan) if mode == "exact" else None
    alive, finite = torch.arange(5) != 0, torch.arange(5) != 1
    made = moved(given, kernel, inputs=inputs, alive=alive, finite=finite)
    assert torch.equal(made.z[:4], given[0][:4]) and torch.equal(made.z[4], sound.z[4])
    assert made.alive.tolist() == [False, False, False, True, True]
    if inputs is not None:
        torch.testing.assert_close(inputs, 0.8 * made.z.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_graph_is_built(kernel: Form) -> None:
    given = [tensor.requires_grad_() for tensor in tensors((2, 4, 3, 3))]
    made = moved(given, kernel)
    assert not made.z.requires_grad and not made.prediction.x0.requires_grad


@pytest.mark.parametrize("kernel", KERNELS)
def test_pure_noise_says_nothing_of_x0(kernel: Form) -> None:
    rows = ROWS.clone()
    rows[1, COLUMNS.index("alpha")] = 0
    given = tensors((2, 4, 3, 3))
    made = moved(given, kernel, rows=rows)
    torch.testing.assert_close(made.prediction.x0, given[1])
    assert not torch.equal(made.z, given[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_overlapping_buffers_and_numbers_are_refused(kernel: Form) -> None:
    whole = torch.randn(7, 4, 2, 2)
    z, x0, eps_hat, by_x0, by_inputs = tensors((3, 4, 2, 2))
    with pytest.raises(ValueError, match=r"inputs: it shares memory with by_inputs"):
        moved([z, x0, eps_hat, by_x0, whole[1:]], kernel, inputs=whole[:6])
    with pytest.raises(ValueError, match=r"inputs: it shares memory with z"):
        moved([whole[:3], x0, eps_hat, by_x0, by_inputs], kernel, inputs=whole[1:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_bad_arguments_are_refused(kernel: Form) -> None:
    z, x0, eps_hat, by_x0, by_inputs = tensors((3, 4, 2, 2))
    for words, given, inputs in (
        ("by_inputs: got shape", [z, x0, eps_hat, by_x0, by_inputs[:5]], None),
        ("inputs: got shape", [z, x0, eps_hat, by_x0, by_inputs], torch.ones(3, 4, 2, 2)),
        ("guidance.gradient: got shape", [z, x0, eps_hat, by_x0[:2], by_inputs], None),
        ("prediction.eps_hat: got shape", [z, x0, eps_hat[:2], by_x0, by_inputs], None),
        ("z: got torch.float16", [z.half(), x0, eps_hat, by_x0, by_inputs], None),
    ):
        with pytest.raises(ValueError, match=words):
            moved(given, kernel, inputs=inputs)
    with pytest.raises(ValueError, match=r"guidance\.rule"):
        moved([z, x0, eps_hat, by_x0, by_inputs], kernel, "best")
    if kernel == "triton":
        with pytest.raises(ValueError, match=r"by_inputs: torch\.float64"):
            moved([z, x0, eps_hat, by_x0, by_inputs.double()], kernel)
