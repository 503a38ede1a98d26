"""The one error a user is meant to read."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

FILE_AT_FAULT = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
)
"""What the system says of a disk or file that is full, locked, broken or of the wrong kind."""


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
