import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from built_engines import FILES, IDENTITY, build, sound, visible

from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.entry import SIDECAR, Entry
from diffdfkd.engine.shards import canonical_json


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines of mine ü")


@pytest.fixture
def entry(cache: EngineCache) -> Entry:
    return cache.obtain("tensorrt", IDENTITY, build)


def test_layout(cache: EngineCache, entry: Entry) -> None:
    key = hashlib.sha256(canonical_json({"kind": "tensorrt", "identity": IDENTITY})).hexdigest()[:32]
    assert entry.folder == cache.folder / "tensorrt" / key
    assert visible(cache) == [f"tensorrt/{key}"]
    sidecar = json.loads((entry.folder / SIDECAR).read_bytes())
    assert list(sidecar) == sorted(("version", "kind", "identity", "details", "seconds", "created", "files", "digest"))
    assert sidecar["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    assert datetime.fromisoformat(sidecar["created"]).utcoffset() is not None


def test_only_an_entrys_own_files_have_paths(entry: Entry) -> None:
    assert entry.path("unet.plan").is_file()
    for name in ("other.plan", "../x", SIDECAR, ""):
        with pytest.raises(ValueError, match="is none of them"):
            entry.path(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", Path("x"), object(), "\ud800"])
def test_only_json(value: Any, cache: EngineCache, entry: Entry) -> None:
    for call in (
        lambda: cache.obtain("onnx", {"value": value}, build),
        lambda: cache.find("onnx", {"value": [value]}),
        lambda: cache.obtain("onnx", IDENTITY, lambda folder: {"value": value}),
        lambda: cache.update(entry, {"value": {"value": value}}),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
    assert visible(cache) == [f"tensorrt/{entry.folder.name}"]
    assert cache.find("tensorrt", IDENTITY) is not None


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def edit(folder: Path, **fields: Any) -> None:
    """Change the sidecar as one who knows its digest."""
    content = json.loads((folder / SIDECAR).read_bytes()) | fields
    del content["digest"]
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    content["digest"] = hashlib.sha256(plain).hexdigest()
    (folder / SIDECAR).write_text(json.dumps(content), encoding="utf-8")


def reword(folder: Path) -> None:
    content = (folder / SIDECAR).read_bytes()
    assert content.count(b"0.04321") == 1
    (folder / SIDECAR).write_bytes(content.replace(b"0.04321", b"0.04322"))


def deep(folder: Path) -> None:
    (folder / SIDECAR).write_bytes(b'{"digest": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no sidecar": (lambda folder: (folder / SIDECAR).unlink(), "engine.json is missing"),
    "empty sidecar": (lambda folder: (folder / SIDECAR).write_bytes(b""), "engine.json is not valid"),
    "sidecar of another form": (lambda folder: (folder / SIDECAR).write_bytes(b"[1]"), "engine.json is not valid"),
    "sidecar without digest": (lambda folder: (folder / SIDECAR).write_bytes(b"{}"), "engine.json is not valid"),
    "endless sidecar": (deep, "engine.json is not valid"),
    "cut sidecar": (lambda folder: os.truncate(folder / SIDECAR, 200), "engine.json is not valid"),
    "bytes that are no text": (lambda folder: (folder / SIDECAR).write_bytes(b"\xff\xfe"), "engine.json is not valid"),
    "other version": (lambda folder: edit(folder, version=2), "engine.json is not valid: version: "),
    "other kind": (lambda folder: edit(folder, kind="onnx"), "engine.json belongs to another engine"),
    "other details": (reword, "engine.json was changed"),
    "unknown field": (lambda folder: edit(folder, pickle="x"), "engine.json is not valid: pickle: "),
    "NaN": (lambda folder: edit(folder, details={"parity": float("nan")}), "engine.json is not valid"),
    "file gone": (lambda folder: (folder / "unet.plan").unlink(), "unet.plan is missing"),
    "file cut": (lambda folder: os.truncate(folder / "unet.plan", 7), "unet.plan has 7 bytes, engine.json says 2048"),
    "file longer": (lambda folder: (folder / "unet.plan").open("ab").write(b"x"), "unet.plan has 2049 bytes"),
    "file changed": (lambda folder: flip(folder / "unet.plan", 2047, 0), "unet.plan differs from its digest"),
    "extra file": (lambda folder: (folder / "b.so").write_bytes(b""), "'b.so' is none of its files"),
    "hidden file": (lambda folder: (folder / ".x").write_bytes(b""), r"'\.x' is none of its files"),
    "extra folder": (lambda folder: (folder / "b").mkdir(), "'b' is no plain file"),
    "pipe": (lambda folder: (os.unlink(folder / SIDECAR), os.mkfifo(folder / SIDECAR)), "'engine.json' is no plain f"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_entry_is_not_used_and_built_again(
    name: str, cache: EngineCache, entry: Entry, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGES[name]
    damage(entry.folder)
    assert cache.find("tensorrt", IDENTITY) is None
    assert len(caplog.messages) == 1
    assert re.match(f"{re.escape(str(entry.folder))} is not used: {reason}", caplog.messages[0]), caplog.messages
    caplog.clear()
    assert cache.obtain("tensorrt", IDENTITY, build).made
    assert len(caplog.messages) == 1
    assert re.match(f"{re.escape(str(entry.folder))} is built again: {reason}", caplog.messages[0]), caplog.messages
    assert caplog.records[0].levelno == logging.WARNING
    sound(cache, entry)
    assert visible(cache) == [f"tensorrt/{entry.folder.name}"]


def test_sidecar_of_another_entry_is_not_taken(
    cache: EngineCache, entry: Entry, caplog: pytest.LogCaptureFixture
) -> None:
    other = cache.obtain("tensorrt", {"stage": "decoder"}, build)
    shutil.copy(other.folder / SIDECAR, entry.folder / SIDECAR)
    assert cache.find("tensorrt", IDENTITY) is None
    shutil.rmtree(entry.folder)
    shutil.copytree(other.folder, entry.folder)
    assert cache.find("tensorrt", IDENTITY) is None
    assert caplog.text.count("engine.json belongs to another engine") == 2
    assert cache.find("tensorrt", other.identity) is not None


def test_no_change_of_a_byte_goes_unseen(cache: EngineCache, entry: Entry) -> None:
    """A sample of all bit flips and cuts: the entry is refused, or says just what it said."""
    found = cache.find("tensorrt", IDENTITY)
    dice = random.Random(0)
    used = 0
    for name in (SIDECAR, "unet.plan"):
        path = entry.folder / name
        whole = path.read_bytes()
        for _ in range(150):
            if dice.random() < 0.8:
                flip(path, dice.randrange(len(whole)), dice.randrange(8))
            else:
                os.truncate(path, dice.randrange(len(whole)))
            now = cache.find("tensorrt", IDENTITY)
            assert now is None or (name == SIDECAR and now == found)
            used += now is not None
            path.write_bytes(whole)
    assert used < 5  # such as 1e-03 for 1E-03
    assert cache.find("tensorrt", IDENTITY) == found


def test_leftover_of_an_update_does_no_harm(cache: EngineCache, entry: Entry) -> None:
    leftover = entry.folder / f".{SIDECAR}.4711-0123abcd.tmp"
    leftover.write_bytes(b"{")
    leftover.chmod(0o664)
    assert cache.find("tensorrt", IDENTITY) is not None
    cache.update(entry, {"x": 1})
    assert not leftover.exists()
