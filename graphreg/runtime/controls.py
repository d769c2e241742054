"""Functions that control a rewritten module, or a backend, after it was made: strengths, noise state, frozen noise, noise in eval mode.

Setting a strength, restoring a state and freezing the noise recompile nothing; ``noise_on`` and ``set_ranks`` recompile once for each
setting, never for each call.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, near_sentence, shown
from graphreg.ir import Own
from graphreg.runtime.handle import Knobs, knobs_of, own_draws, rewritten, rules_of
from graphreg.runtime.leaf import Drawing, KeyRule
from graphreg.torch_internals import Changes

STATE_VERSION = 1
STATE = {"version", "call", "ranks", "streams"}  # the keys of a noise state
Ranks = Literal["differ", "same"]
log = logging.getLogger("graphreg")
_unheld: WeakKeyDictionary[nn.Module, tuple[Own, ...]] = WeakKeyDictionary()  # by KeyRule or Rules: what frozen_noise is still to warn of
Regulated = nn.Module | Knobs | Callable[..., Any]  # a rewritten module, a backend, or what torch.compile made with one


def strengths(module: Regulated) -> dict[str, float]:
    """Return the present strengths (weights and rates) by regularizer name."""
    if (knobs := knobs_of(module)) is not None:
        return knobs.strengths()
    rules = rules_of(module)
    return {name: rules.value(name) for name in rules.strengths}


def set_strength(module: Regulated, name: str, value: float) -> None:
    """Change a regularizer's strength (its weight or rate); nothing is recompiled.

    Args:
        module: A rewritten module, also compiled or wrapped, or a backend.
        name: The regularizer's name, one of ``strengths(module)``.
        value: The new strength.

    Raises:
        NoMatchError: No regularizer has this name.
        RegularizerError: ``value`` is out of the regularizer's range.
    """
    if (knobs := knobs_of(module)) is not None:
        knobs.set_strength(name, value)
        return
    rules = rules_of(module)
    plan = rules.about[0]
    if name not in plan.regularizers:  # true also of what is not a string
        known = ", ".join(plan.regularizers) or "none"
        moved = any(name in (edit.own.site.name, "own_dropout") for edit in plan.own)
        hint = " The rate of a native dropout is set once, by regularize(..., own_dropout={selector: rate})." if moved else ""
        raise NoMatchError(f"no regularizer is named {name!r}.{near_sentence(str(name), plan.regularizers)} Names: {known}.{hint}")
    checked = dataclasses.replace(plan.regularizers[name], weight=value)
    rules.set_value(name, checked.weight)


def rng_state(module: Regulated) -> dict[str, Any]:
    """Return the state of the noise: a plain dict to save beside a checkpoint, the same on every rank.

    It has graphreg's streams and the number of their next call; all calls in a block of ``frozen_noise`` count as one. It has no
    strengths: a run that changes them also saves ``strengths(module)``. A native dropout that was left alone (``own_dropout="keep"``)
    draws from torch's generator, whose state is ``torch.get_rng_state()``. A module that draws nothing has a state without streams.
    """
    if (knobs := knobs_of(module)) is not None:
        return knobs.rng_state()
    key = _key_of(module)
    if key is None:
        return {"version": STATE_VERSION, "call": 0, "ranks": "differ", "streams": {}}
    streams = dict(zip(key.names, key.streams.tolist(), strict=True))
    return {"version": STATE_VERSION, "call": key.call(), "ranks": "same" if key.alike else "differ", "streams": streams}


def set_rng_state(module: Regulated, state: dict[str, Any]) -> None:
    """Resume the noise at a saved state: the next call draws the masks that would have come next when ``rng_state`` was called.

    Streams are matched by name and replace the module's own, so the seed is that of the state from here on.

    Args:
        module: A rewritten module, also compiled or wrapped, or a backend.
        state: What ``rng_state`` returned.

    Raises:
        RegularizerError: The state is damaged, or of another version or another module. The noise then stays as it was.
    """
    if (knobs := knobs_of(module)) is not None:
        knobs.set_rng_state(state)
        return
    key = _key_of(module)
    streams = _checked_streams(state, () if key is None else key.names)
    if key is None:
        return
    key.streams = key.streams.new_tensor(streams)
    key.alike = state["ranks"] == "same"
    key.seek(state["call"])


def set_ranks(module: Regulated, ranks: Ranks) -> None:
    """Choose whether the ranks of torch.distributed draw different masks (``"differ"``, the default) or the ``"same"``.

    The same masks are right where ranks share one example, as in tensor parallelism.

    Args:
        module: A rewritten module, also compiled or wrapped, or a backend.
        ranks: ``"differ"`` or ``"same"``.

    Raises:
        RegularizerError: ``ranks`` is another word.
        GraphRegError: The module has no splice.
    """
    knobs = knobs_of(module)
    key = _key(module) if knobs is None else None
    if ranks not in ("differ", "same"):
        raise RegularizerError(f"ranks={shown(ranks)} is not allowed; give 'differ' (each rank draws its own masks) or 'same'.")
    if key is None:
        assert knobs is not None
        knobs.set_ranks(ranks)
        return
    key.alike = ranks == "same"


@contextmanager
def frozen_noise(module: Regulated) -> Iterator[None]:
    """Draw the same masks in every call inside the block, for line searches, gradient checks or sharpness-aware steps.

    The block counts as one call, or as none if nothing was drawn in it. A nested block is part of the outer one. Nothing is
    recompiled. A native dropout left to torch (``own_dropout="keep"``) is not held; the logger ``graphreg`` warns of it, once a module.
    A module that draws nothing is not affected.

    Each thread has blocks of its own, which end when that thread leaves them; in eager they have masks of their own. A thread without
    a block draws the held masks for as long as any thread holds the noise.
    """
    if (knobs := knobs_of(module)) is not None:
        with knobs.frozen_noise():
            yield
        return
    key = _key_of(module)
    if key is None or key.held is None:
        _tell_unheld(module, rules_of(module) if key is None else key)
    if key is None:
        yield
        return
    block = object()
    with Changes() as changes, changes:
        changes.later(partial(key.release, block))
        key.hold(block)
        yield


def _tell_unheld(module: Any, key: nn.Module) -> None:
    if key not in _unheld:  # once: it looks at the whole graph
        _unheld[key] = own_draws(module)
    inner = rewritten(module) if _unheld[key] else module
    names = [own.site.name for own in _unheld[key] if own.when == "always" or inner.get_submodule(own.path).training]
    if names:
        _unheld[key] = ()
        log.warning(
            "frozen_noise does not hold %s: torch draws it, not graphreg. own_dropout='seeded' moves what can be moved.", _few(names)
        )


@contextmanager
def noise_on(module: Regulated) -> Iterator[None]:
    """Keep every splice acting whatever the mode: ``with graphreg.noise_on(module): module.eval()(x)``.

    Blocks of several threads may overlap: the noise is on until the last of them ends. A native dropout left to torch
    (``own_dropout="keep"``) goes on following its module's mode. Raises GraphRegError for a module without a splice.
    """
    if (knobs := knobs_of(module)) is not None:
        with knobs.noise_on():
            yield
        return
    key, block = _key(module), object()
    leaves = [leaf for leaf in rules_of(module).children() if isinstance(leaf, (Drawing, KeyRule))]

    def back() -> None:
        key.forcing.pop(block, None)
        for leaf in leaves:
            leaf.forced = bool(key.forcing)
        key.settle()

    with Changes() as changes, changes:
        changes.later(back)
        key.forcing[block] = None
        for leaf in leaves:
            leaf.forced = True
        yield


def require_draws(module: Regulated) -> None:
    """Raise GraphRegError for a module that draws no noise."""
    if knobs_of(module) is None:
        _key(module)


def _key_of(module: Any) -> KeyRule | None:
    key = getattr(rules_of(module), "key", None)
    return key if isinstance(key, KeyRule) else None


def _key(module: Any) -> KeyRule:
    key = _key_of(module)
    if key is None:
        raise GraphRegError(
            "this module draws no noise: it has no splice, so there is no noise to keep on or to sample, and ranks have none to share. "
            "Regularize with dropout or noise first, e.g. hidden_dropout=0.1, or own_dropout='seeded'."
        )
    return key


def _checked_streams(state: object, names: Sequence[str]) -> list[int]:
    """Return the streams of a state in the module's order; raises RegularizerError for what ``rng_state`` never returned."""
    if not isinstance(state, Mapping):
        raise RegularizerError(f"{type(state).__name__} is no state of noise. Give the dict that graphreg.rng_state returned.")
    if state.get("version") != STATE_VERSION:
        given = f"version {state['version']!r}" if "version" in state else "no version"
        raise RegularizerError(
            f"the state has {given}; this graphreg reads version {STATE_VERSION}. Give the dict that graphreg.rng_state returned, "
            "or read it with the graphreg that saved it."
        )
    if "calls" in state and "seed" in state:
        raise RegularizerError(
            "the state of a backend's noise is no state of a rewritten module. Give the dict that rng_state(module) gave."
        )
    call, streams = state.get("call"), state.get("streams")
    damaged = (
        f"call={call!r}, not a whole number of 0 or more (below 2**63)" if not _is_word(call) or call < 0  # type: ignore[operator]
        else f"ranks={state.get('ranks')!r}, not 'differ' or 'same'" if state.get("ranks") not in ("differ", "same")
        else f"streams={streams!r}, not a dict of names to 64-bit numbers" if not _are_streams(streams)
        else f"{_few([str(key) for key in state if key not in STATE])}, which no state has" if not STATE.issuperset(state)
        else None
    )  # fmt: skip
    if damaged:
        raise RegularizerError(f"the state is damaged: it says {damaged}. Take an older checkpoint's, or start anew.")
    assert isinstance(streams, Mapping)
    missing, foreign = [name for name in names if name not in streams], [name for name in streams if name not in names]
    if missing or foreign:
        parts = [f"{what}: {_few(found)}" for what, found in (("the state alone has", foreign), ("it lacks", missing)) if found]
        raise RegularizerError(
            f"the state belongs to another module, of other streams of noise; {'; '.join(parts)}. "
            "Build the module as for the run that saved it: the same regularizers by the same names, at the same sites."
        )
    return [streams[name] for name in names]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_word(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _are_streams(streams: object) -> bool:
    return isinstance(streams, Mapping) and all(isinstance(name, str) and _is_word(word) for name, word in streams.items())
