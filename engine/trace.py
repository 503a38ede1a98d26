"""A stage as one flat, forward-only graph of plain operators: gradients taken inside it are part of the graph."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from diffdfkd.engine.decompositions import decompositions, whole_resizing
from diffdfkd.engine.engine_stages import Function, Stage


def trace(stage: Stage) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    """(the program, inputs of the usual batch); nothing is computed.

    The batch is a symbol where the specification says so, else a constant.
    """
    specification = stage.specification
    rows = specification.rows
    least, _, most = specification.range
    inputs = stage.examples(rows, 0)
    batched = [not specification.static and port.batched for port in specification.inputs]
    graph = _graph(stage, inputs, batched)
    dynamic = None
    if any(batched):
        # The tracer takes 0 and 1 for constants: a batch of 1 is served by the same graph all the same.
        batch = torch.export.Dim("batch", min=max(least, 1), max=most)
        dynamic = tuple({0: batch} if symbolic else None for symbolic in batched)
    with torch.no_grad():
        return torch.export.export(graph, inputs, dynamic_shapes=dynamic), inputs


def _graph(stage: Stage, inputs: Sequence[Tensor], batched: Sequence[bool]) -> GraphModule:
    function = stage.function  # made outside the trace
    with torch.no_grad():
        if any(batched):
            mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
            fakes = [_fake(mode, value, free) for value, free in zip(inputs, batched, strict=True)]
            with mode, whole_resizing():
                graph = _tracer(function, "symbolic")(*fakes)
        else:
            graph = _tracer(function, "fake")(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _tracer(function: Function, mode: Literal["fake", "symbolic"]) -> Any:
    return make_fx(function, decomposition_table=decompositions(), tracing_mode=mode, _allow_non_fake_inputs=True)


def _fake(mode: FakeTensorMode, value: Tensor, batched: bool) -> Tensor:
    """A tensor without data, whose batch is a symbol where it is ``batched``."""
    sizes = [DimDynamic.STATIC] * value.dim()
    if batched:
        sizes[0] = DimDynamic.DYNAMIC
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context)
