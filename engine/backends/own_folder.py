"""A folder that the user alone writes: whose it is, and what is said where it is not or cannot be used.

What lies there may be code, so nothing is taken from it that anybody else could have put there: the folder, the folders
in it and their files belong to the user who runs, are writable by nobody else, and are no symbolic links. The folder
itself may be given by way of links; what they lead to is looked at. Folders above it are not: who may write there can
take the folder away, but not make one that belongs to the user. Where the system has no user ids (Windows), owner and
mode go unchecked.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffdfkd.engine.errors import CURES, UserError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What fails in a stream's write, which names no file."""
ELSEWHERE = "give engine.cache=FOLDER of your own"


class OwnFolder:
    """The cache's folder; errors are UserErrors that name the field or environment variable that gave it."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``, else $DIFFDFKD_CACHE, $XDG_CACHE_HOME/diffdfkd or ~/.cache/diffdfkd; nothing is made."""
        self.field, given = _where(folder)
        self.path = Path(os.path.realpath(given))
        """Absolute, without links on the way."""

    def make(self, folder: Path) -> None:
        """Make a folder at or below this one, for the user alone, if there is none; check it as `trust_folder` does."""
        _make(folder)
        self.trust_folder(folder)

    def trust_folder(self, folder: Path) -> None:
        """Check this folder and those from it down to ``folder``; FileNotFoundError where one is missing."""
        inner = folder.relative_to(self.path).parts
        for depth in range(len(inner) + 1):
            path = self.path.joinpath(*inner[:depth])
            if not stat.S_ISDIR(self.trust(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))

    def trust(self, path: Path) -> os.stat_result:
        """Status of a file or folder; UserError where somebody else may have put it there, or changed it."""
        status = path.lstat()
        user = os.geteuid() if hasattr(os, "geteuid") else None
        if stat.S_ISLNK(status.st_mode):
            fault, cure = "is a symbolic link", "delete the link"
        elif user is not None and status.st_uid != user:
            fault, cure = f"belongs to user {status.st_uid}, not to you (user {user})", "let its owner take it away"
        elif user is not None and status.st_mode & 0o022:
            fault = f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})"
            cure = "delete it, or chmod go-w it if you know that nobody did"
        else:
            return status
        raise UserError(f"{self.field}: {path} {fault}, and an engine is code that runs; {cure}, or {ELSEWHERE}")

    @contextmanager
    def naming_faults(self, path: Path | None = None) -> Iterator[None]:
        """Turn the block's OSErrors, all of this folder, into UserErrors that name ``path``, else the error's file."""
        try:
            yield
        except OSError as error:
            raise self._fault(error, path or error.filename or self.path) from error

    @contextmanager
    def naming_own_faults(self, path: Path) -> Iterator[None]:
        """As `naming_faults`, for a block that is also busy elsewhere: errors of other places stay as they are."""
        try:
            yield
        except OSError as error:
            if error.filename is None:
                own = error.errno in DISK
            else:
                own = error.errno in CURES and Path(str(error.filename)).is_relative_to(self.path)
            if not own:
                raise
            raise self._fault(error, path) from error

    def _fault(self, error: OSError, path: object) -> UserError:
        cure = f"{CURES[error.errno]}, or " if error.errno in CURES else ""
        return UserError(f"{self.field}: {path} cannot be used ({error.strerror or error}); {cure}{ELSEWHERE}")


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(0o700, exist_ok=True)


def _where(folder: Path | None) -> tuple[str, Path]:
    """Field or environment variable that gives the folder, and the folder."""
    own, common = (os.environ.get(name) or None for name in ("DIFFDFKD_CACHE", "XDG_CACHE_HOME"))
    field = "DIFFDFKD_CACHE" if folder is None and own is not None else "engine.cache"
    try:
        if folder is not None:
            return field, folder.expanduser().absolute()
        if own is not None:
            return field, Path(own).expanduser().absolute()
        if common is not None and Path(common).is_absolute():  # a relative one is void by its specification
            return "XDG_CACHE_HOME", Path(common) / "diffdfkd"
        return field, Path.home() / ".cache" / "diffdfkd"
    except RuntimeError:
        raise UserError(f"{field}: no home folder is known here; {ELSEWHERE}, without ~") from None
