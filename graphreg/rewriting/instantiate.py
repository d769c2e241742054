"""Makes the runtime modules of a plan, with their names, strengths and noise streams, before any graph is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError, shown
from graphreg.ir import Site, has_float64, identifier
from graphreg.planning import OWN_DROPOUT, Edit, Plan, rates_are_scheduled
from graphreg.regularizer import Penalty, Regularizer, Splice, own_strength, require_pure
from graphreg.runtime import (
    CLOCK,
    OWN,
    AllSitesTotal,
    ClockRule,
    Derivative,
    KeyRule,
    Measure,
    MeasureCounted,
    MeasureSteps,
    MeasureUnits,
    NativeDropoutRule,
    Places,
    Rules,
    RuntimeModule,
    SharedClock,
    SharedKeyRule,
    SharedState,
    SpliceRule,
    SpliceTotal,
    State,
    StatefulSplice,
    StatefulTotal,
    StateHolder,
    StateHoldingTotal,
    StreamName,
    Total,
    Track,
    device_with_values,
    own_strength_of_rates,
    strengths_on,
    zeros,
)


def runtime_module_names(plan: Plan) -> dict[int | str, str]:
    """Name the plan's runtime modules under ``graphreg_rules``.

    A key of the result is an edit's index in the plan, or the name of a tracked site. The indices of native dropouts follow those of the
    edits. The streams in a state that ``rng_state`` returned have these names, so a new version of graphreg must not change the names.
    """
    own = {"key", "attach"} | ({CLOCK, OWN_DROPOUT} if plan.is_scheduled else set())
    taken = {*dir(Rules()), *own, *plan.regularizers}
    names: dict[int | str, str] = {}
    bases: dict[int | str, str] = {i: f"{identifier(edit.site.name)}_{edit.name}" for i, edit in enumerate(plan.edits)}
    for i, base in (bases | {site: f"{identifier(site)}_wrt" for site in plan.tracked}).items():
        name, count = base, 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        names[i] = name
    for i, native in enumerate(plan.native_dropout, len(plan.edits)):
        name = f"{identifier(native.dropout.site.name)}_own"
        while name in taken:
            name += "_"
        taken.add(name)
        names[i] = name
    clash = [name for name in plan.regularizers if name in {*dir(Rules()), *own, "strengths"}]
    if clash:
        raise RegularizerError(f"name={clash[0]!r} is a name that torch modules or graphreg use for themselves; choose another name.")
    return names


def make_rules(model: nn.Module, plan: Plan, names: Mapping[int | str, str], noise: Any) -> Rules:
    """Make the module ``graphreg_rules``: it holds the runtime modules of the plan, with their strengths and noise streams.

    ``noise``: the seed, as ``rng=`` of ``regularize``; or a ``SharedState``, which has the strengths and the streams.
    """
    for name, regularizer in plan.regularizers.items():
        require_pure(regularizer, [edit.site for edit in plan.of(name)])
    rules, streams = Rules(), _streams(plan, names)
    if isinstance(noise, SharedState):
        _add_strengths(rules, plan, noise.key.step.device, noise)
        slots, rules.seeds = noise.slots(streams), dict(noise.seeds)
        key: KeyRule | SharedKeyRule = SharedKeyRule(noise.key)
    else:
        device = device_of(model)
        rules.awaits_device = device_with_values(model) is None and next(model.parameters(), None) is not None
        _add_strengths(rules, plan, device)
        seeds = _Seeds(noise)
        numbers = _numbers(streams, plan, seeds)
        rules.seeds = seeds.drawn()
        slots, key = {name: i for i, name in enumerate(streams)}, KeyRule(numbers).to(device)
    states = _states(model, plan, noise)
    order = {name: {site: 1 + i for i, site in enumerate(at.sites)} for name, at in rules.places.items()}
    for i, edit in enumerate(plan.edits):
        if (runtime_module := _runtime_module(edit, rules, slots.get(names[i], 0), states)) is not None:
            runtime_module.elements = rules.elements.get(edit.name, ())
            if isinstance(runtime_module, SpliceRule) and (len(order[edit.name]) > 1 or runtime_module.elements):
                own = order[edit.name][edit.site.name]
                # with blocks=, all sites read element 0 until strengths are set by site: equal blocks compile once while these are equal
                later = bool(plan.blocks) and edit.at_depth is None
                runtime_module.element, runtime_module.own_element = (0, own) if later else (own, own)
            rules.add_module(names[i], runtime_module)
    for i, native in enumerate(plan.native_dropout, len(plan.edits)):
        rule = NativeDropoutRule(native, slots.get(names[i], 0))
        if native.is_scheduled:
            rule.elements = (rules.elements[OWN_DROPOUT][order[OWN_DROPOUT][native.dropout.site.name]],)
        rules.add_module(names[i], rule)
    if streams or _draws_elsewhere(plan):
        rules.add_module("key", key)
    _add_totals(rules, plan, names, slots, states)
    for site, readers in plan.tracked.items():
        derivatives = [reader for name in readers if isinstance(reader := rules.get_submodule(name), Derivative)]
        rules.add_module(names[site], Track(site, derivatives))
    for child in rules.children():
        assert isinstance(child, RuntimeModule)
        child.rules = (rules,)
    for name in rules.places if isinstance(noise, SharedState) else ():  # last, because this changes runtime modules
        rules.set_by_site(name, noise.rules.chosen.get(name, {}))
    return rules


def _add_strengths(rules: Rules, plan: Plan, device: torch.device, shared: SharedState | None = None) -> None:
    """Make the tensors of the planned strengths on a device. The clock, which may be shared, gets the strengths that have a schedule."""
    rules.places = {name: places(plan, name) for name in plan.regularizers}
    weights = {name: float(regularizer.weight) for name, regularizer in plan.regularizers.items() if not regularizer.is_scheduled}
    if plan.is_scheduled:
        scheduled = {name: rules.places[name] for name in plan.regularizers if name not in weights}
        if rates_are_scheduled(plan.own_dropout):
            scheduled[OWN_DROPOUT] = rules.places[OWN_DROPOUT] = _scheduled_rates(plan)
        rules.elements = _add_clock(rules, scheduled, device, shared)
    rules.strengths = strengths_on(
        device, {name: rules.places[name].elements(own, rules.places[name].planned) for name, own in weights.items()}
    )
    if not has_float64(device):
        rules.exact = weights


def _add_clock(
    rules: Rules, scheduled: Mapping[str, Places], device: torch.device, shared: SharedState | None
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Add the clock. Return, for each strength that has a schedule, the indices of its elements in the tensor that the clock returns."""
    planned = {name: [(OWN, sites.own), *zip(sites.sites, sites.planned, strict=True)] for name, sites in scheduled.items()}
    # Two graphs share the element of a site only if they plan the same strength there: ``by_depth`` plans another one if a model grows.
    elements = {name: [(name, site if site == OWN else f"{site} {each!r}") for site, each in sites] for name, sites in planned.items()}
    schedules = {element: each for name in planned for element, (_, each) in zip(elements[name], planned[name], strict=True)}
    if shared is not None:
        assert shared.clock is not None
        found, clock = shared.elements(schedules), shared.clock
        rules.add_module(CLOCK, SharedClock(clock))
    else:
        clock = ClockRule(schedules, device)
        rules.add_module(CLOCK, clock)
        found = {element: place for place, element in enumerate(clock.names)}
    return {name: tuple(map(found.__getitem__, each)) for name, each in elements.items()}


