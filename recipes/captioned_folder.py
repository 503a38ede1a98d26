"""A captioned image folder in Hugging Face's `imagefolder` form: `metadata.jsonl` with `file_name` and `text`."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffdfkd.engine.errors import UserError

CHANNELS = {"L": 1, "RGB": 3}


@dataclass(frozen=True)
class CaptionedImages:
    """`images` uint8 [N, C, S, S] with one caption each."""

    images: Tensor
    captions: list[str]

    def digest(self) -> str:
        """SHA-256 of pixels and captions: two folders with the same digest train the same prior."""
        pixels = hashlib.sha256(self.images.numpy().tobytes())
        pixels.update("\n".join(self.captions).encode())
        return pixels.hexdigest()


def read_captioned_folder(folder: Path) -> CaptionedImages:
    """All images of `folder`, in the order of `metadata.jsonl`; grey (mode L) or colour, square, side a multiple of 8.

    Raises UserError that names the file for anything missing, unreadable or of another size or mode than the first.
    """
    images: list[Tensor] = []
    captions: list[str] = []
    for file_name, text in _metadata(folder):
        image = _read_image(folder / file_name)
        if images and image.shape != images[0].shape:
            raise UserError(
                f"{folder / file_name}: is {_shape(image)}, the first image is {_shape(images[0])}; "
                "make all images of the folder one size and one mode"
            )
        images.append(image)
        captions.append(text)
    if not images:
        raise UserError(f"{folder / 'metadata.jsonl'}: lists no image; add one line per image")
    return CaptionedImages(torch.stack(images), captions)


def _metadata(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path}: not found; --images takes a folder with a metadata.jsonl "
            'of lines such as {"file_name": "0.png", "text": "a caption"}'
        )
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: line {number} is not JSON ({error.msg}); write one JSON object per line"
            ) from error
        fields = [row.get(key) for key in ("file_name", "text")] if isinstance(row, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise UserError(f"{path}: line {number} needs the strings file_name and text; add them")
        yield row["file_name"], row["text"]


def _read_image(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            grey = image.mode in ("L", "1", "I;16")
            array = np.array(image.convert("L" if grey else "RGB"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: listed in metadata.jsonl but not found; add the file or remove the line") from error
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); replace it") from error
    height, width = array.shape[:2]
    if height != width or height % 8:
        raise UserError(f"{path}: is {width}x{height}; images must be square with a side that is a multiple of 8")
    return torch.from_numpy(array).reshape(height, width, -1).permute(2, 0, 1).contiguous()  # [C, S, S]


def _shape(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]} with {image.shape[0]} channel(s)"
