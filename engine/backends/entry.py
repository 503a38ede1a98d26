"""A built engine on disk: a folder of plain files, and ``engine.json``, which says what it is and proves the files."""

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from diffdfkd.engine.shards import atomic_file, canonical_json

SIDECAR = "engine.json"
KIND = re.compile(r"[a-z0-9][a-z0-9_-]*")


class Damaged(Exception):
    """An entry that must not be used; the message is the reason."""


@dataclass(frozen=True)
class Entry:
    """A built engine that was found whole."""

    folder: Path
    kind: str
    identity: Mapping[str, Any]
    details: Mapping[str, Any]
    """What its build returned, what was added since, and ``seconds``, which the build took."""
    files: Mapping[str, str]
    """SHA-256 of each file by its name; ``engine.json`` is none of them."""
    made: bool
    """Whether this call built it."""

    def path(self, name: str) -> Path:
        """Of one of its files; ValueError for another name."""
        if name not in self.files:
            raise ValueError(f"{self.folder} holds {', '.join(self.files) or 'no file'}; {name!r} is none of them")
        return self.folder / name


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: NonNegativeInt
    sha256: str


class Sidecar(BaseModel):
    """Content of ``engine.json``, but for its ``digest``: the SHA-256 of all the rest as canonical JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    kind: str
    identity: dict[str, Any]
    details: dict[str, Any]
    seconds: float
    """That the build took."""
    created: str
    """ISO date and time, UTC."""
    files: dict[str, File]

    @property
    def digests(self) -> dict[str, str]:
        return {name: file.sha256 for name, file in self.files.items()}


class Place(NamedTuple):
    """Where the engine of an identity lies, if there is one."""

    kind: str
    identity: dict[str, Any]
    folder: Path
    """Its name is the first 32 hexadecimal digits of the SHA-256 of kind and identity as canonical JSON."""

    @property
    def lock(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.lock")

    def temporary(self) -> Path:
        """A new name beside the folder, of the form of `shards.TEMPORARY`."""
        return self.folder.with_name(f".{self.folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")

    def entry(self, sidecar: Sidecar, *, made: bool) -> Entry:
        details = {**sidecar.details, "seconds": sidecar.seconds}
        return Entry(self.folder, self.kind, self.identity, details, sidecar.digests, made)


def place_of(cache: Path, kind: str, identity: Mapping[str, Any]) -> Place:
    """ValueError for a kind that is no plain name; ValueError or TypeError for an identity that is no JSON."""
    if not KIND.fullmatch(kind):
        raise ValueError(f"{kind!r} is no kind of engine: small letters, digits, - and _ expected")
    plain = json.loads(canonical_json(dict(identity)))
    key = hashlib.sha256(canonical_json({"kind": kind, "identity": plain})).hexdigest()[:32]
    return Place(kind, plain, cache / kind / key)


def plain_details(details: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read back; ValueError or TypeError for what is no JSON, and for ``seconds``, which is the cache's."""
    plain: dict[str, Any] = json.loads(canonical_json(dict(details)))
    if "seconds" in plain:
        raise ValueError("details of an engine name its seconds, which the cache itself measures; take another name")
    return plain


def seal(folder: Path, place: Place, details: dict[str, Any], seconds: float) -> Sidecar:
    """Flush a built folder's files to disk, keep others from writing them, and write their sidecar.

    Raises ValueError for anything but plain files.
    """
    files = {path.name: _seal_file(path) for path in sorted(folder.iterdir())}
    sidecar = Sidecar(
        kind=place.kind,
        identity=place.identity,
        details=details,
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
    )
    write_sidecar(folder, sidecar)
    return sidecar


def _seal_file(path: Path) -> File:
    if not stat.S_ISREG(path.lstat().st_mode) or path.name == SIDECAR:
        raise ValueError(f"an engine's build left {path.name!r}; plain files of other names than {SIDECAR} expected")
    path.chmod(0o600)
    with open(path, "r+b", buffering=0) as stream:
        os.fsync(stream.fileno())
        return File(bytes=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Replace ``engine.json``, whole or not at all."""
    content = sidecar.model_dump(mode="json")
    content["digest"] = hashlib.sha256(canonical_json(content)).hexdigest()
    with atomic_file(folder / SIDECAR) as stream:
        os.chmod(stream.name, 0o600)
        stream.write(canonical_json(content) + b"\n")


def read_sidecar(place: Place) -> Sidecar:
    """Raises Damaged where it is missing, changed, of another version or of another engine."""
    try:
        content = json.loads((place.folder / SIDECAR).read_bytes())
        digest = content.pop("digest")
        sidecar = Sidecar.model_validate(content)
        whole = digest == hashlib.sha256(canonical_json(content)).hexdigest()
    except FileNotFoundError:
        raise Damaged(f"{SIDECAR} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{SIDECAR} is not valid: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged(f"{SIDECAR} is not valid") from None
    if not whole:
        raise Damaged(f"{SIDECAR} was changed")
    if (sidecar.kind, canonical_json(sidecar.identity)) != (place.kind, canonical_json(place.identity)):
        raise Damaged(f"{SIDECAR} belongs to another engine")
    return sidecar


def verify(place: Place, found: Mapping[str, os.stat_result]) -> Sidecar:
    """The sidecar, after comparing it with the files found by their names; raises Damaged with the reason."""
    for name, status in found.items():
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{name!r} is no plain file")
    sidecar = read_sidecar(place)
    for name in sorted({*found, *sidecar.files} - {SIDECAR}):
        if name not in sidecar.files:
            raise Damaged(f"{name!r} is none of its files")
        if name not in found:
            raise Damaged(f"{name} is missing")
        size, wanted = found[name].st_size, sidecar.files[name]
        if size != wanted.bytes:
            raise Damaged(f"{name} has {size} bytes, {SIDECAR} says {wanted.bytes}")
        with open(place.folder / name, "rb", buffering=0) as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != wanted.sha256:
                raise Damaged(f"{name} differs from its digest in {SIDECAR}")
    return sidecar
