"""The synthetic data set on disk: WebDataset tars, a sidecar for each that proves it, a manifest derived from them.

A shard is published in two renames, tar then sidecar, so it exists exactly when its sidecar does and the tar has the
sidecar's digest. Tar, sidecar and manifest are written byte-stably: no clock, owner, host or order of arrival enters.
"""

import hashlib
import io
import json
import os
import re
import secrets
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

MANIFEST = "manifest.jsonl"
SIDECAR = re.compile(r"shard-\d{5,}\.json")
TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
"""Names that `atomic_file` gives, and hardly anyone else: what has such a name may be deleted."""


class DamagedShard(Exception):
    """A shard that must be made again; the message is the reason."""


@dataclass(frozen=True)
class Sample:
    """One member pair of a shard: ``<key>.<extension>`` and ``<key>.json``."""

    key: str
    """Name without a dot, unique and ascending within the data set."""
    image: bytes
    """An encoded image file."""
    record: Mapping[str, Any]
    """JSON-ready description: class, soft label, sample id, ..."""
    extension: str = "png"


class Sidecar(BaseModel):
    """What ``shard-00000.json`` says of ``shard-00000.tar``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    shard: str
    """File name of the tar."""
    round: NonNegativeInt
    index: NonNegativeInt
    images: NonNegativeInt
    dropped: NonNegativeInt
    """Samples left out because they were not finite; images + dropped is what the shard was to hold."""
    bytes: NonNegativeInt
    sha256: str
    """Of the tar file, hexadecimal."""
    digest: str
    """Of the choices: shards of different digests do not belong into one data set."""
    choices: dict[str, Any]
    """All that the shard's content depends on besides its place in the data set."""
    licence: str | None = None
    """Of the generative prior; it may bind what is made from the images."""


def round_folder(root: Path, round: int) -> Path:
    return root / f"round-{round:03d}"


def shard_path(folder: Path, index: int) -> Path:
    """The tar of a shard in its round's folder; the sidecar stands beside it with the suffix ``.json``."""
    return folder / f"shard-{index:05d}.tar"


def logits_path(folder: Path, index: int) -> Path:
    """Beside a shard, the teacher's answers to its images: no part of the data set, and made again at any time."""
    return shard_path(folder, index).with_suffix(".logits.safetensors")


def number_in(name: str) -> int | None:
    """Number at the end of a shard's or round's name without its suffix; None for a name that we do not give."""
    number = name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdecimal() else None


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Binary stream whose content appears under ``path`` whole or not at all, and survives a power cut once it does.

    An OSError of its own writing, such as a full disk, carries the file's name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace the file at ``path`` by ``content``: temporary name, flush to disk, rename."""
    with atomic_file(path) as stream:
        stream.write(content)


