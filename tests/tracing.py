"""Stages traced with the decompositions, for tests: what a graph holds, and what it gives."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from diffdfkd.engine.decompositions import decompositions, whole_resizing

aten = torch.ops.aten

PLAIN = {
    *(
        "abs",
        "add",
        "bitwise_and",
        "bitwise_not",
        "bitwise_or",
        "ceil",
        "clamp",
        "cos",
        "div",
        "elu",
        "eq",
        "erf",
        "exp",
    ),
    *("floor", "ge", "gelu", "gt", "hardtanh", "le", "leaky_relu", "log", "log1p", "logical_and", "logical_not", "lt"),
    *("maximum", "minimum", "mul", "ne", "neg", "pow", "reciprocal", "relu", "rsqrt", "sigmoid", "sign", "sin", "sqrt"),
    *("sub", "tanh", "where", "_to_copy", "alias", "clone", "expand", "permute", "view", "squeeze", "unsqueeze"),
    *("cat", "constant_pad_nd", "flip", "repeat", "select", "slice", "split_with_sizes"),
    *("amax", "any", "mean", "sum", "var", "_softmax", "_log_softmax"),
    *("addmm", "bmm", "mm", "convolution", "avg_pool2d", "max_pool2d_with_indices", "upsample_nearest2d"),
    *("_native_batch_norm_legit_no_training", "native_group_norm", "reflection_pad2d", "replication_pad2d"),
    *("arange", "full", "full_like", "scalar_tensor", "sym_size"),
    # In place, which the exporter and the compiler put right.
    *("add_", "copy_", "fill_", "logical_and_", "mul_", "pow_", "relu_"),
}
"""What a traced graph may hold: forward operators that ONNX and TensorRT have, without a scatter among them."""


_table = cache(decompositions)


def vjp(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """(x, cotangent, *others) -> the function's output, and its vector-Jacobian product with respect to x."""

    def pulled(x: Tensor, cotangent: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            made = function(leaf, *others)
            (gradient,) = torch.autograd.grad(made, leaf, cotangent)
        return made.detach(), gradient

    return pulled


def traced(
    function: Callable[..., Any], *inputs: Tensor, mode: Literal["real", "fake", "symbolic"] = "fake"
) -> torch.fx.GraphModule:
    """The function as a graph; ``fake`` computes nothing, with ``symbolic`` its inputs' first dimension is free too."""
    tracer = make_fx(function, decomposition_table=_table(), tracing_mode=mode, _allow_non_fake_inputs=mode != "real")
    if mode == "symbolic":
        fakes = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        with fakes, whole_resizing():
            graph = tracer(*[_free(fakes, tensor) for tensor in inputs])
    else:
        graph = tracer(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _free(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (tensor.dim() - 1)
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


class _Reshaping(torch.fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(aten.reshape.default if target is aten.view.default else target, args, kwargs)


def run_eager(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """What a graph gives; some CPU kernels lay their output out otherwise than a trace without values takes it."""
    with torch.no_grad():
        return _Reshaping(graph).run(*inputs)


def operators(graph: torch.fx.GraphModule) -> set[str]:
    """Names of the ATen operators that a graph calls, without their overloads."""
    return {
        node.target.overloadpacket.__name__
        for node in graph.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }


def distance(given: Tensor, expected: Tensor) -> float:
    """|given - expected| over |expected|, Euclidean; infinite where a value is not finite or a shape differs."""
    if given.shape != expected.shape or not given.isfinite().all():
        return float("inf")
    difference = (given.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-300))


def usual_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The median, over all samples of several pairs (given, expected), of a sample's distance.

    Where a ReLU's input is 0 but for rounding, or two values of a window are equal but for it, one side goes another
    way, and that sample's gradient is off by 1e-3: a kink of the function. What is wrong is wrong in most samples.
    """
    distances = [
        distance(made, wanted)
        for given, expected in pairs
        for made, wanted in zip(given, expected, strict=True)
        if wanted.norm() > 0
    ]
    return sorted(distances)[len(distances) // 2]


def assert_same(given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(given) == len(expected)
    for made, wanted in zip(given, expected, strict=True):
        assert made.dtype == wanted.dtype and distance(made, wanted) <= tolerance, distance(made, wanted)


def check_operator(function: Callable[..., Tensor], *shape: int, symbolic: bool = False, whole: bool = False) -> None:
    """Output and gradient of the traced function are autograd's in float64, on an input that the trace has not seen.

    With ``symbolic`` its batch is larger than the traced one's, with ``whole`` its values repeat. No operator that is
    made for a gradient is left.
    """
    generator = torch.Generator().manual_seed(0)

    def sample(*sizes: int) -> Tensor:
        values = torch.randn(sizes, generator=generator, dtype=torch.float64)
        return values.round() if whole else values

    x = sample(*shape)
    cotangent = sample(*function(x).shape)
    graph = traced(vjp(function), x, cotangent, mode="symbolic" if symbolic else "real")
    assert operators(graph) <= PLAIN, operators(graph) - PLAIN
    more = 2 if symbolic else 0
    fresh = [sample(len(tensor) + more, *tensor.shape[1:]) for tensor in (x, cotangent)]
    assert_same(graph(*fresh), vjp(function)(*fresh), 1e-12)


def to_onnx(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """The ModelProto that torch's exporter makes of a graph; a symbolic one keeps its free batch."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    symbolic = any(
        isinstance(node.meta["val"].shape[0], torch.SymInt) for node in graph.graph.find_nodes(op="placeholder")
    )
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(graph, tuple(inputs), dynamic_shapes=(batch,) * len(inputs) if symbolic else None)
    # Its optimizer compares every rule with every node, for minutes on a large chain; onnxruntime has its own.
    exported = torch.onnx.export(program, (), dynamo=True, opset_version=21, verbose=False, optimize=False)
    assert exported is not None
    fold_constants(exported.model)
    RemoveUnusedNodesPass()(exported.model)
    return exported.model_proto


def run_onnx(model: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What onnxruntime makes of it, on two threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(made) for made in session.run(None, given)]
