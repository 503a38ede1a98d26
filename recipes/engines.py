"""A run's engines, settled before its first shard: chosen where the recipe says ``auto``, built where it names one."""

import logging
import sys
from collections.abc import Collection
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.run_folder import RunFolder

if TYPE_CHECKING:
    from diffdfkd.engine.backends.choose import Choice
    from diffdfkd.engine.backends.serve import Subject
    from diffdfkd.engine.classifier import Classifier
    from diffdfkd.engine.journal import Journal
    from diffdfkd.engine.prior import Prior

log = logging.getLogger(__name__)


def with_engines(folder: RunFolder, prior: "Prior", teacher: "Classifier") -> tuple[RunFolder, list["Choice"]]:
    """The folder with a recipe that names its engines, all of them built, and what was chosen.

    Raises UserError for a named engine that cannot be had, before the folder is bound to it.
    """
    from diffdfkd.engine.backends.choose import settle_engines
    from diffdfkd.engine.backends.unet_attention import refuse_attention

    refuse_attention(folder.recipe.engine.attention, folder.recipe.engine.unet, prior.unet)
    recipe, choices = settle_engines(folder.recipe, lambda: subject_of(folder.recipe, prior, teacher))
    recipe = with_attention(recipe, prior)
    recipe = build_engines(recipe, prior, teacher, {choice.stage for choice in choices})
    return replace(folder, recipe=recipe), choices


def with_attention(recipe: Recipe, prior: "Prior") -> Recipe:
    """The recipe with ``engine.attention`` settled; UserError where xformers is asked for and cannot be had."""
    import torch

    from diffdfkd.engine.backends.unet_attention import settle_attention
    from diffdfkd.engine.prompts import class_prompts, embed_prompts
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


def build_engines(recipe: Recipe, prior: "Prior", teacher: "Classifier", chosen: Collection[str] = ()) -> Recipe:
    """Build what the recipe's rounds need and the cache lacks; UserError, naming the field, where that fails.

    Returns the recipe. Of stages that are ``chosen`` rather than named, one that cannot be had with a student is eager.
    """
    from diffdfkd.engine.backends.serve import backend_of, field_of, open_engine, run_settings

    for stage, subject in wanted(recipe, prior, teacher):
        try:
            # Asked here alone: where nothing is built no folder need be known for the cache.
            open_engine(subject, stage, backend_of(recipe, stage), run_settings(recipe)).runner.close()
        except UserError as reason:
            if field_of(stage) not in chosen or subject.student is None:
                raise
            log.warning("%s; so guidance is eager, in all rounds alike", reason)
            recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={field_of(stage): "eager"})})
    return recipe


def wanted(recipe: Recipe, prior: "Prior", teacher: "Classifier") -> list[tuple[str, "Subject"]]:
    """(stage, what it is made of) for all engines of the recipe's rounds: the chain with the student comes last."""
    from diffdfkd.engine.backends.serve import backend_of, field_of, serves_itself, stages_of
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.painter import uses_student

    stages = [stage for stage in stages_of(recipe) if not serves_itself(recipe, backend_of(recipe, stage))]
    if not stages:
        return []
    first = subject_of(recipe, prior, teacher)
    found = [(stage, first) for stage in stages]
    chains = [stage for stage in stages if field_of(stage) == "chain"]
    if chains and recipe.rounds > 1 and uses_student(recipe, 1):
        # Its weights are inputs, so any student of the architecture will do.
        student = build_classifier(recipe.student, recipe.teacher, field="student", seed=recipe.seed, trained=teacher)
        knowing = replace(first, student=student.to(recipe.device).eval().requires_grad_(False))
        found += [(stage, knowing) for stage in chains]
    return found


def subject_of(recipe: Recipe, prior: "Prior", teacher: "Classifier") -> "Subject":
    """What the run's stages are made of."""
    from diffdfkd.engine.backends.serve import Subject
    from diffdfkd.engine.prompts import class_prompts, embed_prompts

    context, _ = embed_prompts(prior, class_prompts(recipe))
    return Subject(recipe, prior, teacher, context)


def tell_engines(choices: list["Choice"], journal: "Journal") -> None:
    """Print what ``auto`` took and why, where anything was tried; keep it in the journal in any case."""
    for choice in choices:
        journal.log("engine", **asdict(choice))
        if choice.tried:
            print(f"engine.{choice.stage}={choice.engine}: {choice.reason}", file=sys.stderr)
