"""The user's own cache of what takes long to build: TensorRT plans, exported graphs, compiled packages, choices made.

An entry is a folder ``<cache>/<kind>/<key>/`` (`backends.entry`). It appears whole, by one rename under the lock of its
key, so a killed build leaves a temporary folder and nothing else, and a power cut may cost the newest entry. What does
not prove whole is built again, and the reason logged. A plan is code, and a digest beside it proves no origin: nothing
is loaded that anybody else could have written (`backends.own_folder`). Where the system has no flock (Windows), a build
is not waited for, and what a killed one left stays.
"""

import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffdfkd.engine.backends.entry import (
    Damaged,
    Entry,
    Place,
    Sidecar,
    place_of,
    plain_details,
    read_sidecar,
    seal,
    verify,
    write_sidecar,
)
from diffdfkd.engine.backends.own_folder import OwnFolder
from diffdfkd.engine.shards import TEMPORARY, remove_temporary

log = logging.getLogger(__name__)

LEFTOVER = re.compile(r"\.([0-9a-f]{32})\.\d+-[0-9a-f]{8}\.tmp")
"""Temporary folder of a key."""


class EngineCache:
    """Entries by kind and identity, for all processes and threads of one user.

    Every method raises UserError, naming the field or environment variable that gave the cache's folder, where that
    cannot be read or written or is not the user's alone. Identities and details are JSON; ValueError or TypeError for
    NaN and anything else.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """In ``folder``, else $DIFFDFKD_CACHE, $XDG_CACHE_HOME/diffdfkd or ~/.cache/diffdfkd; nothing is made yet."""
        self._own = OwnFolder(folder)

    @property
    def folder(self) -> Path:
        """Absolute, without links on the way."""
        return self._own.path

    def find(self, kind: str, identity: Mapping[str, Any]) -> Entry | None:
        """The entry, every byte of it compared with its digest; None, with a logged reason if it is damaged."""
        place = place_of(self.folder, kind, identity)
        try:
            return self._look(place)
        except Damaged as reason:
            log.warning("%s is not used: %s", place.folder, reason)
            return None

    def obtain(self, kind: str, identity: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> Entry:
        """The entry as `find` gives it, or else built: of all that ask for it at once one builds, the others wait.

        ``build`` writes plain files into the empty folder that it is given and returns the details. What it raises is
        raised, and nothing is kept; only where the cache's disk is at fault does it become a UserError. It must not
        ask for its own entry.
        """
        place = place_of(self.folder, kind, identity)
        with suppress(Damaged):
            if entry := self._look(place):
                return entry
        with self._locked(place):
            try:
                if entry := self._look(place):
                    return entry
            except Damaged as reason:
                log.warning("%s is built again: %s", place.folder, reason)
            return self._build(place, build)

    def update(self, entry: Entry, details: Mapping[str, Any]) -> Entry:
        """The entry with more details, on disk too unless it has been removed or built anew since it was found."""
        more = plain_details(details)
        place = place_of(self.folder, entry.kind, entry.identity)
        with self._locked(place), self._own.naming_faults():
            sidecar = _current(place, entry)
            if sidecar is None:
                log.warning("%s is no longer what it was; its new details are not kept", place.folder)
                return replace(entry, details={**entry.details, **more})
            remove_temporary(place.folder)
            sidecar = sidecar.model_copy(update={"details": {**sidecar.details, **more}})
            write_sidecar(place.folder, sidecar)
            return place.entry(sidecar, made=entry.made)

    def drop(self, entry: Entry, reason: str) -> None:
        """Remove an entry that was found bad when used, unless another has been built in its place since."""
        place = place_of(self.folder, entry.kind, entry.identity)
        with self._locked(place), self._own.naming_faults():
            if _current(place, entry) is None:
                return
            log.warning("%s is removed: %s", place.folder, reason)
            _put_away(place)

    def side_folder(self, name: str) -> Path:
        """A folder in the cache for what engines keep by themselves, made if need be, for the user alone.

        Of one that lets others in, its files are looked at too: engines make them by the process's umask.
        """
        folder = self.folder / name
        with self._own.naming_faults(folder):
            self._own.make(folder)
            if self._own.trust(folder).st_mode & 0o077:
                for path in folder.iterdir():
                    with suppress(FileNotFoundError):  # another process's temporary file
                        self._own.trust(path)
        return folder

    def _look(self, place: Place) -> Entry | None:
        """The entry, None where there is none; raises Damaged and, for what is not the user's alone, UserError."""
        with self._own.naming_faults():
            try:
                self._own.trust_folder(place.folder)
            except FileNotFoundError:
                return None
            try:
                # First whose they are: only what nobody else can change is worth reading.
                names = [name for name in os.listdir(place.folder) if not TEMPORARY.fullmatch(name)]
                found = {name: self._own.trust(place.folder / name) for name in names}
                return place.entry(verify(place, found), made=False)
            except FileNotFoundError as error:
                raise Damaged(f"{Path(error.filename).name} is missing") from None

    def _build(self, place: Place, build: Callable[[Path], Mapping[str, Any]]) -> Entry:
        """Called under the lock."""
        temporary = place.temporary()
        try:
            with self._own.naming_faults(place.folder):
                _remove_leftovers(place)
                temporary.mkdir(0o700)
            started = time.perf_counter()
            with self._own.naming_own_faults(place.folder):
                details = plain_details(build(temporary))
            seconds = round(time.perf_counter() - started, 3)
            with self._own.naming_faults(place.folder):
                sidecar = seal(temporary, place, details, seconds)
                _put_away(place)
                temporary.rename(place.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return place.entry(sidecar, made=True)

    @contextmanager
    def _locked(self, place: Place) -> Iterator[None]:
        """Hold the key's lock, which ends with the process; its file stays, and says who had it last."""
        with self._own.naming_faults():
            self._own.make(place.folder.parent)
            lock = os.open(place.lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with self._own.naming_faults():
                if not _lock(lock, wait=False):
                    holder = os.read(lock, 200).decode("utf-8", "replace") or "another process"
                    log.warning("%s: waits for %s, which is at work on it", place.folder, holder)
                    _lock(lock, wait=True)
            with suppress(OSError):  # of use only to those who wait
                os.ftruncate(lock, 0)
                os.lseek(lock, 0, os.SEEK_SET)
                os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
            yield
        finally:
            _unlock(lock)


def _current(place: Place, entry: Entry) -> Sidecar | None:
    """The sidecar in the entry's place if it is of the same files; None where it is not, or there is none."""
    try:
        sidecar = read_sidecar(place)
    except Damaged:
        return None
    return sidecar if sidecar.digests == entry.files else None


def _put_away(place: Place) -> None:
    """Remove what is in the entry's place: out of sight at once, then piece by piece."""
    temporary = place.temporary()
    with suppress(FileNotFoundError):
        place.folder.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)  # what stays is a leftover like others


def _remove_leftovers(place: Place) -> None:
    """What killed builds left: temporary folders of this key, whose lock is held, and of keys whose lock nobody has."""
    if os.name != "posix":
        return  # without locks nobody knows whose they are
    for path in place.folder.parent.glob(".*.tmp"):
        key = LEFTOVER.fullmatch(path.name)
        if key is None:
            continue
        other = place.folder.with_name(key[1])
        if other == place.folder:
            shutil.rmtree(path, ignore_errors=True)
            continue
        lock = os.open(place._replace(folder=other).lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if _lock(lock, wait=False):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            _unlock(lock)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the open file's lock is now held: by this open file, so that threads exclude each other too."""
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    """Close the file, and give its lock back even where a forked child still has it open."""
    if os.name == "posix":
        import fcntl

        with suppress(OSError):  # a disk without locks has been named before
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
