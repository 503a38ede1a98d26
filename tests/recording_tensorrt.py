"""A stand-in for TensorRT's runtime: it records what it is told, and computes on CPU tensors by their addresses."""

import ctypes
import math
from collections.abc import Callable, Sequence
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.specification import Port, Specification

DTYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bool: "BOOL"}


def at_address(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor that lies there."""
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(*shape)


class RecordingTensorRT(ModuleType):
    """What the runner uses of ``tensorrt`` or ``tensorrt_rtx``; plans are the engines' names.

    ``engines`` holds what each plan stands for, ``calls`` all that was told to any context, in order.
    """

    TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")
    TensorLocation = Enum("TensorLocation", "DEVICE HOST")
    DataType = Enum("DataType", "FLOAT HALF BOOL")
    ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", "STATIC USER_MANAGED")
    DynamicShapesKernelSpecializationStrategy = Enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE")

    def __init__(self, name: str, version: str) -> None:
        super().__init__(name)
        self.__version__ = version
        self.engines: dict[bytes, RecordingEngine] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.runtimes = 0
        outer = self

        class ILogger:
            def log(self, severity: Any, message: str) -> None: ...

        class Runtime:
            def __init__(self, logger: ILogger) -> None:
                outer.runtimes += 1
                self.logger = logger

            def deserialize_cuda_engine(self, plan: bytes) -> RecordingEngine | None:
                found = outer.engines.get(plan)
                if found is None:
                    severity = SimpleNamespace(name="ERROR")
                    self.logger.log(severity, "IRuntime::deserialize: Error Code 6: API Usage Error (no magic tag)")
                return found

        self.ILogger, self.Runtime = ILogger, Runtime


class RecordingEngine:
    """One engine: ``compute`` maps its inputs to its outputs, ``size`` is what it needs of the workspace."""

    def __init__(
        self,
        module: RecordingTensorRT,
        name: str,
        specification: Specification,
        compute: Callable[..., tuple[Tensor, ...]],
        size: int = 64,
    ) -> None:
        self.module, self.name, self.specification, self.compute = module, name, specification, compute
        self.device_memory_size_v2 = size
        self.ports: dict[str, Port] = {port.name: port for port in (*specification.inputs, *specification.outputs)}
        self.range = specification.range
        self.host: set[str] = set()
        self.executes = self.makes_context = True
        self.kernels = b"compiled"
        self.wrong_rows = 0
        module.engines[name.encode()] = self

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_mode(self, name: str) -> Any:
        is_input = name in [port.name for port in self.specification.inputs]
        return self.module.TensorIOMode.INPUT if is_input else self.module.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.module.DataType[DTYPES[self.ports[name].dtype]]

    def get_tensor_location(self, name: str) -> Any:
        return self.module.TensorLocation.HOST if name in self.host else self.module.TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        port = self.ports[name]
        return (-1, *port.shape[1:]) if port.batched and self.range[0] != self.range[2] else port.shape

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert index == 0
        return [self.ports[name].shape_at(rows) for rows in self.range]

    def create_execution_context(self, how: Any) -> "RecordingContext | None":
        self.module.calls.append(("context", self.name, how))
        return RecordingContext(self) if self.makes_context else None

    def create_runtime_config(self) -> "RecordingConfig":
        return RecordingConfig(self)


class RecordingConfig:
    """TensorRT-RTX's runtime configuration; its cache begins empty and holds the engine's kernels at the end."""

    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self, engine: RecordingEngine) -> None:
        self.engine = engine
        self.strategy: Any = None
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        engine = self.engine
        return SimpleNamespace(deserialize=lambda content: content == engine.kernels, serialize=lambda: engine.kernels)

    def set_runtime_cache(self, cache: Any) -> None:
        self.cache = cache


class RecordingContext:
    """Computes at the addresses that it was given, after it has scribbled over its workspace."""

    def __init__(self, engine: RecordingEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.rows = 0 if engine.range[0] != engine.range[2] else engine.range[2]

    def _record(self, *call: Any) -> None:
        self.engine.module.calls.append((*call[:1], self.engine.name, *call[1:]))

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.memory = (address, size)
        self._record("memory", address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        self._record("address", name, address)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self.engine.ports
        self.rows = shape[0]
        self._record("shape", name, tuple(shape))
        return self.engine.range[0] <= self.rows <= self.engine.range[2]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.ports[name].shape_at(self.rows + self.engine.wrong_rows)

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        self._record("execute", stream, self.rows)
        if not engine.executes:
            return False
        at_address(self.memory[0], (engine.device_memory_size_v2,), torch.uint8).fill_(255)
        there = {
            port.name: at_address(self.addresses[port.name], port.shape_at(self.rows), port.dtype)
            for port in engine.ports.values()
        }
        results = engine.compute(*(there[port.name] for port in engine.specification.inputs))
        for port, result in zip(engine.specification.outputs, results, strict=True):
            there[port.name].copy_(result)
        return True
