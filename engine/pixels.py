"""Encoded image files to uint8 arrays of the wanted channels and size."""

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffdfkd.engine.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may take a file for, whatever its name: not PostScript, for which it would start an interpreter."""

Channels = Literal[1, 3]


class Decoder:
    """Encoded image to uint8 array [C,H,W] of the wanted channels and size."""

    def __init__(self, channels: Channels | None, size: int | None, interpolation: str) -> None:
        self.channels = channels
        self.size = size
        self._resampling = Image.Resampling[interpolation.upper()]

    def settle(self, content: bytes, name: str) -> None:
        """Let the first image of a source decide the channels, where the caller did not."""
        if self.channels is None:
            self.channels = 1 if self._open(content, name).mode in ("1", "L", "LA") else 3

    def decode(self, content: bytes, name: str) -> np.ndarray:
        return self.array(self._open(content, name), name)

    def array(self, image: Image.Image, name: str) -> np.ndarray:
        """As `decode`, of an image in memory; `name` stands in the error of an image that cannot be converted."""
        if image.mode[0] in "IF":
            raise UserError(f"{name}: {image.mode} pixels; convert it to 8 bits a channel")
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None and image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), self._resampling)
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    @staticmethod
    def _open(content: bytes, name: str) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            image.load()
        except UnidentifiedImageError:
            raise UserError(f"{name}: not a readable image; {', '.join(FORMATS)} are read") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{name}: not a readable image: {error}") from None
        return image


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
