"""Runtime modules of penalties: they compute a penalty's formula at its sites, in float32 or wider, and its total over the sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphreg.compiler.inductor_passes import improve_graph
from graphreg.errors import RegularizerError
from graphreg.ir.time_steps import Steps
from graphreg.ir.units import Units
from graphreg.regularizer.base import Penalty
from graphreg.regularizer.purity import called, is_proven
from graphreg.runtime.distributed_values import Compute, computed, in_eager, leaves_graph, own_parameters, whole
from graphreg.runtime.model_inputs import fitted, require_inputs
from graphreg.runtime.owned_state import SiteState, cast, moves_on
from graphreg.runtime.runtime_module import WIDE, RuntimeModule, accumulation
from graphreg.torch_internals.distributed import has_process_group
from graphreg.torch_internals.dynamo import known_true
from graphreg.torch_internals.dynamo_marks import skip_as_outermost
from graphreg.torch_internals.functorch import transforms
from graphreg.torch_internals.operators import assert_async
from graphreg.torch_internals.other_threads import is_compiling

_ANY = ""  # stands for the site's name if the formula takes one value, so that Dynamo compiles blocks once that differ only in this name


class Measure(RuntimeModule):
    """Computes a penalty's formula at one site, in float32 or wider, also under autocast."""

    def __init__(self, regularizer: Penalty, site: str, strength: Tensor | None, held: SiteState | None = None) -> None:
        """``held``: the state of the site, if the formula takes one."""
        super().__init__(f"{type(regularizer).__name__} at {site}", strength)
        self.regularizer, self.site = regularizer, site
        self.held = () if held is None else (held,)  # in a tuple, so that it does not become a submodule
        if held is not None:  # the state moves on in train mode of the root: a call of the whole model is one step
            self.path, self.moves_key = "", False

    def forward(self, value: Tensor, /, *, clock: Tensor | None = None, **inputs: Any) -> Tensor:
        """Return the measurement of the site's value: [any shape] -> [].

        ``clock``: what the clock returned, [elements], if the formula takes a strength that has a schedule. ``inputs``: the inputs of the
        model that the formula takes, by the names of its arguments.
        """
        if self.is_off or has_no_elements(value):
            return nothing(value)
        if is_quick(self.regularizer, value):
            return unless_empty(quickly(self.regularizer, value, self.description), value)
        return unless_empty(self.computed(partial(self.measured, clock=clock, inputs=inputs), {_ANY: value}, inputs), value)

    def computed(self, compute: Compute, values: Mapping[str, Any], inputs: Mapping[str, Any], form: Steps | Units | None = None) -> Tensor:
        """Return ``compute(values)``; of DTensors, it is a plain tensor that is the same on all ranks. ``form``: how values are read."""
        if self.held:  # a state is one of whole values, and moves on once in a call
            return compute({name: whole(value) for name, value in values.items()})  # type: ignore[no-any-return]
        return computed(compute, values, self.regularizer, inputs, form)

    def measured(self, values: Mapping[str, Any], clock: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        """Return the formula's value, [], for the value of the site, whose name in ``values`` is ``_ANY``.

        ``clock`` and ``inputs``: as in ``forward``.
        """
        return measured(self, values, clock, inputs, *self.held)


class MeasureSteps(Measure):
    """Computes a penalty's formula on a sequence: the value of one site, or the values of a cell's calls, in order."""

    def __init__(self, regularizer: Penalty, site: str, strength: Tensor | None, steps: Steps, held: SiteState | None = None) -> None:
        super().__init__(regularizer, site, strength, held)
        self.steps = steps

    def forward(self, value: Tensor | tuple[Tensor, ...], /, *, clock: Tensor | None = None, **inputs: Any) -> Tensor:
        """Return the measurement, [], of a sequence or of the tuple of its steps.

        ``clock`` and ``inputs``: as in ``Measure``. The input ``lengths`` has the lengths of the examples, or is a mask of steps.
        """
        calls = isinstance(value, tuple)
        steps: tuple[Tensor, ...] = value if isinstance(value, tuple) else (value,)
        if self.is_off or all(map(has_no_elements, steps)):
            return nothing(*steps)
        values = {str(i): step for i, step in enumerate(value)} if calls else {_ANY: value}

        def compute(values: Mapping[str, Any]) -> Tensor:
            require_inputs(self.regularizer, inputs, self.description)
            return self.steps_measured(tuple(values.values()) if calls else values[_ANY], clock, inputs)

        return unless_empty(self.computed(compute, values, inputs, self.steps), *steps)

    def steps_measured(self, value: Any, clock: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        """Return the formula's value, [], for a value or the tuple of the steps. ``clock`` and ``inputs``: as in ``forward``."""
        sequence, counts = self.steps.of(value, whole(inputs.get("lengths")), self.description)
        more = inputs if counts is None else {**inputs, "lengths": counts}
        return measured(self, {_ANY: sequence}, clock, more, *self.held)


class MeasureUnits(Measure):
    """Computes a penalty's formula on the value of one site, turned into a matrix [samples, units]."""

    def __init__(self, regularizer: Penalty, site: str, strength: Tensor | None, units: Units, held: SiteState | None = None) -> None:
        super().__init__(regularizer, site, strength, held)
        self.units = units

    def forward(self, value: Tensor, /, *, clock: Tensor | None = None, **inputs: Any) -> Tensor:
        """Return the measurement, [], of a value that has an axis of units and one or more of samples.

        ``clock`` and ``inputs``: as in ``Measure``.
        """
        if self.is_off or has_no_elements(value):
            return nothing(value)
        return unless_empty(self.computed(partial(self.measured, clock=clock, inputs=inputs), {_ANY: value}, inputs, self.units), value)

    def measured(self, values: Mapping[str, Any], clock: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        return super().measured({_ANY: self.units.of(values[_ANY], self.description)}, clock, inputs)


class MeasureCounted(MeasureSteps):
    """Computes a penalty's formula on a value, or on the values of a cell's calls, of which only some steps count; 0 if none does."""

    def __init__(
        self, regularizer: Penalty, site: str, strength: Tensor | None, steps: Steps, units: Units | None, held: SiteState | None = None
    ) -> None:
        super().__init__(regularizer, site, strength, steps, held)
        if units is not None and steps.calls and units.axis >= 0:  # the calls are stacked along a new first axis
            units = replace(units, axis=units.axis + 1)
        self.units = units

    def steps_measured(self, value: Any, clock: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        value, counted = self.steps.counted(value, whole(inputs["lengths"]), self.description)
        # a padded step may be nan (attention over nothing), and then backward computes 0 * nan
        kept = torch.where(counted, value, (self.regularizer.value_range or (0.0,))[0])
        if self.units is not None:
            kept, counted = self._as_samples(self.units, kept, counted)
        found = measured(self, {_ANY: kept}, clock, {**inputs, "counted": counted}, *self.held)
        return torch.where(counted.any(), found, 0)

    def _as_samples(self, units: Units, value: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value as [samples, units], and which samples count, [samples]."""
        samples = units.of(value, self.description)
        if counted.shape[units.axis] != 1:
            raise RegularizerError(
                f"{self.description}: the units are {units.text} of a value of shape {tuple(value.shape)}, which is the axis of time or of "
                f"the batch (time_axis={self.steps.axis}). Give another axis= or time_axis=."
            )
        return samples, counted.expand(value.shape).movedim(units.axis, -1)[..., 0].flatten()


class Total(RuntimeModule):
    """Computes a penalty from its measurements: their mean or sum, times the strength.

    If the penalty is on parameters, ``Total`` also measures them.
    """

    def __init__(self, regularizer: Penalty, name: str, strength: Tensor | None) -> None:
        super().__init__(f"{type(regularizer).__name__} {name}", strength)
        self.regularizer = regularizer
        self.sums = regularizer.engine_options.reduction == "sum"

    def forward(
        self, *values: Tensor, places: tuple[int, ...] = (), clock: Tensor | None = None, of: int = 0, **inputs: Any
    ) -> Tensor:  # fmt: skip
        """Return the penalty, [], from its measurements, each [], or from parameters of any shape.

        ``places``: the positions of these measurements among the penalty's sites, if some sites are only in the other mode's graph.
        ``clock``: what the clock returned, [elements], for a strength that has a schedule. ``of``: in a stage of a pipeline, how many
        sites the penalty has in the whole model, over which it is a mean; 0 if it is a mean over ``values``. ``inputs``: as in
        ``Measure``, for a penalty on parameters.
        """
        if self.is_off:
            return nothing(*values)
        if torch.compiler.is_dynamo_compiling():
            improve_graph()
        if self.regularizer.on == "parameters" and leaves_graph(values):
            return in_eager(self.total, *values, places=places, clock=clock, of=of, inputs=inputs)  # type: ignore[no-any-return]
        return self.total(*values, places=places, clock=clock, of=of, inputs=inputs)

    def total(self, *values: Tensor, places: tuple[int, ...], clock: Tensor | None, of: int, inputs: Mapping[str, Any]) -> Tensor:
        """Return the penalty, [], as ``forward`` does."""
        if self.regularizer.on == "parameters":
            values = self.parameters_measured(values, clock, inputs)
        if not values:  # no site of the penalty is in this mode's graph
            return self.weight(torch.float32, clock) * 0
        return self.combined(values, places, clock, of)

    def combined(self, values: Sequence[Tensor], places: tuple[int, ...], clock: Tensor | None, of: int) -> Tensor:
        """Return the penalty, [], from the measurements, each multiplied by the strength at its site."""
        if clock is None and self.kept(_are_alike, None):
            joined = values[0] if len(values) == 1 and (self.sums or not of) else self._joined(torch.stack(tuple(values)), of)
            return self.weight(joined.dtype) * joined
        stacked = torch.stack(tuple(values))
        # a copy: backward may read it after ``set_strength`` has written into the strength
        strengths, elements = (self.strength.clone(), range(len(self.strength))) if clock is None else (clock, self.elements)
        if len(elements) == 1:
            weight = strengths[elements[0]]
        else:
            sites = _gathered(strengths, [elements[place] for place in places] if places else elements)
            if is_compiling():  # without a common factor, which backward would need, too
                return self._joined(stacked * sites.to(stacked), of)
            # Strengths are a common factor times shares. If all are equal, each share is 1, and the
            # penalty is the same bit for bit as with a number. The factor is detached: a derivative
            # by a strength goes through its share.
            first = sites[0].detach()
            weight = torch.where(first == 0, 1, first)
            stacked = stacked * (sites / weight).to(stacked)
        total = self._joined(stacked, of)
        return weight.to(total.dtype) * total

    def _joined(self, measurements: Tensor, of: int) -> Tensor:
        return measurements.sum() if self.sums else average(measurements, of)

    def parameters_measured(self, values: Sequence[Tensor], clock: Tensor | None, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return the formula's value, [], for each parameter. What is the same for all parameters is asked once."""
        results = [self.parameter_measured({_ANY: value}, clock, inputs) for value in values[:1]]
        regularizer, rest = self.regularizer, values[1:]
        proven = is_compiling() or is_proven(regularizer)  # in this order, because Dynamo traces each function it meets
        if not rest or has_process_group() or not proven or not is_quick(regularizer, values[0]):
            return (*results, *(self.parameter_measured({_ANY: value}, clock, inputs) for value in rest))
        name, device = _SOLE[regularizer.takes], values[0].device
        for value in rest:
            if type(value) in _KINDS and value.dtype in WIDE and value.device == device:
                results.append(_checked(regularizer(**{name: value}), self.description))
            else:
                results.append(self.parameter_measured({_ANY: value}, clock, inputs))
        return tuple(results)

    def parameter_measured(self, values: Mapping[str, Any], clock: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        """Return the formula's value, []. Of DTensors, it is a plain tensor that is the same on all ranks."""
        if len(values) == 1 and not has_process_group() and is_quick(self.regularizer, value := next(iter(values.values()))):
            return quickly(self.regularizer, value, self.description)
        return computed(partial(self._formula, clock=clock, inputs=inputs), own_parameters(values), self.regularizer, inputs)

    def _formula(self, values: Mapping[str, Any], clock: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        return measured(self, values, clock, inputs)


class AllSitesTotal(Total):
    """Computes a penalty whose formula takes ``values``: all its sites at once, by name, so that nothing is averaged."""

    def forward(self, values: dict[str, Tensor], /, *, clock: Tensor | None = None, **inputs: Any) -> Tensor:  # type: ignore[override]
        """Return the penalty, [], from the values of all sites by name, each of any shape. ``clock`` and ``inputs``: as in ``Measure``."""
        if self.is_off:
            return nothing(*values.values())
        if torch.compiler.is_dynamo_compiling():
            improve_graph()
        if self.regularizer.on == "parameters" and leaves_graph(values.values()):
            return in_eager(self.total, values, clock=clock, inputs=inputs)  # type: ignore[no-any-return]
        return self.total(values, clock=clock, inputs=inputs)

    def total(self, values: dict[str, Tensor], *, clock: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:  # type: ignore[override]
        """Return the penalty, [], as ``forward`` does."""
        if not values:
            return self.weight(torch.float32, clock) * 0
        measurement = self.parameter_measured(values, clock, inputs)
        return self.weight(measurement.dtype, clock) * measurement


for _kind in (Total, AllSitesTotal):
    skip_as_outermost(_kind.forward)  # after a graph break at ``in_eager``, Dynamo would compile it by itself, for each shape of parameters


def has_no_elements(value: Any) -> bool:
    """Return whether there is nothing to penalize, as at an expert that gets no examples. If a compiler cannot know: no."""
    return isinstance(value, Tensor) and known_true(value.numel() == 0)


def unless_empty(found: Tensor, *values: Any) -> Tensor:
    """Return a measurement; 0 in compiled code in which only the values of tensors decide that there was nothing to measure."""
    if not torch.compiler.is_dynamo_compiling() or any(not isinstance(value, Tensor) or known_true(value.numel() > 0) for value in values):
        return found
    some = torch.stack([torch.ones_like(value, dtype=torch.bool).any() for value in values]).any()
    return torch.where(some, found, 0)


def nothing(*values: Tensor) -> Tensor:
    """Return what stands for a penalty that is switched off, or for a measurement of no elements: 0, [], in its dtype, on its device."""
    if not values:
        return torch.zeros((), device="cpu")
    return torch.zeros((), dtype=accumulation(values[0].dtype), device=values[0].device)


def _are_alike(strength: Tensor, _: None) -> bool:
    """Return whether all sites of a penalty have one strength."""
    return len(set(strength.tolist())) == 1


def average(measurements: Tensor, of: int) -> Tensor:
    """Return the mean of measurements, []; if ``of`` is not 0, their share in the mean over ``of`` sites, most of them elsewhere."""
    return measurements.sum() / of if of else measurements.mean()


def _gathered(strengths: Tensor, places: Sequence[int]) -> Tensor:
    """Return the elements at some places, [places]."""
    first, count = places[0], len(places)
    if tuple(places) == tuple(range(first, first + count)):
        return strengths[first : first + count]
    return torch.stack([strengths[place] for place in places])


def measured(
    rule: Measure | Total, sites: Mapping[str, Tensor], clock: Tensor | None, inputs: Mapping[str, Any], held: SiteState | None = None
) -> Tensor:
    """Return the formula's value, 0-d, for values widened to float32 (float64 stays), with autocast off.

    Replace the state ``held`` if the formula returns a new one. ``clock`` and ``inputs``: as in ``Measure``.
    """
    regularizer, description = rule.regularizer, rule.description
    for value in sites.values():
        if not isinstance(value, Tensor):
            raise RegularizerError(
                f"{description}: the value is a {type(value).__name__}, not a tensor. Select a part by its port (:0), or leave the site "
                "out."
            )
    wide = {name: widened(value) for name, value in sites.items()}
    if regularizer.value_range is not None:
        for value in wide.values():
            _require_range(value, *regularizer.value_range, description)
    first = next(iter(wide.values()))
    require_inputs(regularizer, inputs, description)
    arguments: dict[str, Any] = {"z": first, "w": first, "values": wide, "steps": first, "units": first}
    arguments |= fitted(regularizer, inputs, first.dtype, first.device)
    if "weight" in regularizer.takes:
        arguments["weight"] = rule.weight(first.dtype, clock)
    if held is None:
        return formula(regularizer, arguments, first.device.type, description)
    value, new = _result(regularizer, arguments | {"state": cast(held, first.dtype)}, first.device.type, description)
    if new is not None:
        held.refuse_other(new, description)
        if moves_on(rule, rule.owner[0].training):
            held.replace(new)
    return value


# By what a formula takes: the name of its only argument. A formula that takes ``counted``, too, gets None for it.
_SOLE: dict[tuple[str, ...], str] = {("z",): "z", ("w",): "w", ("z", "counted"): "z"}
_KINDS = (Tensor, torch.nn.Parameter)


def is_quick(regularizer: Penalty, value: Any) -> bool:
    """Return whether nothing is to be prepared for a formula: it takes one plain tensor, in the dtype that it has."""
    return (
        type(value) in _KINDS
        and value.dtype in WIDE
        and regularizer.takes in _SOLE
        and regularizer.value_range is None
        and not _casts(value.device.type)
    )


def quickly(regularizer: Penalty, value: Tensor, description: str) -> Tensor:
    """Return the formula's value, 0-d, of a value for which ``is_quick`` is True. The result is that of ``measured``."""
    return _checked(called(regularizer, dict.fromkeys(regularizer.takes) | {_SOLE[regularizer.takes]: value}), description)


def _require_range(value: Tensor, low: float, high: float, description: str) -> None:
    """Check that all numbers are in a range: in eager by reading them, in a compiled graph by an assertion in the graph.

    Numbers may be slightly out of the range: by rounding errors, the mean of several 1.0 may be above 1. A nan is not refused.
    """
    room = 1e-5 * (high - low)
    value = value.detach()
    wrong = (value < low - room) | (value > high + room)
    if is_compiling():
        assert_async(~wrong.any(), f"{description}: the value must be in [{low:g}, {high:g}]")
    elif type(value) is Tensor and value.device.type != "meta" and not transforms() and bool(wrong.any()):  # fake tensors have no numbers
        raise RegularizerError(
            f"{description}: the value has the number {float(value[wrong][0]):g}; all numbers must be in [{low:g}, {high:g}]. Select "
            "values in this range, as '**@Sigmoid' or '**@sigmoid' does, or use another penalty (hidden_l1 takes any numbers). If dropout "
            "or noise acts at this value, too, give clean=True: the penalty then measures the value before it."
        )


def widened(value: Tensor) -> Tensor:
    """Return a value in the dtype in which formulas compute with it."""
    dtype = accumulation(value.dtype)
    return value if value.dtype == dtype else value.to(dtype)  # a compiled graph would keep a .to() that changes nothing


def uncast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast."""
    return torch.autocast(device, enabled=False) if _casts(device) else nullcontext()


def _casts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # torch has no autocast for the meta device


def formula(regularizer: Penalty, arguments: Mapping[str, Any], device: str, description: str) -> Tensor:
    """Return the formula's value, 0-d, with autocast off. The formula gets those of the ``arguments`` that it takes."""
    return _result(regularizer, arguments, device, description)[0]


def _result(
    regularizer: Penalty, arguments: Mapping[str, Any], device: str, description: str
) -> tuple[Tensor, Mapping[str, Tensor] | None]:
    """Return the formula's value, as ``formula`` does, and the new state; None if the formula returned no state."""
    call = {name: arguments[name] for name in regularizer.takes}
    with uncast(device):
        given: Any = called(regularizer, call)
    value, new = given if isinstance(given, tuple) and "state" in call else (given, None)
    return _checked(value, description), new


def _checked(value: Any, description: str) -> Tensor:
    if not isinstance(value, Tensor):
        what = "None: does it lack a return?" if value is None else f"a value of type {type(value).__name__}, which has no gradient."
        raise RegularizerError(f"{description} gave {what} A penalty is a 0-d tensor. Return one, computed from the formula's arguments.")
    if value.dim() != 0:
        raise RegularizerError(f"{description} gave a tensor of shape {tuple(value.shape)}; a penalty is a 0-d tensor. Average it.")
    return value
