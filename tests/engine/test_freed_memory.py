"""Freed memory that the process keeps is not cleared anew by the system."""

import subprocess
import sys

import pytest

COUNT = """
import resource
import torch
from diffdfkd.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
returned = faults()
told = keep_freed_memory()
for _ in range(4):
    faults()  # the heap grows for a while before it is used again
print(told, returned, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_pages_are_asked_for_once() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    told, returned, kept = done.stdout.split()
    if told == "False":
        pytest.skip("this C library has no mallopt")
    # 64 MiB five times, in pages of at most 2 MiB.
    assert int(returned) >= 5 * 32
    assert int(kept) < int(returned) / 4
