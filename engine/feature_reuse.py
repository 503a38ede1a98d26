"""Deep features of the UNet kept across steps: in between only its outermost blocks run (DeepCache, arXiv 2312.00858).

What enters the last up block changes slowly along a trajectory. A whole call keeps it; a shallow one computes the time
embedding, the first down block and the last up block with what was kept. With features of the same inputs it equals
the whole call.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.stages import UNet, arithmetic, dense, guidance_embedding, unet_stage
from diffdfkd.kernels.launch import at_least_float32


@runtime_checkable
class Reusing(Protocol):
    """A UNet that keeps its deep features."""

    def shallow(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The prediction with the features of the last whole call."""
        ...

    def __call__(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor: ...


def shallow_form(unet: UNet) -> UNet:
    """The shallow call of a UNet that has one; ValueError for others."""
    if not isinstance(unet, Reusing):
        raise ValueError("reuse_every: this UNet keeps no features; give a ReusingUNet")
    return unet.shallow


class ReusingUNet:
    """`unet_stage` of a prior in diffusers' format, eager, that keeps what enters its last up block."""

    def __init__(self, prior: Prior, dtype: torch.dtype = torch.float32, guidance_scale: float = 1.0) -> None:
        """Raises UserError for a UNet of one level, which has nothing deep to reuse."""
        unet: Any = prior.unet
        if len(unet.up_blocks) < 2:
            raise UserError("synthesis.reuse_every: this prior's UNet has one level, so nothing deep to reuse; give 1")
        self._unet, self._dtype = unet, dtype
        self._whole = unet_stage(prior, dtype, guidance_scale)
        self._told = None
        if prior.guidance_width is not None:
            device = next(prior.unet.parameters()).device
            self._told = guidance_embedding(guidance_scale, prior.guidance_width).to(device)
        self._features: Tensor | None = None

    def __call__(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        handle = self._unet.up_blocks[-1].register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            return self._whole(sample, timestep, context)
        finally:
            handle.remove()

    def _keep(self, block: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._features = named["hidden_states"] if "hidden_states" in named else given[0]

    def shallow(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The prediction with the features of the last whole call.

        On half of that call's rows it is the half with the prompt. ValueError where no features fit.
        """
        features = self._features
        if features is None or len(features) not in (len(sample), 2 * len(sample)):
            raise ValueError("no features of a whole call for these rows; call the UNet itself first")
        unet = self._unet
        sample = sample.contiguous(memory_format=torch.channels_last)
        with arithmetic(sample.device, self._dtype):
            if unet.config.center_input_sample:
                sample = 2 * sample - 1
            condition = None if self._told is None else self._told.expand(len(sample), -1)
            time = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), condition)
            if unet.time_embed_act is not None:
                time = unet.time_embed_act(time)
            first, last = unet.down_blocks[0], unet.up_blocks[-1]
            entered = unet.conv_in(sample)
            _, residuals = first(hidden_states=entered, temb=time, **_prompt(first, context))
            # What was made smaller belongs to the deeper levels.
            residuals = (entered, *residuals)[: len(last.resnets)]
            output = last(
                hidden_states=features[-len(sample) :],
                temb=time,
                res_hidden_states_tuple=residuals,
                **_prompt(last, context),
            )
            if unet.conv_norm_out is not None:
                output = unet.conv_act(unet.conv_norm_out(output))
            output = unet.conv_out(output)
        return dense(at_least_float32(output))


def _prompt(block: Any, context: Tensor) -> dict[str, Tensor]:
    """What a block with cross-attention is given beside the image."""
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
