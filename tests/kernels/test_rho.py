import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from diffdfkd.kernels.rho import RULES, Rule, step_size, step_size_reference
from diffdfkd.kernels.row import COLUMNS, named

ROW = named(torch.tensor([{"x0_m": -1.6, "eps_m": 0.9}.get(name, 0.0) for name in COLUMNS]))


def test_rules_of_the_step_size() -> None:
    gradient_norm, x0_norm, guidance_norm = torch.tensor([[2.0, 4.0], [3.0, 5.0], [0.5, 1.0]])
    scale = torch.tensor([2.0, 7.0])
    arguments = (gradient_norm, x0_norm, guidance_norm, scale, ROW)
    torch.testing.assert_close(step_size_reference("raw", 0.1, *arguments), torch.tensor([0.1, 0.1]))
    torch.testing.assert_close(step_size_reference("unit", 0.1, *arguments), torch.tensor([0.15, 0.125]))
    torch.testing.assert_close(
        step_size_reference("cfg", 0.1, *arguments), torch.tensor([0.1 * 2 * 1.6 * 0.25, 0.1 * 7 * 1.6 * 0.25])
    )
    torch.testing.assert_close(
        step_size_reference("cfg", 0.1, *arguments, of="z"),
        torch.tensor([0.1 * 2 * 0.9 * 0.25, 0.1 * 7 * 0.9 * 0.25]),
    )


@pytest.mark.parametrize("rule", ["raw", "unit", "cfg"])
def test_no_step_without_a_usable_gradient(rule: Any) -> None:
    gradient_norm = torch.tensor([0.0, math.nan, math.inf, 1.0])
    ones = torch.ones(4)
    size = step_size_reference(rule, 0.1, gradient_norm, ones, ones, ones, ROW)
    assert size[:3].tolist() == [0, 0, 0] and size[3] > 0


@triton.jit
def _kernel(gradient_norm, x0_norm, guidance_norm, scale, out, factor, rho, RULE: tl.constexpr):
    sample = tl.program_id(0)
    size = step_size(
        tl.load(gradient_norm + sample),
        tl.load(x0_norm + sample),
        tl.load(guidance_norm + sample),
        tl.load(scale + sample),
        factor,
        rho,
        RULE,
    )
    tl.store(out + sample, size)


@pytest.mark.filterwarnings("ignore:(divide|invalid|overflow):RuntimeWarning")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("of", ["x0", "z"])
def test_the_kernel_takes_the_same_steps(rule: Rule, of: Any) -> None:
    norms = [0.0, math.nan, math.inf, -0.0, 1e-45, 1e-30, 3.0, 1e30]
    gradient_norm, x0_norm, guidance_norm = (
        grid.flatten() for grid in torch.meshgrid(*[torch.tensor(norms)] * 3, indexing="ij")
    )
    scale = torch.linspace(1, 7, len(x0_norm))
    out = torch.full_like(scale, torch.nan)
    factor = float(ROW.x0_m if of == "x0" else ROW.eps_m)
    _kernel[(len(out),)](gradient_norm, x0_norm, guidance_norm, scale, out, factor, 0.1, RULES.index(rule))
    expected = step_size_reference(rule, 0.1, gradient_norm, x0_norm, guidance_norm, scale, ROW, of=of)
    torch.testing.assert_close(out, expected)
    assert 0 < int((out != 0).sum()) < len(out)
