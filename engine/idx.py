"""IDX files, the format of MNIST and its kin: a header of big-endian integers, then the bytes."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from diffdfkd.engine.errors import UserError

GZIP = b"\x1f\x8b"


def read_bytes(path: str | Path) -> bytes:
    """Content of a file, unpacked where it is gzipped; raises UserError if it is missing or a cut archive."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an IDX file such as t10k-images-idx3-ubyte.gz")
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == GZIP else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: truncated or damaged gzip file ({error}); fetch the file again") from None


def read_idx(path: str | Path, dimensions: int) -> np.ndarray:
    """Unsigned bytes of an IDX file, gzipped or not, as an array with the given number of dimensions.

    Raises UserError if the file is missing, of another kind, truncated, or longer than its header says.
    """
    data = read_bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0":
        raise UserError(
            f"{path}: not an IDX file (it begins with {data[:4].hex() or 'nothing'}); images are read from a folder, a "
            ".tar or an IDX file"
        )
    if data[2] != 8:
        raise UserError(f"{path}: IDX data type 0x{data[2]:02x}; only unsigned bytes (0x08) are images or labels")
    if data[3] != dimensions:
        kind = {1: "labels have 1", 3: "grey images have 3"}.get(dimensions, f"expected {dimensions}")
        raise UserError(f"{path}: IDX file with {data[3]} dimension(s), but {kind}; images and labels swapped?")
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise UserError(f"{path}: truncated within its header; fetch the file again")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(data) - start != expected:
        state = "truncated" if len(data) - start < expected else "too long"
        raise UserError(
            f"{path}: {state}: its header promises {expected} bytes for {'x'.join(map(str, shape))}, "
            f"it holds {len(data) - start}; fetch the file again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
