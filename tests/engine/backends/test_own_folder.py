import errno
import fcntl
import os
import re
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from built_engines import IDENTITY, build, mode, never, sound, umask, visible

from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.entry import SIDECAR, Entry
from diffdfkd.engine.errors import UserError

STRANGER = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines of mine ü")


@pytest.fixture
def entry(cache: EngineCache) -> Entry:
    return cache.obtain("tensorrt", IDENTITY, build)


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIFFDFKD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert EngineCache().folder == tmp_path / "home" / ".cache" / "diffdfkd"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert EngineCache().folder == tmp_path / "home" / ".cache" / "diffdfkd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert EngineCache().folder == tmp_path / "xdg" / "diffdfkd"
    monkeypatch.setenv("DIFFDFKD_CACHE", "~/mine")
    assert EngineCache().folder == tmp_path / "home" / "mine"
    monkeypatch.setenv("DIFFDFKD_CACHE", "")
    assert EngineCache().folder == tmp_path / "xdg" / "diffdfkd"
    monkeypatch.chdir(tmp_path)
    relative = EngineCache(Path("given"))
    monkeypatch.chdir("/")
    assert relative.folder == tmp_path / "given"
    assert list(tmp_path.iterdir()) == []


def test_what_is_made_is_the_users_alone(tmp_path: Path) -> None:
    with umask(0o002):
        cache = EngineCache(tmp_path / "a" / "b")
        made = cache.obtain("onnx", IDENTITY, build)
        cache.update(made, {"x": 1})
    folders = [tmp_path / "a", tmp_path / "a" / "b", made.folder.parent, made.folder]
    assert {mode(path) for path in folders} == {0o700}
    assert {mode(path) for path in made.folder.iterdir()} == {0o600}
    assert cache.find("onnx", IDENTITY) is not None


PARTS: dict[str, Callable[[EngineCache, Entry], Path]] = {
    "cache": lambda cache, entry: cache.folder,
    "kind": lambda cache, entry: entry.folder.parent,
    "entry": lambda cache, entry: entry.folder,
    "file": lambda cache, entry: entry.path("unet.plan"),
    "sidecar": lambda cache, entry: entry.folder / SIDECAR,
}


def refused(cache: EngineCache, entry: Entry, words: str, field: str = "engine.cache") -> None:
    """Nothing is loaded, built or removed: one line names field, place and cure."""
    before = visible(cache)
    for call in (lambda: cache.find("tensorrt", IDENTITY), lambda: cache.obtain("tensorrt", IDENTITY, never)):
        with pytest.raises(UserError) as caught:
            call()
        line = str(caught.value)
        assert re.match(f"{field}: {words}", line), line
        assert "\n" not in line and line.endswith("give engine.cache=FOLDER of your own")
    assert visible(cache) == before


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_what_others_may_write_is_refused(part: str, bits: int, cache: EngineCache, entry: Entry) -> None:
    path = PARTS[part](cache, entry)
    path.chmod(mode(path) | bits)
    refused(cache, entry, re.escape(f"{path} may be written by others (mode {mode(path):o})"))
    path.chmod(mode(path) & ~0o022 | 0o044)  # to read is no harm
    assert cache.obtain("tensorrt", IDENTITY, never) is not None


@root_only
@pytest.mark.parametrize("part", PARTS)
def test_what_belongs_to_another_is_refused(part: str, cache: EngineCache, entry: Entry) -> None:
    path = PARTS[part](cache, entry)
    os.chown(path, STRANGER, -1)
    refused(cache, entry, re.escape(f"{path} belongs to user {STRANGER}, not to you (user 0)"))
    os.chown(path, 0, -1)
    assert cache.find("tensorrt", IDENTITY) is not None


def test_another_user_is_refused(cache: EngineCache, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refused(cache, entry, re.escape(f"{cache.folder} belongs to user {owner}, not to you (user {owner + 1})"))


@pytest.mark.parametrize("part", PARTS)
def test_link_in_the_cache_is_refused(part: str, cache: EngineCache, entry: Entry, tmp_path: Path) -> None:
    path = PARTS[part](cache, entry)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    refused(cache, entry, re.escape(f"{path} is a symbolic link"))


def test_extra_file_of_a_stranger_is_refused_too(cache: EngineCache, entry: Entry) -> None:
    (entry.folder / "b.so").symlink_to("/nowhere")
    refused(cache, entry, re.escape(f"{entry.folder / 'b.so'} is a symbolic link"))


def test_cache_given_by_a_link(entry: Entry, cache: EngineCache, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache.folder)
    linked = EngineCache(tmp_path / "link")
    found = linked.find("tensorrt", IDENTITY)
    assert found is not None and found.folder == entry.folder
    cache.folder.chmod(0o777)
    refused(linked, entry, re.escape(f"{cache.folder} may be written by others"))
    (tmp_path / "nowhere").symlink_to(tmp_path / "there")
    assert EngineCache(tmp_path / "nowhere").obtain("onnx", IDENTITY, build).folder.is_relative_to(tmp_path / "there")


@pytest.mark.parametrize("name", ["DIFFDFKD_CACHE", "XDG_CACHE_HOME"])
def test_environment_variable_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFDFKD_CACHE", raising=False)
    monkeypatch.setenv(name, str(tmp_path / "cache"))
    cache = EngineCache()
    entry = cache.obtain("tensorrt", IDENTITY, build)
    cache.folder.chmod(0o770)
    refused(cache, entry, "", name)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: Any) -> str:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", none)
    with pytest.raises(UserError, match=r"^engine.cache: no home folder is known here; give engine.cache=FOLDER"):
        EngineCache(Path("~nobody/x"))


