"""Makes the runtime modules of a plan, with their names, strengths and noise streams, before any graph is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError, shown
from graphreg.ir.naming import identifier
from graphreg.ir.site import Site
from graphreg.planning.native_dropout import OWN_DROPOUT
from graphreg.planning.plan import Edit, Plan
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.regularizer.purity_trial import require_pure
from graphreg.runtime.clock import CLOCK, ClockRule, SharedClock, clock_of, scheduled_elements
from graphreg.runtime.derivative_penalty import Derivative, Track
from graphreg.runtime.dropout import NativeDropoutRule
from graphreg.runtime.noise_keys import KeyRule, SharedKeyRule
from graphreg.runtime.owned_state import State, states_in, zeros
from graphreg.runtime.penalty import AllSitesTotal, Measure, MeasureCounted, MeasureSteps, MeasureUnits, Total
from graphreg.runtime.runtime_module import Rules, RuntimeModule, device_with_values, strengths_on
from graphreg.runtime.splice import SpliceRule
from graphreg.runtime.stateful import SpliceTotal, StatefulSplice, StatefulTotal, StateHolder, StateHoldingTotal
from graphreg.session.session import Session
from graphreg.session.streams import FixedStreams, GrowingStreams, StreamName
from graphreg.torch_internals.modules import parameters_by_name


def runtime_module_names(plan: Plan) -> dict[int | str, str]:
    """Name the plan's runtime modules under ``graphreg_rules``.

    A key of the result is an edit's index in the plan, or the name of a tracked site. The indices of native dropouts follow those of the
    edits. The streams in a state that ``rng_state`` returned have these names, so a new version of graphreg must not change the names.
    """
    own = {"key", "attach"} | ({CLOCK, OWN_DROPOUT} if plan.is_scheduled else set())
    of_rules = set(dir(Rules()))
    taken = {*of_rules, *own, *plan.regularizers}
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
            # Another way than above. Both stand in saved states, so both stay.
            name += "_"
        taken.add(name)
        names[i] = name
    clash = [name for name in plan.regularizers if name in {*of_rules, *own, "strengths"}]
    if clash:
        raise RegularizerError(f"name={clash[0]!r} is a name that torch modules or graphreg use for themselves; choose another name.")
    return names


def make_rules(model: nn.Module, plan: Plan, names: Mapping[int | str, str], noise: Any) -> Rules:
    """Make the module ``graphreg_rules``: it holds the runtime modules of the plan, with their strengths and noise streams.

    ``noise``: the seed, as ``rng=`` of ``regularize``: then the module has a session of its own. Or the session of a model in place.
    """
    for name, regularizer in plan.regularizers.items():
        require_pure(regularizer, [edit.site for edit in plan.of(name)])

    rules, streams = Rules(), _streams(plan, names)
    # A stage of a pipeline gets keys if another stage may draw: set_ranks and noise_on may be
    # called for all stages alike.
    splices = any(isinstance(each, Splice) for each in plan.regularizers.values())
    draws = bool(streams) or (bool(plan.in_whole) and (plan.own_dropout != "keep" or splices))
    key: KeyRule | SharedKeyRule
    if isinstance(noise, Session):
        assert isinstance(noise.streams, GrowingStreams)
        session, device = noise, noise.streams.key.step.device
        # All graphs of a model in place draw with the rows of one table of keys.
        slots, key = noise.streams.rows(streams), SharedKeyRule(noise.streams.key)
    else:
        device = device_of(model)
        rules.awaits_device = device_with_values(model) is None and bool(parameters_by_name(model))
        numbers, seeds = _numbers(streams, plan, noise)
        slots, keys = {name: i for i, name in enumerate(streams)}, KeyRule(numbers).to(device)
        session, key = Session(plan.regularizers, FixedStreams(keys if draws else None, seeds), plan.own_dropout), keys
    session.learn(plan)
    rules.session = session
    rules.proxed = tuple(dict.fromkeys(edit.site.name for edit in plan.edits if edit.regularizer.by_prox))

    rules.planned_strengths = {name: plan.planned_strengths(name) for name in session.strengths}
    for name, row in session.strengths.items():
        # A strength with a schedule has no buffer: the clock returns it, a new one at each call.
        if not row.has_clock:
            rules.strengths[name] = strengths_on(device, row.elements(rules.planned_strengths[name]))
    elements = _add_clock(rules, session, device)

    states = _states(model, plan, noise)
    for i, edit in enumerate(plan.edits):
        if (runtime_module := _runtime_module(edit, rules, slots.get(names[i], 0), states)) is not None:
            rules.add_module(names[i], runtime_module)
            of, own = elements[edit.name], elements[edit.name][0]
            # Each splice reads the element of its own site.
            if len(of) > 1 and isinstance(runtime_module, SpliceRule):
                own = of[list(rules.planned_strengths[edit.name]).index(edit.site.name)]
            # Code that reads element 7 is not equal to code that reads element 3, and equal blocks
            # are compiled once. As long as all sites have one strength, all read the first element.
            if own != of[0] and plan.blocks and edit.at_depth is None and not session.strengths[edit.name].chosen:
                rules.shared_elements.setdefault(edit.name, {})[names[i]] = own
                own = of[0]
            runtime_module.elements = (own,)
    for i, native in enumerate(plan.native_dropout, len(plan.edits)):
        rule = NativeDropoutRule(native, slots.get(names[i], 0))
        if native.is_scheduled:
            rule.elements = (elements[OWN_DROPOUT][list(rules.planned_strengths[OWN_DROPOUT]).index(native.dropout.site.name)],)
        rules.add_module(names[i], rule)
    if draws:
        rules.add_module("key", key)
    _add_totals(rules, plan, names, slots, states, elements)
    for site, readers in plan.tracked.items():
        derivatives = [reader for name in readers if isinstance(reader := rules.get_submodule(name), Derivative)]
        rules.add_module(names[site], Track(site, derivatives))

    for child in rules.children():
        assert isinstance(child, RuntimeModule)
        child.rules = (rules,)
    if not isinstance(noise, Session):
        session.clock, session.states, session.complete = clock_of(rules), {state.name: state for state in states_in(rules)}, True
        session.join(rules)
    return rules


def _add_clock(rules: Rules, session: Session, device: torch.device) -> dict[str, tuple[int, ...]]:
    """Add the clock if a strength has a schedule. Return, by regularizer, the places of the elements that its runtime modules read."""
    elements = {name: tuple(range(len(tensor))) for name, tensor in rules.strengths.items()}
    scheduled = scheduled_elements(rules)
    if not scheduled:
        return elements
    strengths = {
        each: row.at(each.site, each.planned) if each.site else row.others
        for name, of in scheduled.items() for row in [session.strengths[name]] for each in of
    }  # fmt: skip
    if isinstance(session.clock, ClockRule):
        clock = session.clock
        rules.add_module(CLOCK, SharedClock(clock))
    else:
        clock = ClockRule(strengths, device)
        rules.add_module(CLOCK, clock)
    # In place, each further graph brings sites of its own.
    clock.extend(strengths)
    return elements | {name: clock.places(of) for name, of in scheduled.items()}


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
    """Return, by the regularizer's name, each ``State`` that the plan needs: a new one, or that of a session.

    Each has a ``SiteState`` for every site of its regularizer.
    """
    if isinstance(noise, Session):
        states = noise.states
    else:
        states = {name: State(name, regularizer) for name, regularizer in plan.regularizers.items() if "state" in regularizer.takes}
    parameters = parameters_by_name(model, once=True) if states else {}
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
        # Only the shape of the steps is wanted, and lengths come with a call.
        steps = dataclasses.replace(edit.steps, lengths=None)
        return steps.of((like,) * len(steps.calls) or like, None, f"{kind} at {site.name}")[0]
    return like if edit.units is None else like.movedim(edit.units.axis, -1)


def _add_totals(
    rules: Rules, plan: Plan, names: Mapping[int | str, str], slots: Mapping[str, int], states: Mapping[str, State],
    elements: Mapping[str, tuple[int, ...]],
) -> None:  # fmt: skip
    """Add each penalty's runtime module, which computes the penalty from the measurements, the values at its sites, or a splice's state."""
    for name, regularizer in plan.regularizers.items():
        strength, sites = rules.strengths.get(name), [edit.site.name for edit in plan.of(name)]
        if isinstance(regularizer, Splice):
            if name in states:
                learns = regularizer.has_penalty()
                holder = SpliceTotal(regularizer, name, strength, states[name], sites) if learns else StateHolder(states[name])
                holder.elements = elements[name]
                rules.add_module(name, holder)
            continue
        assert isinstance(regularizer, Penalty)
        if regularizer.by_prox:  # nothing of it is in the graph
            continue
        if name in plan.slices:
            drawn = {edit.site.name: slots[names[i]] for i, edit in enumerate(plan.edits) if edit.name == name}
            total: Total = Derivative(regularizer, name, strength, plan.slices[name], drawn)
        elif name in states:
            kind = StatefulTotal if regularizer.on == "parameters" else StateHoldingTotal
            total = kind(regularizer, name, strength, states[name], sites)
        else:
            total = (AllSitesTotal if "values" in regularizer.takes else Total)(regularizer, name, strength)
        total.elements = elements[name]
        rules.add_module(name, total)


def measures(regularizer: Regularizer) -> bool:
    """Whether a penalty measures each site's value on its own, directly after the site, and not all values at once."""
    return regularizer.on == "values" and "values" not in regularizer.takes and not regularizer.takes_vjp


def _numbers(streams: Mapping[str, StreamName], plan: Plan, rng: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return the numbers of streams, and the seeds: the common one under ``""``, that of each splice with an ``rng`` under its name."""
    common, own, numbers = None if rng is None else seed(rng), dict[str, int](), dict[str, int]()
    for name, stream in streams.items():
        regularizer = plan.regularizers.get(stream.of)
        theirs = regularizer.rng if isinstance(regularizer, Splice) else None
        if theirs is not None:
            numbers[name] = stream.number(own.setdefault(stream.of, seed(theirs)))
            continue
        if common is None:  # where nothing needs it, it is not drawn, and torch's generator stays as it is
            common = seed(None)
        numbers[name] = stream.number(common)
    return numbers, ({} if common is None else {"": common}) | own


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
