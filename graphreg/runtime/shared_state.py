"""``SharedState``: the strengths and the noise that several rewritten modules of one model have in common.

A model that is regularized in place has a rewritten module for each structure of arguments. A strength is the same in all of them, and
they count their calls together, so that it makes no difference to the noise which of them runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from graphreg.errors import NoMatchError, listed, suggestions_text, warn
from graphreg.ir import Missing, Site, brought, has_float64, select_among
from graphreg.planning import OWN_DROPOUT, OwnDropout, Plan, rates_are_scheduled
from graphreg.regularizer import Regularizer, own_strength
from graphreg.rng import call_keys, stream
from graphreg.runtime.clock import CLOCK, ClockRule, Element
from graphreg.runtime.noise_keys import KeyRule
from graphreg.runtime.owned_state import State
from graphreg.runtime.runtime_module import Rules
from graphreg.runtime.site_strengths import OWN, Places
from graphreg.runtime.stateful import StateHoldingTotal
from graphreg.schedules import Schedule


@dataclass(frozen=True)
class StreamName:
    """What identifies a noise stream, together with a seed.

    Attributes:
        site: The name of the site.
        kind: The name of the regularizer's class; ``"own dropout"`` for native dropout.
        occurrence: The position of the splice among those of its class at the site, from 0.
        of: The name of the regularizer if it has a seed of its own, else ``""``.
    """

    site: str
    kind: str
    occurrence: int
    of: str = ""

    def number(self, seed: int) -> int:
        """Return the stream's 64-bit number."""
        return stream(seed, self.site, self.kind, self.occurrence)


