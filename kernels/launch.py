"""Which of its two forms an operation takes, and how a Triton kernel is called: described first, then run or compiled.

A `Launch` holds all that decides a kernel's machine code, so that what is compiled ahead of time without a GPU
(ahead_of_time.py) is what would run on one.
"""

import os
import shutil
import sys
import sysconfig
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from torch import Tensor

Kernel = Literal["auto", "triton", "reference"]
"""Of an operation: its Triton kernel, its plain torch reference, or the kernel on CUDA and the reference elsewhere."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What a kernel reads and writes; its arithmetic is float32."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 in the environment before the first import."""


class KernelUnavailable(ValueError):
    """The Triton kernel is asked for where nothing can run it."""


@dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    kernel: Any
    """The ``@triton.jit`` function."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Tensors, numbers and None, by the kernel's parameter names."""
    constants: dict[str, Any]
    """The kernel's ``tl.constexpr`` parameters."""
    warps: int

    def run(self) -> None:
        """Enqueue it on its device's current stream; under the interpreter, carry it out."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps)


def settle_kernel(kernel: Kernel, device: torch.device) -> Literal["triton", "reference"]:
    """The form that is meant on this device; raises KernelUnavailable where ``triton`` cannot be had."""
    if kernel not in ("auto", "triton", "reference"):
        raise ValueError(f"kernel: got {kernel!r}; auto, triton or reference")
    # The interpreter would carry a kernel out on the CPU, wherever its tensors are: only where it is asked for.
    if kernel == "reference" or (kernel == "auto" and (device.type != "cuda" or INTERPRETED)):
        return "reference"
    if device.type == "cuda" or INTERPRETED:
        return "triton"
    raise KernelUnavailable(
        f"kernel: triton needs a CUDA device, and this is the {device.type}; give kernel=auto or kernel=reference (or, "
        "for tests, set TRITON_INTERPRET=1: slow)"
    )


def launch_fault() -> str | None:
    """What keeps Triton from launching kernels on a GPU, and the cure; None if nothing does.

    It compiles a small program of its own the first time, for which it needs a C compiler and Python's headers.
    """
    if os.environ.get("CC") is None and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler to launch kernels; install gcc, or name one in CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return f"Triton needs Python's headers to launch kernels; install them ({package})"
    return None


def check_tensor(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    optional: bool = False,
) -> None:
    """Raises ValueError for a tensor of another shape, dtype or device; ``dtype`` None allows every float dtype.

    Vectors and tables, unlike latents, must be contiguous. None passes where it is ``optional``.
    """
    if tensor is None and optional:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: got {tensor!r}; a tensor of shape {shape} expected")
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; {shape} expected")
    if dtype is None and not tensor.is_floating_point():
        raise ValueError(f"{name}: got {tensor.dtype}; a float dtype expected")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name}: got {tensor.dtype}; {dtype} expected")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, the others on {device}; move it there")
    if len(shape) != 4 and not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()} of shape {shape}; give it .contiguous()")


def check_floats(**tensors: Tensor | None) -> None:
    """Raises ValueError for a dtype that no kernel reads."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(
                f"{name}: {tensor.dtype}; the Triton kernel reads {names}: convert it, or give kernel=reference"
            )


def unreadable_strides(name: str, tensor: Tensor) -> ValueError:
    """The error for a tensor that lies in neither memory format."""
    return ValueError(
        f"{name}: strides {tensor.stride()} of shape {tuple(tensor.shape)} are neither contiguous nor channels_last; "
        "give it .contiguous()"
    )


def at_least_float32(values: Tensor) -> Tensor:
    """As the references compute: half precision in float32, wider as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def blocks(n: int, block: int) -> int:
    """How many blocks cover n elements."""
    return -(-n // block)
