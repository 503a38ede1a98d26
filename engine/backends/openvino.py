"""OpenVINO: the exported float32 graph on the CPU, in a precision that is said and never guessed."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.backends.onnx_ports import Found, compare_ports
from diffdfkd.engine.memory import less_memory
from diffdfkd.engine.runner import NoEngine, Runner
from diffdfkd.engine.specification import Specification

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
TYPES = {"f32": torch.float32, "boolean": torch.bool, "f16": torch.float16}


class OpenVinoRunner(Runner):
    """An exported stage under OpenVINO; inputs and outputs are read and written where they lie."""

    engine = "openvino"

    def __init__(
        self,
        model: Path,
        specification: Specification,
        device: torch.device,
        threads: int | None,
        precision: torch.dtype,
    ) -> None:
        super().__init__(specification, device)
        openvino = load_openvino(device, precision)
        core = openvino.Core()
        settings = {
            # Left out, it would take bfloat16 by itself wherever the processor has it.
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        try:
            graph = core.read_model(str(model))
            compare_ports(specification, [_found(port) for port in (*graph.inputs, *graph.outputs)], model)
            self._compiled = core.compile_model(graph, "CPU", settings)
        except RuntimeError as error:
            raise NoEngine(f"{model}: OpenVINO refuses it: {_reason(error)}{less_memory(error)}") from None
        self._openvino = openvino
        self._outputs = {
            port.name: torch.empty(port.shape_at(specification.range[2]), dtype=port.dtype, device=device)
            for port in specification.outputs
        }
        self._requests: dict[int, tuple[Any, tuple[Tensor, ...]]] = {}

    def run(self, rows: int) -> tuple[Tensor, ...]:
        if rows not in self._requests:
            self._requests[rows] = self._request(rows)
        request, outputs = self._requests[rows]
        request.infer()
        return outputs

    def _request(self, rows: int) -> tuple[Any, tuple[Tensor, ...]]:
        request = self._compiled.create_infer_request()

        def shared(tensor: Tensor) -> Any:
            return self._openvino.Tensor(tensor.numpy(), shared_memory=True)

        for index, value in enumerate(self.views(rows)):
            request.set_input_tensor(index, shared(value))
        outputs = []
        for index, port in enumerate(self.specification.outputs):
            buffer = self._outputs[port.name]
            outputs.append(buffer[:rows] if port.batched else buffer)
            request.set_output_tensor(index, shared(outputs[-1]))
        return request, tuple(outputs)


def _found(port: Any) -> Found:
    shape = tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
    return Found(port.any_name, TYPES.get(port.element_type.get_type_name()), shape)


def _reason(error: RuntimeError) -> str:
    """What it says in one line, without where in OpenVINO's own sources it came about."""
    told = re.sub(r"(Exception from|Check '.*?' failed at) src/\S+:\d+:", "", str(error), flags=re.DOTALL)
    return " ".join(told.split())[:300] or "it gave no reason"


def load_openvino(device: torch.device, precision: torch.dtype = torch.float32) -> Any:
    """The module; NoEngine with the cure where it is not there, or serves neither device nor precision."""
    if precision not in PRECISIONS:
        raise NoEngine(
            f"OpenVINO computes in float32 or bfloat16, and {str(precision).removeprefix('torch.')} was asked for; "
            "give engine.precision=bfloat16, or take another engine"
        )
    if device.type != "cpu":
        raise NoEngine(f"OpenVINO runs on the CPU here, and the device is {device.type}; take another engine")
    try:
        import openvino
    except ImportError:
        raise NoEngine('openvino is not installed; pip install "diffdfkd[openvino]"') from None
    return openvino
