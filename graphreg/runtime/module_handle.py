"""The handle of a rewritten module: it reads and sets strengths and the noise state, freezes noise, and keeps noise on in eval mode.

A compiled module is not recompiled for a new strength, a restored state or frozen noise. ``noise_on``, ``noise_off`` and ``set_ranks``
recompile it once for each setting, however many calls follow.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, listed, shown, suggestions_text
from graphreg.ir import NativeDropout, Site
from graphreg.planning import OWN_DROPOUT, is_rate
from graphreg.regularizer import ByDepth, Regularizer
from graphreg.runtime.attach import AttachRule, check_scale
from graphreg.runtime.build_record import Asked
from graphreg.runtime.clock import ClockRule, clock_of
from graphreg.runtime.counter import Counter
from graphreg.runtime.handle import Handle, backend_handle, in_place_handle, native_draws, record_of, rewritten, rules_of
from graphreg.runtime.noise_keys import KeyRule, key_of
from graphreg.runtime.noise_state import MODULE_STATE, checked_state, clock_of_state, written_state
from graphreg.runtime.noise_switches import NoiseSwitches
from graphreg.runtime.owned_state import Saved, State, states_in
from graphreg.runtime.rank_mesh import RankMesh
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.runtime_module import Drawing, Rules, RuntimeModule
from graphreg.runtime.shared_state import selected, unmatched
from graphreg.runtime.site_strengths import OWN
from graphreg.schedules import Schedule
from graphreg.torch_internals import Changes

log = logging.getLogger("graphreg")
# For each module, by its KeyRule (or its Rules, if it has no KeyRule): the native dropouts that frozen_noise has not warned of yet.
_unfrozen: WeakKeyDictionary[nn.Module, tuple[NativeDropout, ...]] = WeakKeyDictionary()


def handle_of(target: object) -> Handle:
    """Return the handle of a rewritten module, of a model regularized in place, of a backend, or of a model compiled with a backend.

    For anything else it returns a handle whose methods raise GraphRegError.
    """
    return backend_handle(target) or in_place_handle(target) or ModuleHandle(target)


class ModuleHandle(Handle):
    """The handle of a rewritten module, also inside compiled and distributed wrappers."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def _containers(self) -> list[Rules]:
        """Return the containers of runtime modules; only a model in place has several. A site has one strength in all that have it."""
        return [rules_of(self.module)]

    def _regularizers(self) -> Mapping[str, Regularizer]:
        return record_of(self.module).plan.regularizers

    def _is_native(self, name: object) -> bool:
        """Whether a name is ``own_dropout``, or the name of a native dropout, in a module whose plan changes native dropout."""
        edits = record_of(self.module).plan.native_dropout
        return any(name in (edit.dropout.site.name, "own_dropout") for edit in edits)

    def strengths(self) -> dict[str, float]:
        rules, by_site = self._containers()[0], self.site_strengths()
        names = [*(name for name in self._regularizers() if rules.has(name)), *([OWN_DROPOUT] if OWN_DROPOUT in rules.elements else [])]
        return {name: max(by_site.get(name, {}).values(), key=abs, default=rules.value(name)) for name in names}

    def site_strengths(self) -> dict[str, dict[str, float]]:
        by_site: dict[str, dict[str, float]] = {}
        for rules in self._containers():
            for name in rules.places:
                by_site.setdefault(name, {}).update(rules.by_site(name))
        return {name: sites for name, sites in by_site.items() if sites}

    def set_strength(self, name: str, value: float | Mapping[str, float]) -> None:
        self.require_name(name)
        containers = self._containers()
        if isinstance(value, Mapping):
            chosen = containers[0].chosen.get(name, {}) | self._at_sites(name, value)
        else:
            chosen = {OWN: self._checked(name, value)}
        for rules in containers:
            if rules.has(name):
                rules.set_by_site(name, chosen)

    def require_name(self, name: object) -> None:
        """Raise NoMatchError unless a strength has this name, which may be anything, not only a string."""
        regularizers, elements = self._regularizers(), self._containers()[0].elements
        if name in regularizers or (name == OWN_DROPOUT and name in elements):
            return
        known = ", ".join([*regularizers, *({OWN_DROPOUT} & elements.keys())]) or "none"
        hint = (
            " The rate of a native dropout is set once, by regularize(..., own_dropout={selector: rate}). If it is a schedule, "
            f"set_strength(module, {OWN_DROPOUT!r}, ...) changes it."
        )
        raise NoMatchError(
            f"no regularizer is named {name!r}.{suggestions_text(str(name), regularizers)} Names: {known}."
            f"{hint if self._is_native(name) else ''}"
        )

    def _checked(self, name: str, value: float) -> float:
        """Return a new strength as a float, or a schedule; raise RegularizerError if it is out of range, or cannot be set."""
        regularizer = self._regularizers().get(name)
        if regularizer is not None:
            checked = checked_strength(regularizer, value)
        elif is_rate(value):
            checked = value if isinstance(value, Schedule) else float(value)
        else:
            raise RegularizerError(f"{name}: {shown(value)} is not allowed; give a rate in [0, 1), or a schedule of rates.")
        if isinstance(checked, Schedule):
            clock = self._clock() if name in self._containers()[0].elements else None
            if clock is None:
                raise RegularizerError(
                    f"{name}: {checked!r} is not allowed, because {name} was given a number and has no clock. Give the schedule to "
                    "regularize."
                )
            if len(checked.pieces) > clock.room():
                raise RegularizerError(
                    f"{name}: {checked!r} has {len(checked.pieces)} pieces, and there is room for {clock.room()}, those of the longest "
                    "schedule that the module was made with. Give a shorter one, or give it to regularize."
                )
        return checked

    def changed_strengths(self) -> dict[str, dict[str, float]]:
        return {name: dict(chosen) for name, chosen in self._containers()[0].chosen.items()}

    def restore_strengths(self, changed: Mapping[str, Mapping[str, float]]) -> None:
        """Set the strengths that ``changed_strengths`` returned, and reset all others to what the regularizers were made with."""
        weights = {name: regularizer.weight for name, regularizer in self._regularizers().items()}
        for name in self.strengths():
            planned = {} if name not in weights or isinstance(weights[name], ByDepth) else {OWN: weights[name]}
            chosen = {site: self._checked(name, value) for site, value in changed.get(name, planned).items()}
            for rules in self._containers():
                if rules.has(name) and chosen != rules.chosen.get(name, planned):
                    rules.set_by_site(name, chosen)

    def _sites(self, name: str) -> dict[str, Site]:
        """Return the sites of a regularizer by name; for ``own_dropout``, the sites of the native dropouts whose rate has a schedule."""
        plans = [rules.build_record.plan for rules in self._containers() if rules.build_record is not None]
        return {site: found for plan in plans for site, found in plan.strength_sites(name).items()}

    def _at_sites(self, name: str, value: Mapping[str, float]) -> dict[str, float]:
        """Turn a dict from selectors to strengths into a dict from site names to strengths."""
        sites, chosen = self._sites(name), dict[str, float]()
        for selector, strength in self.by_selector(name, value).items():
            if not (matched := selected(selector, sites)):
                raise NoMatchError(unmatched(name, selector, sites))
            chosen |= dict.fromkeys(matched, strength)
        return chosen

    def by_selector(self, name: str, value: Mapping[str, float]) -> dict[str, float]:
        """Return a dict from selectors to strengths, checked but for the sites."""
        regularizer = self._regularizers().get(name)
        if regularizer is not None and not regularizer.by_site:
            raise one_for_all(name, regularizer)
        return {selector: self._checked(name, number) for selector, number in value.items()}

    @property
    def attaches(self) -> bool:
        """Whether penalties attach; False for a module without penalties."""
        return "attach" in rules_of(self.module)._modules

    @property
    def is_traced(self) -> bool:
        """Whether the model has been traced; always True, except for a model that is regularized in place and was not called yet."""
        return True

    def current(self) -> RewrittenModule:
        """Return the rewritten module. For a model that is regularized in place, it is the rewritten module of the last call."""
        return rewritten(self.module)  # type: ignore[return-value]

    def last_penalties(self) -> Mapping[str, Tensor]:
        """Return the attached penalties of the last call by name, detached."""
        attach = rules_of(self.module)._modules.get("attach")
        return dict(attach.last) if isinstance(attach, AttachRule) else {}

    def scale(self) -> Any:
        """Return the scale of attached penalties; None if no scale was given."""
        return next((attach.scale for attach in self._attached()), None)

    def set_scale(self, scale: Any) -> None:
        """Set the scale of attached penalties: a number, a 0-d tensor, a GradScaler, a function, a ``CallScale``, or None for 1."""
        check_scale(scale)
        for attach in self._attached():
            attach.scale = scale

    def _attached(self) -> list[AttachRule]:
        return [child for rules in self._containers() for child in rules.children() if isinstance(child, AttachRule)]

    def rng_state(self) -> dict[str, Any]:
        key = self._key()
        streams = {} if key is None else dict(zip(key.names, key.streams.tolist(), strict=True))
        alike, call = key is not None and key.alike, 0 if key is None else key.call()
        return written_state(MODULE_STATE, alike, self.saved_states(), self.clock_call(), call=call, streams=streams)

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        key = self._key()
        names = () if key is None else key.names
        checked = checked_state(state, MODULE_STATE)
        streams: Mapping[str, int] = checked["streams"]
        missing, foreign = [name for name in names if name not in streams], [name for name in streams if name not in names]
        if missing or foreign:
            pairs = (("only the state has", foreign), ("the state lacks", missing))
            differences = [f"{whose}: {listed(unmatched, 3)}" for whose, unmatched in pairs if unmatched]
            raise RegularizerError(
                f"the state belongs to another module, with other streams of noise; {'; '.join(differences)}. "
                "Build the module as for the run that saved it: the same regularizers by the same names, at the same sites."
            )
        clock = clock_of_state(checked, self._clock() is not None)
        self.load_states(checked)
        self.seek_clock(clock)
        if key is None:
            return
        key.streams = key.streams.new_tensor([streams[name] for name in names])
        key.alike = checked["ranks"] == "same" and key.position is None
        key.seek(checked["call"])

    def asked(self) -> Asked:
        return record_of(self.module).asked

    def reset_state(self, names: Sequence[str]) -> None:
        states = self._states()
        for name in names:
            if name not in states:
                raise NoMatchError(f"no regularizer that keeps a state is named {name!r}. Names: {', '.join(states) or 'none'}.")
        parameters = dict(rewritten(self.module).named_parameters(remove_duplicate=False)) if states else {}
        for name in names or states:
            states[name].reset(parameters)

    def _states(self) -> dict[str, State]:
        """Return the states that regularizers keep from call to call, by regularizer name."""
        return {state.name: state for state in states_in(self._containers()[0])}

    def _saved(self) -> dict[str, State]:
        """Return the states that ``rng_state`` saves. The others consist of parameters alone, and are in ``state_dict``."""
        return {name: state for name, state in self._states().items() if state.is_saved}

    def saved_states(self) -> dict[str, Saved]:
        """Return copies of the tensors that regularizers keep from call to call, by regularizer name, as ``rng_state`` has them."""
        return {name: state.saved() for name, state in self._saved().items()}

    def load_states(self, checked: Mapping[str, Any]) -> None:
        """Load the states of regularizers from a state of the noise. If one does not fit, raise RegularizerError and change nothing."""
        states, saved = self._saved(), checked.get("state", {})
        if other := sorted(states.keys() ^ saved.keys()):
            raise RegularizerError(
                f"the state belongs to another module: only the state or only the module has tensors of {listed(other, 3)}. Build the "
                "module as for the run that saved the state."
            )
        for name, state in states.items():
            state.check(saved[name])
        for name, state in states.items():
            state.load(saved[name])

    def set_ranks(self, ranks: Any) -> None:
        key, mesh = self._drawing_key(), ranks if isinstance(ranks, RankMesh) else None
        found = {} if mesh is None else {rule: cuts for root in self._roots() for rule, cuts in mesh.cuts(root).items()}
        for rules in self._containers():
            for child in rules.children():
                if isinstance(child, Drawing):
                    child.cuts = found.get(child, ())
        key.alike = ranks == "same"
        key.position, key.meshed, key.differing = (None, (), ()) if mesh is None else (mesh.position, mesh.tensor, mesh.differing)

    def _roots(self) -> Sequence[nn.Module]:
        """Return the rewritten modules whose graphs run."""
        return [rewritten(self.module)]

    @contextmanager
    def frozen_noise(self) -> Iterator[None]:
        key = self._key()
        if key is None or key.frozen_call is None:
            self._warn_unfrozen(self._containers()[0] if key is None else key)
        block = object()
        with Changes() as changes, changes:
            for counter in self._counters():
                changes.later(partial(counter.release, block))
                counter.freeze(block)
            yield

    def noise_on(self) -> AbstractContextManager[None]:
        self._drawing_key()
        return self._noise_switched(on=True)

    def noise_off(self) -> AbstractContextManager[None]:
        return self._noise_switched(on=False)

    def penalties_off(self) -> AbstractContextManager[None]:
        switches: NoiseSwitches = vars(self._containers()[0]).setdefault("penalty_switches", NoiseSwitches())

        def switch(state: bool | None) -> None:
            for child in (child for rules in self._containers() for child in rules.children() if isinstance(child, RuntimeModule)):
                child.is_off = state is False

        return switches.block(False, switch)

    def _noise_switched(self, on: bool) -> AbstractContextManager[None]:
        switches: NoiseSwitches = vars(self._containers()[0]).setdefault("noise_switches", NoiseSwitches())

        def switch(state: bool | None) -> None:
            for rules in self._containers():
                for child in rules.children():
                    if isinstance(child, (Drawing, Counter)):
                        child.forced = state is True
                    if isinstance(child, RuntimeModule):
                        child.silenced = state is False
            for counter in self._counters():
                counter.settle()

        return switches.block(on, switch)

    def require_draws(self) -> None:
        self._drawing_key()

    def _key(self) -> KeyRule | None:
        return key_of(rules_of(self.module))

    def _clock(self) -> ClockRule | None:
        return clock_of(self._containers()[0])

    def _counters(self) -> list[Counter]:
        """Return the key rule and the clock, if there are any."""
        return [counter for counter in (self._key(), self._clock()) if counter is not None]

    def clock_call(self) -> int | None:
        """Return the number of the next call in train mode; None if no strength has a schedule."""
        clock = self._clock()
        return None if clock is None else clock.call()

    def seek_clock(self, call: int | None) -> None:
        """Make ``call`` the next call that the clock counts. Do nothing if ``call`` is None, as for a state saved without schedules."""
        clock = self._clock()
        if clock is not None and call is not None:
            clock.seek(call)

    def _drawing_key(self) -> KeyRule:
        key = self._key()
        if key is None:
            raise no_noise()
        return key

    def _warn_unfrozen(self, key: nn.Module) -> None:
        """Warn, once for each module, of the native dropouts that draw from torch's generator."""
        if key not in _unfrozen:  # native_draws searches all graphs, so it is called once
            _unfrozen[key] = native_draws(self.module)
        inner = rewritten(self.module) if _unfrozen[key] else None
        names = [
            dropout.site.name
            for dropout in _unfrozen[key]
            if dropout.when == "always" or (inner is not None and inner.get_submodule(dropout.path).training)
        ]
        if names:
            _unfrozen[key] = ()
            log.warning(
                "frozen_noise does not freeze %s: torch draws it, not graphreg. With own_dropout='seeded', graphreg draws what it can.",
                listed(names, 3),
            )


def checked_strength(regularizer: Regularizer, value: float) -> float:
    """Return a new strength as a float or a schedule; raise RegularizerError if it is out of the regularizer's range, or no number."""
    checked = dataclasses.replace(regularizer, weight=value).weight
    if isinstance(checked, ByDepth):
        raise RegularizerError(
            f"set_strength takes a number or a dict of selectors to numbers, not {value!r}: only a plan can have a strength by depth. To "
            "change it, scale the strengths in graphreg.site_strengths(module), and set them by site."
        )
    return checked


def one_for_all(name: str, regularizer: Regularizer) -> RegularizerError:
    """Return the error for strengths by site of a regularizer whose formula takes all sites at once."""
    return RegularizerError(
        f"{name} takes all its sites at once ({type(regularizer).__name__}), so they have one strength. Give a number."
    )


def no_noise() -> GraphRegError:
    """Return the error for a module that draws nothing."""
    return GraphRegError(
        "this module draws no noise: it has no splice, so there is no noise to keep on, to sample, or to share between ranks. "
        "Regularize with dropout or noise first, e.g. hidden_dropout=0.1, or own_dropout='seeded'."
    )
