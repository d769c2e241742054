"""The leaves of the model's own dropout: they run in the place of its calls, with their arguments, and draw from our streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphreg.attention import attention, multi_head
from graphreg.forms import kept
from graphreg.fused import recomputes
from graphreg.noise import Noise
from graphreg.own_choice import OwnEdit
from graphreg.own_dropout import rate_of
from graphreg.rules import Drawing, accumulation

_SELU = 1.7580993408473766  # what alpha dropout drops to, minus; Klambauer et al. 2017


def scaled(mask: Tensor, scale: float) -> Tensor:
    """A mask that nothing else reads: in eager in its own memory."""
    return mask.mul_(scale) if mask.is_floating_point() else mask * scale


class OwnRule(Drawing):
    """One dropout of the model's own: at a rate of its own, or at ``rate``; at 0 it is off.

    It is called with what the function or module in its place was called with, and ``noise``, the keys.
    """

    def __init__(self, edit: OwnEdit, slot: int) -> None:
        own = edit.own
        super().__init__(f"{own.site.op} at {own.site.name}: {edit.becomes}", own.site.name, slot, own.path)
        self.kind, self.rate, self.was, self.always = own.kind, edit.rate, own.rate, own.when == "always"
        self.function, self.names, self.is_module = own.function, own.names, own.function == ""
        self.layer: tuple[nn.Module, ...] = ()

    def adopt(self, owner: nn.Module) -> None:
        super().adopt(owner)
        if self.is_module:
            self.layer = (owner,)

    def forward(self, *args: Any, noise: Tensor | None = None, **kwargs: Any) -> Any:
        """What the model's call gives, with masks of ours; its own arguments, and ``noise``, the keys int32 [streams, 2]."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        p = self._rate(given)
        if self.kind == "heads":
            return self._heads(p, noise, args, kwargs, given)
        if self.kind == "attention":
            if p == 0 or noise is None or not self._acts(given):
                return F.scaled_dot_product_attention(**{**given, "dropout_p": 0.0})
            return attention(self._drop(p, noise), **given)
        z: Tensor = args[0] if args else next(iter(kwargs.values()))
        if p == 0 or noise is None or not self._acts(given):
            return z
        y = self._replaced(z, p, Noise(noise[self.slot]), given)
        return z.copy_(y) if self._writes(given) else y

    def _rate(self, given: Mapping[str, Any]) -> float:
        """As it is now: a module's may have been changed, as the model would see it."""
        if self.rate is not None:
            return self.rate
        if self.is_module:
            return rate_of(self.layer[0])
        if self.kind == "attention":  # the call is given 0 in eval mode
            return float(given["dropout_p"] or self.was or 0)
        return float(given.get("dropout_p" if self.kind == "heads" else "p", 0.5))

    def _acts(self, given: Mapping[str, Any]) -> bool:
        if self.forced or self.always:
            return True
        if self.is_module:
            return self.layer[0].training
        if self.kind == "attention":
            return bool(given["dropout_p"] > 0 if self.was else self.owner[0].training)
        return bool(given.get("training", given.get("train", False)))

    def _writes(self, given: Mapping[str, Any]) -> bool:
        in_place = getattr(self.layer[0], "inplace", False) if self.is_module else given.get("inplace", False)
        return self.function.endswith("_") or bool(in_place)

    def _replaced(self, z: Tensor, p: float, noise: Noise, given: Mapping[str, Any]) -> Tensor:
        if p == 1:
            return z * 0  # what torch gives

        def formula(z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
            shape = self._shape(z, given)
            mask = noise.keep(z if shape == z.shape else z[:1].new_empty(shape), weight).to(z.dtype)
            return self._dropped(z, mask, p, given)

        weight = torch.full((), p, dtype=accumulation(z.dtype), device=z.device)
        again = self.recomputed and recomputes() and not self._writes(given)
        return kept(formula, z, weight, noise) if again else formula(z, weight, noise)

    def _dropped(self, z: Tensor, mask: Tensor, p: float, given: Mapping[str, Any]) -> Tensor:
        if self.kind in ("alpha", "channel alpha"):
            a = 1 / math.sqrt((_SELU**2 * p + 1) * (1 - p))
            return z * (mask * a) + ((mask - 1) * (_SELU * a) + _SELU * a * p)
        scales = getattr(self.layer[0], "scale_by_keep", True) if self.layer else True
        return z * scaled(mask, 1 / (1 - p)) if scales else z * mask

    def _shape(self, z: Tensor, given: Mapping[str, Any]) -> tuple[int, ...]:
        """Of the mask: one draw an element, a channel of an example, an example, or a batch."""
        if self.kind in ("element", "alpha"):
            return tuple(z.shape)
        ones = (1,) * (z.dim() - 1)
        if self.kind == "depth":
            return (1, *ones) if given.get("mode") == "batch" else (z.shape[0], *ones)
        if z.dim() < 2:
            raise RuntimeError(f"{self.about}: the value has {z.dim()} dims; dropout of channels needs 2 or more.")
        return (z.shape[0], *ones) if self._unbatched(z) else (z.shape[0], z.shape[1], *ones[1:])

    def _unbatched(self, z: Tensor) -> bool:
        """Whether torch takes the first axis for the channels, which it does by the function and the number of axes."""
        name = self.function or type(self.layer[0]).__name__.lower()
        return (name == "dropout1d" and z.dim() == 2) or (name == "dropout3d" and z.dim() != 5)

    def _drop(self, p: float, noise: Tensor) -> Callable[[Tensor], Tensor]:
        draws = Noise(noise[self.slot])

        def drop(weights: Tensor) -> Tensor:
            keep = draws.keep(weights, torch.full((), p, dtype=accumulation(weights.dtype), device=weights.device))
            return weights * scaled(keep.to(weights.dtype), 1 / (1 - p))

        return drop

    def _heads(self, p: float, noise: Tensor | None, args: Any, kwargs: Any, given: Mapping[str, Any]) -> Any:
        """Attention with several heads: torch's own where nothing is dropped, or the layer with its function replaced."""
        drops = p > 0 and noise is not None and self._acts(given)
        if not self.is_module:
            if drops and noise is not None:
                return multi_head(self._drop(p, noise), **given)
            return F.multi_head_attention_forward(**{**given, "dropout_p": 0.0})
        if not drops and not self.layer[0].training:
            return self.layer[0](*args, **kwargs)  # its fast path too
        with _Heads(self._drop(p, noise) if drops and noise is not None else None):
            return self.layer[0](*args, **kwargs)


class _Heads(TorchFunctionMode):
    """Puts ``multi_head`` in the place of torch's function, while the layer's own forward runs."""

    def __init__(self, drop: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.drop = drop

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        if self.drop is None:
            return func(*args, **{**(kwargs or {}), "training": False})  # which decides of dropout alone
        return multi_head(self.drop, *args, **(kwargs or {}))
