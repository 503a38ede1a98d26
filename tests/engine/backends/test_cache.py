import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from built_engines import FILES, IDENTITY, build, never, sound, umask, visible

from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.entry import SIDECAR, Entry
from diffdfkd.engine.errors import UserError


class Counted:
    """A build that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        self.calls += 1
        return build(folder)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines of mine ü")


@pytest.fixture
def entry(cache: EngineCache) -> Entry:
    return cache.obtain("tensorrt", IDENTITY, build)


def test_built_once_then_found(cache: EngineCache) -> None:
    counted = Counted()
    assert cache.find("tensorrt", IDENTITY) is None
    assert not cache.folder.exists()
    first = cache.obtain("tensorrt", IDENTITY, counted)
    again = cache.obtain("tensorrt", dict(reversed(IDENTITY.items())), counted)
    assert (first.made, again.made, counted.calls) == (True, False, 1)
    assert again == cache.find("tensorrt", IDENTITY)
    assert (first.kind, first.identity, first.details) == (again.kind, again.identity, again.details)
    assert first.details["log"] == ["a", "ü"] and 0 <= first.details["seconds"] < 5
    sound(cache, first)


def test_other_kind_or_identity_is_another_entry(cache: EngineCache, entry: Entry) -> None:
    others = [("onnx", IDENTITY), ("tensorrt", {**IDENTITY, "rows": [1, 4, 9]}), ("tensorrt", {})]
    folders = {cache.obtain(kind, identity, build).folder for kind, identity in others}
    assert len(folders | {entry.folder}) == 4


def test_tuples_are_lists(cache: EngineCache, entry: Entry) -> None:
    assert cache.obtain("tensorrt", {**IDENTITY, "rows": (1, 4, 8)}, never).folder == entry.folder


def test_a_record_has_no_file(cache: EngineCache) -> None:
    made = cache.obtain("choice", {"device": "cpu"}, lambda folder: {"engine": "eager"})
    assert made.files == {}
    found = cache.find("choice", {"device": "cpu"})
    assert found is not None and found.details["engine"] == "eager"


@pytest.mark.parametrize(
    "error", [RuntimeError("no tactic"), KeyboardInterrupt(), FileNotFoundError(2, "No", "/m.onnx")]
)
def test_failed_build_leaves_nothing(error: BaseException, cache: EngineCache) -> None:
    def fail(folder: Path) -> Mapping[str, Any]:
        build(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        cache.obtain("tensorrt", IDENTITY, fail)
    assert caught.value is error
    assert visible(cache) == []
    assert cache.obtain("tensorrt", IDENTITY, build).made


@pytest.mark.parametrize("kind", ["", "..", "a/b", "A", ".x", "a b", "a\n", "x\0"])
def test_kind_is_a_plain_name(kind: str, cache: EngineCache) -> None:
    with pytest.raises(ValueError, match="no kind of engine"):
        cache.obtain(kind, IDENTITY, build)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "b").mkdir(),
        lambda folder: (folder / "b").symlink_to("/etc/hostname"),
        lambda folder: os.mkfifo(folder / "b"),
        lambda folder: (folder / SIDECAR).write_bytes(b"{}"),
    ],
    ids=["folder", "link", "pipe", "sidecar"],
)
def test_a_build_leaves_plain_files(write: Callable[[Path], Any], cache: EngineCache) -> None:
    with pytest.raises(ValueError, match="plain files of other names"):
        cache.obtain("onnx", IDENTITY, lambda folder: {"written": str(write(folder))})
    assert visible(cache) == []


def test_seconds_are_the_caches(cache: EngineCache, entry: Entry) -> None:
    with pytest.raises(ValueError, match="seconds"):
        cache.obtain("onnx", IDENTITY, lambda folder: {"seconds": 3})
    with pytest.raises(ValueError, match="seconds"):
        cache.update(entry, {"seconds": 3})
    slow = cache.obtain("onnx", IDENTITY, lambda folder: time.sleep(0.05) or {})
    assert 0.05 <= slow.details["seconds"] < 2


def test_update_is_kept(cache: EngineCache, entry: Entry) -> None:
    now = cache.update(entry, {"measured": 2e-4, "parity": 3e-3})
    assert now.made and now.details == {**entry.details, "measured": 2e-4, "parity": 3e-3}
    later = cache.find("tensorrt", IDENTITY)
    assert later is not None and later.details == now.details and not later.made
    both = cache.update(entry, {"second": True})  # by one who has not seen the first
    assert both.details == {**now.details, "second": True}
    sound(cache, entry)


def test_drop(cache: EngineCache, entry: Entry, caplog: pytest.LogCaptureFixture) -> None:
    cache.drop(entry, "parity 0.5 is above 0.01")
    assert caplog.messages == [f"{entry.folder} is removed: parity 0.5 is above 0.01"]
    assert cache.find("tensorrt", IDENTITY) is None
    assert visible(cache) == []
    cache.drop(entry, "again")
    assert len(caplog.messages) == 1


def test_what_was_built_anew_is_neither_updated_nor_dropped(
    cache: EngineCache, entry: Entry, caplog: pytest.LogCaptureFixture
) -> None:
    def otherwise(folder: Path) -> Mapping[str, Any]:
        (folder / "unet.plan").write_bytes(b"another")
        return {}

    cache.drop(entry, "bad")
    anew = cache.obtain("tensorrt", IDENTITY, otherwise)
    caplog.clear()
    cache.drop(entry, "bad")
    assert cache.update(entry, {"x": 1}).details["x"] == 1
    assert caplog.messages == [f"{entry.folder} is no longer what it was; its new details are not kept"]
    found = cache.find("tensorrt", IDENTITY)
    assert found is not None and found.details == anew.details


WORKER = """
import json, logging, os, sys, time
from pathlib import Path
from diffdfkd.engine.backends.cache import EngineCache

