import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdfkd.kernels.advance import advance, step_size
from diffdfkd.kernels.row import COLUMNS

VALUES = {"z": 0.2, "x0": 0.7, "eps": 0.4, "previous": -0.3, "noise": 0.5, "x0_m": -1.6, "eps_m": 0.9}
ROW = torch.tensor([VALUES.get(name, 0.0) for name in COLUMNS])
SHAPES = [(1, 4, 8, 8), (3, 4, 5, 7), (4, 1, 1, 63)]


def latents(shape: tuple[int, ...], n: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for _ in range(n)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_is_applied(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z, eps_hat, x0, previous, gradient, noise = latents(shape, 6)
    size = torch.rand(shape[0])
    buffer = torch.full((2 * shape[0], *shape[1:]), torch.nan, dtype=dtype)
    result = advance(
        z,
        eps_hat,
        x0,
        previous,
        ROW,
        gradient=gradient,
        step_size=size,
        noise=noise,
        out_input=buffer,
        next_input_scale=0.6,
    )
    guided = x0 - size[:, None, None, None] * gradient
    expected = 0.2 * z + 0.7 * guided + 0.4 * eps_hat - 0.3 * previous + 0.5 * noise
    torch.testing.assert_close(result.x0, guided)
    torch.testing.assert_close(result.z, expected)
    torch.testing.assert_close(buffer, (0.6 * expected).repeat(2, 1, 1, 1).to(dtype))


def test_input_that_is_not_doubled() -> None:
    z, eps_hat, x0 = latents((3, 4, 2, 2), 3)
    buffer = torch.empty(3, 4, 2, 2)
    result = advance(z, eps_hat, x0, None, ROW, out_input=buffer, next_input_scale=torch.tensor(2.0))
    torch.testing.assert_close(buffer, 2 * result.z)


def test_frozen_samples_keep_z_and_poison_nobody() -> None:
    z, eps_hat, x0, gradient = latents((3, 4, 4, 4), 4)
    expected = advance(z, eps_hat, x0, None, ROW, gradient=gradient, step_size=torch.ones(3))
    for tensor in (eps_hat, x0, gradient):
        tensor[1] = torch.nan
    alive = torch.tensor([True, False, True])
    partners = torch.tensor([1, 0, 1])
    boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 4, 4]], dtype=torch.int32)
    buffer = torch.full((6, 4, 4, 4), torch.nan)
    result = advance(
        z,
        eps_hat,
        x0,
        None,
        ROW,
        gradient=gradient,
        step_size=torch.ones(3),
        alive=alive,
        partners=partners,
        boxes=boxes,
        out_input=buffer,
    )
    assert torch.equal(result.z[1], z[1])
    assert torch.equal(result.z[alive], expected.z[alive])
    assert torch.isfinite(buffer).all()


def test_step_size_zero_ignores_the_gradient() -> None:
    z, eps_hat, x0 = latents((2, 4, 2, 2), 3)
    gradient = torch.full_like(z, torch.nan)
    result = advance(z, eps_hat, x0, None, ROW, gradient=gradient, step_size=torch.zeros(2))
    assert torch.equal(result.z, advance(z, eps_hat, x0, None, ROW).z)


def test_cutmix_copies_the_partners_unmixed_result() -> None:
    """A ring 0 <- 1 <- 2 <- 0: each box holds what its partner would have been without CutMix."""
    z, eps_hat, x0, noise = latents((3, 2, 4, 5), 4)
    plain = advance(z, eps_hat, x0, None, ROW, noise=noise)
    partners = torch.tensor([1, 2, 0])
    boxes = torch.tensor([[0, 0, 4, 5], [1, 1, 3, 4], [0, 0, 0, 0]], dtype=torch.int32)
    buffer = torch.empty(6, 2, 4, 5)
    mixed = advance(z, eps_hat, x0, None, ROW, noise=noise, partners=partners, boxes=boxes, out_input=buffer)
    for before, after in ((plain.z, mixed.z), (plain.x0, mixed.x0)):
        assert torch.equal(after[0], before[1])
        expected = before[1].clone()
        expected[:, 1:3, 1:4] = before[2][:, 1:3, 1:4]
        assert torch.equal(after[1], expected)
        assert torch.equal(after[2], before[2])
    assert torch.equal(buffer, mixed.z.repeat(2, 1, 1, 1))


def test_rules_of_the_step_size() -> None:
    gradient_norm, x0_norm, guidance_norm = torch.tensor([[2.0, 4.0], [3.0, 5.0], [0.5, 1.0]])
    scale = torch.tensor([2.0, 7.0])
    arguments = (gradient_norm, x0_norm, guidance_norm)
    torch.testing.assert_close(step_size("raw", 0.1, *arguments, scale, ROW), torch.tensor([0.1, 0.1]))
    torch.testing.assert_close(step_size("unit", 0.1, *arguments, scale, ROW), torch.tensor([0.15, 0.125]))
    torch.testing.assert_close(
        step_size("cfg", 0.1, *arguments, scale, ROW), torch.tensor([0.1 * 2 * 1.6 * 0.25, 0.1 * 7 * 1.6 * 0.25])
    )
    torch.testing.assert_close(
        step_size("cfg", 0.1, *arguments, 2.0, ROW, of="z"), torch.tensor([0.1 * 2 * 0.9 * 0.25] * 2)
    )


@pytest.mark.parametrize("rule", ["raw", "unit", "cfg"])
def test_no_step_without_a_usable_gradient(rule: str) -> None:
    gradient_norm = torch.tensor([0.0, math.nan, math.inf, 1.0])
    ones = torch.ones(4)
    size = step_size(rule, 0.1, gradient_norm, ones, ones, 2.0, ROW)  # type: ignore[arg-type]
    assert size[:3].tolist() == [0, 0, 0] and size[3] > 0


def test_bad_arguments() -> None:
    z, eps_hat, x0 = latents((3, 4, 2, 2), 3)
    boxes, partners = torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    for words, options in {
        "eps_hat": {"eps_hat": torch.ones(2, 4, 2, 2)},
        "noise": {"noise": torch.ones(3, 4, 2, 1)},
        "alive": {"alive": torch.ones(2, dtype=torch.bool)},
        "give both or neither": {"gradient": z},
        "partners and boxes": {"partners": partners},
        "boxes: got": {"partners": partners, "boxes": boxes[:2]},
        "out_input": {"out_input": torch.ones(4, 4, 2, 2)},
        "row": {"row": torch.ones(2)},
    }.items():
        given: dict[str, Any] = {"z": z, "eps_hat": eps_hat, "x0": x0, "previous_x0": None, "row": ROW, **options}
        with pytest.raises(ValueError, match=words):
            advance(**given)