def _scheduled_rates(plan: Plan) -> Places:
    """Return the sites of the native dropouts whose rate has a schedule, with these rates."""
    rates = {edit.dropout.site.name: edit.rate for edit in plan.native_dropout if edit.is_scheduled}
    return Places(tuple(rates), tuple(rate for rate in rates.values() if rate is not None), own=own_strength_of_rates(plan.own_dropout))


def places(plan: Plan, name: str) -> Places:
    """Return the sites of a regularizer with their planned strengths; no sites if the formula takes all sites at once."""
    regularizer, edits = plan.regularizers[name], plan.of(name)
    own = own_strength(regularizer.weight)
    if not regularizer.by_site:
        return Places(own=own)
    return Places(tuple(e.site.name for e in edits), tuple(e.weight for e in edits), isinstance(regularizer, Penalty), own)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter that is not a meta tensor; the CPU if there is none."""
    return device_with_values(model) or torch.device("cpu")


def _streams(plan: Plan, names: Mapping[int | str, str]) -> dict[str, StreamName]:
    """Return the noise stream of each runtime module that draws, by the module's name, in the order of the rows of a call's keys."""
    streams: dict[str, StreamName] = {}
    for i, edit in enumerate(plan.edits):
        regularizer = edit.regularizer
        if isinstance(regularizer, Splice) or edit.name in plan.slices:
            own = isinstance(regularizer, Splice) and regularizer.rng is not None
            streams[names[i]] = StreamName(edit.site.name, type(regularizer).__name__, edit.occurrence, edit.name if own else "")
    for i, native in enumerate(plan.native_dropout, len(plan.edits)):
        if native.draws:
            streams[names[i]] = StreamName(native.dropout.site.name, "own dropout", 0)
    return streams


def _draws_elsewhere(plan: Plan) -> bool:
    """Whether the plan is for a stage of a pipeline, and something may draw in another stage.

    Such a stage gets keys even if it draws nothing: then ``set_ranks`` and ``noise_on`` may be called for all stages alike.
    """
    return bool(plan.in_whole) and (plan.own_dropout != "keep" or any(isinstance(each, Splice) for each in plan.regularizers.values()))


def _numbers(streams: Mapping[str, StreamName], plan: Plan, seeds: _Seeds) -> dict[str, int]:
    """Return the number of each noise stream, computed from its seed and its name. Draw the seeds that are not given."""
    return {name: stream.number(seeds.of(stream, plan)) for name, stream in streams.items()}


def _runtime_module(edit: Edit, rules: Rules, slot: int, states: Mapping[str, State]) -> RuntimeModule | None:
    """Return the runtime module of an edit; None if its penalty has a single runtime module for all sites."""
    strength, regularizer, site = rules.strengths.get(edit.name), edit.regularizer, edit.site.name
    if isinstance(regularizer, Splice):
        given = (regularizer, site, strength, slot, edit.site.module, edit.steps, edit.units)
        return StatefulSplice(*given, states[edit.name].at(site)) if edit.name in states else SpliceRule(*given)
    if not isinstance(regularizer, Penalty) or not measures(regularizer):
        return None
    held = states[edit.name].at(site) if edit.name in states else None
    if edit.steps and "counted" in regularizer.takes:
        return MeasureCounted(regularizer, site, strength, edit.steps, edit.units, held)
    if edit.units:
        return MeasureUnits(regularizer, site, strength, edit.units, held)
    return MeasureSteps(regularizer, site, strength, edit.steps, held) if edit.steps else Measure(regularizer, site, strength, held)


def _states(model: nn.Module, plan: Plan, noise: Any) -> dict[str, State]:
    """Return, by the regularizer's name, each ``State`` that the plan needs: a new one, or that of a ``SharedState``.

    Each has a ``SiteState`` for every site of its regularizer.
    """
    if isinstance(noise, SharedState):
        states = noise.states()
    else:
        states = {name: State(name, regularizer) for name, regularizer in plan.regularizers.items() if "state" in regularizer.takes}
    parameters = dict(model.named_parameters()) if states else {}
    for edit in plan.edits:
        if edit.name in states:
            states[edit.name].place(edit.site.name, _like(edit, parameters))
    return states


def _like(edit: Edit, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor that ``init_state`` gets for a site: the parameter, or zeros of the value's shape."""
    site: Site = edit.site
    if site.kind == "parameter":
        return parameters[site.name]
    kind = type(edit.regularizer).__name__
    if site.shape is None or site.dtype is None:
        raise RegularizerError(
            f"{kind} at {site.name}: it has a state that depends on the value's shape, and the shape is not known. Give example_inputs."
        )
    if unready := next((name for name, parameter in parameters.items() if parameter.device.type == "meta"), None):
        raise GraphRegError(
            f"{edit.name} keeps a state for {site.name}, and {unready} has no values yet (device meta). Materialize the model, then "
            "regularize it."
        )
    weights = [parameter for parameter in parameters.values() if parameter.is_floating_point()]
    dtype = torch.promote_types(site.dtype, weights[0].dtype) if weights else site.dtype  # wider than the value's under autocast
    like = zeros(site.shape, dtype, weights[0].device if weights else torch.device("cpu"))
    if edit.steps is not None and isinstance(edit.regularizer, Penalty):
        steps = dataclasses.replace(edit.steps, lengths=None)
        return steps.of((like,) * len(steps.calls) or like, None, f"{kind} at {site.name}")[0]
    return like if edit.units is None else like.movedim(edit.units.axis, -1)


