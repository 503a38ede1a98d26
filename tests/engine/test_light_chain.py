"""The guidance chain through a light decoder: the run's own, its digest, and what an engine makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_stages import WEIGHTS, classifier, open_prior
from torch.nn import functional
from tracing import distance

from diffdfkd.engine.backends.build import Settings, build
from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.engine_stages import Batches, Stage, chain_engine_stage
from diffdfkd.engine.guidance_decoder import GuidanceDecoder, Shape
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.stages import guidance_chain, light_decode_stage
from diffdfkd.engine.taps import BatchNormTaps


@pytest.fixture(scope="module")
def prior(tiny_prior: Path) -> Prior:
    return open_prior(tiny_prior)


def light(form: Any = "convolutions", seed: int = 0, **fields: int) -> GuidanceDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = Shape(form, **{"latent_channels": 4, "channels": 1, "scale": 4, "width": 8, **fields})
        return GuidanceDecoder(shape, "").eval().requires_grad_(False)


def stage(prior: Prior, decoder: GuidanceDecoder | None, precision: torch.dtype = torch.float32) -> Stage:
    return chain_engine_stage(prior, classifier(), WEIGHTS, Batches(4), precision, None, decoder)


@pytest.mark.parametrize("form", ["convolutions", "linear"])
@pytest.mark.parametrize(("precision", "least"), [(torch.float32, 0.9999), (torch.bfloat16, 0.9)])
def test_stage_is_the_runs_own(prior: Prior, form: Any, precision: torch.dtype, least: float) -> None:
    made, teacher = stage(prior, light(form), precision), classifier()
    taps = BatchNormTaps(teacher.model)
    chain = guidance_chain(light_decode_stage(light(form)), teacher, taps, WEIGHTS, kernel="reference")
    inputs = made.examples(4, 0)
    expected = chain(*inputs)
    gradient, _, finite, losses = made.function(*inputs)
    assert functional.cosine_similarity(gradient.flatten(1), expected.gradient.flatten(1))[finite].min() > least
    assert torch.equal(finite, expected.finite)
    assert distance(losses, expected.losses) < (1e-5 if precision == torch.float32 else 0.1)


def test_digest_knows_the_decoder(prior: Prior) -> None:
    digests = [stage(prior, decoder).digest for decoder in (None, light(), light(seed=1), light("linear"))]
    assert len(set(digests)) == 4
    assert stage(prior, light()).digest == digests[1]
    # Not the VAE, which takes no part.
    assert stage(prior, light(), torch.bfloat16).digest != digests[1]


@pytest.mark.parametrize("form", ["convolutions", "linear"])
def test_engine_computes_it(prior: Prior, tmp_path: Path, form: Any) -> None:
    made = stage(prior, light(form))
    settings = Settings(EngineCache(tmp_path / "cache"), 1, (), None)
    runner = build(lambda precision: made, "onnxruntime", torch.float32, settings).runner
    try:
        given = made.examples(4, 0)
        for ours, theirs in zip(runner(*given), made.function(*given), strict=True):
            assert distance(ours.float(), theirs.float()) < 1e-4
    finally:
        runner.close()