folder, seconds, stage = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
logging.basicConfig(stream=sys.stdout, format="log %(message)s")
def build(target):
    (target / "plan").write_bytes(b"p" * 1000)
    print("builds", flush=True)
    time.sleep(float(seconds)) if seconds != "until told" else sys.stdin.readline()
    return {"by": os.getpid()}
print("starts", flush=True)
entry = EngineCache(folder).obtain("tensorrt", {"stage": stage}, build)
print("has", json.dumps([entry.made, entry.details["by"], entry.path("plan").stat().st_size]), flush=True)
"""


def start(cache: EngineCache, seconds: float | str, stage: str = "unet") -> subprocess.Popen[str]:
    """A process whose build takes so long, or "until told" by a line."""
    command = [sys.executable, "-c", WORKER, str(cache.folder), str(seconds), stage]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def until(worker: subprocess.Popen[str], word: str) -> str:
    """The next line that begins with the word."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith(word):
            return line
    raise AssertionError(f"{word} did not come")


def outcome(worker: subprocess.Popen[str]) -> Any:
    line = until(worker, "has")
    assert worker.wait(20) == 0
    return json.loads(line.removeprefix("has"))


def test_two_processes_build_once(cache: EngineCache) -> None:
    first = start(cache, "until told")
    until(first, "builds")
    others = [start(cache, 0) for _ in range(2)]
    other = start(cache, 0, "decoder")
    lines = [until(worker, "log") for worker in others]
    assert outcome(other)[0]  # another engine waits for nobody
    assert first.poll() is None
    for line in lines:
        assert re.search(
            rf"log {re.escape(str(cache.folder))}/tensorrt/\w+: waits for process {first.pid} on \S+, ", line
        )
    assert first.stdin is not None
    first.stdin.write("\n")
    first.stdin.flush()
    assert outcome(first) == [True, first.pid, 1000]
    assert [outcome(worker) for worker in others] == [[False, first.pid, 1000]] * 2
    assert len(visible(cache)) == 2


