import io
import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.painter import Painting
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes.cli import app
from diffdfkd.recipes.contact_sheet import contact_sheet
from diffdfkd.recipes.preview import preview


@pytest.fixture(scope="module")
def shown(tiny_recipe, tmp_path_factory):
    """Text, folder and figures of a preview of the tiny recipe, in the default folder."""
    folder = tmp_path_factory.mktemp("preview")
    text = preview(load_recipe(tiny_recipe, [f"output={folder / 'run'}", "synthesis.batch_size=9"]))
    assert [path.name for path in folder.iterdir()] == ["run-preview"]
    return text, folder / "run-preview", json.loads((folder / "run-preview" / "preview.json").read_text())


def test_picture_and_figures_are_all_that_is_written(shown):
    text, folder, _ = shown
    assert sorted(path.name for path in folder.iterdir()) == ["preview.json", "preview.png"]
    assert text.endswith(f"wrote {folder / 'preview.png'} and preview.json")
    picture = Image.open(folder / "preview.png")
    # Four classes, each with two samples, each without and with guidance.
    assert picture.width > 4 * 84 and picture.height > 4 * 84 and picture.mode == "RGB"


def test_figures_of_both_halves(shown):
    text, _, figures = shown
    assert [sample["class"] for sample in figures["samples"]].count(0) == 2 and len(figures["samples"]) == 8
    assert len(figures["layers"]) == 8 and len(figures["by_class"]) == 4
    for which in ("unguided", "guided"):
        total = sum(sum(layer[which].values()) for layer in figures["layers"])
        assert figures["batchnorm"][which] == pytest.approx(total, abs=1e-4)
        own = [entry[which]["agreement"] for entry in figures["by_class"]]
        assert figures["signs"][which]["agreement"] == pytest.approx(sum(own) / 4)
        assert all(0 <= entry[which]["confidence"] <= 1 for entry in figures["by_class"])
        assert figures["images_per_second"][which] > 0
    assert figures["batchnorm"]["unguided"] != figures["batchnorm"]["guided"]
    assert f"{figures['batchnorm']['unguided']:.3g} -> {figures['batchnorm']['guided']:.3g}" in text
    assert max(map(len, text.split("\n")[:-1])) <= 100


def test_the_alarms_of_a_run_are_given(tiny_recipe, tmp_path):
    text = preview(load_recipe(tiny_recipe, ["guidance.rho=50"]), tmp_path / "to")
    alarms = json.loads((tmp_path / "to" / "preview.json").read_text())["alarms"]
    assert "saturation" in [alarm["kind"] for alarm in alarms]
    assert "alarm: images are saturated" in text and "no alarms" not in text


def test_an_unguided_recipe_has_one_half(tiny_recipe, tmp_path):
    overrides = ["guidance.mode=none", "guidance.adversarial_weight=0", f"output={tmp_path / 'run'}"]
    text = preview(load_recipe(tiny_recipe, overrides))
    figures = json.loads((tmp_path / "run-preview" / "preview.json").read_text())
    assert figures["batchnorm"]["guided"] is None and figures["by_class"][0]["guided"] is None
    assert "->" not in text and "no guidance" in text and "alarm" not in text


def test_the_runs_own_folder_is_never_written_to(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, [f"output={tmp_path / 'run'}"])
    for folder in ("run", "run/preview", "run/../run"):
        with pytest.raises(UserError, match=r"--to: .* is in the run's own folder"):
            preview(recipe, tmp_path / folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--to: .* is a file"):
        preview(recipe, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_prints_the_text(tiny_recipe, tmp_path, monkeypatch):
    from diffdfkd.recipes import preview as module

    monkeypatch.setattr(module, "preview", lambda recipe, to: f"{recipe.seed} {to}")
    result = CliRunner().invoke(app, ["preview", str(tiny_recipe), "seed=4", "--to", str(tmp_path)])
    assert result.exit_code == 0 and result.output.strip() == f"4 {tmp_path}"


def painting(count, channels, size, alive=None):
    images = torch.randint(1, 255, (count, channels, size, size), dtype=torch.uint8)
    whole = torch.ones(count, dtype=torch.bool) if alive is None else torch.tensor(alive)
    return Painting(images, whole, torch.zeros(count, 2), torch.zeros(1, 4), torch.ones(count), None)


@pytest.mark.parametrize(("channels", "size", "edge"), [(1, 28, 84), (3, 32, 96), (3, 300, 256)])
def test_pictures_show_the_images_as_they_are(channels, size, edge):
    given = {"unguided": painting(3, channels, size), "guided": painting(3, channels, size, [True, False, True])}
    names = ["a class with a name that is far too long for its column", "クラス"]
    chances = {which: torch.full((3, 2), 0.5) for which in given}
    sheet = Image.open(io.BytesIO(contact_sheet(given, torch.tensor([0, 1, 0]), chances, names)))
    first = sheet.crop((150, 19, 150 + edge, 19 + edge))
    pixels = given["unguided"].images[0]
    factor = edge // size
    if factor:
        middle = factor // 2
        seen = first.getpixel((2 * factor + middle, 5 * factor + middle))
        assert seen == tuple(pixels[:, 5, 2].expand(3).tolist())
    assert sheet.width == 150 + 2 * (2 * edge + 4 + 16)


@pytest.mark.slow
def test_preview_of_the_demo(tmp_path):
    text = preview(load_recipe("fashion", [f"output={tmp_path / 'run'}"]))
    figures = json.loads((tmp_path / "run-preview" / "preview.json").read_text())
    assert "no alarms" in text and figures["batchnorm"]["guided"] < 0.6 * figures["batchnorm"]["unguided"]
