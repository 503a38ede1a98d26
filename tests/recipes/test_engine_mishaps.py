"""Caches that fail during a command: a named engine is one clear error, ``auto`` goes on in eager mode and says so."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from bad_input_cases import Call, Recipe, command

from diffdfkd.engine.backends import cache as cache_module
from diffdfkd.engine.backends import choose, own_folder


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "seal", full)


def read_only_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr(own_folder, "_make", refuse)


FAULTS = [
    pytest.param(full_disk, "No space left on device); make room on its disk", id="full"),
    pytest.param(read_only_disk, "Read-only file system); let it be read and written", id="read only"),
]


@pytest.fixture
def recipe(good_recipe: Recipe) -> Recipe:
    """One whose UNet alone asks for an engine."""
    return {**good_recipe, "engine": {"chain": "eager", "unet": "onnxruntime"}}


@pytest.mark.parametrize(("spoil", "said"), FAULTS)
def test_named_engine_is_one_error_and_the_cache_stays_sound(
    spoil: Any, said: str, recipe: Recipe, tmp_path: Path, command_line: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    spoil(monkeypatch)
    code, out, err = command_line(command(tmp_path, recipe, f"engine.cache={cache}", name="synthesize"))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: engine.cache: {cache}") and said in err and "engine.cache=FOLDER" in err
    assert not [path for path in cache.glob("*/*") if path.suffix != ".lock"]
    assert not (tmp_path / "run" / "recipe.yaml").exists()  # the folder is bound to nothing


@pytest.mark.parametrize(("spoil", "said"), FAULTS)
def test_auto_goes_on_in_eager_mode_and_says_why(
    spoil: Any, said: str, recipe: Recipe, tmp_path: Path, command_line: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "FEW_CALLS", 0)
    monkeypatch.setattr(choose, "SHARE", 1e9)
    monkeypatch.setattr(choose, "candidates", lambda device: ("onnxruntime",))
    recipe["engine"]["unet"] = "auto"
    spoil(monkeypatch)
    code, _, err = command_line(command(tmp_path, recipe, f"engine.cache={tmp_path / 'cache'}", name="synthesize"))
    assert code == 0
    assert "engine.unet=eager: eager " in err and f"left out (engine.cache: {tmp_path / 'cache'}" in err and said in err
    assert "unet: eager" in (tmp_path / "run" / "recipe.yaml").read_text()
