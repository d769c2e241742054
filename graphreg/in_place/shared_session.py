"""The session of a model in place: its graphs share it, and it outlives each of them.

It has a container of runtime modules of its own, for what counts calls and keeps states before there is a graph and between graphs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from graphreg.planning.native_dropout import OwnDropout
from graphreg.regularizer.base import Regularizer
from graphreg.runtime.clock import CLOCK, ClockRule, ScheduledElement
from graphreg.runtime.owned_state import State
from graphreg.runtime.runtime_module import Rules
from graphreg.runtime.stateful import StateHoldingTotal
from graphreg.session.session import Session
from graphreg.session.streams import GrowingStreams
from graphreg.session.strengths import OWN
from graphreg.torch_internals.modules import parameters_by_name


class SharedSession(Session):
    """A session whose counters and states belong to no graph.

    Attributes:
        streams: The streams of all graphs.
        home: Holds the key rule, the clock and the states, so that they move with the model. No graph calls it.
        owners: By the name of a parameter, the module that has it, as far as a state was made from the parameter.
        has_acted: Whether the model, or the model of which it is a copy, has had a graph.
    """

    streams: GrowingStreams

    def __init__(self, regularizers: Mapping[str, Regularizer], streams: GrowingStreams, own_dropout: OwnDropout) -> None:
        super().__init__(regularizers, streams, own_dropout)
        self.own_dropout, self.has_acted = own_dropout, False
        self.owners: dict[str, weakref.ref[nn.Module]] = {}
        self.home = Rules()
        self.home.session = self
        self.home.add_module("key", streams.key)
        if scheduled := {ScheduledElement(name, OWN, row.own): row.own for name, row in self.strengths.items() if row.has_clock}:
            self.clock = ClockRule(scheduled, streams.key.step.device)
            self.home.add_module(CLOCK, self.clock)
        for name, regularizer in regularizers.items():
            if "state" in regularizer.takes:
                self.states[name] = State(name, regularizer)
                self.home.add_module(f"{name}_state", self.states[name])
        for child in self.home.children():
            child.rules = (self.home,)  # type: ignore[assignment]
        self.join(self.home)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSession:
        """Return the session of one graph that is copied, as ``verify`` does. It has nothing to do with the model and its other graphs."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "readers"})
        # Of the readers, only the graph that is being copied.
        twin.readers = [twin.home, *(memo[id(reader)] for reader in self.readers if reader is not self.home and id(reader) in memo)]
        return twin

    def copied(self) -> SharedSession:
        """Return a session for a copy of the model: it has the same strengths, seeds, states and calls, and no graph yet."""
        regularizers = {name: row.regularizer for name, row in self.strengths.items() if row.regularizer is not None}
        twin = SharedSession(regularizers, self.streams.copied(), self.own_dropout)
        twin.take_strengths(self.changed_strengths(), self.awaited())
        for name, state in self.states.items():
            twin.states[name].load(state.saved())
        if self.clock is not None and twin.clock is not None:
            twin.clock.seek(self.clock.call())
        twin.asked, twin.attaches, twin.scale, twin.has_acted = self.asked, self.attaches, self.scale, self.has_acted
        return twin

    def awaited(self) -> list[tuple[str, str]]:
        """Return the selectors that must match a site of the first graph, each with the name of the regularizer."""
        return [(name, selector) for name, row in self.strengths.items() for selector in row.awaited]

    def take_strengths(self, changed: Mapping[str, Mapping[str, float]], awaited: Collection[tuple[str, str]]) -> None:
        """Take the strengths of another session, whose copy this is: they were checked there, and the clock makes room for them."""
        for name, row in self.strengths.items():
            row.restore(changed.get(name, {}))
            row.awaited = tuple(selector for of, selector in awaited if of == name)
            self._tell(row)

    def follow(self, model: nn.Module) -> list[str]:
        """Drop the states of parameters that have changed: they are gone, have another shape, or belong to another module than before.

        Return a line for each. A state that is needed again starts anew, from the parameter as it is then.
        """
        lines, parameters, modules = [], parameters_by_name(model, once=True), dict(model.named_modules())
        for name, state in self.states.items():
            for site in tuple(state.sites) if state.regularizer.on == "parameters" else ():
                parameter, owner = parameters.get(site), modules.get(site.rpartition(".")[0])
                known, shape = self.owners.get(site), state.at(site).like[0]
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
        self.owners = {name: weakref.ref(modules[name.rpartition(".")[0]]) for name in parameters}
        return lines

    def is_outdated(self, rules: Rules) -> bool:
        """Return whether a graph, given its runtime modules, holds states that were dropped."""
        present = {id(each) for state in self.states.values() for each in state.children()}
        held = [child.held for child in rules.children() if isinstance(child, StateHoldingTotal)]
        return any(id(each) not in present for states in held for each in states)
