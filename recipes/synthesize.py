"""The images of a run's first round, and nothing else.

diffdfkd synthesize fashion output=runs/images synthesis.images_per_class=50
"""

import time

from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.engines import tell_engines, with_engines
from diffdfkd.recipes.figures import stage
from diffdfkd.recipes.launch import refuse_launch
from diffdfkd.recipes.run import load_prior_for, look_first, session, use_device
from diffdfkd.recipes.run_folder import claim


def synthesize(recipe: Recipe, *, progress: bool = True) -> str:
    """Make the missing shards of round 0 in the recipe's output folder; returns a sentence about them.

    With more rounds the later ones need a student, which ``run`` makes between them. Raises UserError as ``run`` does.
    """
    refuse_launch("synthesize")
    started = time.perf_counter()
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.synthesis import Models
    from diffdfkd.engine.synthesis import synthesize as make_shards

    with claim(recipe) as folder:
        recipe = folder.recipe
        use_device(recipe)
        teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher").to(recipe.device)
        models = Models(load_prior_for(recipe, teacher), teacher)
        folder, choices = with_engines(folder, models.prior, teacher)
        recipe = folder.recipe
        folder.freeze()
        with session(folder, "synthesize", time.perf_counter() - started) as journal:
            tell_engines(choices, journal)
            look_first(recipe, models, folder.path, journal)
            with stage(journal, "synthesis", recipe):
                made = make_shards(recipe, models, 0, folder.path, journal, progress)
    rate = f", {made.made} of them made now at {made.made / made.seconds:.1f} a second" if made.seconds else ""
    later = "" if recipe.rounds == 1 else f"; rounds 2 to {recipe.rounds} need a student: diffdfkd run makes them"
    return f"{made.images:,} images in {folder.path / 'synthetic'}{rate}{later}"
