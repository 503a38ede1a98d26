"""What a machine offers: processor, memory, disk, GPU and launchers, read from the system and never guessed.

Sizes are bytes. What a system does not say is None.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")
"""Of /proc/cpuinfo, those that torch's and oneDNN's kernels choose by; asimd and bf16 are ARM's."""


def examine_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Model, vector features, and cores: those of the machine and those that this process may use."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    if cpuinfo.is_file():
        fields = [line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines()]
        model = next((value.strip() for name, _, value in fields if name.strip() == "model name"), model)
        flags = set(next((value for name, _, value in fields if name.strip() in ("flags", "Features")), "").split())
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return {
        "model": model,
        "features": [feature for feature in FEATURES if feature in flags],
        "cores": cores,
        "usable_cores": allowed,
        "core_quota": _core_quota(),
    }


def examine_memory(meminfo: Path = Path("/proc/meminfo")) -> dict[str, Any]:
    """Total, available, and the limit of the control group (a container's), if there is one below the total."""
    found: dict[str, int] = {}
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found[name] = int(value.split()[0]) * 1024
    total, limit = found.get("MemTotal"), _group_limit()
    if limit is not None and total is not None and limit >= total:
        limit = None
    return {"total": total, "available": found.get("MemAvailable"), "limit": limit}


def examine_disk(folder: Path) -> dict[str, Any]:
    """Free space where runs are written by default."""
    return {"folder": str(folder), "free": shutil.disk_usage(folder).free}


def _groups() -> list[Path]:
    """Folders of this process's control group, version 2 or 1, and of those around it."""
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    folders = []
    if own.is_file():
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                folder = root / controllers / path.lstrip("/")
                folders += [folder, *folder.parents]
    return [folder for folder in folders if folder.is_relative_to(root)] or [root]


def _group_limit() -> int | None:
    limits = []
    for folder in _groups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            file = folder / name
            text = file.read_text().strip() if file.is_file() else "max"
            # Version 1 says "none" by a number that no machine has.
            if text.isdecimal() and int(text) < 2**60:
                limits.append(int(text))
    return min(limits, default=None)


def _core_quota() -> float | None:
    """Cores' worth of time that the control group allows, where it is limited."""
    quotas = []
    for folder in _groups():
        file = folder / "cpu.max"
        if file.is_file():
            quota, period = file.read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def examine_gpu() -> dict[str, Any]:
    """Devices as torch sees them, the driver as nvidia-smi does, and what is missing where there is none."""
    import torch

    found: dict[str, Any] = {"cuda_of_torch": torch.version.cuda, "driver": _driver(), "devices": [], "missing": None}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found["devices"].append(
                {
                    "name": about.name,
                    "memory": about.total_memory,
                    "free": torch.cuda.mem_get_info(index)[0],
                    "compute_capability": f"{about.major}.{about.minor}",
                }
            )
    elif torch.version.cuda is None:
        found["missing"] = "this torch is built without CUDA; install torch from PyPI or from PyTorch's CUDA index"
    elif found["driver"] is None:
        found["missing"] = (
            "nvidia-smi is not on the PATH or does not answer, so no NVIDIA driver is visible: install the driver, "
            "or, in a container, start it with its GPUs (docker run --gpus all)"
        )
    else:
        found["missing"] = (
            f"the driver {found['driver']} is there, but torch, built for CUDA {torch.version.cuda}, cannot use it: "
            "update the driver, or clear CUDA_VISIBLE_DEVICES if that hides the GPU"
        )
    return found


def _driver() -> str | None:
    """Version of the NVIDIA driver, or None where nvidia-smi is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def examine_launchers() -> dict[str, bool]:
    """Programs that start several processes, on the PATH or beside this Python."""
    beside = str(Path(sys.executable).parent)
    return {name: bool(shutil.which(name) or shutil.which(name, path=beside)) for name in _LAUNCHERS}


_LAUNCHERS = ("torchrun", "deepspeed", "mpirun")
