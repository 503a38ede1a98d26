"""Tensors larger than the machine, for tests of offsets: memory is taken only where it is touched."""

import math
import mmap

import torch
from torch import Tensor

MAP_NORESERVE = 0x4000


def vast(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of a shape, in memory that the system need not have."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
