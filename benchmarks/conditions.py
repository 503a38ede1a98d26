"""When, where and with what a figure was measured; what a process holds."""

import os
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

QUANTILES = (0.1, 0.5, 0.9)


def conditions(device: torch.device) -> dict[str, Any]:
    """Date, commit, GPU, processor, threads, system and versions; JSON-ready."""
    from diffdfkd.recipes.machine import examine_processor
    from diffdfkd.recipes.run_folder import versions

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "gpu": gpu,
        "processor": examine_processor()["model"],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions(),
    }


def commit() -> str | None:
    """Short hash of the checkout that this code lies in, with ``-dirty`` where files have changed; None outside one."""
    if shutil.which("git") is None:
        return None
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = Path(__file__).parent
    found = subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], capture_output=True, cwd=folder).returncode
    return found + "-dirty" * bool(changed) if found else None


def peak_memory(field: str = "VmHWM") -> int:
    """Most bytes that this process has held since it began or `forget_peak`; unlike getrusage's, without its parent's.

    ``VmRSS`` gives what it holds now.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def forget_peak() -> None:
    """Begin the peak anew at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
