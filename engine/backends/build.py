"""From a stage to a runner: export, compile or build it once, prove it against eager, keep it in the user's cache."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.entry import Entry
from diffdfkd.engine.backends.identity import engine_identity, graph_identity, package_version
from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.memory import LESS_MEMORY, ran_out
from diffdfkd.engine.onnx_files import deepest_line
from diffdfkd.engine.parity import Parity, Refused, proven, usual_rows
from diffdfkd.engine.runner import NoEngine, Runner

Backend = Literal["eager", "compiled", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Make = Callable[[torch.dtype], Stage]
"""A stage in a precision."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What all engines of a run are built with."""

    cache: EngineCache
    threads: int | None = None
    capabilities: tuple[str, ...] = ()
    """Of TensorRT-RTX plans that are built for other GPUs than the one at hand."""
    memory_limit: int | None = None
    """Bytes of workspace that a TensorRT builder may take."""
    progress: Callable[[str, float], None] | None = None
    """Told the phase and the fraction of a TensorRT build."""
    shared: dict[torch.device, Any] = field(default_factory=dict)
    """Scratch memory by device, which all TensorRT runners of a run take turns in."""

    def workspace(self, device: torch.device) -> Any:
        """The shared scratch memory of a device."""
        from diffdfkd.engine.backends.tensorrt import Workspace

        if device not in self.shared:
            self.shared[device] = Workspace(device)
        return self.shared[device]


@dataclass(frozen=True)
class Built:
    """A runner, and how it came about."""

    runner: Runner
    parity: Parity | None
    """As measured when it was built; None for an eager stage in float32, which is the reference."""
    seconds: float
    """That its build took, whenever that was."""
    cached: bool
    """Whether it was there already."""


def graph_precision(backend: Backend, precision: torch.dtype) -> torch.dtype:
    """Of the stage that a backend takes: OpenVINO lowers a float32 graph by itself."""
    return torch.float32 if backend == "openvino" else precision


def prepare(make: Make, backend: Backend, precision: torch.dtype, settings: Settings) -> tuple[Stage, Entry]:
    """(the stage as the backend takes it, its engine in the cache), built if need be, though it may not run here.

    Raises NoEngine where the backend is not installed or refuses the stage, and Refused where the result is further
    from eager float32 than the precision allows.
    """
    stage = make(graph_precision(backend, precision))
    identity = engine_identity(stage, backend, precision, settings)
    return stage, settings.cache.obtain(
        backend, identity, lambda folder: _build(stage, backend, precision, settings, folder)
    )


def build(make: Make, backend: Backend, precision: torch.dtype, settings: Settings) -> Built:
    """A runner of the stage; raises NoEngine as `prepare` does, and where the engine does not run here.

    UserError where the cache cannot be used; eager does without.
    """
    if backend == "eager" and precision == torch.float32:
        return Built(open_runner(make(precision), backend, precision, settings, Path()), None, 0.0, False)
    try:
        stage, entry = prepare(make, backend, precision, settings)
    except UserError as reason:
        if backend != "eager":
            raise
        # The cache holds nothing of it but its proof.
        log.warning("engine eager: its comparison with float32 is not kept: %s", reason)
        stage, started = make(precision), time.perf_counter()
        runner = open_runner(stage, backend, precision, settings, Path())
        return Built(runner, proven(stage, backend, precision, runner), time.perf_counter() - started, False)
    try:
        runner = open_runner(stage, backend, precision, settings, entry.folder)
    except NoEngine as reason:
        if settings.capabilities and backend == "tensorrt-rtx":
            named = ", ".join(settings.capabilities)
            cure = f"if engine.capabilities ({named}) leaves this GPU out, add it, or leave the field out"
            raise NoEngine(f"{reason}; {cure}") from reason
        if entry.made or LESS_MEMORY in str(reason):
            raise
        settings.cache.drop(entry, f"it no longer loads here, and is built again ({reason})")
        return build(make, backend, precision, settings)
    parity = _parity(entry.details)
    kept = parity is not None and not entry.made
    try:
        if parity is None:
            # Built where it could not run.
            parity = proven(stage, backend, precision, runner)
            settings.cache.update(entry, {"parity": asdict(parity)})
        elif kept:
            # One small batch: a teacher's code may have changed since, which no digest sees.
            proven(stage, backend, precision, runner, rows=(min(usual_rows(stage)),))
    except NoEngine as reason:
        runner.close()
        if not isinstance(reason, Refused):
            raise
        settings.cache.drop(entry, str(reason))
        if not kept:
            raise
        # Nor is the graph then what the stage is today.
        if graph := settings.cache.find("onnx", graph_identity(stage)):
            settings.cache.drop(graph, str(reason))
        return build(make, backend, precision, settings)
    return Built(runner, parity, float(entry.details["seconds"]), not entry.made)


def exported(stage: Stage, settings: Settings) -> Entry:
    """The stage as an ONNX file in the cache, compared with the stage by ONNX Runtime where that can run it."""
    from diffdfkd.engine.export import export_stage

    def export(folder: Path) -> Mapping[str, Any]:
        details = dict(export_stage(stage, folder))
        details["parity"] = _file_parity(stage, folder, settings)
        return details

    return settings.cache.obtain("onnx", graph_identity(stage), export)


