"""Images that synthetic ones are measured against, for recipes whose prior comes with them."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe

if TYPE_CHECKING:
    from diffdfkd.engine.images import Images

ASSETS = Path(__file__).parent.parent.parent / "recipes" / "assets"


def refuse_comparison(recipe: Recipe, source: str) -> None:
    """UserError unless there are such images, and all that they are made of."""
    from diffdfkd.recipes.train_teacher import training_files

    if Path(recipe.prior.path).resolve() != (ASSETS / "fashion" / "prior").resolve():
        raise UserError(f"images: {source}: known of the prior of the recipe fashion alone; leave the variant out")
    if source == "oracle":
        training_files(None)


def comparison_images(recipe: Recipe, source: str) -> "Images":
    """Fresh augmentations of the prior's own training images, as many as are drawn, or real training images."""
    from diffdfkd.benchmarks.controls import FreshIcons, real_images
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.recipes.render_icons import load_glyphs

    if source == "floor":
        drawn = recipe.distillation.steps * recipe.distillation.batch_size
        teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher")
        return FreshIcons(load_glyphs(), drawn, recipe.seed, teacher.preprocessing)
    return real_images(None, recipe.synthesis.images_per_class * len(recipe.teacher.classes), recipe.seed)
