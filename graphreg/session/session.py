"""``Session``: how strongly a regularized model is regularized now, what it draws next, what is switched off, and what is saved.

A rewritten module, a stage, a model in place and a backend each have one. It writes changed strengths into the runtime modules of the
graphs, and tells its *readers* when noise or penalties have been switched.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, listed, suggestions_text, warn
from graphreg.ir.selector import Missing
from graphreg.planning.native_dropout import OWN_DROPOUT, OwnDropout
from graphreg.planning.plan import Plan
from graphreg.regularizer.base import Regularizer, Splice
from graphreg.runtime.attach import AttachRule, check_scale
from graphreg.runtime.build_record import Asked, written_scale
from graphreg.runtime.clock import ClockRule
from graphreg.runtime.optimizer_steps import watch_steps
from graphreg.runtime.owned_state import State
from graphreg.runtime.rank_mesh import RankMesh
from graphreg.runtime.runtime_module import DrawingRule, Rules
from graphreg.runtime.splice import SpliceRule
from graphreg.schedules import Schedule
from graphreg.session.saved import checked_state, clock_of_state, written_state
from graphreg.session.streams import CallClock, Streams
from graphreg.session.strengths import OWN, Row, strength_table
from graphreg.session.switches import Switches
from graphreg.torch_internals.patching import Changes

NO_GRAPH = (
    "this model is regularized in place and has no graph yet: it is traced at the first call in train mode. Call it once in train mode, or "
    "give graphreg.regularize_ example_inputs."
)


class Reader(Protocol):
    """What acts by a session: the runtime modules of a graph, or a model in place."""

    def on_switched(self, session: Session) -> None: ...


@dataclass(frozen=True)
class StrengthBuffers:
    """Where the strengths of one regularizer are in a module, for ``torch.func.functional_call``.

    Attributes:
        names: The names of the buffers, each a tensor [elements], all with the same content.
        sites: The site of each element; ``("",)`` if one element is the strength at all sites.
        absolute: Whether an element is the strength itself, and no ratio; always True.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    absolute: bool = True


