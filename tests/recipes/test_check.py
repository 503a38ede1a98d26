import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from diffdfkd.engine import painter
from diffdfkd.engine.architectures import ARCHITECTURES
from diffdfkd.engine.class_order import better_order
from diffdfkd.engine.classifier import Classifier, Preprocessing, build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.engine.sanity import hypotheses, judge, read
from diffdfkd.recipes.check import check
from diffdfkd.recipes.check_findings import findings
from diffdfkd.recipes.cli import app


def everything_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checked(tiny_recipe, tmp_path_factory):
    """Text, verdict and figures of a check of the tiny recipe; and that nothing else was written."""
    folder = tmp_path_factory.mktemp("check")
    before = everything_in(tiny_recipe.parent)
    recipe = load_recipe(tiny_recipe, [f"output={folder / 'run'}"])
    text, sound = check(recipe, json_file=folder / "check.json", progress=False)
    assert everything_in(tiny_recipe.parent) == before
    assert [path.name for path in folder.iterdir()] == ["check.json"]
    return text, sound, json.loads((folder / "check.json").read_text())


def test_a_prior_that_cannot_draw_the_classes_accuses_nobody(checked):
    text, sound, figures = checked
    assert sound and figures["sound"]
    assert "too weak to judge" in text and "looks wrong" not in text
    assert figures["better_preprocessing"] is None and figures["better_order"] is None


def test_text_is_aligned_and_fits_a_terminal(checked):
    text, _, figures = checked
    lines = text.split("\n")
    assert max(map(len, lines)) <= 100
    assert "100 unguided images of 4 classes" in lines[0]
    assert all(any(line.strip().startswith(name[:20]) for line in lines) for name in ("T-shirt/top", "<b>Shoe</b>"))
    table = [line for line in lines if line.startswith("  features.")]
    assert len(table) == len(figures["layers"]) == 8 and len({len(line) for line in table}) == 1


def test_figures_hold_what_the_text_says(checked):
    _, _, figures = checked
    assert (figures["images"], figures["dropped"], figures["classes_drawn"]) == (100, 0, 4)
    assert [entry["images"] for entry in figures["by_class"]] == [25] * 4
    for entry in figures["by_class"]:
        assert sum(entry["answers"].values()) == 25 and len(entry["likeliest"]) == 3
        assert 0 <= entry["likeliest"][2]["probability"] <= entry["likeliest"][0]["probability"] <= 1
        assert entry["agreement"] == pytest.approx(entry["answers"].get(str(entry["class"]), 0) / 25)
    names = [entry["name"] for entry in figures["hypotheses"]]
    assert names[0] == "as declared" and "dark and light exchanged" in names
    assert figures["agreement"] == pytest.approx(sum(entry["agreement"] for entry in figures["by_class"]) / 4)
    assert all(entry["distance"] > 0 and entry["variance_ratio"] > 0 for entry in figures["layers"])


def test_of_many_classes_twenty_are_drawn(tiny_recipe, monkeypatch):
    asked = []

    def fake(self, ids, classes, **_):
        asked.extend(classes.tolist())
        count = len(ids)
        return painter.Painting(
            images=torch.randint(0, 256, (count, 1, 32, 32), dtype=torch.uint8),
            alive=torch.arange(count) != 0,
            targets=torch.zeros(count, 1),
            losses=torch.zeros(1, 4),
            latents=torch.ones(count),
            plan=None,
        )

    monkeypatch.setattr(painter.Painter, "paint", fake)
    names = [f"class {k}" for k in range(345)]
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher.append(nn.Linear(4, 345))
    from diffdfkd.engine import classifier

    built = classifier.Classifier(teacher, classifier.Preprocessing(1, 28, (0.3,), (0.3,), "bilinear"), names)
    monkeypatch.setattr(classifier, "build_classifier", lambda *_, **__: built.requires_grad_(False).eval())
    recipe = load_recipe(tiny_recipe, [f"teacher.classes={json.dumps(names)}", "synthesis.batch_size=50"])
    text, _ = check(recipe, progress=False)
    assert len(asked) == 100 and len(set(asked)) == 20 and max(asked) > 300
    assert len(set(asked[:50])) == 20  # mixed within a batch
    assert text.startswith("98 unguided images of 20 of the 345 classes") and "2 more were not finite" in text


def test_a_prompt_without_the_class_says_that_answers_mean_nothing(tiny_recipe):
    text, sound = check(load_recipe(tiny_recipe, ["synthesis.prompt=a photo"]), progress=False)
    assert sound and "synthesis.prompt has no {}" in text and "class order cannot be checked" in text


def test_the_command_exits_with_3_when_something_looks_wrong(tiny_recipe, monkeypatch, tmp_path):
    from diffdfkd.recipes import check as module

    monkeypatch.setattr(module, "check", lambda *_, **__: ("text", False))
    assert CliRunner().invoke(app, ["check", str(tiny_recipe)]).exit_code == 3
    monkeypatch.setattr(module, "check", lambda *_, **__: ("text", True))
    assert CliRunner().invoke(app, ["check", str(tiny_recipe)]).exit_code == 0