def test_path_with_a_file_on_its_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(UserError, match=r"^engine.cache: .*file.*take away what is in its place.*, or give engine"):
            EngineCache(folder).obtain("tensorrt", IDENTITY, never)
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("part", ["kind", "entry"])
def test_file_in_place_of_a_folder(part: str, cache: EngineCache, entry: Entry) -> None:
    path = PARTS[part](cache, entry)
    shutil.rmtree(path)
    path.write_bytes(b"mine")
    path.chmod(0o600)
    refused(cache, entry, re.escape(f"{path} cannot be used (Not a directory); take away what is in its place"))
    assert path.read_bytes() == b"mine"


def test_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"^engine.cache: .*give engine.cache=FOLDER"):
        EngineCache(tmp_path / "a" / "c").obtain("tensorrt", IDENTITY, never)
    with pytest.raises(UserError, match=r"^engine.cache: .*give engine.cache=FOLDER"):
        EngineCache(tmp_path / "a").find("tensorrt", IDENTITY)


def test_permission_denied(tmp_path: Path) -> None:
    """For real: root becomes another user for the while."""
    (tmp_path / "locked").mkdir(0o500)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(STRANGER)
        with pytest.raises(
            UserError, match=r"^engine.cache: .*Permission denied.*; let it be read and written, or give"
        ):
            EngineCache(tmp_path / "locked" / "cache").obtain("tensorrt", IDENTITY, never)
    finally:
        os.seteuid(user)
    assert list((tmp_path / "locked").iterdir()) == []


def test_read_only_disk_serves_what_it_holds(cache: EngineCache, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *rest: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("open", "mkdir", "rename", "replace", "unlink", "chmod"):
        monkeypatch.setattr(os, name, refuse)
    assert cache.obtain("tensorrt", IDENTITY, never).folder == entry.folder
    with pytest.raises(
        UserError, match=r"^engine.cache: .* \(Read-only file system\); let it be read and written, or give"
    ):
        cache.obtain("tensorrt", {}, never)
    for call in (lambda: cache.update(entry, {"x": 1}), lambda: cache.drop(entry, "bad")):
        with pytest.raises(UserError, match=r"^engine.cache: .*Read-only file system"):
            call()
    monkeypatch.undo()
    sound(cache, entry)


def full(cache: EngineCache, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        cache.obtain("tensorrt", IDENTITY, build)
    place = re.escape(str(cache.folder)) + "/tensorrt/[0-9a-f]{32}"
    cure = "make room on its disk, or give engine.cache=FOLDER of your own"
    assert re.fullmatch(rf"engine.cache: {place} cannot be used \({reason}\); {cure}", str(caught.value)), caught.value
    assert visible(cache) == []


def test_full_disk_for_real(cache: EngineCache) -> None:
    """A limit on the size of files stands in for the disk's: in the build's own write, with a short write before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        full(cache, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache.obtain("tensorrt", IDENTITY, build).made


@pytest.mark.parametrize("call", range(1, 5))
def test_disk_that_is_full_when_flushed(call: int, cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each flush: of the files, of the sidecar and of the folder."""
    calls, flush = 0, os.fsync

    def fail(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    full(cache, "No space left on device")
    monkeypatch.undo()
    assert calls == call
    assert cache.obtain("tensorrt", IDENTITY, build).made


def test_full_disk_in_an_update(cache: EngineCache, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        UserError, match=r"^engine.cache: .*engine.json cannot be used \(No space left on device\); make ro"
    ):
        cache.update(entry, {"x": 1})
    monkeypatch.undo()
    sound(cache, entry)
    found = cache.find("tensorrt", IDENTITY)
    assert found is not None and found.details == entry.details


def test_cache_deleted_during_a_build(cache: EngineCache) -> None:
    def vanish(folder: Path) -> Mapping[str, Any]:
        shutil.rmtree(cache.folder)
        return {}

    with pytest.raises(UserError, match=r"^engine.cache: .*No such file or directory\); give engine.cache=FOLDER"):
        cache.obtain("tensorrt", IDENTITY, vanish)


def test_disk_without_locks(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"^engine.cache: .* \(No locks available\); give engine.cache=FOLDER"):
        cache.obtain("tensorrt", IDENTITY, never)
    assert visible(cache) == []
