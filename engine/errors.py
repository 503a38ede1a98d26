"""The one error a user is meant to read."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room on its disk"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "let it be read and written"),
    **dict.fromkeys(
        (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP),
        "take away what is in its place, a file, folder or link of another kind",
    ),
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EIO: "have its disk looked at",
}
"""What to do where the system says that a disk or file is full, locked, of the wrong kind or broken."""


class UserError(Exception):
    """Bad input: one line that names the field or file, what is wrong and the cure. The command line exits with 2."""


@contextmanager
def naming(field: str, files: dict[str, object] | None = None) -> Iterator[None]:
    """Begin the block's errors with the field at fault: ``field``, or that of ``files`` whose file they begin with."""
    try:
        yield
    except UserError as error:
        named = (name for name, file in (files or {}).items() if file and str(error).startswith(f"{file}:"))
        raise UserError(f"{next(named, field)}: {error}") from error
