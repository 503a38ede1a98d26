"""How far a kernel may be from its reference, by the dtype of what it reads and writes: the one place that says so.

A kernel computes in float32, so that the error is that of rounding inputs and outputs to their dtype: a few units in
the last place, 2^-23, 2^-10 and 2^-7 of a value's size.
"""

from typing import Any

import torch

TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 4e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 8e-3},
}

DTYPES = tuple(TOLERANCES)

NORMAL_TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 2e-6}
"""Of drawn normals: the kernel's Box-Muller in float32 against the reference's in float64."""
