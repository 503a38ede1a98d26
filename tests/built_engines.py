"""An engine of two files for the tests of the engines' cache, and what is asked about it."""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.entry import SIDECAR, Entry

FILES = {"unet.plan": bytes(range(256)) * 8, "weights with space ü.bin": b"\0" * 100}
IDENTITY = {"stage": "unet", "rows": [1, 4, 8], "precision": {"name": "fp16"}, "größe": 0.1}


def build(folder: Path) -> Mapping[str, Any]:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return {"parity": 0.04321, "log": ["a", "ü"]}


def never(folder: Path) -> Mapping[str, Any]:
    raise AssertionError("built though it is there")


def visible(cache: EngineCache) -> list[str]:
    """What lies in the cache, but for locks."""
    return sorted(str(path.relative_to(cache.folder)) for path in cache.folder.glob("*/*") if path.suffix != ".lock")


def sound(cache: EngineCache, entry: Entry) -> None:
    """The entry is whole on disk, and its folder holds nothing else."""
    assert {path.name for path in entry.folder.iterdir()} == {*FILES, SIDECAR}
    assert {name: entry.path(name).read_bytes() for name in FILES} == FILES
    assert cache.find(entry.kind, entry.identity) is not None


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
