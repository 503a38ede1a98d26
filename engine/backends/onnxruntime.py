"""ONNX Runtime: the exported graph on CPU or CUDA, bound to the runner's own buffers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdfkd.engine.backends.onnx_ports import Found, compare_ports
from diffdfkd.engine.memory import less_memory
from diffdfkd.engine.onnx_files import deepest_line
from diffdfkd.engine.runner import NoEngine, Runner
from diffdfkd.engine.specification import Specification

NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.bool: np.bool_, torch.float16: np.float16}
TYPES = {"tensor(float)": torch.float32, "tensor(bool)": torch.bool, "tensor(float16)": torch.float16}


class OnnxRuntimeRunner(Runner):
    """An exported stage under ONNX Runtime; inputs and outputs are read and written where they lie."""

    engine = "onnxruntime"

    def __init__(self, model: Path, specification: Specification, device: torch.device, threads: int | None) -> None:
        super().__init__(specification, device)
        onnxruntime = load_onnxruntime(device)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Its threads wait asleep: those of torch run between two calls, and would share the cores with theirs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider: Any = "CPUExecutionProvider"
        if device.type == "cuda":
            stream = str(torch.cuda.current_stream(device).cuda_stream)
            # float32 is float32: see `recipes.run.use_device`.
            settings = {"device_id": device.index or 0, "user_compute_stream": stream, "use_tf32": "0"}
            provider = ("CUDAExecutionProvider", settings)
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=[provider])
        # The runtime has errors of its own for each thing that can be wrong with a file.
        except Exception as error:
            raise NoEngine(f"{model}: ONNX Runtime refuses it: {deepest_line(error)}{less_memory(error)}") from None
        values = (*self._session.get_inputs(), *self._session.get_outputs())
        compare_ports(specification, [_found(value) for value in values], model)
        self._outputs = {
            port.name: torch.empty(port.shape_at(specification.range[2]), dtype=port.dtype, device=device)
            for port in specification.outputs
        }
        self._bindings: dict[int, Any] = {}

    def run(self, rows: int) -> tuple[Tensor, ...]:
        if rows not in self._bindings:
            self._bindings[rows] = self._bind(rows)
        self._session.run_with_iobinding(self._bindings[rows])
        return tuple(self._part(port, rows) for port in self.specification.outputs)

    def _part(self, port: Any, rows: int) -> Tensor:
        buffer = self._outputs[port.name]
        return buffer[:rows] if port.batched else buffer

    def _bind(self, rows: int) -> Any:
        binding = self._session.io_binding()
        kind, index = self.device.type, self.device.index or 0
        for port in self.specification.inputs:
            pointer = self.inputs[port.name].data_ptr()
            binding.bind_input(port.name, kind, index, NUMPY[port.dtype], port.shape_at(rows), pointer)
        for port in self.specification.outputs:
            pointer = self._outputs[port.name].data_ptr()
            binding.bind_output(port.name, kind, index, NUMPY[port.dtype], port.shape_at(rows), pointer)
        return binding


def _found(value: Any) -> Found:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Found(value.name, TYPES.get(value.type), shape)


def load_onnxruntime(device: torch.device, precision: torch.dtype = torch.float32) -> Any:
    """The module, once it is known to serve device and precision; NoEngine with the cure otherwise."""
    cuda = device.type == "cuda"
    if not cuda and precision == torch.bfloat16:
        raise NoEngine("ONNX Runtime has no bfloat16 on a CPU; give engine.precision=float32, or take another engine")
    extra = "onnxruntime-gpu" if cuda else "onnxruntime"
    try:
        import onnxruntime
    except ImportError:
        raise NoEngine(f'onnxruntime is not installed; pip install "diffdfkd[{extra}]"') from None
    wanted = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise NoEngine(f'this onnxruntime has no {wanted}; pip install "diffdfkd[{extra}]"')
    return onnxruntime
