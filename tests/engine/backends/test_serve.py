"""What is said where a named engine cannot be had: the field and the cure, which for eager is the precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_stages import stand_in

from diffdfkd.engine.backends.build import Settings
from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.serve import open_engine
from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.errors import UserError


class Subject:
    """Of `open_engine`, as far as it looks at one; in low precision its stage is 10 % off."""

    def __init__(self, precision: torch.dtype) -> None:
        self.precision = precision

    def make(self, name: str) -> Callable[[torch.dtype], Stage]:
        return lambda dtype: stand_in(dtype, spoil=lambda made: 1.1 * made) if dtype != torch.float32 else stand_in()


def error(stage: str, backend: str, precision: torch.dtype, settings: Settings) -> str:
    subject: Any = Subject(precision)
    with pytest.raises(UserError) as refusal:
        open_engine(subject, stage, backend, settings)
    return str(refusal.value)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(EngineCache(tmp_path / "cache"), threads=1)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize(("stage", "field"), [("unet", "unet"), ("vjp", "unet"), ("chain", "chain")])
def test_eager_that_is_refused_is_not_advised(settings: Settings, backend: str, stage: str, field: str) -> None:
    said = error(stage, backend, torch.bfloat16, settings)
    assert said.startswith(f"engine.{field}: eager cannot be had: unet: eager differs from eager (")
    assert said.endswith("; give engine.precision=float32") and "=eager" not in said


def test_eager_is_advised_in_the_place_of_another(settings: Settings) -> None:
    said = error("chain", "onnxruntime", torch.bfloat16, settings)
    assert said.startswith("engine.chain: onnxruntime cannot be had: ONNX Runtime has no bfloat16 on a CPU; ")
    assert said.endswith("; or give engine.chain=eager")


def test_eager_float32_that_does_not_fit(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, stage: Stage) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr("diffdfkd.engine.backends.eager.EagerRunner.__init__", full)
    said = error("unet", "eager", torch.float32, settings)
    assert said.startswith("engine.unet: eager cannot be had: unet: eager does not fit into memory (")
    assert said.endswith("or let it have more memory") and "(synthesis.batch_size)" in said


def test_cache_that_cannot_be_used_is_named(settings: Settings) -> None:
    settings.cache.folder.mkdir()
    settings.cache.folder.chmod(0o777)
    said = error("unet", "onnxruntime", torch.float32, settings)
    assert said.startswith(f"engine.cache: {settings.cache.folder} may be written by others (mode 777)")
