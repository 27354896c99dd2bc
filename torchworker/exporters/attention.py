"""Attention with a mask in ONNX, by the operator that has one since opset 23.

At opset 20 a mask is added to the scores, and of a row that it masks throughout (a sample that is all padding) ONNX
gives the mean of the values, or NaN where the mask is of floats; torch gives 0, and so does the operator. It is faster
too (docs/decisions/0028-opset-by-graph.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

OPSET = 23
"""The first ONNX operator set with Attention."""
AT_20 = "scaled_dot_product_attention with a mask"
"""What `operators.py` calls its difference at opset 20."""


def has_masks(program: ExportedProgram) -> bool:
    """Whether attention with a mask is anywhere in it, also inside branches and loops."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    return any(
        (node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")) is not None
        for graph in graphs
        for node in graph.nodes
        if node.target is torch.ops.aten.scaled_dot_product_attention.default
    )


def attention_translation() -> dict[Any, Callable[..., Any]]:
    """For torch's exporter at OPSET."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _as_onnx}


def _as_onnx(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """ONNX's Attention (https://onnx.ai/onnx/operators/onnx__Attention.html), for what it can express.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as of torch's operator.

    Raises:
        ValueError: it has dropout, other dimensions than [batch, heads, length, features] or [batch, length, features],
            or broadcasts.
    """
    import onnxscript

    # Its annotations know tensors of ONNX only, and it takes numbers too.
    op: Any = onnxscript.opset23
    rank = len(query.shape)
    if dropout_p or rank not in (3, 4) or not rank == len(key.shape) == len(value.shape):
        raise ValueError(f"attention over {rank} dimensions, with dropout {dropout_p}")
    same = [(query, key, 0), (key, value, 0)] + [(key, value, 1)] * (rank == 4)
    same += [(query, key, 1)] * (rank == 4 and not enable_gqa)
    if any(one.shape[axis] != other.shape[axis] for one, other, axis in same):
        raise ValueError("attention over samples or heads that are broadcast")
    if attn_mask is not None:
        if rank == len(attn_mask.shape) == 3:
            attn_mask = op.Unsqueeze(attn_mask, [1])
        # ONNX Runtime takes no mask that is broadcast over queries or keys.
        ends = (op.Shape(tensor, start=rank - 2, end=rank - 1) for tensor in (query, key))
        attn_mask = op.Expand(attn_mask, op.Concat(op.Constant(value_ints=[1, 1]), *ends, axis=0))
    if rank == 3:
        query, key, value = (op.Unsqueeze(tensor, [1]) for tensor in (query, key, value))
    answers, *_ = op.Attention(query, key, value, attn_mask, scale=scale, is_causal=int(is_causal))
    return op.Squeeze(answers, [1]) if rank == 3 else answers
