"""What an engine depends on, JSON-ready: the identity under which the cache keeps it, and what was found out of it.

Among it is our own code. A digest of its sources says more than the version alone, which stands still between releases.
"""

import functools
import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.onnx_files import OPSET

if TYPE_CHECKING:
    from diffdfkd.engine.backends.build import Backend, Settings

ROOT = Path(__file__).parents[2]
GRAPH = (
    *("engine/engine_stages.py", "engine/stages.py", "engine/prior.py", "engine/classifier.py"),
    *("engine/inversion.py", "engine/taps.py", "engine/trace.py", "engine/export.py", "engine/onnx_files.py"),
    *(
        "engine/decompositions.py",
        "engine/folded_upsampling.py",
        "engine/attention.py",
        "engine/max_pooling.py",
        "engine/normalization.py",
    ),
    *("engine/separable.py", "kernels/activation.py", "kernels/batchnorm_loss.py", "kernels/kd_loss.py"),
    *("kernels/launch.py", "kernels/moments.py", "kernels/class_statistics.py", "engine/stage_networks.py"),
    *("engine/parity.py", "engine/example_student.py", "engine/guidance_decoder.py"),
)
"""Sources that say what is in a stage's graph, and how it is proven."""
BUILDERS: Mapping[str, tuple[str, ...]] = {
    "compiled": ("engine/backends/compiled.py", "engine/backends/frozen.py", "engine/backends/channel_rows.py"),
    "tensorrt": ("engine/backends/tensorrt_builder.py",),
    "tensorrt-rtx": ("engine/backends/tensorrt_builder.py",),
}
"""What makes an engine of the graph, by backend; the others take it as it is."""
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "eager": ("torch",),
    "compiled": ("torch",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx",),
}
"""Distributions behind each backend: the first that is installed serves."""


def engine_identity(
    stage: Stage, backend: "Backend", precision: torch.dtype, settings: "Settings"
) -> Mapping[str, Any]:
    """Of an engine: all that it depends on."""
    identity: dict[str, Any] = {
        **graph_identity(stage),
        "precision": str(precision).removeprefix("torch."),
        "package": package_version(backend),
        "device": device_identity(stage.device),
    }
    if builders := BUILDERS.get(backend):
        identity["builder"] = sources_digest(builders)
    if backend == "compiled":
        # Their number stands in its code.
        identity["threads"] = settings.threads or torch.get_num_threads()
    if backend in ("tensorrt", "tensorrt-rtx"):
        identity |= {
            "capabilities": sorted(settings.capabilities),
            "memory_limit": settings.memory_limit,
            "flags": ["no TF32", "USER_MANAGED", "REQUIRE_USER_ALLOCATION"],
        }
        if settings.capabilities:
            # A plan for named GPUs is the same wherever it is built.
            identity["device"] = "cuda"
    return identity


def graph_identity(stage: Stage) -> Mapping[str, Any]:
    """Of an exported graph, which many engines share."""
    return {
        "stage": stage.digest,
        "specification": stage.specification.describe(),
        "precision": str(stage.precision).removeprefix("torch."),
        "exporter": {
            "torch": torch.__version__,
            "onnx": _installed("onnx"),
            "onnxscript": _installed("onnxscript"),
            "opset": OPSET,
        },
        "diffdfkd": {"version": _installed("diffdfkd"), "sources": sources_digest(GRAPH)},
    }


def trial_identity(stage: Stage, backend: "Backend", precision: torch.dtype, settings: "Settings") -> Mapping[str, Any]:
    """Of what a trial found: all that its figures and its refusals depend on.

    The versions of all engines' packages are among it, those of the others too: ONNX Runtime judges the graph that
    OpenVINO takes. What is not installed has none, so that installing it ends what was found without it.
    """
    return {
        **engine_identity(stage, backend, precision, settings),
        "engine": backend,
        "threads": settings.threads or torch.get_num_threads(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def device_identity(device: torch.device) -> str:
    """The processor that an engine was built for and proven on."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, SM{major}{minor}, CUDA {torch.version.cuda}"
    # Compiled packages are made for this processor alone, and there are many kinds of AVX-512.
    found = torch.cpu.get_capabilities()
    able = sorted(name for name, has in found.items() if has is True)
    return ", ".join([platform.machine(), str(found.get("cpu_name", "")), *able])


def package_version(backend: str) -> str | None:
    """Name and version of the package behind a backend; None where it is not installed."""
    for package in PACKAGES[backend]:
        if (found := _installed(package)) is not None:
            return f"{package} {found}"
    return None


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def sources_digest(names: tuple[str, ...]) -> str:
    """SHA-256 of source files of ours, by their paths below the package; read once a process."""
    digest = hashlib.sha256()
    for name in names:
        content = (ROOT / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
