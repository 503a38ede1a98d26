"""Memory that runs out: told from other errors, and turned into a line about the field that asks for less.

On a CPU the system would rather end the process than refuse it memory; a bound on the process makes it refuse.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffdfkd.engine.errors import UserError

SIGNS = (
    *("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED", "a memory object"),
    *("Cannot allocate memory", "Failed to allocate memory", "could not be allocated"),
    *("OutOfMemory", "cudaErrorMemoryAllocation"),
)
"""How torch, oneDNN, cuBLAS and the C++ library put it where they raise a plain RuntimeError; then the system, the
allocators of ONNX Runtime and OpenVINO, TensorRT, and CUDA."""
LESS_MEMORY = (
    "make its batches smaller (synthesis.batch_size), build it for one batch instead of a range, or let it have more "
    "memory"
)
"""What to do where an engine does not fit; one for a range of batches is laid out for the largest."""


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, be it the machine's or a GPU's (``torch.OutOfMemoryError`` is a RuntimeError)."""
    if isinstance(error, MemoryError):
        return True
    # ONNX Runtime's errors are no RuntimeErrors.
    raised = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")
    return raised and any(sign in str(error) for sign in SIGNS)


def less_memory(error: BaseException) -> str:
    """The end of an engine's message: what to do where memory ran out, and nothing where it did not."""
    return f"; {LESS_MEMORY}" if ran_out(error) else ""


def may_pass(error: BaseException) -> bool:
    """Whether an error, or what it came of, is of a cause that may be gone the next time: memory, or a disk or file."""
    while True:
        if ran_out(error) or isinstance(error, OSError):
            return True
        before = error.__cause__ or error.__context__
        if before is None:
            return False
        error = before


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
KEPT = 2**31 - 1
"""Bytes: the most that mallopt takes."""


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed instead of handing it back to the system; False where it cannot be told.

    By default glibc maps large blocks anew with each allocation and returns the top of its heap, so that every call of
    a network pays for its pages again.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False
    return bool(tell(M_MMAP_THRESHOLD, KEPT) and tell(M_TRIM_THRESHOLD, KEPT))


@contextmanager
def fitting(field: str, tried: str, cure: str) -> Iterator[None]:
    """Turn an error of the block that says that memory ran out into a UserError about the field."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        said = " ".join(str(error).split()).partition(" If reserved but unallocated")[0]
        # "[enforce fail at alloc_cpu.cpp:128] err == 0. " says nothing to a user.
        said = said.rpartition("err == 0. ")[2][:200].rstrip(". ") or type(error).__name__
        raise UserError(f"{field}: {tried} does not fit into memory ({said}); {cure}") from error


def refuse_more(field: str, tried: str, needed: int, there: int | None, cure: str) -> None:
    """UserError where the least that something needs is more bytes than there are; for what would take all of them."""
    if there is not None and needed > there:
        raise UserError(
            f"{field}: {tried} needs {needed / 2**30:,.0f} GiB of memory at the very least, and there are "
            f"{there / 2**30:,.0f} GiB; {cure}"
        )


def machine_memory() -> int | None:
    """Bytes of memory and swap that this process may come to use, by the machine and its container; None if unknown."""
    try:
        entries = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found = sum(int(entries[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError):
        return None
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(file).read_text()))
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
    return found


def bound_memory() -> None:
    """Let allocations fail, for this process, where the machine's memory ends: an error can be told, a kill cannot.

    Without it Linux promises more than there is and ends the process when it is used. Only ever lowers the limit.
    """
    there = machine_memory()
    if there is None:
        return
    import resource  # which Windows lacks

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    lowest = min(limit for limit in (soft, hard, there) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
