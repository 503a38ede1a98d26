"""Attention and its gradient in matrix products and softmax, so that no fused operator is left in a traced graph.

    P = softmax(scale Q K^T + mask)    O = P V    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(P * dP))
    dQ = scale dS K    dK = scale dS^T Q

Q [B, h, T, E], K [B, h, S, E], V [B, h, S, F], mask broadcast to [B, h, T, S]; P in float32 or wider. The backward
computes P again, which an elimination of common subexpressions takes away. Dropout, and fewer heads in K than in Q, are
left to the operator.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from diffdfkd.engine.separable import outside_trace
from diffdfkd.kernels.launch import at_least_float32

aten = torch.ops.aten


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output [B, h, T, F] and the scores' logsumexp [B, h, T]."""
    scores = _scores(query, key, mask, causal, scale)
    return _product(_softmax(scores, mask).to(value.dtype), value), scores.logsumexp(-1)


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the output to those of query, key and value."""
    wide = _softmax(_scores(query, key, mask, causal, scale), mask)
    by_probabilities = at_least_float32(_product(gradient, value.transpose(-2, -1))) * wide
    by_scores = by_probabilities - wide * by_probabilities.sum(-1, keepdim=True)
    by_scores = (by_scores * _scale(query, scale)).to(query.dtype)
    by_value = _product(wide.to(value.dtype).transpose(-2, -1), gradient)
    return _product(by_scores, key), _product(by_scores.transpose(-2, -1), query), by_value


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[B, h, m, k] and [B, h, k, n] -> [B, h, m, n]; matmul would be traced with an expansion of both."""
    pairs = left.shape[0] * left.shape[1]
    made = torch.bmm(left.reshape(pairs, *left.shape[2:]), right.reshape(pairs, *right.shape[2:]))
    return made.reshape(*left.shape[:-1], right.shape[-1])


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    scores = at_least_float32(_product(query * _scale(query, scale), key.transpose(-2, -1)))
    if causal:
        rows, columns = scores.shape[-2:]
        scores = torch.where(_triangle(int(rows), int(columns), scores.device), scores, float("-inf"))
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """A row that a mask takes away whole is 0."""
    return scores.softmax(-1) if mask is None else torch._safe_softmax(scores, -1)


@lru_cache(maxsize=32)
def _triangle(rows: int, columns: int, device: torch.device) -> Tensor:
    with outside_trace():
        return torch.ones(rows, columns, dtype=torch.bool, device="cpu").tril().to(device)


def _plain(query: Tensor, key: Tensor, dropout: float) -> bool:
    return dropout == 0 and query.shape[1] == key.shape[1]


def _for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    return attend(query, key, value, attn_mask, causal, scale) if _plain(query, key, dropout) else NotImplemented


def _for_cpu_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    if not _plain(query, key, dropout):
        return NotImplemented
    return attend_backward(gradient, query, key, value, attn_mask, causal, scale)


def _seeds(query: Tensor) -> tuple[Tensor, Tensor]:
    """What the fused operators return for dropout's sake; nobody reads it."""
    return query.new_zeros((), dtype=torch.int64), query.new_zeros((), dtype=torch.int64)


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    compute_logsumexp: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    if not _plain(query, key, dropout):
        return NotImplemented
    return (*attend(query, key, value, bias, causal, scale), *_seeds(query))


def _efficient_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    wanted: Sequence[bool],
    causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    if wanted[3] or not _plain(query, key, dropout):
        return NotImplemented
    return (*attend_backward(gradient, query, key, value, bias, causal, scale), None)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    return _cudnn(query, key, value, None, True, dropout, causal, return_debug_mask, scale=scale)


def _flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    seed: Tensor,
    offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    if not _plain(query, key, dropout):
        return NotImplemented
    return attend_backward(gradient, query, key, value, None, causal, scale)


def _cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    compute_logsumexp: bool,
    dropout: float = 0.0,
    causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    if return_debug_mask or not _plain(query, key, dropout):
        return NotImplemented
    sizes = None, None, query.shape[2], key.shape[2]
    return (*attend(query, key, value, bias, causal, scale), *sizes, *_seeds(query), query.new_zeros(()))


def _cudnn_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    *,
    scale: float | None = None,
) -> Any:
    if not _plain(query, key, dropout):
        return NotImplemented
    return attend_backward(gradient, query, key, value, bias, causal, scale)


ATTENTION: dict[OpOverload, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _for_cpu_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
}
"""The fused operators that scaled_dot_product_attention becomes on CPU and CUDA, and what stands for each."""
