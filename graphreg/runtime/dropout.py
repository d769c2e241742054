"""Native dropout with graphreg's noise: the runtime module that replaces a dropout call of the model, and two functions for attention.

``NativeDropoutRule`` takes the arguments of the call that it replaces (dropout of elements or channels, alpha dropout, stochastic depth,
attention) and draws from graphreg's streams. ``attention`` and ``multi_head`` compute what torch's attention functions compute, but take
the dropout as an argument, because torch's functions draw the masks themselves.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphreg.compiler.recompute import recompute_in_backward
from graphreg.errors import ROUNDS_TO_1, RegularizerError
from graphreg.ir.random_ops import rate_of
from graphreg.planning.native_dropout import NativeDropoutEdit
from graphreg.rng.noise import Noise
from graphreg.rng.operators import recomputes
from graphreg.runtime.rank_layout import window
from graphreg.runtime.runtime_module import DrawingRule, accumulation
from graphreg.torch_internals.distributed import is_distributed
from graphreg.torch_internals.operators import safe_softmax

_SELU = 1.7580993408473766  # alpha dropout sets a dropped element to minus this number before it rescales; Klambauer et al. 2017


Rate = float | Tensor  # a rate that has a schedule is a 0-d tensor, float64, or float32 on a device without float64


def _drops_all(p: Rate, z: Tensor) -> bool:
    """Return whether a rate is 1, or is so near to 1 that the mask's rate is rounded to it. No schedule has such rates."""
    return not isinstance(p, Tensor) and p >= (1 if accumulation(z.dtype) == torch.float64 else ROUNDS_TO_1)


def _is_off(p: Rate) -> bool:
    """Return whether a rate is 0. Return False for a rate that has a schedule: no branch may depend on a number that changes."""
    return not isinstance(p, Tensor) and p == 0


def _as_tensor(p: Rate, z: Tensor) -> Tensor:
    """Return a rate as a 0-d tensor on the device of ``z``, the value that dropout acts on."""
    return p if isinstance(p, Tensor) else torch.full((), p, dtype=accumulation(z.dtype), device=z.device)


def scaled(mask: Tensor, scale: Rate) -> Tensor:
    """Multiply a mask by ``scale``, in place if the mask's dtype allows it: nothing else reads the mask."""
    return mask.mul_(scale) if mask.is_floating_point() else mask * scale


