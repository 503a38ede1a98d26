"""Icon list, glyph asset, augmentation and the captioned image folder."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.recipes.captioned_folder import read_captioned_folder
from diffdfkd.recipes.icon_augmentation import augment
from diffdfkd.recipes.render_icons import (
    ASSETS,
    CLASSES,
    LICENCES,
    Glyphs,
    fill_silhouette,
    icon_svg,
    load_glyphs,
    plan_images,
    read_list,
    write_images,
)


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return load_glyphs()


def few(glyphs: Glyphs) -> Glyphs:
    """Two icons of every class and two general ones."""
    rows = torch.tensor([i for label in range(-1, 10) for i in (glyphs.classes == label).nonzero()[:2, 0].tolist()])
    words = tuple(glyphs.words[row] for row in rows)
    return Glyphs(glyphs.luminance[rows], glyphs.silhouette[rows], words, glyphs.classes[rows])


def augmented(glyphs: Glyphs, seed: int) -> Tensor:
    return augment(few(glyphs).select(torch.arange(22)), torch.Generator().manual_seed(seed))


def test_the_list_is_licensed_and_covers_every_class() -> None:
    icons = read_list()
    assert {icon["licence"] for icon in icons} <= set(LICENCES)
    assert len({(icon["set"], icon["name"]) for icon in icons}) == len(icons)
    counts = Counter(icon["class"] for icon in icons)
    assert set(counts) == {*CLASSES, None}
    assert min(counts.values()) >= 20


def test_every_set_is_attributed() -> None:
    text = (ASSETS / "ICONS.md").read_text(encoding="utf-8")
    for name, count in Counter(icon["set"] for icon in read_list()).items():
        assert f"(`{name}`) | {count} |" in text


def test_only_the_settled_licences_are_used() -> None:
    assert {licence.split("-")[0] for licence in LICENCES} == {"MIT", "Apache", "CC0", "OFL", "CC"}
    assert not any(share in licence for licence in LICENCES for share in ("SA", "NC", "ND"))
    rows = [line for line in (ASSETS / "ICONS.md").read_text(encoding="utf-8").splitlines() if "(`" in line]
    named = {re.sub(r"^\[(.+?)\].*", r"\1", row.strip("| ").split(" | ")[-1]) for row in rows}
    assert named and named <= set(LICENCES)


def test_glyphs_follow_the_list(glyphs: Glyphs) -> None:
    icons = read_list()
    assert glyphs.luminance.shape == glyphs.silhouette.shape == (len(icons), 64, 64)
    assert glyphs.words == tuple(icon["word"] for icon in icons)
    assert [CLASSES[c] if c >= 0 else None for c in glyphs.classes.tolist()] == [icon["class"] for icon in icons]
    assert (ASSETS / "icons.npz").stat().st_size < 2_000_000
    area = glyphs.silhouette.mean(dim=(1, 2))
    assert area.min() > 0.05
    assert area.max() < 0.97


def test_a_list_that_lost_an_icon_is_refused(tmp_path: Path) -> None:
    (tmp_path / "icons.npz").write_bytes((ASSETS / "icons.npz").read_bytes())
    (tmp_path / "icons.json").write_text(json.dumps(read_list()[1:]))
    with pytest.raises(UserError, match="lists"):
        load_glyphs(tmp_path / "icons.npz")


def test_a_ring_is_filled_and_an_open_curve_is_not() -> None:
    ring = np.zeros((20, 20), dtype=np.float32)
    ring[4:16, 4:16] = 1
    ring[6:14, 6:14] = 0
    assert fill_silhouette(ring).sum() == 12 * 12
    ring[4:6, 10] = 0
    assert fill_silhouette(ring).sum() == ring.sum()


def test_a_handle_stays_open_on_request() -> None:
    bag = np.zeros((30, 30), dtype=np.float32)
    bag[12:28, 4:26] = 1
    bag[4:13, 10:20] = 1
    bag[6:12, 12:18] = 0
    assert fill_silhouette(bag, open_handle=True)[8, 15] == 0
    assert fill_silhouette(bag)[8, 15] == 1


def test_svg_takes_the_defaults_of_its_collection() -> None:
    collection = {"height": 24, "icons": {"a": {"body": "<path/>"}, "b": {"body": "<g/>", "width": 32, "left": 2}}}
    assert icon_svg(collection, "a")[1:] == (16, 24)
    assert 'viewBox="2 0 32 24"' in icon_svg(collection, "b")[0]


def test_augmentation_is_a_function_of_the_seed(glyphs: Glyphs) -> None:
    images = augmented(glyphs, 3)
    assert images.shape == (22, 1, 32, 32)
    assert torch.isfinite(images).all()
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, augmented(glyphs, 3))
    assert (images - augmented(glyphs, 4)).abs().mean() > 0.02


def test_objects_are_light_on_black_and_stay_in_the_frame(glyphs: Glyphs) -> None:
    images = torch.cat([augmented(glyphs, seed) for seed in range(8)])
    corners = images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).float().mean() > 0.9
    assert images.amax(dim=(1, 2, 3)).min() > 0.04
    assert 0.1 < (images > 0.05).float().mean() < 0.7


def test_the_plan_balances_classes_and_prefers_the_canonical_word(glyphs: Glyphs) -> None:
    plan = plan_images(glyphs, 4, seed=0)
    counts = Counter(int(glyphs.classes[icon]) for icon, _ in plan)
    assert len({counts[label] for label in range(10)}) == 1
    assert 0.12 < counts[-1] / len(plan) < 0.15
    boots = [text for icon, text in plan if glyphs.classes[icon] == 9]
    assert 0.6 < boots.count("an icon of an ankle boot") / len(boots) < 0.9
    assert plan == plan_images(glyphs, 4, seed=0)
    assert plan != plan_images(glyphs, 4, seed=1)


def test_the_image_folder_is_a_valid_captioned_folder(glyphs: Glyphs, tmp_path: Path) -> None:
    total = write_images(few(glyphs), tmp_path, variants=2, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == total == len(list(tmp_path.glob("*.png")))
    assert {row["class"] for row in rows} == {*CLASSES, None}
    assert all(row["text"].startswith(("an icon of a ", "an icon of an ")) for row in rows)
    with Image.open(tmp_path / rows[0]["file_name"]) as image:
        assert (image.mode, image.size) == ("L", (32, 32))
    assert len(read_captioned_folder(tmp_path).captions) == total
