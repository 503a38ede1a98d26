"""What a check comes to, in words: what looks wrong, which field says so, and the value to give it."""

import json
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffdfkd.engine.class_names import class_words, plain
from diffdfkd.engine.class_order import Order
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.sanity import CLEARLY, NEAR, SIGNIFICANT, Judgement, Reading, above_chance, unrecognised

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 100
SHOWN = 10
"""Of a list of classes."""
OTHER_RANGE = 20
"""Times by which the spread of the numbers must differ to be one of value range rather than of normalisation."""


@dataclass(frozen=True)
class Finding:
    text: str
    cure: str | None = None
    """key=value that would mend it, quoted for a shell."""

    def __str__(self) -> str:
        text = textwrap.fill(self.text, WIDTH, break_long_words=False, break_on_hyphens=False)
        return text if self.cure is None else f"{text}\n    {self.cure}"


def findings(
    recipe: Recipe,
    readings: Sequence[Reading],
    judgement: Judgement | None,
    order: Order | None,
    asked: "Tensor | None",
) -> list[Finding]:
    """A paragraph each; ``asked`` [N] are the images' classes, None where one prompt serves all classes.

    Of the readings the first is that of the declared preprocessing.
    """
    declared = readings[0]
    prompted = asked is not None
    found = []
    if judgement is not None:
        found.append(_preprocessing(recipe, declared, judgement))
    if order is not None:
        found.append(_order(recipe, order))
    recognised = above_chance(declared)
    if not found and (recognised or (declared.distance is not None and declared.distance <= NEAR)):
        found.append(_nothing(recipe, declared, recognised))
    elif not found:
        found.append(_weak(recipe, declared, prompted))
    if not prompted:
        found.append(
            Finding("synthesis.prompt has no {}, so that no image is of a class: class order cannot be checked.")
        )
    elif order is None and not above_chance(judgement.reading if judgement is not None else declared):
        found.append(Finding("Class order cannot be judged as long as the teacher does not recognise the images."))
    elif order is None and asked is not None:
        best = judgement.reading if judgement is not None else declared
        if names := [recipe.teacher.classes[label] for label in unrecognised(best, asked)]:
            found.append(
                Finding(
                    "Not judged is the place in the order of the classes that the teacher does not recognise often "
                    f"enough, two of which could be exchanged unseen: {', '.join(names)}."
                )
            )
    if prompted and order is None and (unlike := _other_words(recipe)):
        found.append(
            Finding(
                "Images are asked for by synthesis.words, and it is their order that is judged. Whether it is that of "
                f"teacher.classes is for you to compare, where they are no forms of the names: "
                f"{', '.join(unlike[:SHOWN])}{f' and {len(unlike) - SHOWN} more' if len(unlike) > SHOWN else ''}."
            )
        )
    if judgement is None and (turned := _turned(readings)) is not None and not _told_apart(declared, turned):
        found.append(
            Finding(
                "Not judged is whether the teacher takes RGB or BGR: these images fit it about equally well either way."
            )
        )
    if (reason := declared.look.unreadable) is not None:
        found.append(
            Finding(
                "Judged by the teacher's answers alone, which is weaker evidence: its BatchNorm layers cannot be read "
                f"({reason.partition(';')[0]})."
            )
        )
    return found


def _other_words(recipe: Recipe) -> list[str]:
    """Classes beside the words that they are drawn by, where neither is a part of the other."""
    classes = recipe.teacher.classes
    pairs = zip(classes, class_words(recipe.synthesis.words, classes), strict=True)
    known = ((name, word, plain(name), plain(word)) for name, own in pairs for word in own)
    return [f"{name} by {word}" for name, word, one, other in known if one not in other and other not in one]


def _turned(readings: Sequence[Reading]) -> Reading | None:
    """The reading with the declared preprocessing in the other channel order; None of grey teachers."""
    declared = readings[0].hypothesis.preprocessing
    for reading in readings[1:]:
        changes = reading.hypothesis.changes
        if "teacher.channel_order" in changes and reading.hypothesis.preprocessing.size == declared.size:
            own = reading.hypothesis.preprocessing
            if (own.mean, own.std) in ((declared.mean, declared.std), (declared.mean[::-1], declared.std[::-1])):
                return reading
    return None


def _told_apart(declared: Reading, turned: Reading) -> bool:
    """Whether statistics or answers speak for the declared order against the other."""
    known = declared.distance is not None and turned.distance is not None
    if known and (turned.distance or 0.0) >= CLEARLY * (declared.distance or 0.0) > 0:
        return True
    if declared.hits is None or turned.hits is None:
        return False
    lost = int((declared.hits & ~turned.hits).sum()) - int((turned.hits & ~declared.hits).sum())
    differing = int((declared.hits != turned.hits).sum())
    return lost > SIGNIFICANT * differing**0.5


