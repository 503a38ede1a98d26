"""Inductor's freezing on CPUs, which folds constants and packs weights, kept from writing over what is still read.

With weights packed, torch 2.14 fuses a sum into the convolution before it and adds in place, into the sum's other
operand. Where a gradient later in the same graph still reads that operand it can come out wrong, by a few per cent to a
factor of 2.5, without a word (docs/log.md). A sum that is spelled a - (-b) is the same to the last bit, is fused into
what follows it, and is never taken for one of theirs.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten = torch.ops.aten


def frozen() -> dict[str, Any]:
    """Settings for Inductor."""
    return {"freezing": True, "post_grad_custom_pre_pass": SumsApart()}


class SumsApart(CustomGraphPass):
    """conv + x -> x - (-conv)."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if len(node.args) != 2 or node.kwargs:
                continue
            if any(is_convolution(operand) for operand in node.args):
                _subtract(graph, node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def is_convolution(operand: Any) -> bool:
    """Packed, as freezing leaves it, or not."""
    return isinstance(operand, Node) and operand.op == "call_function" and "convolution" in str(operand.target)


def _subtract(graph: Graph, node: Node) -> None:
    other, made = node.args
    if not is_convolution(made):
        other, made = made, other
    assert isinstance(made, Node)
    with graph.inserting_before(node):
        negative = graph.call_function(aten.neg.default, (made,))
        negative.meta = dict(made.meta)
        difference = graph.call_function(aten.sub.Tensor, (other, negative))
        difference.meta = dict(node.meta)
    node.replace_all_uses_with(difference)
    graph.erase_node(node)
