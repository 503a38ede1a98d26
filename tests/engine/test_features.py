import pytest
import torch
from torch import Tensor, nn

from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.features import LOGITS, PENULTIMATE, FeatureTap
from diffdfkd.engine.signs import LOOKED_AT_ONCE

AS_IT_IS = Preprocessing(1, 8, (0.3,), (0.5,), "bilinear")


class Headed(nn.Module):
    """A linear layer of as many outputs as classes inside, an unused one, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.early, self.middle, self.unused = nn.Linear(64, 3), nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return self.middle(self.early(images.flatten(1)).relu()).relu()


def images(count: int = LOOKED_AT_ONCE + 3) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()


def test_features_are_what_the_head_is_given_and_no_hook_stays() -> None:
    torch.manual_seed(0)
    model = Headed()
    teacher = Classifier(model, AS_IT_IS, list("abc")).eval()
    with FeatureTap(teacher) as tap:
        found, kind = tap.read(images())
    with torch.no_grad():
        expected = model.features((images().float() / 255 - 0.3) / 0.5)
    torch.testing.assert_close(found, expected)
    assert kind == PENULTIMATE and not found.requires_grad
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("scripted", [False, True])
def test_a_network_without_a_linear_head_gives_its_logits(scripted: bool) -> None:
    model: nn.Module = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    if scripted:
        model = torch.jit.trace(Headed(), torch.zeros(1, 1, 8, 8))
    teacher = Classifier(model, AS_IT_IS, list("abc")).eval()
    with FeatureTap(teacher) as tap:
        found, kind = tap.read(images())
    with torch.no_grad():
        torch.testing.assert_close(found, teacher(images().float() / 255))
    assert kind == LOGITS
