import io

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from diffdfkd.engine.pixels import Decoder, Wanted

MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST,
}


@pytest.mark.parametrize("interpolation", list(MODES))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("width, height", [(61, 37), (37, 61), (40, 40), (32, 50), (15, 9), (33, 33)])
def test_crop_fraction_is_torchvisions_resize_and_centre_crop(
    width: int, height: int, channels: int, interpolation: str
) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    for size, fraction in ((28, 0.875), (29, 0.9), (32, 1.0)):
        wanted = Wanted(1 if channels == 1 else 3, size, interpolation, crop_fraction=fraction)
        ours = Decoder(wanted).decode(stream.getvalue(), "image")
        theirs = v2.Compose([v2.Resize(round(size / fraction), MODES[interpolation]), v2.CenterCrop(size)])(
            image.convert("L" if channels == 1 else "RGB")
        )
        assert ours.shape == (channels, size, size)
        assert np.array_equal(ours, np.asarray(theirs).reshape(size, size, channels).transpose(2, 0, 1))


def test_without_crop_fraction_the_whole_image_is_squeezed() -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :10] = 255
    squeezed = Decoder(Wanted(1, 20)).array(Image.fromarray(pixels), "image")
    cropped = Decoder(Wanted(1, 20, crop_fraction=1.0)).array(Image.fromarray(pixels), "image")
    assert squeezed[0, :, :4].min() == 255 and squeezed[0, :, 6:].max() == 0
    assert cropped.shape == (1, 20, 20) and cropped.max() == 0
