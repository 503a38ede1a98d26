"""Shards that one run made, taken by another whose choices are the same: they are what it would make itself."""

import os
from collections.abc import Sequence
from pathlib import Path

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.shards import round_folder, shard_path, write_atomic
from diffdfkd.recipes.run_folder import begun, claim


def take_shards(recipe: Recipe, source: Path, shards: Sequence[int]) -> Recipe:
    """Begin the recipe's run with first-round shards of the run in ``source``, linked or else copied.

    Returns the recipe with engines, kernel, device and threads as in ``source``, since the shards depend on them; that
    the other choices are the same is checked by the commands that go on with the run. Raises UserError where there is
    no such run or shard.
    """
    made = begun(source)
    if made is None:
        raise UserError(f"{source}: holds no images; give the command that makes them again")
    settled = {field: getattr(made, field) for field in ("engine", "kernel", "device", "threads")}
    recipe = recipe.model_copy(update=settled)
    with claim(recipe) as folder:
        # First, since shards without a recipe are nobody's.
        folder.freeze()
        theirs, ours = (round_folder(root / "synthetic", 0) for root in (source, folder.path))
        ours.mkdir(parents=True, exist_ok=True)
        for index in shards:
            tar = shard_path(theirs, index)
            for path in (tar, tar.with_suffix(".json")):
                if not (ours / path.name).exists():
                    _link(path, ours / path.name)
    return recipe


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except FileNotFoundError:
        raise UserError(f"{path}: gone; give the command that made it again") from None
    except OSError:  # of a disk that knows no links, or of another disk
        write_atomic(target, path.read_bytes())
