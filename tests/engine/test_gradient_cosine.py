"""Cosines of guidance gradients: by hand, with a decoder that is the full one in disguise, and what a run is told."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_stages import classifier, open_prior
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.gradient_cosine import LEVELS, check_decoder, compare_decoders, cosines, level_of, reduced
from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.stages import Gradient


def gradient(values: list[tuple[float, float]], finite: list[bool]) -> Gradient:
    tensor = torch.tensor(values, dtype=torch.float32).view(len(values), 2, 1, 1)
    return Gradient(tensor, tensor.flatten(1).norm(dim=1), torch.tensor(finite), torch.zeros(4))


def test_cosines_by_hand() -> None:
    ours = gradient([(1, 0), (3, 4), (-2, 0), (1, 1), (0, 0), (1, 2)], [True, True, True, False, True, True])
    theirs = gradient([(5, 0), (4, 3), (1, 0), (1, 1), (1, 0), (0, 0)], [True] * 6)
    # The fourth is not finite, the fifth points nowhere, and to the last one nothing can be compared.
    torch.testing.assert_close(cosines(ours, theirs), torch.tensor([1.0, 24 / 25, -1.0, 0.0]))


def test_levels_are_thirds() -> None:
    assert [level_of(step, 12) for step in (0, 3, 4, 7, 8, 11)] == [LEVELS[i] for i in (0, 0, 1, 1, 2, 2)]
    assert [level_of(step, 2) for step in (0, 1)] == ["early", "middle"]


def test_reduced_images_are_means_over_squares() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(reduced(images, 2), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    assert reduced(images, 4) is images


class Disguised(nn.Module):
    """The prior's own decoder in a light one's place, or that of the turned latent."""

    def __init__(self, prior: Prior, sign: float = 1.0) -> None:
        super().__init__()
        self.prior, self.sign = [prior], sign

    def forward(self, latents: Tensor) -> Tensor:
        # The value is the decoder's in any case, its derivative that with the sign.
        latents = self.sign * latents + (1 - self.sign) * latents.detach()
        return self.prior[0].decode(latents)


@pytest.fixture
def recipe(tiny_prior: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "prior": str(tiny_prior),
            "teacher": {"architecture": "small_cnn", "classes": ["Bag", "Coat", "Shoe"], "channels": 1, "size": 28},
            "student": {"architecture": "small_cnn"},
            "synthesis": {"images_per_class": 4, "batch_size": 6, "steps": 6},
            "guidance": {"batchnorm_weight": 0.3, "decoder": "light.safetensors", "decoder_window": [0.3, 1.0]},
            "kernel": "reference",
        }
    )


def with_decoder(recipe: Recipe, decoder: Any) -> Prior:
    prior = open_prior(Path(recipe.prior.path))
    prior.guidance_decoder = decoder(prior)
    return prior


def test_the_full_decoder_agrees_with_itself(recipe: Recipe) -> None:
    found = compare_decoders(recipe, with_decoder(recipe, Disguised), classifier(), samples=6)
    assert [agreement.level for agreement in found] == [*LEVELS]
    for agreement in found:
        assert agreement.cosine == pytest.approx(1, abs=1e-4) and agreement.pixels < 1e-6


def test_a_run_is_told_where_the_decoder_serves(recipe: Recipe, tmp_path: Path) -> None:
    with Journal(tmp_path / "metrics.jsonl") as journal:
        check_decoder(recipe, with_decoder(recipe, Disguised), classifier(), journal)
    (event,) = read_journal(tmp_path / "metrics.jsonl")
    # Steps 2 to 5 of 6.
    assert event["event"] == "guidance_decoder" and event["samples"] == 6
    assert set(event["cosines"]) == {"middle", "late"} and min(event["cosines"].values()) > 0.99


def test_a_low_cosine_is_pointed_out(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diffdfkd.engine.gradient_cosine.LOW_COSINE", 1.1)
    with caplog.at_level(logging.WARNING), Journal(tmp_path / "metrics.jsonl") as journal:
        check_decoder(recipe, with_decoder(recipe, Disguised), classifier(), journal)
    assert "guidance.decoder: the cosine" in caplog.text and "late 1.00" in caplog.text


@pytest.mark.parametrize("sign", [-1.0, float("nan")])
def test_a_decoder_that_leads_elsewhere_is_refused(recipe: Recipe, tmp_path: Path, sign: float) -> None:
    with (
        Journal(tmp_path / "metrics.jsonl") as journal,
        pytest.raises(UserError, match=r"guidance\.decoder: .* leads elsewhere"),
    ):
        check_decoder(recipe, with_decoder(recipe, lambda prior: Disguised(prior, sign)), classifier(), journal)
