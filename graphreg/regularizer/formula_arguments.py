"""Which arguments the methods of a regularizer's class may have. The engine supplies each by its name; ``base.py`` describes them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from graphreg.errors import RegularizerError, warn
from graphreg.regularizer.model_inputs import input_options
from graphreg.regularizer.sequences import check_call_arguments

SUPPLIED = {"values": ("z", "values", "weight"), "parameters": ("w", "values", "weight")}
OF_SPLICES = {"values": ("noise", "units", "state", "lengths", "module_input", "previous"), "parameters": ("noise", "state")}
OF_PENALTIES = {"values": ("steps", "lengths", "units", "counted", "vjp", "state"), "parameters": ("state",)}
# the arguments that a method ``in_eval`` may have
IN_EVAL = ("z", "weight", "previous", "module_input", "units", "state")
IN_PENALTY = ("state", "weight")  # the arguments that a method ``penalty`` of a splice may have
# two names for one argument of a formula: "pull" is its name in graphreg 0.1
VJP_NAMES = ("vjp", "pull")


def formula_arguments(cls: Any, is_splice: bool, options: Sequence[str], makes_state: bool) -> tuple[str, ...]:
    """Return the names of the arguments of ``__call__``; raise RegularizerError for those that the engine does not supply.

    Args:
        cls: The class.
        is_splice: Whether it is a splice.
        options: The names of its options.
        makes_state: Whether it has ``init_state``.
    """
    names = _names(cls.__call__)
    supplied = SUPPLIED[cls.on] + (OF_SPLICES if is_splice else OF_PENALTIES)[cls.on]
    vjp = "pull" if "pull" in names else "vjp"
    allowed = {*supplied, *input_options(cls), *((vjp,) if "vjp" in supplied else ())}

    if unknown := [name for name in names if name not in allowed]:
        hint = f" For an input of the model, declare an option of this name: {unknown[0]}: ModelInput = None."
        raise RegularizerError(
            f"{cls.__name__}.__call__ asks for {', '.join(unknown)}; the engine supplies {', '.join(supplied)} on {cls.on}.{hint}"
        )
    if vjp == "pull":
        warn(f"{cls.__name__}.__call__ asks for pull, which is called vjp now: rename the argument.", DeprecationWarning)

    # Arguments that do not go together.
    if vjp in names and (both := {"z", "values", "steps", "units"}.intersection(names)):
        raise RegularizerError(f"{cls.__name__}.__call__ asks for {vjp} and for {min(both)}; {vjp}.sites has the values. Leave one out.")
    if "state" in names and cls.on == "values" and (all_at_once := {"values", *VJP_NAMES}.intersection(names)):
        raise RegularizerError(
            f"{cls.__name__}.__call__ asks for state and for {min(all_at_once)}. A state belongs to one site, but {min(all_at_once)} has "
            "the values of all sites. Take z, units or steps."
        )
    if ("state" in names) != makes_state:
        raise RegularizerError(f"{cls.__name__}: __call__ takes state if and only if the class has init_state, which makes the state.")
    if is_splice and "units" in names and "share_axes" in options:
        raise RegularizerError(f"{cls.__name__}: share_axes numbers the axes of z, and __call__ takes units, whose axes lie otherwise.")

    check_call_arguments(cls.__name__, names, options, is_splice)
    return names


def in_eval_arguments(cls: Any) -> tuple[str, ...]:
    """Return the names of the arguments of a splice's ``in_eval``; raise RegularizerError for those that the engine does not supply."""
    names = _names(cls.in_eval)
    value = {"z", "units"}.intersection(names)
    if len(value) != 1 or (unknown := [name for name in names if name not in (*IN_EVAL, *input_options(cls))]):
        asks = f"asks for {', '.join(unknown)}" if len(value) == 1 else f"takes {'z and units' if value else 'neither z nor units'}"
        raise RegularizerError(f"{cls.__name__}.in_eval {asks}; the engine supplies {', '.join(IN_EVAL)}, and draws nothing in eval mode.")
    return names


def penalty_arguments(cls: Any) -> tuple[str, ...]:
    """Return the names of the arguments of a splice's ``penalty``; raise RegularizerError for those that the engine does not supply."""
    names = _names(cls.penalty)
    if "state" not in names or (unknown := [name for name in names if name not in IN_PENALTY]):
        asks = f"asks for {', '.join(unknown)}" if "state" in names else "does not take state"
        raise RegularizerError(f"{cls.__name__}.penalty {asks}; the engine supplies {', '.join(IN_PENALTY)}.")
    return names


def _names(method: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:]