class Session:
    """The state of one regularized model that users read and change while it trains.

    Attributes:
        strengths: The table of strengths, by regularizer.
        streams: The streams of the noise.
        clock: Counts the calls in train mode; None if no strength has a schedule.
        states: What regularizers keep from call to call, by name.
        noise: The open blocks of ``noise_on`` and ``noise_off``.
        penalties: The open blocks of ``penalties_off``.
        readers: What acts by the session.
        changes: How often a strength was changed.
        complete: Whether there is a graph, so that a selector of ``set_strength`` must match a site at once. Later graphs may bring more.
        keeps_selectors: Whether what was set for a selector counts at sites of later graphs, too, as in a backend.
        may_draw: Whether the model may draw noise, although no graph of it is known that does.
        native: Names by which users may look for the rates of native dropout that the plan changes.
        asked: The arguments that the host was made with; a recipe consists of them.
        attaches: Whether penalties attach.
        scale: The scale of attached penalties, as it was given.
    """

    asked: Asked | None = None

    def __init__(self, regularizers: Mapping[str, Regularizer], streams: Streams, own_dropout: OwnDropout = "keep") -> None:
        self.strengths = strength_table(regularizers, own_dropout)
        self.streams = streams
        self.clock: ClockRule | CallClock | None = None
        self.states: dict[str, State] = {}
        self.noise, self.penalties = Switches(), Switches()
        self.readers: list[Reader] = []
        self.changes = 0
        self.complete, self.keeps_selectors, self.may_draw = False, False, False
        self.native: frozenset[str] = frozenset()
        self.attaches = False
        self.scale: Any = None
        if self.has_prox:
            watch_steps(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.has_prox:  # the process that loads a pickle may not watch yet
            watch_steps(self)

    @property
    def has_prox(self) -> bool:
        """Whether ``prox_`` applies some of the penalties."""
        return any(row.regularizer is not None and row.regularizer.by_prox for row in self.strengths.values())

    # Strengths

    def strength(self, name: str) -> Row:
        """Return the row of a regularizer; raise NoMatchError if no strength has this name, which may be anything, not only a string."""
        if isinstance(name, str) and name in self.strengths:
            return self.strengths[name]
        hint = (
            " The rate of a native dropout is set once, by regularize(..., own_dropout={selector: rate}). If it is a schedule, "
            f"set_strength(module, {OWN_DROPOUT!r}, ...) changes it."
        )
        known, cure = ", ".join(self.strengths) or "none", hint if isinstance(name, str) and name in self.native else ""
        raise NoMatchError(f"no regularizer is named {name!r}.{suggestions_text(str(name), self.strengths)} Names: {known}.{cure}")

    def now(self) -> int:
        """Return the number of the call in train mode whose strengths count now."""
        return 0 if self.clock is None else self.clock.present_call()

    def values(self) -> dict[str, float]:
        """Return the present strengths by regularizer name: of those at its sites, that which is furthest from 0."""
        call = self.now()
        return {name: row.furthest(call) for name, row in self.strengths.items()}

    def values_by_site(self) -> dict[str, dict[str, float]]:
        """Return the present strengths by regularizer name and site, without those of formulas that take all sites at once."""
        call = self.now()
        return {name: sites for name, row in self.strengths.items() if (sites := row.numbers(call))}

    def set_strength(self, name: str, value: float | Mapping[str, float]) -> None:
        """Change a regularizer's strength: see ``graphreg.set_strength``."""
        row = self.strength(name)
        if isinstance(value, Mapping):
            row.require_by_site()
            row.set({selector: self._checked(row, each) for selector, each in value.items()}, not self.complete)
            # It holds at the sites that are known, and not at those of graphs that come later.
            if self.complete and not self.keeps_selectors:
                row.keep_sites()
        else:
            row.set_all(self._checked(row, value))
        self._tell(row)

    def changed_strengths(self) -> dict[str, dict[str, float]]:
        """Return the strengths that were set since the host was made, by regularizer and site; ``OWN`` means all other sites."""
        return {name: changed for name, row in self.strengths.items() if (changed := row.changed())}

    def restore_strengths(self, changed: Mapping[str, Mapping[str, float]]) -> None:
        """Set the strengths that ``changed_strengths`` returned, and reset all others to what the regularizers were made with."""
        checked = {
            name: {site: self._checked(row, value) for site, value in changed.get(name, {}).items()} for name, row in self.strengths.items()
        }
        for name, row in self.strengths.items():
            if list(row.changed().items()) != list(checked[name].items()):  # of selectors that wait, the last one counts
                row.restore(checked[name])
                self._tell(row)

    @contextmanager
    def without(self, parts: Mapping[str, Collection[str]]) -> Iterator[None]:
        """Within the block, regularizers do nothing at some of their sites: their strengths are 0 there, also where 0 is out of range.

        A splice that would still act at strength 0 is silenced.

        ``parts``: by the name of a regularizer, the names of the sites; the site ``OWN`` means all of them.
        """
        with Changes() as changes, changes:
            for name, sites in parts.items():
                row = self.strengths[name]
                changes.later(partial(self._put_back, row, row.as_it_is(), [rules.elements_of(name) for rules in self.graphs()]))
                if OWN in sites:
                    row.set_all(0.0)
                else:
                    row.set(dict.fromkeys(sites, 0.0), may_wait=False)
                self._tell(row)
                if isinstance(row.regularizer, Splice) and not row.regularizer.off_at_zero:
                    splices = [each for rules in self.graphs() for each in rules.children() if isinstance(each, SpliceRule)]
                    for splice in splices:
                        if splice.regularizer is row.regularizer and (OWN in sites or splice.site in sites):
                            changes.put(splice, "silenced", True)
            yield

    def _put_back(self, row: Row, before: Row, elements: Sequence[Callable[[], None]]) -> None:
        vars(row).update(vars(before))
        self._tell(row)
        for restore in elements:
            restore()

    def _checked(self, row: Row, value: float) -> float:
        """Return a new strength as a float, or a schedule; raise RegularizerError if it is out of range, or cannot be set."""
        checked, name = row.checked(value), row.name
        if isinstance(checked, Schedule):
            if self.clock is None or not self.clock.takes(name):
                raise RegularizerError(
                    f"{name}: {checked!r} is not allowed, because {name} was given a number and has no clock. Give the schedule to "
                    "regularize."
                )
            # Compiled graphs read a tensor with room for this many pieces.
            if len(checked.pieces) > self.clock.room:
                raise RegularizerError(
                    f"{name}: {checked!r} has {len(checked.pieces)} pieces, and there is room for {self.clock.room}, those of the longest "
                    "schedule that the module was made with. Give a shorter one, or give it to regularize."
                )
        return checked

    def _tell(self, row: Row) -> None:
        # Graphs read a strength with a schedule from the clock, and any other from a buffer of their runtime modules.
        if isinstance(self.clock, ClockRule) and row.has_clock:
            self.clock.set(row.name, lambda element: row.at(element.site, element.planned) if element.site else row.others)
        for rules in self.graphs():
            rules.on_strength_changed(row)
        self.changes += 1

    def learn(self, plan: Plan) -> None:
        """Take the sites of a plan."""
        for name, row in self.strengths.items():
            row.learn(plan.strength_sites(name), plan.planned_strengths(name))
        self.native |= {edit.dropout.site.name for edit in plan.native_dropout} | ({OWN_DROPOUT} if plan.native_dropout else set())

    def settle(self, missing: Missing, text: Callable[[Row, str], str]) -> None:
        """From now on, a selector of ``set_strength`` must match a site. Do as ``missing`` says for those that waited in vain.

        Call this within ``unchanged_unless_done``, which lets them wait again if this raises.

        ``text``: makes the text of the error of such a selector in a row.
        """
        for row in self.strengths.values():
            for selector in row.lost():
                if missing == "error":
                    raise NoMatchError(text(row, selector))
                if missing == "warn":
                    warn(f"set_strength: {row.no_site(selector)}")
            if not self.keeps_selectors:
                row.keep_sites()
        self.complete = True

    @contextmanager
    def unchanged_unless_done(self) -> Iterator[None]:
        """If the with-block, which traces the model, raises: forget the sites that it has found, for the next trace may have others.

        Selectors then wait again. What was set stays.
        """
        found = ("sites", "planned", "given", "chosen", "awaited")
        before = {row: {name: copy.copy(getattr(row, name)) for name in found} for row in self.strengths.values()}
        complete, native = self.complete, self.native
        try:
            yield
        # A user may interrupt a long trace.
        except BaseException:
            for row, was in before.items():
                vars(row).update(was)
            self.complete, self.native = complete, native
            raise

    # Attached penalties

    def set_scale(self, scale: Any) -> None:
        """Set the scale of attached penalties: a number, a 0-d tensor, a GradScaler, a function, a ``CallScale``, or None for 1."""
        check_scale(scale)
        self.scale = scale
        for rules in self.graphs():
            if isinstance(attach := rules._modules.get("attach"), AttachRule):
                attach.scale = scale

    def graphs(self) -> list[Rules]:
        """Return the containers of the runtime modules of all graphs."""
        return [reader for reader in self.readers if isinstance(reader, Rules)]

    # What is saved

    def saved(self) -> dict[str, Any]:
        """Return the state of the noise: see ``graphreg.rng_state``."""
        clock = self.clock.call() if self.clock is not None and self._saves_clock else None
        state = {name: state.saved() for name, state in self._saved_states().items()}
        return written_state(self.streams.form, self.streams.alike, state, clock, **self.streams.saved())

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume the noise at a saved state: see ``graphreg.set_rng_state``. If it does not fit, raise an error and change nothing."""
        checked = checked_state(state, self.streams.form)
        self.streams.check(checked)
        call = clock_of_state(checked, self._saves_clock)
        # All is compared before the first change, so that an error leaves the noise as it was.
        states, saved = self._saved_states(), checked.get("state", {})
        if other := sorted(states.keys() ^ saved.keys()):
            raise RegularizerError(
                f"the state belongs to another module: only the state or only the module has tensors of {listed(other, 3)}. Build the "
                "module as for the run that saved the state."
            )
        for name, each in states.items():
            each.check(saved[name])
        for name, each in states.items():
            each.load(saved[name])
        if call is not None and self.clock is not None:
            self.clock.seek(call)
        self.streams.load(checked)

    @property
    def _saves_clock(self) -> bool:
        """Whether a strength has a schedule, or had one when the host was made."""
        if self.clock is None or isinstance(self.clock, ClockRule):
            return self.clock is not None
        return any(row.is_scheduled or isinstance(row.own, Schedule) for row in self.strengths.values())

    def _saved_states(self) -> dict[str, State]:
        """Return the states that are saved. The others consist of parameters alone, and are in ``state_dict``."""
        return {name: state for name, state in self.states.items() if state.is_saved}

    def reset_state(self, names: Sequence[str], parameters: Callable[[], Mapping[str, Tensor]]) -> None:
        """Reset the states that regularizers keep: see ``graphreg.reset_state``. ``parameters`` returns those of the model, by name."""
        for name in names:
            if name not in self.states:
                raise NoMatchError(f"no regularizer that keeps a state is named {name!r}. Names: {', '.join(self.states) or 'none'}.")
        present = parameters() if self.states else {}
        for name in names or self.states:
            self.states[name].reset(present)

    # Noise

    def require_draws(self) -> None:
        """Raise GraphRegError if the model draws no noise."""
        if not self.may_draw and not self.streams.draws:
            raise GraphRegError(
                "this module draws no noise: it has no splice, so there is no noise to keep on, to sample, or to share between ranks. "
                "Regularize with dropout or noise first, e.g. hidden_dropout=0.1, or own_dropout='seeded'."
            )

    def set_ranks(self, ranks: Any, roots: Sequence[nn.Module]) -> None:
        """Choose whether ranks draw different masks: see ``graphreg.set_ranks``.

        ``ranks``: ``"differ"``, ``"same"`` or a ``RankMesh``; ``roots``: the rewritten modules whose graphs run.
        """
        # This raises for a formula that cannot be divided, before anything is changed.
        found = {rule: cuts for root in roots for rule, cuts in ranks.cuts(root).items()} if isinstance(ranks, RankMesh) else {}
        self.streams.set_ranks(ranks)
        for child in (child for rules in self.graphs() for child in rules.children()):
            if isinstance(child, DrawingRule):
                child.cuts = found.get(child, ())

    def counters(self) -> list[Any]:
        """Return what counts calls: those that draw, and those in train mode."""
        return self.streams.counters() + ([] if self.clock is None else [self.clock])

    @property
    def noise_is_frozen(self) -> bool:
        """Whether a block of ``frozen_noise`` is open."""
        return any(counter.is_frozen for counter in self.streams.counters())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Draw the same masks in every call of the block: see ``graphreg.frozen_noise``."""
        block = object()
        with Changes() as changes, changes:
            for counter in self.counters():
                # First what undoes it: an exception in between then leaves nothing frozen.
                changes.later(partial(counter.release, block))
                counter.freeze(block)
            yield

    def noise_switched(self, on: bool) -> AbstractContextManager[None]:
        """Switch the noise on in all modes, or off, in a block: see ``graphreg.noise_on`` and ``graphreg.noise_off``."""
        return self.noise.block(on, self._tell_switched)

    def penalties_off(self) -> AbstractContextManager[None]:
        """Let no penalty act in a block: see ``graphreg.penalties_off``."""
        return self.penalties.block(False, self._tell_switched)

    def _tell_switched(self) -> None:
        for reader in tuple(self.readers):
            reader.on_switched(self)
        for counter in self.counters():
            counter.settle()

    def join(self, reader: Reader) -> None:
        """Let a reader act by the session from now on."""
        self.readers.append(reader)
        reader.on_switched(self)

    def asked_now(self) -> Asked:
        """Return the arguments with which a host of the same kind would be made, with the present seeds."""
        if self.asked is None:
            raise GraphRegError(NO_GRAPH)
        return dataclasses.replace(self.asked, seeds=dict(self.streams.seeds), scale=written_scale(self.scale))