class NativeDropoutRule(DrawingRule):
    """Replaces one native dropout. The rate is that of the original, or the rate that ``own_dropout=`` gives; 0 turns dropout off.

    Attributes:
        kind: What is dropped together: ``"element"``, ``"channel"``, ``"depth"`` and so on, as in ``NativeDropout.kind``.
        rate: The rate that the plan gives; None for the rate of the original call or module. If it is a schedule, the clock returns its
            present value.
        was: The original's rate when the model was traced.
        always: Whether the original acts in eval mode too.
        layer: The module whose call is replaced, in a tuple, so that it does not become a submodule; () if a function call is replaced.
    """

    def __init__(self, edit: NativeDropoutEdit, slot: int) -> None:
        dropout = edit.dropout
        super().__init__(f"{dropout.site.op} at {dropout.site.name}: {edit.action}", dropout.site.name, slot, dropout.path)
        self.kind, self.rate, self.was, self.always = dropout.kind, edit.rate, dropout.rate, dropout.when == "always"
        self.function, self.names, self.is_module = dropout.function, dropout.names, dropout.function == ""
        self.layer: tuple[nn.Module, ...] = ()

    def adopt(self, owner: nn.Module) -> None:
        super().adopt(owner)
        if self.is_module:
            self.layer = (owner,)

    def forward(self, *args: Any, noise: Tensor | None = None, clock: Tensor | None = None, **kwargs: Any) -> Any:
        """Return what the original call would return, with masks from graphreg's streams.

        The arguments are those of the original call. ``noise``: the keys, int32 [streams, 2], or None if the plan turns this dropout off.
        ``clock``: the strengths of this call that have a schedule, a 1-d tensor in which ``self.elements`` has the place of this rate; None
        if the rate has no schedule.
        """
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        p = self._rate(arguments) if clock is None else clock[self.elements[0]]
        if self.kind == "heads":
            return self._heads(p, noise, args, kwargs, arguments)
        if self.kind == "attention":
            if _is_off(p) or noise is None or not self._acts(arguments):
                return F.scaled_dot_product_attention(**{**arguments, "dropout_p": 0.0})
            return attention(self._drop(p, noise), **arguments)
        z: Tensor = args[0] if args else next(iter(kwargs.values()))
        if _is_off(p) or noise is None or not self._acts(arguments):
            return z
        if is_distributed(z):
            raise RegularizerError(
                f"{self.description}: the value is a DTensor, and graphreg draws only for plain tensors here. Leave the dropout to torch: "
                "own_dropout='keep'."
            )
        y = self._replaced(z, p, self.noise(noise, (), window(z, self.cuts, self.description)), arguments)
        return z.copy_(y) if self._writes(arguments) else y

    def _rate(self, arguments: Mapping[str, Any]) -> float:
        """Return the rate at this call. A dropout module's rate is read anew, because the user may have changed it since the trace."""
        if self.rate is not None:
            return self.rate
        if self.is_module:
            return rate_of(self.layer[0])
        # Many models pass dropout_p=0 in eval mode. If a block of noise_on makes dropout act there, it has the rate of the trace.
        if self.kind == "attention":
            return float(arguments["dropout_p"] or self.was or 0)
        return float(arguments.get("dropout_p" if self.kind == "heads" else "p", 0.5))

    def _acts(self, arguments: Mapping[str, Any]) -> bool:
        if self.silenced:
            return False
        if self.forced or self.always:
            return True
        if self.is_module:
            return self.layer[0].training
        if self.kind == "attention":
            return bool(arguments["dropout_p"] > 0 if self.was else self.owner[0].training)
        return bool(arguments.get("training", arguments.get("train", False)))

    def _writes(self, arguments: Mapping[str, Any]) -> bool:
        if not self.is_module:
            return self.function.endswith("_") or bool(arguments.get("inplace", False))
        # torch's layers of alpha dropout take the option ``inplace``, but do not pass it on
        return self.kind not in ("alpha", "channel alpha") and bool(getattr(self.layer[0], "inplace", False))

    def _replaced(self, z: Tensor, p: Rate, noise: Noise, arguments: Mapping[str, Any]) -> Tensor:
        if _drops_all(p, z):
            return z * 0  # as torch does

        def formula(z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
            shared = [axis for axis, size in enumerate(self._shape(z, arguments)) if size != z.shape[axis]]
            mask = noise.keep(z, weight.to(accumulation(z.dtype)), shared).to(z.dtype)
            return self._dropped(z, mask, weight if isinstance(p, Tensor) else p, arguments)

        weight = _as_tensor(p, z)
        recompute = self.recomputed and recomputes() and not self._writes(arguments)
        return recompute_in_backward(formula, z, weight, noise) if recompute else formula(z, weight, noise)

    def _dropped(self, z: Tensor, mask: Tensor, p: Rate, arguments: Mapping[str, Any]) -> Tensor:
        if self.kind in ("alpha", "channel alpha"):
            variance = (3.09091329228798 * p + 1) * (1 - p)  # the square of _SELU, as a literal: see AlphaDropout
            a = 1 / (torch.sqrt(variance) if isinstance(variance, Tensor) else math.sqrt(variance))
            return z * (mask * a) + ((mask - 1) * (_SELU * a) + _SELU * a * p)
        scales = getattr(self.layer[0], "scale_by_keep", True) if self.layer else True
        return z * scaled(mask, 1 / (1 - p)) if scales else z * mask

    def _shape(self, z: Tensor, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the mask's shape: one draw for each element, for each channel of an example, for each example, or for the batch."""
        if self.kind in ("element", "alpha"):
            return tuple(z.shape)
        ones = (1,) * (z.dim() - 1)
        if self.kind == "depth":
            return (1, *ones) if arguments.get("mode") == "batch" else (z.shape[0], *ones)
        if z.dim() < 2:
            raise RuntimeError(f"{self.description}: the value has {z.dim()} dims; dropout of channels needs 2 or more.")
        # torch reads some values as one example without a batch axis, by the function and the
        # number of axes: axis 0 has the channels then
        name = self.function or type(self.layer[0]).__name__.lower()
        unbatched = (name == "dropout1d" and z.dim() == 2) or (name == "dropout3d" and z.dim() != 5)
        return (z.shape[0], *ones) if unbatched else (z.shape[0], z.shape[1], *ones[1:])

    def _drop(self, p: Rate, noise: Tensor) -> Callable[[Tensor], Tensor]:
        draws = self.noise(noise)

        def drop(weights: Tensor) -> Tensor:
            if _drops_all(p, weights):
                return weights * 0
            mask = draws.keep(weights, _as_tensor(p, weights).to(accumulation(weights.dtype)))
            return weights * scaled(mask.to(weights.dtype), 1 / (1 - p))

        return drop

    def _heads(self, p: Rate, noise: Tensor | None, args: Any, kwargs: Any, arguments: Mapping[str, Any]) -> Any:
        """Run multi-head attention: with ``multi_head`` if dropout acts, else with torch's own function and no dropout."""
        drops = not _is_off(p) and noise is not None and self._acts(arguments)
        if not self.is_module:
            if drops and noise is not None:
                return multi_head(self._drop(p, noise), **arguments)
            return F.multi_head_attention_forward(**{**arguments, "dropout_p": 0.0})
        if not drops and not self.layer[0].training:
            return self.layer[0](*args, **kwargs)  # the layer may take torch's fast path
        with _Heads(self._drop(p, noise) if drops and noise is not None else None):
            return self.layer[0](*args, **kwargs)


class _Heads(TorchFunctionMode):
    """Replaces ``F.multi_head_attention_forward`` while the layer's own forward runs.

    ``drop``: the dropout for ``multi_head``, which runs instead; if ``drop`` is None, torch's function runs without dropout.
    """

    def __init__(self, drop: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.drop = drop

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        if self.drop is None:
            return func(*args, **{**(kwargs or {}), "training": False})  # in this function, training=False only turns dropout off
        return multi_head(self.drop, *args, **(kwargs or {}))


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
    if enable_gqa:  # several heads of the query share one head of key and value
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    weights = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        later = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
        weights = weights.masked_fill(later, -math.inf)
    if attn_mask is not None:
        weights = weights.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
        return drop(safe_softmax(weights, -1)) @ value  # zeros, not nan, where a query may attend to nothing
    return drop(torch.softmax(weights, -1)) @ value


_PARAMETERS = inspect.signature(F.multi_head_attention_forward).parameters
HEADS = tuple(_PARAMETERS)  # plain tuples and dicts: Dynamo does not trace inspect.signature
_DEFAULTS = {name: p.default for name, p in _PARAMETERS.items() if p.default is not p.empty}


def multi_head(drop: Drop, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` with ``drop`` as its dropout.

    torch's own function checks the arguments and computes the attention weights. This function computes what follows the dropout.
    """
    a = _separate({**_DEFAULTS, **dict(zip(HEADS, args, strict=False)), **kwargs})
    needed, average = a["need_weights"], a["average_attn_weights"]
    # Of what torch's function returns here, only the attention weights are used. To save work, it gets a value with one feature and an
    # output projection to one feature.
    value, size = a["value"], len(a["q_proj_weight"])
    none = {"value": value.new_zeros(*value.shape[:-1], 1), "v_proj_weight": value.new_zeros(size, 1)}
    none |= {"out_proj_weight": value.new_zeros(1, size), "out_proj_bias": None}
    _, weights = F.multi_head_attention_forward(
        **{**a, **none, "dropout_p": 0.0, "training": False, "need_weights": True, "average_attn_weights": False}
    )
    assert weights is not None  # need_weights=True
    batched = weights.dim() == 4
    dropped = drop(weights if batched else weights.unsqueeze(0))  # [batch, heads, L, S]
    out = dropped @ _values(a, dropped.shape[1], batched)  # [batch, heads, L, E]
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), a["out_proj_weight"], a["out_proj_bias"])
    if needed:
        shown = dropped.mean(1) if average else dropped
        return (out, shown) if batched else (out.squeeze(1), shown.squeeze(0))
    return (out if batched else out.squeeze(1)), None


def _separate(a: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with a separate weight for each of the three projections, which torch's function also accepts."""
    if a["use_separate_proj_weight"]:
        return a
    q, k, v = a["in_proj_weight"].chunk(3)
    return a | {"use_separate_proj_weight": True, "in_proj_weight": None, "q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}


def _values(a: dict[str, Any], heads: int, batched: bool) -> Tensor:
    """Return the projected values, [batch, heads, S, E], with the rows that ``bias_v`` and ``add_zero_attn`` append."""
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
