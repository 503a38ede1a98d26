"""Kept features of a prior's UNet: the shallow call with fresh ones is the whole call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_stages import open_prior
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.feature_reuse import ReusingUNet
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.stages import unet_stage


def inputs(prior: Prior, rows: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, *prior.latent_shape, generator=generator)
    context = prior.embed(["a", "b", "c", "d"][:rows])
    return sample, torch.linspace(900, 100, rows), context


@pytest.mark.parametrize(
    ("unet", "dtype"),
    [
        ({}, torch.float32),
        ({"layers_per_block": 2}, torch.float32),
        (
            {
                "block_out_channels": (16, 32, 32),
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            },
            torch.float32,
        ),
        ({"center_input_sample": True, "time_cond_proj_dim": 8}, torch.float32),
        ({}, torch.bfloat16),
    ],
)
def test_shallow_with_fresh_features_is_whole(
    prior_builder: Callable[..., Path], tmp_path: Path, unet: dict[str, Any], dtype: torch.dtype
) -> None:
    prior = open_prior(prior_builder(tmp_path / "prior", unet=unet))
    reusing = ReusingUNet(prior, dtype, 2.0)
    given = inputs(prior)
    with torch.no_grad():
        whole = reusing(*given)
        assert torch.equal(whole, unet_stage(prior, dtype, 2.0)(*given))
        assert torch.equal(reusing.shallow(*given), whole)
        # Half of the rows: the prompt's half.
        half = [value[2:] for value in given]
        torch.testing.assert_close(
            reusing.shallow(*half), whole[2:], atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0
        )


def test_features_are_those_of_the_last_whole_call(tiny_prior: Path) -> None:
    prior = open_prior(tiny_prior)
    reusing = ReusingUNet(prior)
    first, second = inputs(prior), inputs(prior, seed=1)
    with torch.no_grad():
        expected = reusing(*second)
        reusing(*first)
        stale = reusing.shallow(*second)
        # Elsewhere than fresh ones lead to, though not far.
        assert not torch.equal(stale, expected)
        reusing(*second)
        assert torch.equal(reusing.shallow(*second), expected)
    assert not any(module._forward_pre_hooks for module in prior.unet.modules())


def test_features_of_other_rows_are_an_error(tiny_prior: Path) -> None:
    prior = open_prior(tiny_prior)
    reusing = ReusingUNet(prior)
    with pytest.raises(ValueError, match="no features"):
        reusing.shallow(*inputs(prior))
    with torch.no_grad():
        reusing(*inputs(prior, rows=1))
    with pytest.raises(ValueError, match="no features"):
        reusing.shallow(*inputs(prior, rows=4))


def test_unet_of_one_level_is_refused(prior_builder: Callable[..., Path], tmp_path: Path) -> None:
    flat = {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    prior = open_prior(prior_builder(tmp_path / "prior", unet=flat))
    with pytest.raises(UserError, match=r"synthesis\.reuse_every: .* one level"):
        ReusingUNet(prior)