def test_killed_builder_is_followed_by_the_next(cache: EngineCache) -> None:
    first = start(cache, 60)
    until(first, "builds")
    (temporary,) = visible(cache)
    assert re.fullmatch(rf"tensorrt/\.[0-9a-f]{{32}}\.{first.pid}-[0-9a-f]{{8}}\.tmp", temporary)
    assert cache.find("tensorrt", {"stage": "unet"}) is None
    second = start(cache, 0)
    until(second, "log")
    first.kill()
    first.wait(20)
    assert outcome(second) == [True, second.pid, 1000]
    (name,) = visible(cache)
    assert not name.endswith(".tmp")


def test_leftovers_of_other_engines_go_unless_they_are_being_built(cache: EngineCache) -> None:
    dead, alive = start(cache, 60, "dead"), start(cache, 60, "alive")
    until(dead, "builds")
    until(alive, "builds")
    dead.kill()
    dead.wait(20)
    (cache.folder / "tensorrt" / ".something else.tmp").write_bytes(b"none of ours")
    assert len(visible(cache)) == 3
    made = cache.obtain("tensorrt", IDENTITY, build)
    left = {name.rpartition("/")[2] for name in visible(cache)} - {made.folder.name, ".something else.tmp"}
    assert len(left) == 1 and f".{alive.pid}-" in left.pop()
    alive.kill()
    alive.wait(20)
    cache.obtain("tensorrt", {}, build)
    assert len(visible(cache)) == 3


def test_threads_build_once(cache: EngineCache) -> None:
    calls: list[int] = []
    entries: list[Entry] = []
    ready = threading.Barrier(8)

    def slow(folder: Path) -> Mapping[str, Any]:
        calls.append(1)
        time.sleep(0.1)
        return build(folder)

    def ask() -> None:
        ready.wait()
        entries.append(EngineCache(cache.folder).obtain("tensorrt", IDENTITY, slow))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(calls), len(entries), sum(entry.made for entry in entries)) == (1, 8, 1)


def test_a_forked_child_does_not_keep_the_lock(cache: EngineCache) -> None:
    """As a compiler's workers that live on, or the children of a tool without close-on-exec."""
    children: list[int] = []

    def fork(folder: Path) -> Mapping[str, Any]:
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        children.append(child)
        return build(folder)

    try:
        entry = cache.obtain("tensorrt", IDENTITY, fork)
        started = time.monotonic()
        cache.update(entry, {"x": 1})
        assert time.monotonic() - started < 5
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)


def test_readers_beside_updates_see_whole_entries(cache: EngineCache, entry: Entry) -> None:
    stop = threading.Event()
    seen: list[Entry | None] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(cache.find("tensorrt", IDENTITY))

    reader = threading.Thread(target=read)
    reader.start()
    with umask(0o002):
        for number in range(50):
            cache.update(entry, {"number": number})
    stop.set()
    reader.join(20)
    assert seen and None not in seen


def test_an_entry_may_be_built_from_another(cache: EngineCache) -> None:
    def plan(folder: Path) -> Mapping[str, Any]:
        graph = cache.obtain("onnx", IDENTITY, build)
        shutil.copy(graph.path("unet.plan"), folder / "engine.plan")
        return {"of": graph.folder.name}

    made = cache.obtain("tensorrt", IDENTITY, plan)
    assert made.path("engine.plan").read_bytes() == FILES["unet.plan"]
    assert len(visible(cache)) == 2


def test_side_folders_are_the_users_alone_whatever_an_engine_makes_in_them(cache: EngineCache) -> None:
    """A compiler makes folders by the process's umask, of which one may let a group write."""
    with umask(0o002):
        folder = cache.side_folder("inductor")
        (folder / "3e").mkdir()
        (folder / "timing").write_bytes(b"x")
        assert (folder / "3e").stat().st_mode & 0o020
        assert cache.side_folder("inductor") == folder
    assert folder.stat().st_mode & 0o077 == 0
    # Of one that others can enter this is no longer so.
    folder.chmod(0o755)
    with pytest.raises(UserError, match=r"inductor/(3e|timing) may be written by others"):
        cache.side_folder("inductor")


def test_side_folder_in_which_a_file_vanishes(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache.side_folder("kernels")
    folder.chmod(0o755)
    there = (folder / "a.tmp",)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(there))
    assert cache.side_folder("kernels") == folder