def _nothing(recipe: Recipe, declared: Reading, recognised: bool) -> Finding:
    evidence = []
    if recognised:
        chance = 1 / len(recipe.teacher.classes)
        evidence.append(
            f"the teacher names the class asked for in {declared.agreement:.0%} of the images",
        )
        evidence[-1] += f" (by chance {chance:.2g} of them)" if chance < 0.01 else f" (by chance {chance:.0%})"
    if declared.distance is not None:
        evidence.append("no other preprocessing fits its BatchNorm statistics clearly better")
    return Finding(f"Nothing looks wrong: {', and '.join(evidence) or 'no other preprocessing does better'}.")


def _weak(recipe: Recipe, declared: Reading, prompted: bool) -> Finding:
    answers = (
        f"the teacher names the class asked for in {declared.agreement:.0%} of the images, which may be chance"
        if prompted
        else "one prompt serves all classes"
    )
    statistics = (
        "the images are far from its BatchNorm statistics under every preprocessing tried"
        if declared.distance is not None
        else "there are no BatchNorm statistics to compare with"
    )
    return Finding(
        f"The evidence is too weak to judge by: {answers}, and {statistics}. Either the prior cannot draw these "
        "classes (look at what `diffdfkd preview` draws; try other synthesis.words or another synthesis.prompt), or "
        "the teacher's weights are not those that its fields describe."
    )


def _preprocessing(recipe: Recipe, declared: Reading, judgement: Judgement) -> Finding:
    reading, teacher = judgement.reading, recipe.teacher
    hypothesis, changes = reading.hypothesis, reading.hypothesis.changes
    turned = "teacher.channel_order" in changes
    numbers = [field for field in ("teacher.mean", "teacher.std") if field in changes]
    own = hypothesis.preprocessing
    # Turned around with the channels, and the same otherwise.
    if turned and own.mean[::-1] == tuple(teacher.mean) and own.std[::-1] == tuple(teacher.std):
        numbers = []
    wrong, fields = [], []
    if turned:
        wrong.append("channel order")
        fields.append("teacher.channel_order")
    if numbers:
        ratio = (sum(teacher.std) / len(teacher.std)) / (sum(own.std) / len(own.std))
        wrong.append("value range" if max(ratio, 1 / ratio) >= OTHER_RANGE else "normalisation")
        fields += numbers
    if "teacher.size" in changes:
        wrong.append("size")
        fields.append("teacher.size")
    if hypothesis.inverted:
        wrong.append("use of dark and light")
        fields.append("teacher")
    reasons = []
    if judgement.ratio is not None and judgement.by_statistics:
        reasons.append(f"the images fit the teacher's BatchNorm statistics {judgement.ratio:.1f} times better")
    if reading.agreement is not None and declared.agreement is not None:
        reasons.append(f"it names the class asked for in {reading.agreement:.0%}, now in {declared.agreement:.0%}")
    text = (
        f"{', '.join(fields)}: the {' and the '.join(wrong)} {'looks' if len(wrong) == 1 else 'look'} wrong. With "
        f"{hypothesis.name} {', and '.join(reasons)}. "
    )
    if hypothesis.inverted:
        return Finding(
            f"{text}No field turns dark and light around: ask for it in synthesis.prompt (such as 'a white {{}} on a "
            "black background'), or give the teacher as package.module:factory with a first layer that takes 1 - x."
        )
    cure = " ".join(shlex.quote(f"{field}={_value(value)}") for field, value in changes.items())
    return Finding(f"{text}If the teacher was trained so, give:", cure)


def _order(recipe: Recipe, order: Order) -> Finding:
    classes, words = recipe.teacher.classes, recipe.synthesis.words
    text = (
        f"teacher.classes: the class order looks wrong. The teacher names the class asked for in {order.declared:.0%} "
        f"of the images that tell, and in {order.agreement:.0%} with {order.name}. "
    )
    names = {output: classes[label] for label, output in order.output.items()}
    if len(names) == len(classes):
        label_of = {output: label for label, output in order.output.items()}
        labels = [label_of[output] for output in range(len(classes))]
        changes: dict[str, object] = {"teacher.classes": [classes[label] for label in labels]}
        if words is not None:
            changes["synthesis.words"] = [words[label] for label in labels]
        cure = " ".join(shlex.quote(f"{field}={_value(names)}") for field, names in changes.items())
        return Finding(f"{text}As far as these images tell, the order of the outputs is:", cure)
    pairs = [f"output {output} answers to {names[output]}" for output in sorted(names)]
    shown = ", ".join(pairs[:8]) + (", ..." if len(pairs) > 8 else "")
    return Finding(f"{text}Of the classes drawn {shown} (counted from 0).")


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
