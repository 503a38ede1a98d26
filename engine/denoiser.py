"""A round's stages on their engines, and the trajectory through them: recorded steps or the plain loop."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from diffdfkd.engine.backends.serve import (
    EngineChain,
    EngineUNet,
    EngineVjp,
    Subject,
    backend_of,
    open_engine,
    run_settings,
    serves_itself,
    stages_of,
)
from diffdfkd.engine.backends.unet_attention import use_attention
from diffdfkd.engine.captured import CapturedSampler
from diffdfkd.engine.cheap_steps import prompt_alone_steps
from diffdfkd.engine.cutmix import CutMixPlan
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.feature_reuse import ReusingUNet
from diffdfkd.engine.loop import Alone
from diffdfkd.engine.micro_batches import micro_batched_chain, unet_in_parts
from diffdfkd.engine.runner import Runner
from diffdfkd.engine.sampler import Trajectory, sample
from diffdfkd.engine.schedule import make_table
from diffdfkd.engine.stages import Chain, UNet, guidance_chain, light_decode_stage, unet_stage
from diffdfkd.engine.taps import BatchNormTaps, guidance_taps


class Denoiser:
    """What turns noise into finished latents in one round; a context manager.

    Raises UserError, naming the field, for an engine that cannot be had.
    """

    def __init__(self, subject: Subject, decode: Callable[[Tensor], Tensor]) -> None:
        """``decode`` is the decoder that guidance goes through where no engine runs the chain."""
        self.recipe = recipe = subject.recipe
        self.prior, self.device = subject.prior, subject.context.device
        synthesis, guidance = recipe.synthesis, recipe.guidance
        self.table = make_table(synthesis.sampler, self.prior.scheduler_config, synthesis.steps, self.device)
        # A UNet that is told the scale runs once, on the prompt alone.
        self.scale = 1.0 if self.prior.guidance_width is not None else synthesis.guidance_scale
        if self.scale != synthesis.guidance_scale and guidance.mode != "none" and guidance.rho_rule == "cfg":
            raise UserError(
                "guidance.rho_rule: cfg needs an unconditional half, but this prior's UNet takes the guidance scale as "
                "an input; take unit or raw"
            )
        self._settings = run_settings(recipe)
        self._runners: list[Runner] = []
        self._taps: BatchNormTaps | None = None
        self._recorded: CapturedSampler | None = None
        self.vjp: EngineVjp | None = None
        self.chain: Chain | None = None
        self.light: Chain | None = None
        """Through the light decoder."""
        self.alone: Alone | None = None
        use_attention(self.prior.unet, recipe.engine.attention)
        form = ReusingUNet if synthesis.reuse_every > 1 else unet_stage
        self.unet: UNet = form(self.prior, getattr(torch, recipe.prior.dtype), synthesis.guidance_scale)
        stages = stages_of(recipe)
        alone = self._without_guidance()
        try:
            if not serves_itself(recipe, recipe.engine.unet):
                self.unet = EngineUNet(self._open(subject, "unet"))
                if "vjp" in stages:
                    self.vjp = EngineVjp(self._open(subject, "vjp"))
                if any(alone):
                    vjp = EngineVjp(self._open(subject, "vjp alone")) if "vjp alone" in stages else None
                    self.alone = Alone(alone, EngineUNet(self._open(subject, "unet alone")), vjp)
            elif any(alone):
                self.alone = Alone(alone, self.unet)
            if "chain" in stages:
                self.chain = self._chain(subject, "chain", decode)
            if "light chain" in stages:
                self.light = self._chain(subject, "light chain", self._light_decode())
            if guidance.micro_batch is not None:
                if self.alone is not None:
                    self.alone = self.alone._replace(unet=unet_in_parts(self.alone.unet, guidance.micro_batch))
                self.unet = unet_in_parts(self.unet, guidance.micro_batch * (2 if subject.doubled else 1))
        except BaseException:
            self.close()
            raise

    def _without_guidance(self) -> list[bool]:
        """Per step, whether the UNet runs on the prompt alone though the recipe has classifier-free guidance."""
        synthesis = self.recipe.synthesis
        alone = prompt_alone_steps(synthesis)
        if any(alone) and self.scale != synthesis.guidance_scale:
            raise UserError(
                "synthesis.guidance_interval: this prior's UNet takes the guidance scale as an input and has no second "
                "half to leave out; leave the interval out"
            )
        return alone

    def _light_decode(self) -> Callable[[Tensor], Tensor]:
        light = self.prior.guidance_decoder
        if light is None:
            raise ValueError(f"guidance.decoder={self.recipe.guidance.decoder} is not loaded with the prior")
        return light_decode_stage(light, getattr(torch, self.recipe.prior.dtype))

    def _chain(self, subject: Subject, stage: str, decode: Callable[[Tensor], Tensor]) -> Chain:
        recipe, student = self.recipe, subject.student
        if not serves_itself(recipe, recipe.engine.chain):
            return EngineChain(self._open(subject, stage), student)
        guidance = recipe.guidance
        if guidance.batchnorm_weight > 0 and self._taps is None:
            self._taps = guidance_taps(subject.teacher.model, guidance)
        given = (decode, subject.teacher, self._taps, guidance, student)
        if guidance.micro_batch is not None:
            return micro_batched_chain(*given, size=guidance.micro_batch, kernel=recipe.kernel)
        return guidance_chain(*given, kernel=recipe.kernel)

    def _open(self, subject: Subject, stage: str) -> Runner:
        engine = backend_of(self.recipe, stage)
        self._runners.append(open_engine(subject, stage, engine, self._settings).runner)
        return self._runners[-1]

    def close(self) -> None:
        """Take the hooks off the teacher, and give back what engines hold."""
        if self._taps is not None:
            self._taps.remove()
        for runner in self._runners:
            runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @torch.no_grad()
    def __call__(
        self, context: Tensor, noise: Tensor, ids: Tensor, plan: CutMixPlan, *, guided: bool = True
    ) -> Trajectory:
        """From noise [B, c, h, w] and the context of both halves, [B or 2B, T, D]; optionally without guidance."""
        recipe = self.recipe
        guidance = recipe.guidance
        if guided or (self.chain is None and self.light is None):
            captured = self._captured(len(noise), (context.shape[0], context.shape[1], context.shape[2]))
            if captured is not None:
                return captured(context, noise, ids, plan)
        else:
            guidance = guidance.model_copy(update={"mode": "none"})
        return sample(
            self.unet,
            self.table,
            context,
            scale=self.scale,
            noise=noise,
            sample_ids=ids,
            seed=recipe.seed,
            chain=self.chain if guided else None,
            light=self.light if guided else None,
            guidance=guidance,
            plan=plan,
            kernel=recipe.kernel,
            vjp=self.vjp,
            alone=self.alone,
            reuse_every=recipe.synthesis.reuse_every,
        )

    def _captured(self, batch: int, context: tuple[int, int, int]) -> CapturedSampler | None:
        """The recorded steps for a whole batch, where the recipe, the device and the mode allow them."""
        recipe = self.recipe
        if (
            self.device.type != "cuda"
            or recipe.engine.cuda_graph == "never"
            or recipe.kernel == "reference"
            # Its session is bound to the stream that it was opened on, and a graph is recorded on another.
            or "onnxruntime" in (recipe.engine.unet, recipe.engine.chain)
            or recipe.guidance.mode not in ("clean", "none")
            # Kept features lie wherever the last whole call has left them.
            or recipe.synthesis.reuse_every > 1
            or batch != recipe.synthesis.batch_size
        ):
            return None
        if self._recorded is None:
            self._recorded = CapturedSampler(
                self.unet,
                self.table,
                scale=self.scale,
                shape=(batch, *self.prior.latent_shape),
                context=context,
                classes=len(recipe.teacher.classes),
                seed=recipe.seed,
                guidance=recipe.guidance,
                chain=self.chain,
                light=self.light,
                alone=self.alone,
                kernel=recipe.kernel,
                device=self.device,
            )
        return self._recorded
