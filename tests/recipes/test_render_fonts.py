"""Font list, glyph asset, augmentation and the captioned image folder of the digits' prior."""

import json
import shutil
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diffdfkd.engine.errors import UserError
from diffdfkd.recipes.captioned_folder import read_captioned_folder
from diffdfkd.recipes.digit_augmentation import BOX, augment
from diffdfkd.recipes.render_fonts import (
    ASSETS,
    LICENCES,
    describe,
    draw_digits,
    find_fonts,
    is_new,
    licence_of,
    load_glyphs,
    plan_images,
    read_list,
    write_images,
)

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@pytest.fixture(scope="module")
def glyphs() -> Tensor:
    return load_glyphs()


def augmented(glyphs: Tensor, seed: int, count: int = 40) -> Tensor:
    fonts, digits = torch.arange(count) * 7 % len(glyphs), torch.arange(count) % 10
    return augment(glyphs[fonts, digits].unsqueeze(1), torch.Generator().manual_seed(seed))


def test_the_list_is_licensed_attributed_and_without_the_excluded() -> None:
    fonts = read_list()
    excluded = json.loads((ASSETS / "excluded.json").read_text(encoding="utf-8"))
    assert len(fonts) >= 300
    assert {font["licence"] for font in fonts} <= set(LICENCES)
    assert len({font["family"] for font in fonts}) == len(fonts)
    assert not {font["family"] for font in fonts} & set(excluded)
    text = (ASSETS / "FONTS.md").read_text(encoding="utf-8")
    for font in fonts:
        assert f"| {font['family']} | {font['style']} |" in text
        assert f"| {font['licence']} | {font['package']} " in text
    for family in excluded:
        assert family in " ".join(text.split())


def test_glyphs_follow_the_list_and_fill_their_square(glyphs: Tensor, tmp_path: Path) -> None:
    assert glyphs.shape == (len(read_list()), 10, 40, 40)
    assert (ASSETS / "fonts.npz").stat().st_size < 2_000_000
    rows, columns = (glyphs > 0.3).any(3).sum(2), (glyphs > 0.3).any(2).sum(2)
    assert torch.maximum(rows, columns).min() >= 36
    shutil.copy(ASSETS / "fonts.npz", tmp_path)
    (tmp_path / "fonts.json").write_text(json.dumps(read_list()[1:]))
    with pytest.raises(UserError, match="lists"):
        load_glyphs(tmp_path / "fonts.npz")


def test_a_digit_looks_like_those_of_other_fonts(glyphs: Tensor) -> None:
    """Tofu, symbols or another script under a digit's code would be nobody's neighbour."""
    flat, mean = (functional.layer_norm(ink.flatten(-2), (1600,)) for ink in (glyphs, glyphs.mean(0)))
    nearest = torch.einsum("fdp,cp->fdc", flat, mean).argmax(2)
    right = (nearest == torch.arange(10)).float().mean(1)
    assert right.mean() > 0.9
    assert right.min() >= 0.3


def test_licences_are_read_from_the_fonts_words() -> None:
    assert licence_of("Licensed under the SIL Open Font License, Version 1.1. http://scripts.sil.org/OFL") == "OFL-1.1"
    assert licence_of("Licensed under the Apache License, Version 2.0") == "Apache-2.0"
    assert licence_of("GNU General Public License with font exception") is None
    assert licence_of("Ubuntu Font Licence 1.0") is None
    assert licence_of(" ") is None


def rename(source: Path, target: Path, licence: str, family: str, kind: int = 2) -> None:
    """A copy of a font with other words in its name table, and another PANOSE kind."""
    from fontTools.ttLib import TTFont

    font = TTFont(source)
    for number, text in (
        (1, family),
        (2, "Regular"),
        (5, "Version 1.0"),
        (13, licence),
        (14, ""),
        (16, family),
        (17, "Regular"),
    ):
        font["name"].setName(text, number, 3, 1, 0x409)
    font["OS/2"].panose.bFamilyType = kind
    target.parent.mkdir(parents=True, exist_ok=True)
    font.save(target)


def test_fonts_are_found_screened_and_told_apart(tmp_path: Path) -> None:
    licence = "Licensed under the SIL Open Font License, Version 1.1"
    rename(DEJAVU, tmp_path / "fonts-a" / "usr" / "plain.ttf", licence, "Plain")
    rename(DEJAVU, tmp_path / "fonts-a" / "usr" / "another.ttf", licence, "Plain Again")
    rename(DEJAVU, tmp_path / "fonts-b" / "hand.ttf", licence, "Hand", kind=3)
    rename(DEJAVU, tmp_path / "fonts-b" / "gpl.ttf", "GNU GPL", "Copyleft")
    rename(DEJAVU, tmp_path / "fonts-b" / "out.ttf", licence, "Out")
    (tmp_path / "fonts-b" / "broken.ttf").write_bytes(b"not a font")
    assert describe(tmp_path / "fonts-b" / "broken.ttf") is None
    found = find_fonts(tmp_path, {"Out": "by eye"})
    assert [row["family"] for _, row in found] == ["Plain", "Plain Again"]
    assert found[0][1] == {
        "family": "Plain",
        "style": "Regular",
        "version": "1.0",
        "licence": "OFL-1.1",
        "package": "fonts-a",
        "file": "plain.ttf",
    }
    first, second = (draw_digits(path) for path, _ in found)
    assert first is not None and second is not None
    assert is_new(first, []) and not is_new(second, [first])
    assert not is_new(np.repeat(first[:1], 10, axis=0), []), "ten times the same glyph, as tofu is"


def test_augmentation_is_a_function_of_the_seed(glyphs: Tensor) -> None:
    images = augmented(glyphs, 3)
    assert images.shape == (40, 1, 32, 32)
    assert torch.isfinite(images).all() and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, augmented(glyphs, 3))
    assert (images - augmented(glyphs, 4)).abs().mean() > 0.02


def test_digits_are_centred_by_mass_in_their_box(glyphs: Tensor) -> None:
    images = augmented(glyphs, 0, 1000)[:, 0]
    axis = (torch.arange(32) + 0.5) / 32 - 0.5
    mass = images.sum((1, 2))
    for centre in ((images.sum(1) * axis).sum(1) / mass, (images.sum(2) * axis).sum(1) / mass):
        assert centre.abs().max() < 0.1
        assert centre.mean().abs() < 0.01
    ink = images > 0.5
    longer = torch.maximum(ink.any(1).sum(1), ink.any(2).sum(1)).float() / 32
    assert longer.median() == pytest.approx(BOX, abs=0.06)
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] < 0.05).float().mean() > 0.99


def test_the_plan_is_balanced_and_seeded() -> None:
    plan = plan_images(fonts=30, images=600, seed=0)
    assert Counter(digit for _, digit in plan) == dict.fromkeys(range(10), 60)
    assert len(set(plan)) == 300
    assert plan == plan_images(30, 600, 0) != plan_images(30, 600, 1)


def test_the_image_folder_is_a_valid_captioned_folder(glyphs: Tensor, tmp_path: Path) -> None:
    write_images(glyphs[:3], tmp_path, images=20, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert {(row["text"], row["class"]) for row in rows} >= {("a digit zero", "0"), ("a digit nine", "9")}
    with Image.open(tmp_path / rows[0]["file_name"]) as image:
        assert (image.mode, image.size) == ("L", (32, 32))
    assert len(read_captioned_folder(tmp_path).captions) == 20