class SharedState:
    """Holds the strengths, the noise streams and the call number that the rewritten modules of one model share.

    Attributes:
        seeds: The seeds of the noise. The seed of a splice that has a seed of its own is under the regularizer's name; the seed for all
            other noise is under ``""``.
        rules: Holds the strengths, the key rule, the clock and the states. It is not the ``graphreg_rules`` of any rewritten module;
            each rewritten module has a ``Rules`` of its own.
        key: The key rule that counts the calls; it has the streams of all rewritten modules.
        clock: The clock, which has the scheduled strengths of all rewritten modules; None if no strength has a schedule.
        names: The streams, in the order of the key rule's rows.
        unsettled: Whether ``rules.chosen`` may have selectors in place of names of sites, because strengths were set before the sites
            were known.
        awaited: Those of these selectors that must match a site of the first graph, each with the name of the regularizer.
    """

    def __init__(
        self, regularizers: Mapping[str, Regularizer], seeds: Mapping[str, int], device: torch.device, own_dropout: OwnDropout = "keep"
    ) -> None:
        self.seeds, self.names = dict(seeds), list[StreamName]()
        self.unsettled, self.awaited = False, set[tuple[str, str]]()
        self.rules, self.key = Rules(), KeyRule({}).to(device)
        constants = {name: float(r.weight) for name, r in regularizers.items() if not r.is_scheduled}
        self.rules.strengths = strengths_on(device, {name: [weight] for name, weight in constants.items()})
        if not has_float64(device):
            self.rules.exact = constants
        self.rules.add_module("key", self.key)
        scheduled = {name: own_strength(r.weight) for name, r in regularizers.items() if r.is_scheduled}
        if rates_are_scheduled(own_dropout):
            scheduled[OWN_DROPOUT] = own_strength_of_rates(own_dropout)
        self.clock = self._clock(scheduled, device)
        self._owners: dict[str, weakref.ref[nn.Module]] = {}  # by the name of a parameter that has a state: the module that has it
        for child in self.rules.children():
            child.rules = (self.rules,)  # type: ignore[assignment]
        for name, regularizer in regularizers.items():
            if "state" in regularizer.takes:
                self.rules.add_module(f"{name}_state", State(name, regularizer))

    def _clock(self, scheduled: Mapping[str, float], device: torch.device) -> ClockRule | None:
        """Make the clock for the strengths that have a schedule. Elements for sites are added when a graph is made: see ``elements``."""
        if not scheduled:
            return None
        clock = ClockRule({(name, OWN): strength for name, strength in scheduled.items()}, device)
        self.rules.add_module(CLOCK, clock)
        self.rules.elements = {name: (place,) for place, name in enumerate(scheduled)}
        self.rules.places = {name: Places(own=strength) for name, strength in scheduled.items()}
        return clock

    def elements(self, schedules: Mapping[Element, float]) -> dict[Element, int]:
        """Return the places of scheduled strengths in what the clock returns. Add the strengths that are new to the clock."""
        assert self.clock is not None
        return self.clock.extend(schedules)

    def slots(self, streams: Mapping[str, StreamName]) -> dict[str, int]:
        """Return the row of each runtime module's stream in the keys of a call, by the module's name. Add the streams that are new.

        ``streams``: the stream of each runtime module that draws, by the module's name.
        """
        new = [name for name in dict.fromkeys(streams.values()) if name not in self.names]
        self.names += new
        if new:
            self._make_streams()
        return {module: self.names.index(name) for module, name in streams.items()}

    def states(self) -> dict[str, State]:
        """Return the states that regularizers keep from call to call, by regularizer name."""
        return {child.name: child for child in self.rules.children() if isinstance(child, State)}

    def follow(self, model: nn.Module) -> list[str]:
        """Drop the states of parameters that have changed: they are gone, have another shape, or belong to another module than before.

        Return a line for each. A state that is needed again starts anew, from the parameter as it is then.
        """
        lines, parameters, modules = [], dict(model.named_parameters()), dict(model.named_modules())
        for name, state in self.states().items():
            for site in tuple(state.sites) if state.regularizer.on == "parameters" else ():
                parameter, owner = parameters.get(site), modules.get(site.rpartition(".")[0])
                known, shape = self._owners.get(site), state.at(site).like[0]
                if parameter is None or owner is None:
                    lines.append(f"{name}: the model has no parameter {site} any more; its state is dropped")
                elif shape == (0,):  # it was loaded before the first trace
                    state.at(site).like = parameter.shape, parameter.dtype
                    continue
                elif (known is not None and known() is not owner) or shape != parameter.shape:
                    lines.append(f"{name}: {site} is another parameter now, or has another shape; its state starts anew")
                else:
                    continue
                state.drop(site)
        self._owners = {name: weakref.ref(modules[name.rpartition(".")[0]]) for name in parameters}
        return lines

    def is_outdated(self, rules: Rules) -> bool:
        """Return whether a rewritten module, given its runtime modules, holds states that were dropped."""
        present = {id(each) for state in self.states().values() for each in state.children()}
        held = [child.held for child in rules.children() if isinstance(child, StateHoldingTotal)]
        return any(id(each) not in present for states in held for each in states)

    def reseed(self, seeds: Mapping[str, int]) -> None:
        """Draw from other seeds from now on."""
        self.seeds = dict(seeds)
        self._make_streams()

    def _make_streams(self) -> None:
        key = self.key
        numbers = [name.number(self.seeds[name.of]) for name in self.names]
        key.names = tuple(f"{name.site}|{name.kind}|{name.occurrence}" for name in self.names)
        key.streams = torch.tensor(numbers, dtype=torch.int64, device=key.step.device)
        call = key.step if key.frozen_call is None else torch.full_like(key.step, key.frozen_call)
        key.keys = call_keys(key.streams, call)

    def copied(self) -> SharedState:
        """Return a copy with the same strengths, seeds and call number.

        It has no streams yet: ``slots`` adds them for each graph that is made for the copy.
        """
        twin = SharedState({}, self.seeds, self.key.step.device)
        own = {name: places.own for name, places in self.rules.places.items()}
        twin.clock = twin._clock(own, self.key.step.device)
        for name, state in self.states().items():
            twin.rules.add_module(f"{name}_state", State(name, state.regularizer))
            twin.states()[name].load(state.saved())
        twin.rules.strengths = {name: tensor.detach().clone() for name, tensor in self.rules.strengths.items()}
        twin.rules.exact = dict(self.rules.exact)
        twin.choose(self.rules.chosen)
        twin.unsettled, twin.awaited = self.unsettled, set(self.awaited)
        for name in ("alike", "position", "meshed", "differing"):
            setattr(twin.key, name, getattr(self.key, name))
        twin.key.seek(self.key.call())
        if self.clock is not None and twin.clock is not None:
            twin.clock.seek(self.clock.call())
        return twin

    def choose(self, chosen: Mapping[str, Mapping[str, float]]) -> None:
        """Record strengths that were set, as in ``Rules.chosen``, and write those with a schedule; ``Rules.strengths`` has the others."""
        self.rules.chosen = {name: dict(by_site) for name, by_site in chosen.items()}
        for name in self.rules.elements.keys() & chosen.keys():
            self.rules.set_by_site(name, chosen[name])

    def choose_later(self, name: str, by_selector: Mapping[str, float]) -> None:
        """Record strengths by selectors of sites that are not known yet; the last selector that matches a site counts there."""
        chosen = dict(self.rules.chosen.get(name, {}))
        for selector, strength in by_selector.items():
            if selector == EVERYWHERE:
                chosen = {OWN: strength}
                continue
            chosen.pop(selector, None)  # so that it comes last
            chosen[selector] = strength
            self.awaited.add((name, selector))
        self.unsettled = True
        self.rules.set_by_site(name, chosen)

    def settle(self, plan: Plan, missing: Missing) -> None:
        """Put the sites of the first graph in place of the selectors that were given before it was made.

        ``missing``: what to do if one of them matches no site.
        """
        for name, chosen in self.rules.chosen.items() if self.unsettled else ():
            sites, settled = plan.strength_sites(name), dict[str, float]()
            for selector, strength in chosen.items():
                matched = [selector] if selector in {OWN, *sites} else selected(selector, sites)
                if not matched and (name, selector) in self.awaited and missing != "ignore":
                    text = unmatched(name, selector, sites)
                    if missing == "error":
                        raise NoMatchError(
                            f"set_strength, before the model was traced: {text} To forget the selectors that wait, set a number for all "
                            f"sites: graphreg.set_strength(model, {name!r}, number). "
                            "Sites that only calls with other arguments have need such a call first, or missing='warn'."
                        )
                    warn(f"set_strength: {text}")
                settled |= dict.fromkeys(matched or [selector], strength)
            self.rules.chosen[name] = settled
        self.unsettled, self.awaited = False, set()

    @contextmanager
    def unsettled_unless_done(self) -> Iterator[None]:
        """If the with-block, which traces the model, raises: undo ``settle``, for the next trace may have other sites."""
        chosen, unsettled, awaited = dict(self.rules.chosen), self.unsettled, self.awaited
        try:
            yield
        except BaseException:
            self.rules.chosen, self.unsettled, self.awaited = chosen, unsettled, awaited
            raise


