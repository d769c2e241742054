"""Runtime modules of regularizers that keep a state: they pass it to the formula, and replace it by what the formula gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError
from graphreg.ir.time_steps import Steps
from graphreg.ir.units import Units
from graphreg.regularizer.base import Penalty, Splice
from graphreg.rng.noise import Noise
from graphreg.runtime.distributed_values import own_parameters, whole
from graphreg.runtime.owned_state import SiteState, State, cast, moves_on
from graphreg.runtime.penalty import Measure, Total, average, measured, nothing, uncast
from graphreg.runtime.runtime_module import RuntimeModule, accumulation, element_of
from graphreg.runtime.splice import SpliceRule


class StateHolder(RuntimeModule):
    """Holds the state of a splice that has no penalty, so that the rewritten module has it among its submodules."""

    def __init__(self, state: State) -> None:
        super().__init__(state.description)
        self.state = state


class StateHoldingTotal(Total):
    """Computes a penalty on values from its measurements, and holds the state that its formula takes at the sites (``Measure.held``)."""

    def __init__(self, regularizer: Penalty, name: str, strength: Tensor | None, state: State, sites: Sequence[str]) -> None:
        super().__init__(regularizer, name, strength)
        self.state, self.held = state, tuple(state.at(site) for site in sites)


class StatefulTotal(StateHoldingTotal):
    """Computes a penalty whose formula takes ``state``, and replaces the state if the formula returns a new one.

    The state is replaced only in train mode, and neither in a block of ``noise_off`` nor under a transform of torch.func. A forward that a
    backward pass runs again is refused, because it would start from a state that the first run has replaced.
    """

    path = ""  # the root: a call of the whole model is one step
    moves_key = False

    def total(self, *values: Tensor, places: tuple[int, ...], clock: Tensor | None, of: int, inputs: Mapping[str, Any]) -> Tensor:
        """Return the penalty, [], from the parameters, each of any shape. The other arguments: as in ``Total``."""
        measurements = []
        for held, value in zip(self.held, values, strict=True):
            if value.shape != held.like[0] and held.like[0] != (0,):
                raise GraphRegError(
                    f"{self.description}: a parameter has the shape {tuple(value.shape)}, and its state was made for "
                    f"{tuple(held.like[0])}. Call graphreg.reset_state(module), so that the state starts anew, or regularize once more."
                )
            full = {name: whole(own) for name, own in own_parameters({"": value}).items()}  # a state is whole on all ranks
            measurements.append(measured(self, full, clock, inputs, held))
        return self.combined(measurements, places, clock, of) if measurements else self.weight(torch.float32, clock) * 0


class StatefulSplice(SpliceRule):
    """Runs a splice whose formula takes ``state``; backward does not recompute it.

    The state is replaced where the splice acts in train mode, but neither in a transform of torch.func nor in inference mode.
    """

    def __init__(
        self, regularizer: Splice, site: str, strength: Tensor | None, slot: int, path: str, steps: Steps | None, units: Units | None,
        held: SiteState,
    ) -> None:  # fmt: skip
        super().__init__(regularizer, site, strength, slot, path, steps, units)
        self.held = (held,)  # in a tuple, so that it does not become a submodule

    def may_recompute(self) -> bool:
        return False

    def _in_eval(self, z: Tensor, weight: Tensor, others: dict[str, Any]) -> Any:
        return super()._in_eval(z, weight, {**others, "state": cast(self.held[0], weight.dtype)})

    def _formula(self, z: Tensor, weight: Tensor, noise: Noise, others: dict[str, Any]) -> Any:
        held = self.held[0]
        given = super()._formula(z, weight, noise, {**others, "state": cast(held, weight.dtype)})
        if not isinstance(given, tuple):
            return given
        value, new = given
        held.refuse_other(new, self.description)
        if moves_on(self, self.owner[0].training):
            held.replace(new)
        return self.moved_back(value)


class SpliceTotal(RuntimeModule):
    """Computes the penalty of a splice from its state at all sites: the mean or sum of what ``penalty`` returns, times the strength.

    If ``penalty`` takes ``weight``, the result is not multiplied by the strength.
    """

    def __init__(self, regularizer: Splice, name: str, strength: Tensor | None, state: State, sites: Sequence[str]) -> None:
        super().__init__(f"{type(regularizer).__name__} {name}", strength)
        self.regularizer, self.state, self.held = regularizer, state, tuple(state.at(site) for site in sites)
        self.sums = regularizer.engine_options.reduction == "sum"

    def forward(self, *, clock: Tensor | None = None, of: int = 0) -> Tensor:
        """Return the penalty, []. ``clock`` and ``of``: as in ``Total``."""
        if self.is_off:
            return nothing(*(tensor for held in self.held for tensor in held.tensors().values() if tensor.is_floating_point()))
        values = [self._measured(held, i, clock) for i, held in enumerate(self.held)]
        if not values:
            return self.weight(torch.float32, clock) * 0
        stacked = torch.stack(values)
        return stacked.sum() if self.sums else average(stacked, of)

    def _measured(self, held: SiteState, place: int, clock: Tensor | None) -> Tensor:
        dtype = accumulation(next((t.dtype for t in held.tensors().values() if t.is_floating_point()), torch.float32))
        weight = element_of(self.strength, (place, dtype)) if clock is None else clock[self.elements[place]].to(dtype)
        arguments, takes = {"state": cast(held, dtype), "weight": weight}, self.regularizer.penalty_takes
        with uncast(weight.device.type):
            value = self.regularizer.penalty(**{name: arguments[name] for name in takes})  # type: ignore[attr-defined]
        if not isinstance(value, Tensor) or value.dim() != 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise RegularizerError(f"{self.description}: penalty gave {shape}; a penalty is a 0-d tensor. Average it.")
        return value if "weight" in takes else value * weight


def owned_by(runtime_module: nn.Module | None) -> tuple[nn.Parameter, ...]:
    """Return the regularizer's own parameters that a runtime module reads."""
    held = runtime_module.held if isinstance(runtime_module, (StatefulSplice, StatefulTotal, SpliceTotal, Measure)) else ()
    return tuple(parameter for each in held for parameter in each.parameters())
