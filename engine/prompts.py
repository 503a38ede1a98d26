"""What the prior is asked for: the prompts of each class, and which of them a sample takes."""

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffdfkd.engine.class_names import class_words
from diffdfkd.engine.recipe import Recipe
from diffdfkd.kernels.philox import PROMPTS, philox_uniform

if TYPE_CHECKING:
    from diffdfkd.engine.prior import Prior


def prompts_by_class(recipe: Recipe) -> list[list[str]]:
    """The distinct prompts of each class: every template with every word of it, template by template."""
    synthesis = recipe.synthesis
    words = class_words(synthesis.words, recipe.teacher.classes)
    return [
        list(dict.fromkeys(template.replace("{}", word) for template in synthesis.templates for word in own))
        for own in words
    ]


def class_prompts(recipe: Recipe) -> list[str]:
    """All prompts of the run, those of one class after those of another: one a class unless the recipe gives more."""
    return [prompt for own in prompts_by_class(recipe) for prompt in own]


def draw_prompts(recipe: Recipe, ids: Tensor, classes: Tensor) -> Tensor:
    """Place [B] int64 among `class_prompts` of the prompt that each sample of ids [B] and classes [B] takes.

    Drawn from (seed, id) alone, each of a class's prompts alike; on the CPU.
    """
    counts = [len(own) for own in prompts_by_class(recipe)]
    classes = classes.cpu().long()
    if max(counts) == 1:
        return classes
    first, count = torch.tensor([0, *accumulate(counts)])[classes], torch.tensor(counts)[classes]
    uniform = philox_uniform(recipe.seed, ids.cpu().long(), 0, PROMPTS, 1)[:, 0]
    return first + (uniform * count).long()


@torch.no_grad()
def embed_prompts(prior: "Prior", prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [n + 1, T, D] of the distinct prompts and, last, of the empty one; row [P] int64 of each prompt."""
    distinct = [*dict.fromkeys(prompts), ""]
    embeddings = torch.cat([prior.embed(distinct[i : i + 64]) for i in range(0, len(distinct), 64)])
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=embeddings.device)
    return embeddings, rows