def _file_parity(stage: Stage, folder: Path, settings: Settings) -> Mapping[str, Any] | None:
    """Of an exported file, by ONNX Runtime on the CPU; None where that is not there or lacks the type."""
    from diffdfkd.engine.backends.onnxruntime import OnnxRuntimeRunner
    from diffdfkd.engine.export import MODEL

    if stage.precision == torch.bfloat16:
        return None  # ONNX Runtime's CPU provider has no bfloat16
    cpu = torch.device("cpu")
    try:
        runner = OnnxRuntimeRunner(folder / MODEL, stage.specification, cpu, settings.threads)
    except NoEngine as reason:
        if package_version("onnxruntime") is None:
            log.warning("%s: exported, but not compared with eager: %s", stage.name, reason)
            return None
        raise

    def run(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        return runner(*(value.to(cpu) for value in inputs))

    return asdict(proven(stage, "its exported graph", stage.precision, run))


def _build(
    stage: Stage, backend: Backend, precision: torch.dtype, settings: Settings, folder: Path
) -> Mapping[str, Any]:
    """What stands in ``folder`` afterwards is the engine; its details hold its parity where it can run here."""
    details: dict[str, Any] = {"engine": backend, "precision": str(precision).removeprefix("torch.")}
    if backend == "compiled":
        from diffdfkd.engine.backends.compiled import compile_stage

        details |= compile_stage(stage, folder, settings.cache.side_folder("inductor"))
    elif backend in ("tensorrt", "tensorrt-rtx"):
        details |= _build_plan(stage, backend, settings, folder)
        if settings.capabilities:
            return {**details, "parity": None}
    runner = open_runner(stage, backend, precision, settings, folder)
    try:
        details["parity"] = asdict(proven(stage, backend, precision, runner))
    finally:
        runner.close()
    return details


def _build_plan(stage: Stage, backend: Backend, settings: Settings, folder: Path) -> Mapping[str, Any]:
    from diffdfkd.engine.backends.tensorrt_builder import build_plan
    from diffdfkd.engine.backends.tensorrt_flavour import load_flavour, targets
    from diffdfkd.engine.export import MODEL

    assert backend in ("tensorrt", "tensorrt-rtx")
    # Said before the export, which takes long.
    load_flavour(backend)
    targets(backend, settings.capabilities)
    # It outlives a build that fails, whose folder vanishes.
    log_file = settings.cache.side_folder("logs") / f"{stage.name}-{folder.name.strip('.')}.log"
    details = build_plan(
        exported(stage, settings).path(MODEL),
        folder / PLAN,
        stage.specification,
        flavour=backend,
        capabilities=settings.capabilities,
        memory_limit=settings.memory_limit,
        timing_cache=settings.cache.side_folder("timing") / "tensorrt.timing" if backend == "tensorrt" else None,
        log=log_file,
        progress=settings.progress,
    )
    shutil.move(log_file, folder / "builder.log")
    details["build_seconds"] = details.pop("seconds")
    return details


PLAN = "plan.engine"


def open_runner(stage: Stage, backend: Backend, precision: torch.dtype, settings: Settings, folder: Path) -> Runner:
    """A runner of what a build left; raises NoEngine where that does not run here, or not in the memory there is."""
    try:
        return _open(stage, backend, precision, settings, folder)
    # Each engine has errors of its own.
    except Exception as error:
        if not ran_out(error):
            raise
        said = f"{stage.name}: {backend} does not fit into memory ({deepest_line(error)}); {LESS_MEMORY}"
        raise NoEngine(said) from error


def _open(stage: Stage, backend: Backend, precision: torch.dtype, settings: Settings, folder: Path) -> Runner:
    specification, device = stage.specification, stage.device
    if backend == "eager":
        from diffdfkd.engine.backends.eager import EagerRunner

        return EagerRunner(stage)
    if backend == "compiled":
        from diffdfkd.engine.backends.compiled import PACKAGE, CompiledRunner

        return CompiledRunner(folder / PACKAGE, specification, device)
    if backend in ("tensorrt", "tensorrt-rtx"):
        from diffdfkd.engine.backends.tensorrt import TensorRTRunner

        return TensorRTRunner(
            folder / PLAN,
            specification,
            device,
            settings.workspace(device),
            flavour=backend,
            kernels=settings.cache.side_folder("kernels") / folder.name if backend == "tensorrt-rtx" else None,
        )
    from diffdfkd.engine.export import MODEL

    if backend == "openvino":
        from diffdfkd.engine.backends.openvino import OpenVinoRunner, load_openvino

        load_openvino(device, precision)  # said before the export, which takes long
        model = exported(stage, settings).path(MODEL)
        return OpenVinoRunner(model, specification, device, settings.threads, precision)
    from diffdfkd.engine.backends.onnxruntime import OnnxRuntimeRunner, load_onnxruntime

    load_onnxruntime(device, precision)  # likewise
    model = exported(stage, settings).path(MODEL)
    return OnnxRuntimeRunner(model, specification, device, settings.threads)


def _parity(details: Mapping[str, Any]) -> Parity | None:
    found = details.get("parity")
    return None if found is None else Parity(**{**found, "rows": tuple(found["rows"])})
