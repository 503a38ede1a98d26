"""Which templates and words of a recipe cannot be meant: plain text, looked at before anything heavy is imported."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from diffdfkd.engine.class_names import class_words, plain

if TYPE_CHECKING:
    from diffdfkd.engine.recipe import Recipe


def impossible_words(recipe: "Recipe") -> Iterable[tuple[str, str]]:
    """As `engine.combinations.impossible`, of ``synthesis.prompt`` and ``synthesis.words``."""
    words, classes = recipe.synthesis.words, recipe.teacher.classes
    if words is not None and len(words) != len(classes):
        yield "synthesis.words", f"got {len(words)} words for {len(classes)} classes; give one each"
    elif words is not None:
        yield from _exchanged(class_words(words, classes), classes)
    yield from _no_place_for_the_class(recipe)


def _no_place_for_the_class(recipe: "Recipe") -> Iterable[tuple[str, str]]:
    """Templates in which a class's word has no place, where it should have one."""
    synthesis = recipe.synthesis
    templates = synthesis.templates
    for template in templates:
        if strange := re.findall(r"\{[^{}]+\}", template):
            yield "synthesis.prompt", f"got {strange[0]}, which stays as it is; the class's word goes where {{}} stands"
    without = [template for template in templates if "{}" not in template]
    if without and len(without) < len(templates):
        yield (
            "synthesis.prompt",
            f'templates without a place for the class beside others with one: "{without[0]}"; put {{}} where the '
            "class's word goes, or leave it out of all of them",
        )
    elif without and any(isinstance(own, list) for own in synthesis.words or []):
        yield (
            "synthesis.words",
            "several words a class, but templates without a place for the class; put {} into synthesis.prompt, or "
            "leave the words out",
        )


def _exchanged(words: list[list[str]], classes: list[str]) -> Iterable[tuple[str, str]]:
    """Words that are the names of other classes than those at their places: one of the lists is out of order.

    One alone is a coincidence, as a gift is in English and in German.
    """
    place_of = {plain(name): place for place, name in enumerate(classes)}
    found = []
    for place, (own, name) in enumerate(zip(words, map(plain, classes), strict=True)):
        # Part of its own name, too, it may be right: a crane that is a bird beside one that is a machine.
        strangers = [word for word in own if plain(word) in place_of and plain(word) not in name]
        if strangers := [word for word in strangers if name not in plain(word)]:
            found.append((place, strangers[0], place_of[plain(strangers[0])]))
    if len(found) > 1:
        (place, word, other), more = found[0], len(found) - 1
        yield (
            "synthesis.words",
            f"{word} at place {place} would be drawn for the class {classes[place]}, but is the name of the "
            f"class at place {other}, and so for {more} more; give both lists in the order of the teacher's outputs, "
            f'or write the words otherwise where that is meant, as in "a {word}"',
        )
