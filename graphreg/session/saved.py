"""The saved state of the noise: a plain dict, which is checked before it is loaded.

The state of a rewritten module has the number of the next call, and a 64-bit number for each stream. A model that is regularized in place
and a backend make streams while they run. So the state of such a model has the seeds instead of the streams, and the state of a backend
has the seed, and a count of calls for each stream. If a strength has a schedule, the state also has the count of calls in train mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphreg.errors import RegularizerError, listed

STATE_VERSION = 1  # the version of a saved dict that has none of the keys in ``_MORE``
WITH_MORE = 2  # the version of a saved dict with such keys
_MORE = ("state", "clock")  # the tensors that regularizers keep, and the count of calls in train mode


@dataclass(frozen=True)
class StateForm:
    """Describes the saved states of one kind of object: of rewritten modules, of models in place, or of backends.

    Attributes:
        owner: The kind of object, for errors.
        fields: The keys of the dict, without ``version``.
        returned_by: The call that returns such a state, for errors.
    """

    owner: str
    fields: tuple[str, ...]
    returned_by: str


MODULE_STATE = StateForm("a rewritten module", ("call", "ranks", "streams"), "graphreg.rng_state")
IN_PLACE_STATE = StateForm("a model that is regularized in place", ("call", "ranks", "seeds"), "graphreg.rng_state")
BACKEND_STATE = StateForm("a backend's noise", ("seed", "ranks", "calls"), "graphreg.rng_state(backend)")


def is_int64(value: object) -> bool:
    """Whether a value is an int, not a bool, that fits into int64."""
    return _is_integer(value) and -(1 << 63) <= value < 1 << 63  # type: ignore[operator]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_integer(value) and value >= 0  # type: ignore[operator]


def _is_dict_of(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Mapping) and all(isinstance(name, str) and is_value(each) for name, each in value.items())


_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "call": (lambda value: is_int64(value) and _is_count(value), "not a whole number of 0 or more (below 2**63)"),
    "seed": (_is_integer, "not a whole number"),
    "ranks": (("differ", "same").__contains__, "not 'differ' or 'same'"),
    "streams": (_is_dict_of(is_int64), "not a dict of names to 64-bit numbers"),
    "seeds": (_is_dict_of(_is_integer), "not a dict of names to whole numbers"),
    "clock": (lambda value: is_int64(value) and _is_count(value), "not a whole number of 0 or more (below 2**63)"),
    "calls": (_is_dict_of(_is_count), "not a dict of streams to whole numbers of 0 or more"),
}


def written_state(
    form: StateForm, alike: bool, state: Mapping[str, Any] | None = None, clock: int | None = None, **fields: Any
) -> dict[str, Any]:
    """Make the dict that a user saves.

    Args:
        form: The form of the dict.
        alike: Whether all ranks draw the same masks.
        state: The tensors that regularizers keep from call to call, by regularizer name, site name and tensor name.
        clock: The number of the next call in train mode; None if no strength has a schedule.
        fields: The other entries that ``form.fields`` names, such as ``call`` and ``streams``.
    """
    fields["ranks"] = "same" if alike else "differ"
    more = ({"state": state} if state else {}) | ({} if clock is None else {"clock": clock})
    return {"version": WITH_MORE if more else STATE_VERSION, **{name: fields[name] for name in form.fields}, **more}


def checked_state(state: object, form: StateForm) -> Mapping[str, Any]:
    """Return ``state`` if it has the given form; raise RegularizerError for anything that ``written_state`` does not make."""
    if not isinstance(state, Mapping):
        what = "noise" if form is MODULE_STATE else form.owner
        raise RegularizerError(f"{type(state).__name__} is no state of {what}. Give the dict that {form.returned_by} returned.")
    if state.get("version") not in (STATE_VERSION, WITH_MORE):
        version = f"version {state['version']!r}" if "version" in state else "no version"
        raise RegularizerError(
            f"the state has {version}; this graphreg reads versions {STATE_VERSION} and {WITH_MORE}. Give the dict that "
            f"{form.returned_by} returned, or read it with the graphreg that saved it."
        )
    # Say whose state it is, before any of its fields is said to be missing.
    for other in (MODULE_STATE, BACKEND_STATE, IN_PLACE_STATE):
        if other is not form and state.keys() >= {*other.fields}:
            raise RegularizerError(
                f"the state of {other.owner} is no state of {form.owner}. Give the dict that {form.returned_by} returned."
            )
    more = _MORE if state["version"] == WITH_MORE else ()
    for name in (*form.fields, *(["clock"] if "clock" in more and "clock" in state else [])):
        is_right, wrong = _FIELDS[name]
        if not is_right(state.get(name)):
            raise _damaged(f"{name}={state.get(name)!r}, {wrong}")
    is_state = _is_dict_of(_is_dict_of(_is_dict_of(lambda value: isinstance(value, Tensor))))
    # A state of this version has one of the two, or both.
    if more and ("state" in state or "clock" not in state) and not is_state(state.get("state")):
        raise _damaged("something under 'state' that is not a dict of tensors by regularizer and site")
    if foreign := [str(name) for name in state if name not in ("version", *form.fields, *more)]:
        raise _damaged(f"{listed(foreign, 3)}, which no state has")
    return state


def _damaged(what: str) -> RegularizerError:
    return RegularizerError(f"the state is damaged: it has {what}. Load the state of an older checkpoint, or start anew.")


def clock_of_state(checked: Mapping[str, Any], has_clock: bool) -> int | None:
    """Return the number of the next call in train mode that a checked state has; None if it has none.

    A state that was saved when no strength had a schedule has none; the clock then stays where it is.

    Raises:
        RegularizerError: The state has such a number, but no strength of the module has a schedule.
    """
    clock: int | None = checked.get("clock")
    if clock is not None and not has_clock:
        raise RegularizerError(
            "the state belongs to another module: it has the clock of schedules, and no strength has a schedule here. Build the module as "
            "for the run that saved it."
        )
    return clock
