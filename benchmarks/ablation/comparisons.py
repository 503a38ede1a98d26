"""Images that synthetic ones are measured against, for recipes whose prior comes with them."""

from typing import TYPE_CHECKING

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe

if TYPE_CHECKING:
    from diffdfkd.engine.images import Images


def refuse_comparison(recipe: Recipe, source: str) -> None:
    """UserError unless there are such images, and all that they are made of."""
    from diffdfkd.benchmarks.control_images import setting
    from diffdfkd.recipes.teacher_data import READERS

    try:
        known = setting(recipe)
    except UserError as error:
        raise UserError(f"images: {source}: {error}; leave the variant out") from None
    if source == "oracle":
        READERS[known](None, None)


def comparison_images(recipe: Recipe, source: str) -> "Images":
    """Fresh augmentations of the prior's own training images, as many as are drawn, or real training images."""
    from diffdfkd.benchmarks.control_images import floor_images, oracle_images

    return floor_images(recipe) if source == "floor" else oracle_images(recipe)
