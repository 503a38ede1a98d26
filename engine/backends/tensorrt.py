"""TensorRT and TensorRT-RTX: a plan, run on the runner's own buffers and on scratch memory that all stages share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from diffdfkd.engine.backends.tensorrt_flavour import Flavour, load_flavour, log_of
from diffdfkd.engine.backends.tensorrt_kernels import KernelCache, kernels_file
from diffdfkd.engine.backends.tensorrt_ports import Tensor, compare
from diffdfkd.engine.memory import LESS_MEMORY, ran_out
from diffdfkd.engine.runner import NoEngine, Runner
from diffdfkd.engine.specification import Specification


class Execution:
    """An execution context, and what has to outlive it."""

    def __init__(self, context: Any, kernels: KernelCache | None, plan: Any, runtime: Any) -> None:
        self.context, self.kernels, self.plan, self.runtime = context, kernels, plan, runtime

    def __del__(self) -> None:
        # A context without its kernels would end the process.
        self.context = None


class Workspace:
    """Scratch memory of the stages that run one after another, as large as the largest of them needs.

    Make every runner before a CUDA graph is captured: one that comes later may move the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        """On CUDA's default stream TensorRT would wait for the GPU at each call; it runs on this one instead."""
        self._served: WeakSet[Execution] = WeakSet()

    def serve(self, execution: Execution, size: int) -> None:
        """Let the execution context use the memory, grown to ``size`` bytes where it is smaller."""
        before = self.memory.numel()
        if size > before:
            if self.device.type == "cuda":
                # What is at work there ends before it is given back.
                torch.cuda.synchronize(self.device)
            try:
                self._resize(size)
            except RuntimeError:
                self._resize(before)
                raise
        self._served.add(execution)
        self._hand_to(execution)

    def _resize(self, size: int) -> None:
        # First the old one goes, so that there never are two.
        self.memory = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        for execution in self._served:
            self._hand_to(execution)

    def _hand_to(self, execution: Execution) -> None:
        execution.context.set_device_memory(self.memory.data_ptr(), self.memory.numel())


