"""Write the teacher's 5,000 validation images as IDX files, to choose settings on.

    python -m diffdfkd.benchmarks.validation_split --output runs/validation
    diffdfkd run fashion output=runs/try evaluation.images=runs/validation/images-idx3-ubyte \
        evaluation.labels=runs/validation/labels-idx1-ubyte guidance.rho=0.2
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.idx import read_idx
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain
from diffdfkd.recipes.train_teacher import fashion_split, training_files


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file of uint8 values: magic 0, 0, type 8, dimensions; sizes big-endian; values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's training files; Debian's by default")
    arguments = parser.parse_args()
    try:
        images, labels = training_files(arguments.data)
    except UserError as error:
        sys.exit(complain(str(error)))
    truth = read_idx(labels, 1)
    _, validation = fashion_split(truth)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output / "images-idx3-ubyte", idx_bytes(read_idx(images, 3)[validation]))
    write_atomic(arguments.output / "labels-idx1-ubyte", idx_bytes(truth[validation]))


if __name__ == "__main__":
    main()
