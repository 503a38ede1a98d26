"""The prompts of a class, and which of them a sample takes."""

from collections import Counter

import pytest
import torch

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.plan import choices_digest, synthesis_choices
from diffdfkd.engine.prompts import class_prompts, draw_prompts, prompts_by_class
from diffdfkd.engine.recipe import Recipe, load_recipe

CLASSES = ["boot", "coat", "shirt"]


def recipe(**synthesis: object) -> Recipe:
    content = {
        "prior": "p",
        "teacher": {"architecture": "small_cnn", "classes": CLASSES},
        "student": {"architecture": "small_cnn"},
        "synthesis": synthesis,
    }
    return load_recipe(content)


def test_every_template_meets_every_word() -> None:
    made = recipe(prompt=["a {}", "one {} of {}s"], words=["boot", ["coat", "jacket"], ["shirt"]])
    assert prompts_by_class(made) == [
        ["a boot", "one boot of boots"],
        ["a coat", "a jacket", "one coat of coats", "one jacket of jackets"],
        ["a shirt", "one shirt of shirts"],
    ]
    assert class_prompts(made) == [prompt for own in prompts_by_class(made) for prompt in own]
    assert class_prompts(recipe(prompt="A photo.", words=["a", "b", "c"])) == ["A photo."] * 3
    assert prompts_by_class(recipe(prompt=["A photo.", "A picture."])) == [["A photo.", "A picture."]] * 3


def test_a_list_of_one_is_that_one_and_old_shards_stay_valid() -> None:
    plain, listed = recipe(words=CLASSES), recipe(prompt=["an image of a {}"], words=[[name] for name in CLASSES])
    assert plain.synthesis == listed.synthesis
    choices = synthesis_choices(plain, "prior", "teacher")
    assert choices["synthesis.prompt"] == "an image of a {}" and choices["synthesis.words"] == CLASSES
    assert choices_digest(choices) == choices_digest(synthesis_choices(listed, "prior", "teacher"))


def test_with_one_prompt_a_class_nothing_is_drawn() -> None:
    classes = torch.tensor([2, 0, 1, 1])
    assert torch.equal(draw_prompts(recipe(), torch.arange(4), classes), classes)


def test_the_draw_is_uniform_within_the_class_and_does_not_depend_on_the_batch() -> None:
    made = recipe(prompt=["a {}", "one {}", "the {}"], words=["boot", ["coat", "jacket"], "shirt"])
    ids = torch.arange(3000) + 2**40
    classes = torch.arange(3000) % 3
    drawn = draw_prompts(made, ids, classes)
    prompts, own = class_prompts(made), prompts_by_class(made)
    counts = Counter(prompts[place] for place in drawn.tolist())
    assert all(prompts[place] in own[label] for place, label in zip(drawn.tolist(), classes.tolist(), strict=True))
    for mine in own:
        assert all(abs(counts[prompt] / 1000 - 1 / len(mine)) < 0.06 for prompt in mine)
    parts = [draw_prompts(made, *pair) for pair in zip(ids.split(7), classes.split(7), strict=True)]
    assert torch.equal(torch.cat(parts), drawn)
    shuffled = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_prompts(made, ids[shuffled], classes[shuffled]), drawn[shuffled])
    other = made.model_copy(update={"seed": 1})
    assert not torch.equal(draw_prompts(other, ids, classes), drawn)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ["a {}", "a photo"]}, r'synthesis.prompt: templates without a place for the class .*"a photo"'),
        ({"prompt": "a photo", "words": ["a", ["b", "c"], "d"]}, r"synthesis.words: .* without a place for the class"),
        ({"prompt": []}, r"synthesis.prompt: got \[\]; a template, or a list of them"),
        ({"prompt": ["a {}", 5]}, r"synthesis.prompt: got .*; a template, or a list of them"),
        ({"prompt": ["a {}", "a {name}"]}, r"synthesis.prompt: got \{name\}"),
        ({"words": ["a", [], "b"]}, r"synthesis.words: .*each class has a word in quotes, or a list of them"),
        ({"words": [["coat", "x"], ["boot", "y"], "shirt"]}, r"synthesis.words: coat at place 0 .* class at place 1"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe(**fields)


def test_an_override_is_a_template_or_a_list_of_them() -> None:
    content = {
        "prior": "p",
        "teacher": {"architecture": "small_cnn", "classes": CLASSES},
        "student": {"architecture": "small_cnn"},
    }
    made = load_recipe(content, ['synthesis.prompt=["a {}", "one {}"]', "synthesis.words=[boot,[coat,jacket],shirt]"])
    assert made.synthesis.prompt == ["a {}", "one {}"] and made.synthesis.words == ["boot", ["coat", "jacket"], "shirt"]
    assert load_recipe(content, ["synthesis.prompt=[sks] a {}"]).synthesis.prompt == "[sks] a {}"