def _add_totals(
    rules: Rules, plan: Plan, names: Mapping[int | str, str], slots: Mapping[str, int], states: Mapping[str, State]
) -> None:  # fmt: skip
    """Add each penalty's runtime module, which computes the penalty from the measurements, the values at its sites, or a splice's state."""
    for name, regularizer in plan.regularizers.items():
        strength, sites = rules.strengths.get(name), [edit.site.name for edit in plan.of(name)]
        if isinstance(regularizer, Splice):
            if name in states:
                rules.add_module(name, _of_state(regularizer, name, strength, states[name], sites))
                rules.get_submodule(name).elements = rules.elements.get(name, ())  # type: ignore[assignment]
            continue
        assert isinstance(regularizer, Penalty)
        if name in plan.slices:
            drawn = {edit.site.name: slots[names[i]] for i, edit in enumerate(plan.edits) if edit.name == name}
            total: Total = Derivative(regularizer, name, strength, plan.slices[name], drawn)
        elif name in states:
            kind = StatefulTotal if regularizer.on == "parameters" else StateHoldingTotal
            total = kind(regularizer, name, strength, states[name], sites)
        else:
            total = (AllSitesTotal if "values" in regularizer.takes else Total)(regularizer, name, strength)
        total.elements = rules.elements.get(name, ())
        rules.add_module(name, total)


