import pytest
import torch
from torch import Generator, Tensor

from diffdfkd.engine.augmentation import AUGMENTATIONS, augment, crop, cutmix, erase, flip, mixup
from diffdfkd.engine.distillation_recipe import DistillationRecipe


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def pictures(batch: int = 64, channels: int = 3, height: int = 17, width: int = 23) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=seeded(99)) * 0.9 + 0.1  # never black


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(64, 3, 17, 23), (5, 1, 28, 28), (1, 3, 8, 8)])
def test_each_keeps_shape_and_range_and_hangs_on_the_generator_alone(name: str, shape: tuple[int, ...]) -> None:
    images = pictures(*shape)
    before = images.clone()
    torch.manual_seed(1)
    first = augment(images, [name], seeded(3))
    torch.manual_seed(2)
    again = augment(images, [name], seeded(3))
    assert first.shape == images.shape and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert torch.equal(images, before)
    if len(images) > 1:
        assert not torch.equal(first, augment(images, [name], seeded(4)))


def test_the_recipe_names_what_exists() -> None:
    names = list(AUGMENTATIONS)
    assert DistillationRecipe(augmentation=names).augmentation == names  # type: ignore[arg-type]


def test_flip_mirrors_about_half() -> None:
    images = pictures(1000, 1, 4, 5)
    flipped = flip(images, seeded())
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored)
    assert 430 < int(mirrored.sum()) < 570  # 4.4 standard deviations


def test_crop_shifts_whole_pixels_by_up_to_an_eighth() -> None:
    images = pictures(200, 2, 16, 24)
    cropped = crop(images, seeded())
    seen = set()
    for image, shifted in zip(images, cropped, strict=True):
        filled = (shifted > 0).all(0)
        rows, columns = filled.any(1).nonzero().flatten(), filled.any(0).nonzero().flatten()
        down, right = int(rows[0]) - (15 - int(rows[-1])), int(columns[0]) - (23 - int(columns[-1]))
        assert torch.equal(shifted, _shift(image, down, right))
        seen.add((down, right))
    assert {down for down, _ in seen} == {right for _, right in seen} == {-2, -1, 0, 1, 2}


def _shift(image: Tensor, down: int, right: int) -> Tensor:
    shifted = torch.roll(image, (down, right), (1, 2))
    for place, dimension in ((down, 1), (right, 2)):
        size = image.shape[dimension]
        black = torch.arange(place) if place > 0 else torch.arange(size + place, size)
        shifted = shifted.index_fill(dimension, black, 0)
    return shifted


def test_erase_blackens_one_box_in_about_half() -> None:
    images = pictures(400, 3, 20, 30)
    erased = erase(images, seeded())
    black = (erased == 0).all(1)
    assert torch.equal(erased[~black.unsqueeze(1).expand_as(erased)], images[~black.unsqueeze(1).expand_as(images)])
    touched = black.flatten(1).any(1)
    assert 140 < int(touched.sum()) < 260
    for mask in black[touched]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])
        assert int(mask.sum()) <= 0.36 * mask.numel()


def test_cutmix_pastes_a_box_and_mixup_blends() -> None:
    images = torch.arange(1, 51).div(50).view(50, 1, 1, 1).expand(50, 2, 12, 12).contiguous()
    mixed = cutmix(images, seeded())
    values = [set(sample.unique().tolist()) for sample in mixed]
    assert all(len(value) <= 2 for value in values) and any(len(value) == 2 for value in values)
    assert set().union(*values) <= set(images.unique().tolist())
    foreign = (mixed != images).float().mean()
    assert 0.2 < foreign < 0.5  # half on average, less what the border clips
    blended = mixup(images, seeded())
    assert torch.equal(blended, blended[:, :, :1, :1].expand_as(blended))
    assert not torch.isin(blended, images).all()


def test_affine_of_little_moves_little() -> None:
    ramp = torch.linspace(0, 1, 32).expand(100, 1, 32, 32)
    moved = AUGMENTATIONS["affine"](ramp, seeded())[:, :, 12:20, 12:20]
    shift = (moved - ramp[:, :, 12:20, 12:20]).abs().amax(dim=(1, 2, 3))
    assert 0.01 < shift.mean() < 0.2 and shift.max() < 0.3
