import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffdfkd.engine.architectures import small_cnn
from diffdfkd.engine.errors import UserError


def test_small_cnn_has_the_size_that_its_docstring_states() -> None:
    model = small_cnn(channels=1, classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 334_442
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules()) == 8
    operations = FlopCounterMode(display=False)
    with operations:
        model(torch.zeros(1, 1, 28, 28))
    assert 11.5e6 < operations.get_total_flops() / 2 < 12.5e6


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 33)])
def test_small_cnn_takes_other_images(channels: int, size: int) -> None:
    model = small_cnn(channels=channels, classes=3, width=8, blocks=(0, 1, 0)).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 3)


def test_small_cnn_refuses_impossible_options() -> None:
    with pytest.raises(UserError, match=r"options.width: got 0"):
        small_cnn(1, 10, width=0)
    with pytest.raises(UserError, match=r"options.blocks: got \[1\]"):
        small_cnn(1, 10, blocks=[1])
