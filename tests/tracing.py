"""Stages traced with the decompositions, for tests: what a graph holds, and what it gives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from diffdfkd.engine.decompositions import decompositions, whole_resizing


def vjp(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """(x, cotangent, *others) -> the function's output, and its vector-Jacobian product with respect to x."""

    def pulled(x: Tensor, cotangent: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            made = function(leaf, *others)
            (gradient,) = torch.autograd.grad(made, leaf, cotangent)
        return made.detach(), gradient

    return pulled


def traced(function: Callable[..., Any], *inputs: Tensor, symbolic: bool = False) -> torch.fx.GraphModule:
    """The function as a graph; with ``symbolic`` its inputs' first dimension is free."""
    if not symbolic:
        graph = make_fx(function, decomposition_table=decompositions())(*inputs)
    else:
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        fakes = []
        for tensor in inputs:
            free = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (tensor.dim() - 1)
            fakes.append(mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=free)))
        tracer = make_fx(
            function, decomposition_table=decompositions(), tracing_mode="symbolic", _allow_non_fake_inputs=True
        )
        with mode, whole_resizing():
            graph = tracer(*fakes)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


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


def assert_same(given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(given) == len(expected)
    for made, wanted in zip(given, expected, strict=True):
        assert made.dtype == wanted.dtype and distance(made, wanted) <= tolerance, distance(made, wanted)
