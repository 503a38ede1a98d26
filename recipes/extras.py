"""The optional packages: for each extra whether it is installed, usable on this machine, and what it brings.

Imports that can crash a process, print or take long happen in a process of their own, under a time limit.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement

PROBE_SECONDS = 60


@dataclass(frozen=True)
class Extra:
    """An optional group of packages, as ``setup.py`` names it."""

    brings: str
    used: str
    """What the engine does with it today."""
    probe: str | None = None
    """Statement that fails, in a process of its own, where the extra cannot be used."""
    needs_gpu: bool = False


EXTRAS: dict[str, Extra] = {
    "tensorrt": Extra(
        brings="engines for the UNet and the guidance chain on NVIDIA data-centre and consumer GPUs",
        used="runs UNet and guidance chain (engine=tensorrt); never tried on a GPU yet",
        # Never a Runtime without a GPU: it crashes the process.
        probe="import tensorrt; tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))",
        needs_gpu=True,
    ),
    "tensorrt-rtx": Extra(
        brings="the same for GeForce RTX cards; its engines can be built without a GPU (diffdfkd build)",
        used="builds engines here; runs them on RTX cards (engine=tensorrt-rtx), which was never tried",
        probe="import tensorrt_rtx as trt; trt.Builder(trt.Logger(trt.Logger.ERROR))",
        needs_gpu=True,
    ),
    "onnxruntime": Extra(
        brings="a way to run student.onnx without torch, and faster UNets on CPUs",
        used="checks student.onnx and exported stages; runs UNet and guidance chain (engine=onnxruntime)",
        probe="import onnxruntime; assert 'CPUExecutionProvider' in onnxruntime.get_available_providers()",
    ),
    "onnxruntime-gpu": Extra(
        brings="the same on an NVIDIA GPU; replaces onnxruntime, since both install the same module",
        used="runs UNet and guidance chain (engine=onnxruntime); never tried on a GPU yet",
        probe=(
            "import onnxruntime; assert 'CUDAExecutionProvider' in onnxruntime.get_available_providers(), "
            "'this onnxruntime has no CUDAExecutionProvider'"
        ),
        needs_gpu=True,
    ),
    "openvino": Extra(
        brings="faster UNets on CPUs with bfloat16 units, and on Intel GPUs",
        used="runs UNets on CPUs (engine=openvino); its gradients are refused where they are wrong",
        probe="import openvino; assert openvino.Core().available_devices",
    ),
    "xformers": Extra(
        brings="another implementation of attention, for GPUs where torch's own is slower",
        used="attention of UNets in torch (engine.attention), where it works and is faster",
        probe="import xformers.ops",
        needs_gpu=True,
    ),
    "timm": Extra(
        brings="teachers and students of the timm library (architecture: timm:NAME, teacher.metadata: timm:NAME)",
        used="used where a recipe names one",
        probe="import timm",
    ),
    "assets": Extra(
        brings="the demo's icons and fonts drawn again, by python -m diffdfkd.recipes.render_icons, render_fonts",
        used="used by that alone",
        probe="import resvg_py",
    ),
    "digits": Extra(
        brings="the 5,000 real digits that the teacher of the recipe digits is trained and chosen on",
        used="read by train_teacher, validation_split and controls; a run needs none of them",
    ),
    "test": Extra(
        brings="the test suite, lint and type checks",
        used="used by developers alone",
    ),
}
"""Extras of ``setup.py``; a test compares the names."""


def required() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What the installed package asks for: always, and for each extra, as far as it holds on this system."""
    core: list[Requirement] = []
    optional: dict[str, list[Requirement]] = {name: [] for name in EXTRAS}
    for line in requires("diffdfkd") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            core.append(requirement)
            continue
        for name, group in optional.items():
            if requirement.marker.evaluate({"extra": name}):
                group.append(requirement)
    return core, optional


def installed(requirement: Requirement) -> dict[str, Any]:
    """Version of a requirement's package and whether it lies in the range that was tested."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        found = None
    fits = found is not None and requirement.specifier.contains(found, prereleases=True)
    return {"name": requirement.name, "range": str(requirement.specifier), "version": found, "fits": fits}


def install_command(requirements: list[Requirement]) -> str:
    """The pip command that installs them in the tested ranges, into this Python's environment."""
    return "python -m pip install " + " ".join(f'"{line.name}{line.specifier}"' for line in requirements)


def examine_extras(gpu: bool) -> dict[str, dict[str, Any]]:
    """Each extra: its packages, ``installed``, ``usable``, ``reason`` where not, what it brings, how to install it."""
    _, optional = required()
    with ThreadPoolExecutor() as pool:
        # In parallel, since each of them may take seconds to import.
        found = pool.map(lambda name: _examine(EXTRAS[name], optional[name], gpu), EXTRAS)
        return dict(zip(EXTRAS, found, strict=True))


def _examine(extra: Extra, requirements: list[Requirement], gpu: bool) -> dict[str, Any]:
    packages = [installed(requirement) for requirement in requirements]
    missing = [package["name"] for package in packages if package["version"] is None]
    outside = [f"{package['name']} {package['version']}" for package in packages if not package["fits"]]
    reason = None
    if missing:
        reason = f"not installed: {', '.join(missing)}"
    elif extra.needs_gpu and not gpu:
        reason = "no GPU that torch can use"
    elif outside:
        reason = f"outside the tested range: {', '.join(outside)}"
    elif extra.probe is not None:
        reason = probe(extra.probe)
    return {
        "installed": not missing,
        "usable": reason is None,
        "reason": reason,
        "brings": extra.brings,
        "used": extra.used,
        "install": install_command(requirements),
        "packages": packages,
    }


def probe(statement: str, seconds: float = PROBE_SECONDS) -> str | None:
    """Why a statement fails in a fresh Python process, in one line; None if it does not. It cannot harm this one."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", statement], capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"its import took more than {seconds:g} s"
    if answer.returncode == 0:
        return None
    if answer.returncode < 0:
        return f"its import ended the process with signal {-answer.returncode}"
    lines = [line for line in answer.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else f"its import ended with exit code {answer.returncode}"
