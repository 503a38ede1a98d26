"""Memory that runs out, in the words of those who say so."""

import subprocess
import sys

import pytest

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.memory import fitting, may_pass, ran_out

SAID = {
    "torch": "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
    "torch, CUDA": "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.19 GiB",
    "CUDA": "CUDA error: cudaErrorMemoryAllocation",
    "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "OpenVINO": "Exception from src/inference/src/cpp/infer_request.cpp:223: Failed to allocate memory",
    "system": "mmap failed: Cannot allocate memory",
    # github.com/NVIDIA/TensorRT/issues/3017 and 4258
    "TensorRT, allocator": "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
    "TensorRT, context": "Error Code 2: OutOfMemory (no further information)",
    "TensorRT, amount": "Requested amount of GPU memory (17920000000 bytes) could not be allocated.",
}


@pytest.mark.parametrize("who", SAID)
def test_words_of_each(who: str) -> None:
    assert ran_out(RuntimeError(SAID[who]))
    assert not ran_out(ValueError(SAID[who]))


@pytest.mark.parametrize(
    "said",
    [
        "mat1 and mat2 shapes cannot be multiplied",
        "Failed to allocate required number of vector registers",
        "Error Code 4: Internal Error (no profile fits)",
        "CUDA error: an illegal memory access was encountered",
    ],
)
def test_other_errors_are_not_taken_for_it(said: str) -> None:
    assert not ran_out(RuntimeError(said))


ONNXRUNTIME = """
import resource
import numpy, onnxruntime
from onnx import TensorProto, helper
from diffdfkd.engine.memory import ran_out

nodes = [
    helper.make_node("Expand", ["x", "s"], ["y"]),
    helper.make_node("Exp", ["y"], ["e"]),
    helper.make_node("ReduceSum", ["e"], ["z"], keepdims=0),
]
inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]
outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [])]
size = helper.make_tensor("s", TensorProto.INT64, [1], [2**30])
graph = helper.make_graph(nodes, "large", inputs, outputs, [size])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, resource.RLIM_INFINITY))
try:
    session.run(None, {"x": numpy.zeros(1, numpy.float32)})
except Exception as error:
    print(isinstance(error, RuntimeError), ran_out(error), str(error)[-80:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="bounds its own memory")
def test_onnxruntimes_own_error() -> None:
    """Its errors are no RuntimeErrors: here it is asked for 4 GiB, and has half a one."""
    pytest.importorskip("onnxruntime")
    answer = subprocess.run([sys.executable, "-c", ONNXRUNTIME], capture_output=True, text=True)
    assert answer.stdout.startswith("False True "), answer.stdout + answer.stderr


def test_error_of_an_engine_becomes_a_line_about_the_field() -> None:
    foreign = type("Fail", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})
    with (
        pytest.raises(UserError, match=r"^synthesis\.batch_size: a batch does not fit into memory \(.*\); smaller$"),
        fitting("synthesis.batch_size", "a batch", "smaller"),
    ):
        raise foreign(
            "[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 2147483648"
        )
    with pytest.raises(foreign), fitting("synthesis.batch_size", "a batch", "smaller"):
        raise foreign("[ONNXRuntimeError] : 10 : INVALID_GRAPH")


def test_what_may_pass_is_looked_for_among_the_causes() -> None:
    def wrapped(cause: BaseException) -> Exception:
        error = ValueError("a wrapping")
        error.__cause__ = RuntimeError("another")
        error.__cause__.__cause__ = cause
        return error

    for cause in (MemoryError(), RuntimeError("std::bad_alloc"), OSError(28, "No space left on device")):
        assert may_pass(cause) and may_pass(wrapped(cause))
    for cause in (RuntimeError("unsupported operator"), ValueError("x"), KeyError("out of memory")):
        assert not may_pass(cause) and not may_pass(wrapped(cause))