def test_an_unwritable_json_file_is_one_line(tiny_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--json: .*file/x.json cannot be written"):
        check(load_recipe(tiny_recipe), json_file=tmp_path / "file" / "x.json", progress=False)


@pytest.fixture(scope="module")
def demo():
    """The demo's teacher and 100 unguided images, at each of three seeds, with the classes asked for."""
    from diffdfkd.engine.painter import Models
    from diffdfkd.recipes.check import _draw
    from diffdfkd.recipes.launch import settle_machine
    from diffdfkd.recipes.run import load_prior_for

    recipe = settle_machine(load_recipe("fashion"))
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher")
    models = Models(load_prior_for(recipe, teacher), teacher)
    drawn = [_draw(recipe.model_copy(update={"seed": seed}), models, False)[:2] for seed in range(3)]
    return recipe, teacher, drawn


def judged(recipe, teacher, images, asked, names=None):
    readings = [read(teacher, hypothesis, images, asked) for hypothesis in hypotheses(teacher.preprocessing, 32)]
    judgement = judge([reading for reading in readings if reading is not None])
    best = judgement.reading if judgement else readings[0]
    order = better_order(best.look.probabilities, asked, names or teacher.classes)
    return judgement, order, findings(recipe, readings, judgement, order, asked)


@pytest.mark.parametrize("colourful", [False, True])
def test_rgb_or_bgr_is_judged_only_where_the_images_tell(tiny_recipe, colourful):
    """A teacher that remembers images of a reddish world, shown grey or reddish ones."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8).expand(-1, 3, -1, -1).clone()
    if colourful:
        images[:, 2] //= 8
    network = ARCHITECTURES["small_cnn"](channels=3, classes=4, width=8)
    teacher = Classifier(network, Preprocessing(3, 28, (0.5,), (0.5,), "bilinear"), list("abcd"))
    for _ in range(100):
        network.train()(teacher.preprocessing(images.float() / 255))
    teacher.eval()
    recipe = load_recipe(tiny_recipe, ["teacher.channels=3"])
    asked = torch.arange(60) % 4
    assert recipe.teacher.channels == 3
    texts = [finding.text for finding in judged(recipe, teacher, images, asked)[2]]
    assert any("Not judged is whether the teacher takes RGB or BGR" in text for text in texts) != colourful


def test_words_that_are_no_forms_of_the_names_are_left_to_the_reader(tiny_recipe):
    words = "[a t-shirt, handbag, coat, sneaker]"
    recipe = load_recipe(tiny_recipe, [f"synthesis.words={words}"])
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher")
    images, asked = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 4
    _, order, found = judged(recipe, teacher, images, asked)
    (text,) = (finding.text for finding in found if "synthesis.words" in finding.text and "compare" in finding.text)
    assert order is None and text.endswith("the names: T-shirt/top by a t-shirt, <b>Shoe</b> by sneaker.")


@pytest.mark.slow
def test_the_demo_as_shipped_is_sound(demo):
    recipe, teacher, drawn = demo
    for images, asked in drawn:
        judgement, order, words = judged(recipe, teacher, images, asked)
        assert judgement is None and order is None
        assert [finding.cure for finding in words] == [None, None] and "Nothing looks wrong" in words[0].text
        # Coats and shirts are named in hardly any unguided image, trousers in most.
        assert "exchanged unseen" in words[1].text and "Coat" in words[1].text and "Trouser" not in words[1].text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mean", "std", "word"),
    [
        (0.5, 0.5, "normalisation"),
        (0.0, 1.0, "normalisation"),
        (0.1307, 0.3081, "normalisation"),
        (0.449, 0.226, "normalisation"),
        (0.0, 1 / 255, "value range"),
    ],
)
def test_the_demo_with_other_preprocessing_is_not(demo, mean, std, word):
    recipe, teacher, drawn = demo
    wrong = recipe.teacher.model_copy(update={"mean": [mean], "std": [std]})
    recipe = recipe.model_copy(update={"teacher": wrong})
    declared, teacher.preprocessing = teacher.preprocessing, replace(teacher.preprocessing, mean=(mean,), std=(std,))
    try:
        for images, asked in drawn:
            judgement, order, words = judged(recipe, teacher, images, asked)
            assert order is None and judgement is not None
            assert f"the {word} looks wrong" in words[0].text and words[0].text.startswith("teacher.")
            assert words[0].cure == "'teacher.mean=[0.286]' 'teacher.std=[0.353]'"  # Fashion-MNIST's
    finally:
        teacher.preprocessing = declared


@pytest.mark.slow
def test_the_demo_with_its_classes_in_another_order_is_not(demo):
    recipe, teacher, drawn = demo
    true, words = recipe.teacher.classes, dict(zip(recipe.teacher.classes, recipe.synthesis.words, strict=True))
    names = sorted(true)
    alphabetical = recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"classes": names}),
            "synthesis": recipe.synthesis.model_copy(update={"words": [words[name] for name in names]}),
        }
    )
    for images, asked in drawn:
        places = torch.tensor([names.index(true[label]) for label in asked.tolist()])
        judgement, order, found = judged(alphabetical, teacher, images, places, names)
        assert judgement is None and order is not None
        assert sum(names[label] == true[output] for label, output in order.output.items()) >= 5
        assert "class order looks wrong" in found[0].text and "synthesis.words=" in found[0].cure