EVERYWHERE = "**"  # the selector of all sites


def selected(selector: str, sites: Mapping[str, Site]) -> list[str]:
    """Return the names of those sites that a selector of ``set_strength`` matches. ``sites``: by name."""
    return [selector] if selector in sites else [site.name for site in select_among(selector, list(sites.values()))]


def unmatched(name: str, selector: str, sites: Mapping[str, Site]) -> str:
    """Return the text of the error for a selector that matches no site of the regularizer ``name``."""
    known = listed(list(sites), 6) or "none yet"
    return f"{selector!r} matches no site of {name}.{suggestions_text(selector, sites)} Its sites: {known}."


def own_strength_of_rates(own_dropout: OwnDropout) -> float:
    """Return that schedule of ``own_dropout=`` which goes furthest from 0."""
    rates = own_dropout.values() if isinstance(own_dropout, Mapping) else (own_dropout,)
    return max((rate for rate in rates if isinstance(rate, Schedule)), key=float)


def strengths_on(device: torch.device, elements: Mapping[str, Sequence[float]]) -> dict[str, torch.Tensor]:
    """Return the strengths of regularizers by name, as tensors on a device: float64, or float32 if the device has no float64."""
    return {name: brought(torch.tensor(each, dtype=torch.float64, device="cpu"), device) for name, each in elements.items()}