def remove_temporary(folder: Path) -> int:
    """Delete what killed runs left half-written at and below ``folder``; returns the number of files."""
    leftovers = [path for path in folder.rglob(".*.tmp") if TEMPORARY.fullmatch(path.name) and path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def canonical_json(content: Any) -> bytes:
    """JSON with sorted keys and no spaces; raises ValueError for NaN and infinities, which JSON lacks."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


class _Hashing(io.RawIOBase):
    """Pass writes on while taking their SHA-256 and length, so that a shard is never read back to be hashed."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.sha256, self.size = stream, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self.stream.write(block)
        self.sha256.update(block)
        self.size += len(block)
        return len(block)


def write_shard(
    folder: Path,
    index: int,
    samples: Iterable[Sample | None],
    *,
    round: int,
    digest: str,
    choices: Mapping[str, Any],
    licence: str | None = None,
) -> Sidecar:
    """Write and publish one shard, streaming the samples in the order given; None is a dropped sample.

    Memory is that of one sample. Nothing is published if the iterable raises.
    """
    path = shard_path(folder, index)
    images = dropped = 0
    with atomic_file(path) as stream:
        hashing = _Hashing(stream)
        with tarfile.open(fileobj=hashing, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                if sample is None:
                    dropped += 1
                    continue
                images += 1
                _add(tar, f"{sample.key}.{sample.extension}", sample.image)
                _add(tar, f"{sample.key}.json", canonical_json(sample.record))
    sidecar = Sidecar(
        shard=path.name,
        round=round,
        index=index,
        images=images,
        dropped=dropped,
        bytes=hashing.size,
        sha256=hashing.sha256.hexdigest(),
        digest=digest,
        choices=dict(choices),
        licence=licence,
    )
    write_atomic(path.with_suffix(".json"), canonical_json(sidecar.model_dump(mode="json")) + b"\n")
    return sidecar


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, owner names empty
    member.mode = 0o644
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def read_sidecar(path: Path) -> Sidecar:
    """Sidecar of the tar at ``path``, which need not exist; raises DamagedShard if there is none or it is not valid."""
    file = path.with_suffix(".json")
    try:
        return Sidecar.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise DamagedShard(f"{file.name} is missing") from None
    except ValidationError as error:
        raise DamagedShard(f"{file.name} is not a sidecar: {error.errors()[0]['msg']}") from None


def verify_shard(path: Path) -> Sidecar:
    """Sidecar of the tar at ``path`` after comparing place, size and SHA-256; raises DamagedShard with the reason."""
    sidecar = read_sidecar(path)
    if (sidecar.shard, sidecar.round) != (path.name, number_in(path.parent.name)):
        raise DamagedShard(f"its sidecar belongs to round {sidecar.round}, {sidecar.shard}")
    return verify_content(path)


def verify_content(path: Path) -> Sidecar:
    """As `verify_shard`, in whatever folder the tar lies."""
    sidecar = read_sidecar(path)
    try:
        size = path.stat().st_size
        if size != sidecar.bytes:
            raise DamagedShard(f"{path.name} has {size} bytes, its sidecar says {sidecar.bytes}")
        with open(path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise DamagedShard(f"{path.name} is missing") from None
    if sha256 != sidecar.sha256:
        raise DamagedShard(f"{path.name} differs from the digest in its sidecar")
    return sidecar


def list_shards(root: Path, round: int) -> Iterator[Sidecar]:
    """A round's sidecars in order of index, each read when it is asked for; ``root`` is the data set's folder.

    Raises DamagedShard for a broken one. Files of other names are none of ours.
    """
    found = [path for path in round_folder(root, round).glob("shard-*.json") if SIDECAR.fullmatch(path.name)]
    for index in sorted(number for path in found if (number := number_in(path.stem)) is not None):
        yield read_sidecar(shard_path(round_folder(root, round), index))


def write_manifest(root: Path, rounds: int) -> Path:
    """``manifest.jsonl``: a line for each shard of the first ``rounds`` rounds, from the sidecars and nothing else."""
    with atomic_file(root / MANIFEST) as stream:
        stream.writelines(_manifest_lines(root, rounds))
    return root / MANIFEST


def manifest_fault(root: Path, rounds: int) -> str | None:
    """In what way the manifest is not as the sidecars of the first ``rounds`` rounds say; None where it is."""
    try:
        with open(root / MANIFEST, "rb") as stream:
            for number, (line, wanted) in enumerate(zip_longest(stream, _manifest_lines(root, rounds)), 1):
                if line != wanted:
                    return f"line {number} is {'missing' if line is None else 'not as the sidecars say'}"
    except FileNotFoundError:
        return "it is missing"
    return None


def damaged_line(root: Path) -> str | None:
    """The manifest's first line that is no JSON, in words; None where there is none, or no manifest."""
    try:
        with open(root / MANIFEST, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    json.loads(line)
                except ValueError:
                    return f"line {number} is damaged"
    except FileNotFoundError:
        return None
    return None


def _manifest_lines(root: Path, rounds: int) -> Iterator[bytes]:
    for round in range(rounds):
        for sidecar in list_shards(root, round):
            line = sidecar.model_dump(mode="json", exclude={"version", "choices"})
            line["shard"] = f"{round_folder(root, round).name}/{sidecar.shard}"
            yield canonical_json(line) + b"\n"
