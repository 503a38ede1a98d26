from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

from diffdfkd.engine.backends.unet_attention import refuse_attention, settle_attention, use_attention
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.recipe import PriorRecipe


@pytest.fixture
def unet(tiny_prior: Path) -> Any:
    return load_prior(PriorRecipe(path=str(tiny_prior)), "cpu").unet


def kinds(unet: Any) -> set[type]:
    return {type(processor) for processor in unet.attn_processors.values()}


def test_torchs_own_attention_is_the_one_that_a_unet_is_loaded_with(unet: Any) -> None:
    before = kinds(unet)
    assert before == {AttnProcessor2_0}
    for attention in ("auto", "sdpa"):
        use_attention(unet, attention)
        assert kinds(unet) == before
    unet.set_attn_processor(XFormersAttnProcessor())
    use_attention(unet, "sdpa")
    assert kinds(unet) == before


def test_without_a_gpu_xformers_is_refused_and_never_tried(unet: Any) -> None:
    def call() -> None:
        raise AssertionError("nothing is to be run")

    assert settle_attention("auto", "eager", unet, call) == settle_attention("sdpa", "eager", unet, call) == "sdpa"
    with pytest.raises(UserError, match=r"engine\.attention: xformers cannot be had: it needs a CUDA device.*=sdpa"):
        settle_attention("xformers", "eager", unet, call)
    with pytest.raises(UserError, match=r"engine\.unet=compiled has an attention of its own"):
        settle_attention("xformers", "compiled", unet, call)
    refuse_attention("auto", "eager", unet)
    for engine in ("auto", "eager"):  # before an engine is looked for
        with pytest.raises(UserError, match=r"engine\.attention: xformers cannot be had: it needs a CUDA device"):
            refuse_attention("xformers", engine, unet)
    assert not torch.cuda.is_available() or kinds(unet) == {AttnProcessor2_0}
