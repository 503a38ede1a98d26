"""A run's engines, settled before its first shard: chosen where the recipe says ``auto``, built where it names one."""

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.run_folder import RunFolder

if TYPE_CHECKING:
    from diffdfkd.engine.backends.choose import Choice
    from diffdfkd.engine.backends.serve import Subject
    from diffdfkd.engine.classifier import Classifier
    from diffdfkd.engine.journal import Journal
    from diffdfkd.engine.prior import Prior


def with_engines(folder: RunFolder, prior: "Prior", teacher: "Classifier") -> tuple[RunFolder, list["Choice"]]:
    """The folder with a recipe that names its engines, all of them built, and what was chosen.

    Raises UserError for a named engine that cannot be had, before the folder is bound to it.
    """
    from diffdfkd.engine.backends.choose import settle_engines
    from diffdfkd.engine.backends.unet_attention import refuse_attention

    refuse_attention(folder.recipe.engine.attention, folder.recipe.engine.unet, prior.unet)
    recipe, choices = settle_engines(folder.recipe, lambda: subject_of(folder.recipe, prior, teacher))
    recipe = with_attention(recipe, prior)
    build_engines(recipe, prior, teacher)
    return replace(folder, recipe=recipe), choices


def with_attention(recipe: Recipe, prior: "Prior") -> Recipe:
    """The recipe with ``engine.attention`` settled; UserError where xformers is asked for and cannot be had."""
    import torch

    from diffdfkd.engine.backends.unet_attention import settle_attention
    from diffdfkd.engine.painter import class_prompts, embed_prompts
    from diffdfkd.engine.stages import unet_stage

    engine = recipe.engine

    @torch.no_grad()
    def call() -> None:
        rows = recipe.synthesis.batch_size
        context, _ = embed_prompts(prior, class_prompts(recipe)[:1])
        sample = torch.randn(rows, *prior.latent_shape, device=recipe.device)
        timestep = torch.full((rows,), 500.0, device=recipe.device)
        stage = unet_stage(prior, getattr(torch, recipe.prior.dtype), recipe.synthesis.guidance_scale)
        stage(sample, timestep, context[:1].expand(rows, -1, -1))

    attention = settle_attention(engine.attention, engine.unet, prior.unet, call)
    return recipe.model_copy(update={"engine": engine.model_copy(update={"attention": attention})})


def build_engines(recipe: Recipe, prior: "Prior", teacher: "Classifier") -> None:
    """Build what the first round needs and the cache lacks; UserError, naming the field, where that fails."""
    from diffdfkd.engine.backends.serve import open_engine, run_settings, serves_itself

    subject = None
    for stage in stages_of(recipe):
        backend = recipe.engine.chain if stage == "chain" else recipe.engine.unet
        if serves_itself(recipe, backend):
            continue
        subject = subject or subject_of(recipe, prior, teacher)
        open_engine(subject, stage, backend, run_settings(recipe)).runner.close()


def stages_of(recipe: Recipe) -> list[str]:
    """Stages that the recipe's rounds call."""
    mode = recipe.guidance.mode
    return ["unet", *(["vjp"] if mode in ("exact", "reuse") else []), *(["chain"] if mode != "none" else [])]


def subject_of(recipe: Recipe, prior: "Prior", teacher: "Classifier") -> "Subject":
    """What the run's stages are made of."""
    from diffdfkd.engine.backends.serve import Subject
    from diffdfkd.engine.painter import class_prompts, embed_prompts

    context, _ = embed_prompts(prior, class_prompts(recipe))
    return Subject(recipe, prior, teacher, context)


def tell_engines(choices: list["Choice"], journal: "Journal") -> None:
    """Print what ``auto`` took and why, where anything was tried; keep it in the journal in any case."""
    for choice in choices:
        journal.log("engine", **asdict(choice))
        if choice.tried:
            print(f"engine.{choice.stage}={choice.engine}: {choice.reason}", file=sys.stderr)
