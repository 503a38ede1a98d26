"""Write real images that settings are chosen on as IDX files: those of the teacher's validation split.

    python -m diffdfkd.benchmarks.validation_split --output runs/validation
    diffdfkd run fashion output=runs/try evaluation.images=runs/validation/images-idx3-ubyte \
        evaluation.labels=runs/validation/labels-idx1-ubyte guidance.rho=0.2

``digits`` for 500 digits. The digits' test images, which are in the package, are written likewise:

    python -m diffdfkd.benchmarks.validation_split digits --part test --gzip --output recipes/assets/digits/test
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain
from diffdfkd.recipes.teacher_data import READERS


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file of uint8 values: magic 0, 0, type 8, dimensions; sizes big-endian; values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", nargs="?", choices=READERS, default="fashion")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the teacher's training data, as train_teacher --data takes it")
    parser.add_argument("--part", choices=("validation", "test"), default="validation")
    parser.add_argument("--gzip", action="store_true", help="pack the files, the same bytes every time")
    arguments = parser.parse_args()
    try:
        known = READERS[arguments.data_set](arguments.data, None)
    except UserError as error:
        sys.exit(complain(str(error)))
    chosen = known.validation if arguments.part == "validation" else known.test
    if not len(chosen):
        sys.exit(complain(f"--part: the test images of {arguments.data_set} are files of their own, in the package"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3-ubyte", known.pixels), ("labels-idx1-ubyte", known.labels)):
        content = idx_bytes(array[chosen])
        if arguments.gzip:
            name, content = f"{name}.gz", gzip.compress(content, mtime=0)
        write_atomic(arguments.output / name, content)


if __name__ == "__main__":
    main()
