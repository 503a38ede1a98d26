"""From an ONNX file to a TensorRT plan; TensorRT-RTX does it for other GPUs than the one at hand, and without one.

Networks are strongly typed: the precision is that of the ONNX file. Plans differ from build to build, so that what
identifies one are the inputs of its build.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from diffdfkd.engine.backends.tensorrt_flavour import (
    CURRENT,
    Flavour,
    TensorRTLog,
    here,
    load_flavour,
    log_of,
    runs_on,
    targets,
)
from diffdfkd.engine.backends.tensorrt_ports import FREE, Tensor, compare
from diffdfkd.engine.backends.tensorrt_progress import Attention, make_monitor
from diffdfkd.engine.memory import LESS_MEMORY
from diffdfkd.engine.runner import NoEngine
from diffdfkd.engine.shards import write_atomic
from diffdfkd.engine.specification import Specification

CURES = (
    (r"workspace|out ?of ?memory|insufficient memory|fail\w* to allocate|allocation fail", LESS_MEMORY),
    (r"Turing|SM75", "export the stage in float16, or leave SM75 out"),
)
"""What to do where the builder's errors match a pattern."""


def build_plan(
    model: Path,
    plan: Path,
    specification: Specification,
    *,
    flavour: Flavour,
    capabilities: Sequence[str] = (),
    memory_limit: int | None = None,
    tf32: bool = False,
    timing_cache: Path | None = None,
    log: Path,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Build ``model``, an ONNX file with its weights in it or beside it, into ``plan``; JSON-ready details of it.

    ``capabilities`` are compute capabilities such as SM86, none for the GPU at hand. ``memory_limit``, in bytes, bounds
    the scratch memory of a layer. With ``tf32``, products of float32 may be rounded to ten bits of mantissa.
    ``timing_cache`` is read and rewritten by the flavour that measures its kernels as it builds, ``tensorrt``. ``log``
    gets all that TensorRT says. ``progress`` is told the phase and the fraction of the build; what it raises stops it.

    Raises NoEngine, in one line and with no plan written, for all that TensorRT refuses.
    """
    built_for = targets(flavour, capabilities)
    module = load_flavour(flavour)
    if not model.is_file():
        raise NoEngine(f"{model}: there is no such file; export the stage first")
    plan.unlink(missing_ok=True)
    started = time.perf_counter()
    messages, attention = log_of(module), Attention()
    with _recorded(log, messages, attention):
        builder = _make_builder(module, messages)
        # From TensorRT 11 on all networks are of this kind, and the flag is ignored.
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        # Kept until the plan is there: the network's weights are the parser's.
        parser = module.OnnxParser(network, messages.logger)
        _parse(parser, model, flavour, messages, attention)
        compare(specification, *_tensors(network), where=str(model))
        config = _configure(module, builder, flavour, built_for, memory_limit, tf32)
        if not specification.static:
            config.add_optimization_profile(_profile(builder, network, specification))
        cache = _attach(config, timing_cache) if flavour == "tensorrt" and timing_cache else None
        monitor = make_monitor(module, attention, progress)
        config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, config)
        _raise_failure(attention)
        if serialized is None:
            raise NoEngine(f"{model}: {flavour} cannot build it: {_reason(messages)} (all it said: {log})")
        layers = network.num_layers
        with open(plan, "wb") as stream:
            size = stream.write(serialized)
        if cache is not None and timing_cache is not None:
            write_atomic(timing_cache, bytes(memoryview(config.get_timing_cache().serialize())))
    return {
        "flavour": flavour,
        "version": module.__version__,
        "capabilities": [here(flavour)] if built_for == (CURRENT,) else list(built_for),
        "runs_on": runs_on(flavour, built_for),
        "memory_limit": memory_limit,
        "tf32": tf32,
        "seconds": round(time.perf_counter() - started, 3),
        "layers": layers,
        "bytes": size,
    }


@contextmanager
def _recorded(path: Path, messages: TensorRTLog, attention: Attention) -> Iterator[None]:
    """Write each message into ``path`` as it comes, so that it is there after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", buffering=1) as stream:

        def write(severity: str, message: str) -> None:
            attention.call(_write_line, stream, severity, message)

        with messages.listening(write):
            yield
        _raise_failure(attention)


def _write_line(stream: TextIO, severity: str, message: str) -> None:
    stream.write(f"{severity.lower()}: {message}\n")


def _raise_failure(attention: Attention) -> None:
    if attention.failure is not None:
        raise attention.failure


def _make_builder(module: Any, messages: TensorRTLog) -> Any:
    try:
        return module.Builder(messages.logger)
    except (TypeError, RuntimeError) as error:  # how the binding puts that there is none
        raise NoEngine(f"{module.__name__} makes no builder: {messages.last_errors()}") from error


def _parse(parser: Any, model: Path, flavour: Flavour, messages: TensorRTLog, attention: Attention) -> None:
    """Read the file into the parser's network; NoEngine names the node that TensorRT cannot take."""
    parsed = parser.parse_from_file(str(model))
    _raise_failure(attention)
    if not parsed:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = "; ".join(dict.fromkeys(_node_error(error, messages) for error in errors[:2]))
        raise NoEngine(f"{model}: {flavour} cannot read it: {reasons or messages.last_errors()}")


def _node_error(error: Any, messages: TensorRTLog) -> str:
    """One error of the parser, with the node; of what concerns no node, such as weights, the log knows more."""
    kind = error.code().name.lower().replace("_", " ")
    if error.node() < 0:
        said = messages.errors[0] if messages.errors else error.desc()
        return re.sub(r"^.*Assertion failed: .*?: (?=[A-Z])", "", " ".join(said.split())) + "; export the stage again"
    if "Plugin not found" in error.desc():
        kind = "unknown operator"
    desc = "" if kind == "unknown operator" or error.desc() == "false" else f", {' '.join(error.desc().split())[:200]}"
    return f"node {error.node()} {error.node_name()} ({error.node_operator()}): {kind}{desc}"


def _tensors(network: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of a network, by name."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    described = [{one.name: Tensor(one.dtype.name, tuple(one.shape)) for one in some} for some in (inputs, outputs)]
    return described[0], described[1]


def _configure(
    module: Any, builder: Any, flavour: Flavour, built_for: Sequence[str], memory_limit: int | None, tf32: bool
) -> Any:
    config = builder.create_builder_config()
    if memory_limit is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, memory_limit)
    # On by default, where it would turn a float32 stage into one that is right to three digits.
    (config.set_flag if tf32 else config.clear_flag)(module.BuilderFlag.TF32)
    if flavour == "tensorrt-rtx":
        # Without it, an engine may allocate as it runs, and could not be captured into a CUDA graph.
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(built_for)
        for index, name in enumerate(built_for):
            if not config.set_compute_capability(getattr(module.ComputeCapability, name), index):
                raise NoEngine(f"tensorrt-rtx {module.__version__} refuses {name} beside {', '.join(built_for)}")
    return config


def _profile(builder: Any, network: Any, specification: Specification) -> Any:
    """Smallest, usual and largest shape of each input whose first dimension is free."""
    profile = builder.create_optimization_profile()
    ports = {port.name: port for port in specification.inputs}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if FREE in tuple(tensor.shape):
            profile.set_shape(tensor.name, *(ports[tensor.name].shape_at(rows) for rows in specification.range))
    return profile


def _attach(config: Any, path: Path) -> Any:
    """The timing cache in ``path``; an empty one where there is none yet, or one of another GPU or version."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _reason(messages: TensorRTLog) -> str:
    said = messages.last_errors()
    cures = [cure for pattern, cure in CURES if re.search(pattern, said, re.IGNORECASE)]
    return "; ".join([said, *cures])