def _of_state(regularizer: Splice, name: str, strength: Tensor | None, state: State, sites: Sequence[str]) -> RuntimeModule:
    """Return the runtime module that has the state of a splice: it computes the splice's penalty, if the splice has one."""
    return SpliceTotal(regularizer, name, strength, state, sites) if regularizer.has_penalty() else StateHolder(state)


def measures(regularizer: Regularizer) -> bool:
    """Whether a penalty measures each site's value on its own, directly after the site, and not all values at once."""
    return regularizer.on == "values" and "values" not in regularizer.takes and not regularizer.takes_vjp


class _Seeds:
    """The seeds of a module: a common one, drawn when it is first needed, and one for each splice with an ``rng`` of its own."""

    def __init__(self, rng: Any) -> None:
        self.rng, self.common = rng, None if rng is None else seed(rng)
        self.by_name: dict[str, int] = {}

    def of(self, stream: StreamName, plan: Plan) -> int:
        regularizer = plan.regularizers.get(stream.of)
        rng = regularizer.rng if isinstance(regularizer, Splice) else None
        return self.default() if rng is None else self.by_name.setdefault(stream.of, seed(rng))

    def drawn(self) -> dict[str, int]:
        """Return the seeds that were given or drawn: the common one under ``""``, the others by regularizer name."""
        return ({} if self.common is None else {"": self.common}) | self.by_name

    def default(self) -> int:
        if self.common is None:
            self.common = seed(None)
        return self.common


def seed(rng: int | torch.Generator | None) -> int:
    """Return a seed: the int itself, or one draw from a generator (None: torch's global generator)."""
    check_rng(rng)
    if isinstance(rng, int):
        return rng
    device = rng.device if rng is not None else "cpu"
    return int(torch.randint(1 << 62, (), generator=rng, device=device))


def check_rng(rng: object) -> None:
    """Raise RegularizerError unless ``rng`` is an int, a torch.Generator or None."""
    if rng is not None and (isinstance(rng, bool) or not isinstance(rng, (int, torch.Generator))):
        raise RegularizerError(f"rng={shown(rng)} is not allowed; give an int, a torch.Generator, or None for torch's global generator.")
