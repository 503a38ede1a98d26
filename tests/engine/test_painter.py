import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffdfkd.engine.painter import encode


def picture(channels: int, size: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, channels, 6, 6, generator=generator), (size, size), mode="bicubic"
    )
    return (smooth[0] * 255).clamp(0, 255).to(torch.uint8)


def decoded(content: bytes, channels: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(content)).convert("L" if channels == 1 else "RGB")
    return torch.from_numpy(np.array(image)).reshape(48, 48, channels).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["png", "webp"])
def test_files_are_lossless_and_of_equal_bytes(format, channels) -> None:  # type: ignore[no-untyped-def]
    image = picture(channels)
    content = encode(image, format)
    assert content == encode(image.clone(), format)
    assert Image.open(io.BytesIO(content)).format == format.upper()
    assert torch.equal(decoded(content, channels), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_quality_makes_webp_lossy_and_small(channels: int) -> None:
    image = picture(channels)
    contents = [encode(image, "webp", quality) for quality in (10, 80, 100)]
    assert contents[1] == encode(image, "webp", 80)
    assert len(contents[0]) < len(contents[1]) < len(contents[2])
    errors = [(decoded(content, channels).float() - image.float()).abs().mean() for content in contents]
    assert errors[0] > errors[1] > errors[2] > 0 and errors[1] < 6
