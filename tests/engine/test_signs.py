import pytest
import torch
from torch import nn

from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.cutmix import plan_cutmix
from diffdfkd.engine.painter import Painting
from diffdfkd.engine.recipe import CutMixRecipe
from diffdfkd.engine.signs import Observation, look_at
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.kernels.batchnorm_loss import batchnorm_loss

CLASSES = ["a", "b", "c"]


def make_teacher(*extra):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), *extra
        )
        model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(6, 3))
        model[1].running_mean.normal_()
        model[4].running_var.uniform_(0.1, 2)
    return Classifier(model, Preprocessing(1, 12, (0.4,), (0.2,), "bilinear"), CLASSES).requires_grad_(False).eval()


def images(count, seed=0):
    return torch.randint(0, 256, (count, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def painting(pixels, labels, alive=None, latents=None):
    count = len(pixels)
    return Painting(
        images=pixels,
        alive=torch.ones(count, dtype=torch.bool) if alive is None else torch.tensor(alive),
        targets=nn.functional.one_hot(torch.tensor(labels), 3).float(),
        losses=torch.zeros(1, 4),
        latents=torch.ones(count) if latents is None else torch.tensor(latents),
        plan=plan_cutmix(CutMixRecipe(), torch.tensor(labels), 3, 1, (1, 1), 0, torch.arange(len(labels))),
    )


def test_l_bn_of_many_images_is_that_of_one_batch():
    teacher, pixels = make_teacher(), images(60)  # three forward passes
    with BatchNormTaps(teacher.model) as taps, torch.no_grad():
        answers = teacher(pixels.float() / 255).softmax(1)
        whole = batchnorm_loss(taps.inputs, taps.running_means, taps.running_variances, torch.ones(60))
    found = look_at(teacher, pixels)
    assert found.batchnorm == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(found.probabilities, answers, atol=1e-6)
    assert [(layer.name, len(layer.mean)) for layer in found.layers] == [("1", 4), ("4", 6)]
    assert not teacher.model[1]._forward_pre_hooks and not teacher.model._forward_pre_hooks


def test_a_teacher_without_batchnorm_answers_all_the_same():
    teacher = make_teacher()
    teacher.model[1], teacher.model[4] = nn.Identity(), nn.Identity()
    found = look_at(teacher, images(3))
    assert found.batchnorm is None and not found.layers and found.probabilities.shape == (3, 3)
    assert "no BatchNorm layer" in found.unreadable


def test_a_layer_that_takes_no_part_makes_l_bn_unknown():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.BatchNorm2d(6)

        def forward(self, values):
            return values

    found = look_at(make_teacher(Beside()), images(30))
    assert found.batchnorm is None and "auxiliary" in found.unreadable and len(found.probabilities) == 30


def test_signs_are_those_of_the_samples_that_were_finished():
    teacher, pixels = make_teacher(), images(6)
    pixels[0] = 255
    pixels[1, :, :6] = 0
    observation = Observation(teacher)
    observation.add(painting(pixels[:3], [0, 1, 0], latents=[1.0, 2.0, 3.0]))
    observation.add(painting(pixels[3:], [2, 2, 2], [True, False, True], [4.0, torch.nan, 5.0]))
    kept = pixels[[0, 1, 2, 3, 5]]
    found = observation.look()
    signs = observation.signs(found)
    assert observation.labels.tolist() == [0, 1, 0, 2, 2]
    assert signs.images == 5 and signs.latents == 3
    assert signs.batchnorm == pytest.approx(look_at(teacher, kept).batchnorm, abs=1e-5)
    assert signs.saturated == pytest.approx(((kept == 0) | (kept == 255)).float().mean().item(), abs=1e-5)
    assert 0 < signs.distance < 2


def test_the_teacher_sees_no_more_than_it_is_to_see():
    observation = Observation(make_teacher(), seen=4)
    observation.add(painting(images(3), [0, 1, 2]))
    observation.add(painting(images(3, 1), [2, 1, 0]))
    observation.add(painting(images(3, 2), [0, 0, 0]))
    found = observation.look()
    assert len(found.probabilities) == 4 and observation.labels.tolist() == [0, 1, 2, 2]
    alone = Observation(make_teacher())
    alone.add(painting(torch.cat([images(3), images(3, 1)])[:4], [0, 1, 2, 2]))
    assert found.batchnorm == pytest.approx(alone.look().batchnorm)
    # Diversity and the like are of all.
    assert observation.signs(found).images == 4 and observation.signs(found).distance is not None


def test_nothing_finished_gives_no_signs():
    teacher = make_teacher()
    observation = Observation(teacher)
    observation.add(painting(images(2), [0, 1], [False, False]))
    assert observation.signs(look_at(teacher, images(1))) is None
