"""Attention written out, where its dropout draws from a stream of ours: no fused kernel takes a mask of somebody else's.

Vaswani et al. 2017, section 3.2.1; dropout acts on the weights, after the softmax, as in torch's own formula.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Drop = Callable[[Tensor], Tensor]


def attention(
    drop: Drop,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with ``drop`` as its dropout: [..., L, E], [..., S, E], [..., S, V] -> [..., L, V]."""
    if enable_gqa:  # several heads of the query share one of key and value
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    weights = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        later = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
        weights = weights.masked_fill(later, -math.inf)
    if attn_mask is not None:
        weights = weights.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
        return drop(torch.ops.aten._safe_softmax(weights, -1)) @ value  # zeros, not nan, where a query may attend to nothing
    return drop(torch.softmax(weights, -1)) @ value


_PARAMETERS = inspect.signature(F.multi_head_attention_forward).parameters
HEADS = tuple(_PARAMETERS)  # plain things: Dynamo does not look into a signature
_DEFAULTS = {name: p.default for name, p in _PARAMETERS.items() if p.default is not p.empty}


def multi_head(drop: Drop, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` with ``drop`` in the place of its dropout.

    The weights come from torch's own function, which masks and checks; what follows the dropout is linear in them.
    """
    a = _separate({**_DEFAULTS, **dict(zip(HEADS, args, strict=False)), **kwargs})
    needed, average = a["need_weights"], a["average_attn_weights"]
    # What it does with the weights is done below: here of a value of one number, and one number comes out.
    value, size = a["value"], len(a["q_proj_weight"])
    none = {"value": value.new_zeros(*value.shape[:-1], 1), "v_proj_weight": value.new_zeros(size, 1)}
    none |= {"out_proj_weight": value.new_zeros(1, size), "out_proj_bias": None}
    _, weights = F.multi_head_attention_forward(
        **{**a, **none, "dropout_p": 0.0, "training": False, "need_weights": True, "average_attn_weights": False}
    )
    assert weights is not None  # they were asked for
    batched = weights.dim() == 4
    dropped = drop(weights if batched else weights.unsqueeze(0))  # [batch, heads, L, S]
    out = dropped @ _values(a, dropped.shape[1], batched)  # [batch, heads, L, E]
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), a["out_proj_weight"], a["out_proj_bias"])
    if needed:
        shown = dropped.mean(1) if average else dropped
        return (out, shown) if batched else (out.squeeze(1), shown.squeeze(0))
    return (out if batched else out.squeeze(1)), None


def _separate(a: dict[str, Any]) -> dict[str, Any]:
    """With the weights of the three projections apart, as torch takes them too."""
    if a["use_separate_proj_weight"]:
        return a
    q, k, v = a["in_proj_weight"].chunk(3)
    return a | {"use_separate_proj_weight": True, "in_proj_weight": None, "q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}


def _values(a: dict[str, Any], heads: int, batched: bool) -> Tensor:
    """The projected values, [batch, heads, S, E], with what torch appends to them."""
    if a["static_v"] is not None:
        return _appended(a, a["static_v"].unflatten(0, (-1, heads)))
    value = a["value"] if batched else a["value"].unsqueeze(1)  # [S, batch, E]
    bias = None if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)[2]
    v = F.linear(value, a["v_proj_weight"], bias)
    if a["bias_v"] is not None:
        v = torch.cat([v, a["bias_v"].repeat(1, v.shape[1], 1)])
    return _appended(a, v.view(*v.shape[:2], heads, -1).permute(1, 2, 0, 3))


def _appended(a: dict[str, Any], v: Tensor) -> Tensor:
    return torch.cat([v, torch.zeros_like(v[:, :, :1])], 2) if a["add_zero_attn"] else v