class TensorRTRunner(Runner):
    """A plan of either flavour.

    A call neither waits nor allocates, and can be captured into a CUDA graph once its number of rows has been run.
    RuntimeError where TensorRT does not run it.
    """

    def __init__(
        self,
        plan: Path,
        specification: Specification,
        device: torch.device,
        workspace: Workspace,
        *,
        flavour: Flavour,
        kernels: Path | None = None,
    ) -> None:
        """``kernels``: path that the kernels that TensorRT-RTX compiles are kept beside, by default the plan's.

        NoEngine for a plan that does not load here, is not that stage's, or does not fit into memory."""
        # Without a GPU, making a Runtime ends the process.
        if not torch.cuda.is_available():
            raise NoEngine(f"{flavour} runs on a GPU, and torch finds none; take another engine")
        module = load_flavour(flavour)
        self.engine = flavour
        self._log = log_of(module)
        self._workspace = workspace
        self._kernels = kernels or plan.with_suffix("")
        with _on(device), self._fitting(plan):
            super().__init__(specification, device)
            most = specification.range[2]
            self.outputs = {
                port.name: torch.empty(port.shape_at(most), dtype=port.dtype, device=device)
                for port in specification.outputs
            }
            self._execution = self._load(module, plan)
            for name, buffer in (*self.inputs.items(), *self.outputs.items()):
                if not self._execution.context.set_tensor_address(name, buffer.data_ptr()):
                    raise NoEngine(f"{plan}: {flavour} takes no buffer for {name}: {self._log.last_errors()}")
            workspace.serve(self._execution, self._execution.plan.device_memory_size_v2)
            if self._execution.kernels is not None:
                self._execution.kernels.save()
        self._rows = most if specification.static else 0
        """The number of rows that the context is set to; a static engine knows its own."""

    def run(self, rows: int) -> tuple[torch.Tensor, ...]:
        with _on(self.device):
            if rows != self._rows:
                self._set_rows(rows)
            current = torch.cuda.current_stream(self.device)
            side = self._workspace.side if current.cuda_stream == 0 else None
            if side is not None:
                side.wait_stream(current)
            done = self._execution.context.execute_async_v3((side or current).cuda_stream)
            if side is not None:
                current.wait_stream(side)
        if not done:
            raise RuntimeError(
                f"{self.specification.name}: {self.engine} does not run a batch of {rows}: {self._log.last_errors()}; "
                f"if it is memory that lacks, {LESS_MEMORY}"
            )
        ports = self.specification.outputs
        return tuple(self.outputs[port.name][:rows] if port.batched else self.outputs[port.name] for port in ports)

    def close(self) -> None:
        if not self.outputs:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._execution.kernels is not None:
            self._execution.kernels.save()
        del self._execution
        self.inputs, self.outputs = {}, {}

    def _set_rows(self, rows: int) -> None:
        """Tell the context the shapes of a batch, and look whether its outputs then have those of the buffers."""
        specification = self.specification
        self._rows = 0
        for port in specification.inputs:
            if port.batched and not self._execution.context.set_input_shape(port.name, port.shape_at(rows)):
                raise RuntimeError(
                    f"{specification.name}: {self.engine} refuses {rows} rows: {self._log.last_errors()}"
                )
        for port in specification.outputs:
            shape = tuple(self._execution.context.get_tensor_shape(port.name))
            if shape != port.shape_at(rows):
                raise RuntimeError(
                    f"{specification.name}: at {rows} rows {self.engine} gives {port.name} the shape {list(shape)}; "
                    f"{list(port.shape_at(rows))} expected"
                )
        self._rows = rows

    def _load(self, module: Any, plan: Path) -> Execution:
        """The plan's execution context, once the plan is known to be the specification's."""
        if not plan.is_file():
            raise NoEngine(f"{plan}: there is no such file; build the engine first")
        self._log.errors.clear()
        runtime = module.Runtime(self._log.logger)
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            name = torch.cuda.get_device_name(self.device)
            raise NoEngine(
                f"{plan}: {self.engine} does not load it on {name}, as with a plan of another version or for another "
                f"kind of GPU: {self._log.last_errors()}; build it again here"
            )
        compare(self.specification, *_tensors(module, engine, plan), where=str(plan))
        _check_range(self.specification, engine, plan)
        context, kernels = self._make_context(module, engine, plan)
        if context is None:
            raise NoEngine(
                f"{plan}: {self.engine} makes no execution context: {self._log.last_errors()}; "
                f"if it is memory that lacks, {LESS_MEMORY}"
            )
        return Execution(context, kernels, engine, runtime)

    def _make_context(self, module: Any, engine: Any, plan: Path) -> tuple[Any, KernelCache | None]:
        """An execution context without memory of its own; TensorRT-RTX compiles the plan's kernels here."""
        user_managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.engine == "tensorrt":
            return engine.create_execution_context(user_managed), None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(user_managed)
        # Compiled in the background, kernels would change under a captured graph, and results with them.
        strategies = module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        kernels = KernelCache(kernels_file(self._kernels, self.device), config)
        return engine.create_execution_context(config), kernels

    @contextmanager
    def _fitting(self, plan: Path) -> Iterator[None]:
        """NoEngine where torch has no memory for the buffers or the workspace."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            said = " ".join(str(error).split())[:200]
            raise NoEngine(f"{plan}: it does not fit into memory ({said}); {LESS_MEMORY}") from error


def _tensors(module: Any, engine: Any, plan: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of an engine, by name; NoEngine for one that wants its data in the machine's own memory."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        side = inputs if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else outputs
        side[name] = Tensor(engine.get_tensor_dtype(name).name, tuple(engine.get_tensor_shape(name)))
        if engine.get_tensor_location(name) != module.TensorLocation.DEVICE:
            raise NoEngine(
                f"{plan}: {name} is a shape, read on the CPU; the stage must not compute shapes from its data"
            )
    return inputs, outputs


def _check_range(specification: Specification, engine: Any, plan: Path) -> None:
    """NoEngine for a plan that was built for fewer batches than the specification serves."""
    if specification.static:
        return
    least, _, most = specification.range
    name = next(port.name for port in specification.inputs if port.batched)
    smallest, _, largest = [shape[0] for shape in engine.get_tensor_profile_shape(name, 0)]
    if least < smallest or most > largest:
        raise NoEngine(
            f"{plan}: built for batches of {smallest} to {largest} rows; {least} to {most} expected; build it again"
        )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """With the device as CUDA's current one, which TensorRT runs on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
