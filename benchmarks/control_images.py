"""What synthetic images are held against, for the recipes whose prior comes with them.

The floor is fresh augmentations of the images that the prior was trained on; the oracle is as many of the teacher's own
training images.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffdfkd.engine.array_images import ArrayImages
from diffdfkd.engine.classifier import Preprocessing, build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.pixels import Wanted
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes import digit_augmentation, icon_augmentation, render_fonts, render_icons
from diffdfkd.recipes.teacher_data import READERS

ASSETS = render_icons.ASSETS.parent


@dataclass(frozen=True)
class Drawings:
    """Glyphs as planes [N, P, S, S] with their class [N], -1 for none, and what makes grey images of them."""

    planes: Tensor
    classes: Tensor
    augment: Callable[[Tensor, torch.Generator], Tensor]


def icons() -> Drawings:
    glyphs = render_icons.load_glyphs()
    return Drawings(glyphs.select(torch.arange(len(glyphs.classes))), glyphs.classes, icon_augmentation.augment)


def digits() -> Drawings:
    ink = render_fonts.load_glyphs()
    return Drawings(ink.flatten(0, 1).unsqueeze(1), torch.arange(10).repeat(len(ink)), digit_augmentation.augment)


DRAWINGS: dict[str, Callable[[], Drawings]] = {"fashion": icons, "digits": digits}


def setting(recipe: Recipe) -> str:
    """Which of `DRAWINGS` the recipe's prior learnt from; raises UserError for any other prior."""
    folder = Path(recipe.prior.path).resolve()
    for name in DRAWINGS:
        if folder == (ASSETS / name / "prior").resolve():
            return name
    raise UserError(f"prior.path: {folder} is none of those that controls exist for, {' and '.join(DRAWINGS)}")


@dataclass
class FreshImages:
    """The prior's own training images of the teacher's classes, balanced: a new augmentation at every index."""

    drawings: Drawings
    length: int
    seed: int
    preprocessing: Preprocessing
    classes: list[str] | None = None

    def __post_init__(self) -> None:
        labels = self.drawings.classes
        self._by_class = [torch.nonzero(labels == label).flatten() for label in range(int(labels.max()) + 1)]

    def __len__(self) -> int:
        return self.length

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """uint8 images [n, 1, size, size] and classes [n]; a function of the seed and the indices.

        Resized to the teacher's input before the student's augmentation, as synthetic images are.
        """
        key = hashlib.sha256(np.asarray([self.seed, *indices], dtype=np.int64).tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        labels = torch.tensor([int(index) % len(self._by_class) for index in indices])
        rows = torch.stack(
            [
                members[torch.randint(len(members), (), generator=generator)]
                for members in (self._by_class[int(label)] for label in labels)
            ]
        )
        drawn = self.drawings.augment(self.drawings.planes[rows], generator)
        images = self.preprocessing.fit(drawn).clamp(0, 1)
        return (images * 255).round().to(torch.uint8), labels


def floor_images(recipe: Recipe) -> FreshImages:
    """As many as the recipe's distillation draws, so that no augmentation is seen twice."""
    drawn = recipe.distillation.steps * recipe.distillation.batch_size
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher")
    return FreshImages(DRAWINGS[setting(recipe)](), drawn, recipe.seed, teacher.preprocessing)


def oracle_images(recipe: Recipe, data: Path | None = None) -> ArrayImages:
    """As many of the teacher's own training images as the recipe makes, drawn by its seed; all where there are fewer.

    Never from the teacher's validation split. ``data`` is that of `diffdfkd.recipes.teacher_data`.
    """
    known = READERS[setting(recipe)](data, None)
    count = recipe.synthesis.images_per_class * len(recipe.teacher.classes)
    order = torch.randperm(len(known.training), generator=torch.Generator().manual_seed(recipe.seed))[:count]
    chosen = known.training[order.numpy()]
    wanted = Wanted(1, None, "bilinear", None, recipe.teacher.classes, True)
    return ArrayImages(Path(known.title), known.pixels[chosen][:, None], known.labels[chosen], wanted)
