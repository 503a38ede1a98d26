"""A stage as one flat, forward-only graph of plain operators: gradients taken inside it are part of the graph."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from diffdfkd.engine.decompositions import decompositions, whole_resizing
from diffdfkd.engine.engine_stages import Function, Stage
from diffdfkd.engine.folded_upsampling import FoldedUpsampling, Form, transposed


def trace(
    stage: Stage, more: Mapping[Any, Callable[..., Any]] | None = None, doubling: Form = transposed
) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    """(the program, inputs of about the usual batch); nothing is computed.

    The batch is a symbol where the specification says so, else a constant. ``more`` are decompositions in the place of
    those of the same operators. ``doubling`` is the form of a convolution of a doubled image.
    """
    specification = stage.specification
    least, rows, most = specification.range
    if not specification.static:
        # Of a single row the exporter would take the batch for a constant.
        rows = max(rows, 2)
    # As the buffers of a runner lie: a compiler may hold on to strides.
    inputs = tuple(value.contiguous() for value in stage.examples(rows, 0))
    batched = [not specification.static and port.batched for port in specification.inputs]
    graph = _graph(stage, inputs, batched, {**decompositions(), **(more or {})}, doubling)
    dynamic = None
    if any(batched):
        # The tracer takes 0 and 1 for constants: a batch of 1 is served by the same graph all the same.
        batch = torch.export.Dim("batch", min=max(least, 1), max=most)
        dynamic = tuple({0: batch} if symbolic else None for symbolic in batched)
    with torch.no_grad():
        return torch.export.export(graph, inputs, dynamic_shapes=dynamic), inputs


def _graph(
    stage: Stage,
    inputs: Sequence[Tensor],
    batched: Sequence[bool],
    table: Mapping[Any, Callable[..., Any]],
    doubling: Form,
) -> GraphModule:
    function = stage.function  # made outside the trace
    with torch.no_grad(), FoldedUpsampling(doubling):
        if any(batched):
            mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
            fakes = [_fake(mode, value, free) for value, free in zip(inputs, batched, strict=True)]
            with mode, whole_resizing():
                graph = _tracer(function, "symbolic", table)(*fakes)
        else:
            graph = _tracer(function, "fake", table)(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _tracer(
    function: Function, mode: Literal["fake", "symbolic"], table: Mapping[Any, Callable[..., Any]]
) -> Callable[..., GraphModule]:
    return make_fx(function, decomposition_table=table, tracing_mode=mode, _allow_non_fake_inputs=True)


def _fake(mode: FakeTensorMode, value: Tensor, batched: bool) -> Tensor:
    """A tensor without data, whose batch is a symbol where it is ``batched``."""
    sizes = [DimDynamic.STATIC] * value.dim()
    if batched:
        sizes[0] = DimDynamic.DYNAMIC
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context)
