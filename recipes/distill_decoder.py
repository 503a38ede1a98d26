"""A light decoder for guidance, distilled from the prior's VAE on the prior's own unguided samples: never on data.

diffdfkd decoder fashion --output decoder.safetensors
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.table import table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffdfkd.engine.gradient_cosine import Agreement
    from diffdfkd.engine.guidance_decoder import GuidanceDecoder
    from diffdfkd.engine.prior import Prior

STEPS_KEPT = 12
"""Of a trajectory, evenly spread: what is predicted in neighbouring steps hardly differs."""
BATCH = 64
COMPARED = 100
"""Fresh samples that the gradients are compared on, at most a batch of the recipe's."""


class Pool(NamedTuple):
    """What the light decoder is trained on: n latents and what the full decoder makes of them, on the CPU."""

    latents: "Tensor"
    """[n, c, h, w]."""
    images: "Tensor"
    """[n, C, H', W'], not clamped: so the light decoder saturates where the full one does."""


def distill_decoder(
    recipe: Recipe,
    output: Path,
    *,
    form: str = "convolutions",
    steps: int = 3000,
    width: int = 32,
    images: int = 500,
    learning_rate: float = 3e-3,
) -> str:
    """Sample, train, write the file, and return how well it stands in for the VAE, for a person.

    Killed, the same command goes on from its last checkpoint beside the file. Raises UserError for what is given
    wrongly.
    """
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.gradient_cosine import compare_decoders
    from diffdfkd.engine.guidance_decoder import FORMS, Shape, decoder_scale, vae_digest
    from diffdfkd.engine.painter import Models
    from diffdfkd.engine.plan import choices_digest
    from diffdfkd.engine.synthesis import round_choices
    from diffdfkd.recipes.launch import refuse_launch, settle_machine
    from diffdfkd.recipes.pretraining import Plan, pretrain
    from diffdfkd.recipes.run import load_prior_for, use_device

    refuse_launch("decoder")
    if form not in FORMS:
        raise UserError(f"--form: got {form}; allowed: {', '.join(FORMS)}")
    _refuse_output(output)
    recipe = settle_machine(recipe.model_copy(update={"guidance": recipe.guidance.model_copy(update=FULL)}))
    use_device(recipe)
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher").to(recipe.device)
    prior = load_prior_for(recipe, teacher)
    side = prior.latent_shape[1]
    scale = decoder_scale(side, prior.image_size[0] // side, recipe.teacher.size)
    shape = Shape(next(name for name in FORMS if name == form), prior.latent_shape[0], prior.channels, scale, width)
    decoder = _beginner(shape, vae_digest(prior), recipe.seed).to(recipe.device)
    settings = {**decoder.settings(), "steps": steps, "images": images, "learning_rate": learning_rate}
    made_by = choices_digest({**round_choices(recipe, Models(prior, teacher), 0), **settings})
    pool = make_pool(recipe, prior, images, scale)
    plan = Plan(
        name="decoder",
        steps=steps,
        learning_rate=learning_rate,
        seed=recipe.seed,
        checkpoint=output.with_name(f".{output.stem}-{made_by[:12]}.checkpoint"),
        checkpoint_every=100,
        settings={"choices": made_by},
    )
    outcome = pretrain(decoder, lambda generator: losses(decoder, pool, generator), plan)
    decoder.requires_grad_(False)
    prior.guidance_decoder = decoder
    agreement = compare_decoders(recipe, prior, teacher, samples=min(COMPARED, recipe.synthesis.batch_size))
    _write(decoder, output, {"images": images, "steps": steps, "seed": recipe.seed, "licence": prior.licence or ""})
    plan.checkpoint.unlink(missing_ok=True)
    return _text(output, decoder, agreement, outcome.seconds)


FULL: dict[str, Any] = {"decoder": "full", "decoder_window": (0.0, 1.0)}
"""Fields of guidance that name no light decoder."""


def make_pool(recipe: Recipe, prior: "Prior", images: int, scale: int, *, progress: bool = True) -> Pool:
    """Of ``images`` unguided trajectories the x0 predicted in up to 12 steps each, decoded to ``scale`` latents."""
    import torch

    from diffdfkd.engine.gradient_cosine import reduced
    from diffdfkd.engine.painter import LATENT_PIXELS_AT_ONCE
    from diffdfkd.engine.prior_samples import OUTSIDE, predicted_latents
    from diffdfkd.engine.progress import progress_bar
    from diffdfkd.engine.stages import finite

    steps = recipe.synthesis.steps
    kept = sorted({round(index * (steps - 1) / (STEPS_KEPT - 1)) for index in range(STEPS_KEPT)})
    parts: list[tuple[Tensor, Tensor]] = []
    with progress_bar(images, "samples", unit="images", shown=progress) as bar, torch.no_grad():
        for ids in torch.arange(OUTSIDE, OUTSIDE + images).split(recipe.synthesis.batch_size):
            latents = predicted_latents(recipe, prior, ids)[kept].flatten(0, 1)
            for part in latents.split(max(1, LATENT_PIXELS_AT_ONCE // latents[0, 0].numel())):
                parts.append((part.cpu(), reduced(prior.brightness(part), part.shape[-1] * scale).cpu()))
            bar.update(len(ids))
    pool = Pool(*map(torch.cat, zip(*parts, strict=True)))
    whole = finite(pool.latents) & finite(pool.images)
    if not whole.any():
        raise UserError("prior: none of its samples is finite; take prior.dtype=float32, or another prior")
    return Pool(*(values[whole] for values in pool))


def losses(decoder: "GuidanceDecoder", pool: Pool, generator: "torch.Generator") -> dict[str, "Tensor"]:
    """L1 of the pixels of a random batch."""
    import torch

    device = next(decoder.parameters()).device
    pick = torch.randint(len(pool.latents), (BATCH,), generator=generator)
    latents, images = (values[pick].to(device) for values in pool)
    return {"loss": (decoder.brightness(latents) - images).abs().mean()}


def _beginner(shape: Any, vae: str, seed: int) -> "GuidanceDecoder":
    import torch

    from diffdfkd.engine.guidance_decoder import GuidanceDecoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GuidanceDecoder(shape, vae)


def _refuse_output(output: Path) -> None:
    """Before anything is sampled."""
    if output.suffix != ".safetensors":
        raise UserError(f"--output: {output} does not end in .safetensors; name the file so")
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; name a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {output.parent} cannot be made ({error.strerror}); choose another place") from None


def _write(decoder: "GuidanceDecoder", output: Path, facts: dict[str, Any]) -> None:
    from diffdfkd.engine.guidance_decoder import write_guidance_decoder

    try:
        write_guidance_decoder(decoder, output, facts)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror}); choose another place") from None


def _text(output: Path, decoder: "GuidanceDecoder", agreement: list["Agreement"], seconds: float) -> str:
    rows = [(found.level, f"{found.pixels:.4f}", f"{found.cosine:.3f}") for found in agreement]
    parameters = sum(value.numel() for value in decoder.parameters())
    return "\n".join(
        [
            f"{output}: {decoder.shape.form}, {parameters:,} parameters, trained in {seconds:.0f} s",
            "against the VAE's decoder, on fresh unguided samples (pixels of [0, 1]; cosine of the guidance gradient):",
            table(("noise", "pixel error", "cosine"), rows),
            f"to use it: guidance.decoder={output}",
        ]
    )
