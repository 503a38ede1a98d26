"""Dimensions that TensorRT leaves open until an engine is called."""

import pytest
import torch

from diffdfkd.engine.backends.tensorrt_ports import Tensor, compare
from diffdfkd.engine.runner import NoEngine
from diffdfkd.engine.specification import Port, Specification

RANGED = Specification(
    "decoder",
    (Port("latent", (4, 4, 8, 8), torch.float32),),
    (Port("image", (4, 3, 64, 64), torch.float32), Port("finite", (1,), torch.bool, False)),
    1,
    8,
)
LATENT, IMAGE, FINITE = Tensor("FLOAT", (-1, 4, 8, 8)), Tensor("FLOAT", (-1, 3, 64, 64)), Tensor("BOOL", (1,))


def test_an_output_may_leave_its_later_dimensions_open() -> None:
    compare(RANGED, {"latent": LATENT}, {"image": IMAGE, "finite": FINITE}, "x")
    compare(RANGED, {"latent": LATENT}, {"finite": FINITE, "image": Tensor("FLOAT", (-1, 3, -1, -1))}, "x")


@pytest.mark.parametrize(
    ("latent", "image", "finite", "message"),
    [
        (
            Tensor("FLOAT", (-1, 4, -1, 8)),
            IMAGE,
            FINITE,
            r"input latent is float32 \[any, 4, any, 8\]; float32 \[any, 4",
        ),
        (
            LATENT,
            Tensor("FLOAT", (4, 3, 64, 64)),
            FINITE,
            r"output image is float32 \[4, 3, 64, 64\]; float32 \[any, 3",
        ),
        (
            LATENT,
            Tensor("FLOAT", (-1, 3, 64, 32)),
            FINITE,
            r"output image is float32 \[any, 3, 64, 32\]; float32 \[any",
        ),
        (LATENT, IMAGE, Tensor("BOOL", (-1,)), r"output finite is bool \[any\]; bool \[1\] expected"),
        (LATENT, IMAGE, Tensor("FP8", (1,)), r"output finite is FP8 \[1\]; bool \[1\] expected"),
    ],
)
def test_what_does_not_fit(latent: Tensor, image: Tensor, finite: Tensor, message: str) -> None:
    with pytest.raises(NoEngine, match=f"^x: {message}"):
        compare(RANGED, {"latent": latent}, {"image": image, "finite": finite}, "x")
