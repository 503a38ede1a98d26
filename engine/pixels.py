"""Encoded image files to uint8 arrays of the wanted channels and size."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffdfkd.engine.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may take a file for, whatever its name: not PostScript, for which it would start an interpreter."""

Channels = Literal[1, 3]


@dataclass(frozen=True)
class Wanted:
    """How the images of a source are to come out."""

    channels: Channels | None = None
    """Grey is replicated, colour becomes luma; without it the first image decides."""
    size: int | None = None
    """Height and width, resized antialiased; without it all images must be of one size."""
    interpolation: str = "bilinear"
    crop_fraction: float | None = None
    """With a size: the shorter edge becomes size / crop_fraction, and the centre is cropped to the size."""
    classes: Sequence[str] | None = None
    """Class names in the order of the wanted labels; they give the order of named folders, and the labels' range."""
    labelled: bool = True
    """Without it labels are neither read nor checked."""

    def names(self) -> list[str] | None:
        """The classes as a list of its own."""
        return None if self.classes is None else list(self.classes)


class Decoder:
    """Encoded image to uint8 array [C,H,W] of the wanted channels and size."""

    def __init__(self, wanted: Wanted) -> None:
        self.channels = wanted.channels
        self.size = wanted.size
        self._crop_fraction = wanted.crop_fraction
        self._resampling = Image.Resampling[wanted.interpolation.upper()]

    def settle(self, content: bytes, name: str) -> None:
        """Let the first image of a source decide the channels, where the caller did not."""
        if self.channels is None:
            self.channels = 1 if open_image(content, name).mode in ("1", "L", "LA") else 3

    def keeps(self, height: int, width: int) -> bool:
        """Whether images of this size come out as they are."""
        return self.size is None or (self._crop_fraction is None and (height, width) == (self.size, self.size))

    def decode(self, content: bytes, name: str) -> np.ndarray:
        return self.array(open_image(content, name), name)

    def array(self, image: Image.Image, name: str) -> np.ndarray:
        """As `decode`, of an image in memory; `name` stands in the error of an image that cannot be converted."""
        if image.mode[0] in "IF":
            raise UserError(f"{name}: {image.mode} pixels; convert it to 8 bits a channel")
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None and not self.keeps(image.height, image.width):
            image = self._cropped(image, self.size) if self._crop_fraction else self._resized(image, self.size)
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def _resized(self, image: Image.Image, width: int, height: int | None = None) -> Image.Image:
        return image.resize((width, height or width), self._resampling)

    def _cropped(self, image: Image.Image, size: int) -> Image.Image:
        """As torchvision's ``Resize(edge)`` and ``CenterCrop(size)``, to the pixel."""
        assert self._crop_fraction is not None
        edge, shorter = round(size / self._crop_fraction), min(image.size)
        if shorter != edge:
            image = self._resized(image, *(int(edge * length / shorter) for length in image.size))
        left, top = (round((length - size) / 2) for length in image.size)
        return image.crop((left, top, left + size, top + size))


def open_image(content: bytes, name: str) -> Image.Image:
    """An encoded image, its pixels read; UserError that begins with ``name`` for one that cannot be read."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.load()
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a readable image; {', '.join(FORMATS)} are read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{name}: not a readable image ({str(error).rstrip('.')}); save it again, or take it away"
        ) from None
    return image


def encode_image(image: Image.Image, format: Literal["png", "webp", "jpeg"], quality: int | None = None) -> bytes:
    """An encoded file, lossless but for JPEG and WebP with a `quality` from 1 to 100."""
    lossless: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 6},
        "webp": {"lossless": True, "quality": 80, "method": 4},  # here quality is effort
        "jpeg": {"quality": 95},
    }
    stream = io.BytesIO()
    options = lossless[format] if quality is None else {"quality": quality, "method": 4}
    image.save(stream, format.upper(), **options)
    return stream.getvalue()


def stack(arrays: Sequence[np.ndarray], names: Sequence[str]) -> Tensor:
    """Arrays [C,H,W] as one tensor uint8 [n,C,H,W]; UserError names the first that is not of the first one's size."""
    for array, name in zip(arrays, names, strict=True):
        if array.shape != arrays[0].shape:
            height, width = array.shape[1:]
            first_height, first_width = arrays[0].shape[1:]
            raise UserError(
                f"{name}: {width}x{height} pixels, but {names[0]} has {first_width}x{first_height}; resize them to "
                "one size"
            )
    return torch.from_numpy(np.stack(arrays))
