"""The knobs of a rewritten module: strengths, the state of its noise, noise in eval mode. None of them recompiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, near_sentence
from graphreg.inside import rules_of
from graphreg.rules import KeyRule, SpliceRule

STATE_VERSION = 1


def strengths(module: nn.Module) -> dict[str, float]:
    """Weights and rates by regularizer name."""
    return {name: float(value) for name, value in rules_of(module).strengths.items()}


def set_strength(module: nn.Module, name: str, value: float) -> None:
    """Change a weight or rate; nothing is compiled again.

    Raises NoMatchError for an unknown name, RegularizerError for a value out of the regularizer's range.
    """
    rules = rules_of(module)
    plan = rules.about[0]
    if name not in plan.regularizers:  # also for what is no string
        known = ", ".join(plan.regularizers) or "none"
        raise NoMatchError(f"no regularizer is named {name!r}.{near_sentence(str(name), plan.regularizers)} Names: {known}.")
    checked = dataclasses.replace(plan.regularizers[name], weight=value)
    rules.strengths[name].fill_(checked.weight)


def rng_state(module: nn.Module) -> dict[str, Any]:
    """Where the noise stands: a plain dict to save beside a checkpoint. Raises GraphRegError without a splice."""
    key = _key(module)
    streams = dict(zip(key.names, key.streams.tolist(), strict=True))
    return {"version": STATE_VERSION, "call": int(key.step), "streams": streams}


def set_rng_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Resume the noise where ``rng_state`` found it: the next call draws what the next call would have drawn then."""
    key = _key(module)
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise RegularizerError(f"this is no state of graphreg's noise, version {STATE_VERSION}. Give what graphreg.rng_state returned.")
    if list(state["streams"]) != list(key.names):
        raise RegularizerError(
            f"the state belongs to another module: it has {len(state['streams'])} streams ({', '.join(list(state['streams'])[:3])}), "
            f"this one {len(key.names)} ({', '.join(key.names[:3])}). Regularize the same sites in the same order first."
        )
    key.streams = key.streams.new_tensor(list(state["streams"].values()))
    key.seek(state["call"])


@contextmanager
def noise_on(module: nn.Module) -> Iterator[None]:
    """Keep every splice acting, whatever the mode: ``with graphreg.noise_on(module): module.eval()(x)``."""
    rules = [leaf for leaf in rules_of(module).children() if isinstance(leaf, (SpliceRule, KeyRule))]
    before = [leaf.forced for leaf in rules]
    try:
        for leaf in rules:
            leaf.forced = True
        yield
    finally:
        for leaf, forced in zip(rules, before, strict=True):
            leaf.forced = forced


def _key(module: nn.Module) -> KeyRule:
    key = getattr(rules_of(module), "key", None)
    if not isinstance(key, KeyRule):
        raise GraphRegError("this module draws no noise: it has no splice, so there is no state of noise.")
    return key
