"""What the oracle computes for the regularizers of version 0.2: splices on values and on parameters, penalties, states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fuzz import formulas
from fuzz.choices import STATEFUL, Reg
from fuzz.reading import Chain
from fuzz.strengths import Strengths


class LaterRun:
    """The part of ``Run`` that the oracles of cases with regularizers or options of 0.2 call."""

    regs: dict[str, Reg]
    sites: dict[str, Sequence[str]]
    strengths: Strengths
    states: dict[tuple[str, str], Tensor]
    training: bool
    bypass: bool
    must_raise: str

    def _key(self, site: str, kind: str, at: int, rng: int | None = None) -> tuple[int, int]:
        raise NotImplementedError

    def put(self, name: str, value: Tensor) -> None:
        raise NotImplementedError

    @staticmethod
    def wide(value: Tensor) -> Tensor:
        return value if value.dtype == torch.float64 else value.float()

    def splice(self, z: Tensor, name: str, site: str, at: int, training: bool, time: int, given: Any) -> Tensor:
        """A value as a splice of any kind gives it. ``time``: the axis of time, for ``share_axes``; ``given``: a layer's argument."""
        if not training:
            return z
        if self.bypass:
            return laid(z.clone(), z)
        options = self.regs[name].options
        shared = options.get("share_axes", ())
        places: dict[Any, int] = {"time": time, "batch": 1 if time == 0 else 0}
        axes = {places.get(axis, axis) % z.dim() for axis in ([shared] if isinstance(shared, (str, int)) else shared)}
        return laid(self._spliced(z, name, site, at, frozenset(axes), given), z)

    def _spliced(self, z: Tensor, name: str, site: str, at: int, shared: frozenset[int] = frozenset(), given: Any = None) -> Tensor:
        reg = self.regs[name]
        draw = formulas.Draw(self._key(site, reg.kind, at, reg.options.get("rng")), shared)
        return formulas.SPLICE_FORMULAS[reg.kind](z, self.strengths.of(name, site), draw, reg.options, given).to(z.dtype)

    def read(self, model: nn.Module, w: Tensor, chain: Chain) -> Tensor:
        """What stands for a parameter at a read. All reads in a call have the same draw, for it is a function of the call's number."""
        for name, site, at in () if self.bypass else chain:
            if model.get_submodule(site.rpartition(".")[0]).training:
                w = self._spliced(w, name, site, at)
        return w

    def layer(self, model: nn.Module, path: str, chains: Mapping[str, Chain]) -> Callable[..., Any]:
        """A layer, to be called with what stands for its parameters."""
        layer = model.get_submodule(path)
        given = {own: self.read(model, getattr(layer, own), chain) for own, chain in chains.items()}
        if not isinstance(layer, nn.RNNBase):
            return lambda *args: torch.func.functional_call(layer, given, args)

        def called(*args: Any) -> Any:
            was = layer._flat_weights
            layer._flat_weights = [given.get(name, w) for name, w in zip(layer._flat_weights_names, was, strict=True)]
            try:
                return layer(*args)
            finally:
                layer._flat_weights = was

        return called

    def measure(self, name: str, site: str, value: Tensor, axis: int) -> None:
        """A penalty on a value, times the strength there."""
        reg, value = self.regs[name], self.wide(value)
        if reg.kind in formulas.ON_UNITS:
            if reg.kind == "KLSparsity" and not bool(((value >= 0) & (value <= 1)).all()):
                self.must_raise = "a value outside of [0, 1]"
            found = formulas.ON_UNITS[reg.kind](formulas.as_units(value, axis), reg.options)
        elif reg.kind == "HiddenL1":
            found = value.abs().mean() if value.numel() else value.sum()
        else:
            found = formulas.ON_VALUES[reg.kind](value, reg.options)
        self.put(name, found * self.strengths.of(name, site))

    def start(self, model: nn.Module) -> None:
        """Make the states of the penalties that keep one, from the parameters as they are."""
        for name, reg in self.regs.items():
            for site in self.sites[name] if reg.kind in STATEFUL else ():
                w = self.wide(model.get_parameter(site)).detach().clone()
                self.states[name, site] = w if reg.kind == "L2SP" else formulas.start_vector(w)

    def _of_parameter(self, w: Tensor, reg: Reg, name: str, site: str) -> Tensor:
        return self._unweighted(self.wide(w), reg, name, site) * self.strengths.of(name, site)

    def _unweighted(self, w: Tensor, reg: Reg, name: str, site: str) -> Tensor:
        if reg.kind in formulas.ON_PARAMETERS:
            return formulas.ON_PARAMETERS[reg.kind](w, reg.options)
        if reg.kind == "L2SP":
            return formulas.l2_sp(w, self.states[name, site], reg.options)
        if reg.kind == "SpectralPenalty":
            found, vector = formulas.spectral(w, self.states[name, site], reg.options)
            if self.training and not self.bypass:
                self.states[name, site] = vector
            return found
        each = w * w if reg.kind == "WeightL2" else w.abs()
        return each.sum() if reg.options.get("reduction") == "sum" else each.mean()


def weight(value: float, z: Tensor) -> Tensor:
    """A strength in the precision it is used in."""
    return torch.tensor(value, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


def laid(new: Tensor, old: Tensor) -> Tensor:
    """The same values in the strides that the value has in the model, where each element has a place of its own."""
    if new.stride() == old.stride() or not _alone(old):
        return new
    size = 1 + sum((length - 1) * stride for length, stride in zip(old.shape, old.stride(), strict=True))
    placed = torch.zeros(size, dtype=new.dtype).as_strided(old.shape, old.stride())
    placed.copy_(new)
    return placed


def _alone(z: Tensor) -> bool:
    """Whether no two elements share a place in memory; torch itself does not say so of a part of a tensor."""
    places = torch.zeros(z.shape, dtype=torch.int64)
    for axis, stride in enumerate(z.stride()):
        places += (torch.arange(z.shape[axis]) * stride).view(-1, *[1] * (z.dim() - axis - 1))
    return len(set(places.flatten().tolist())) == z.numel()
