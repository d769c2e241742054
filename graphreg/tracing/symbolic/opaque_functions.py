"""Opaque functions: functions of the model's code that a trace records as one call each, because it cannot see into them.

The functions of einops always are. Any other becomes one when the trace fails in it; a module
becomes opaque only if that does not help. The graph calls the function itself, so what it draws, and
under which grad mode it computes, stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from graphreg.torch_internals.interpreter import called_instead
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.frames import functions_behind_modules
from graphreg.tracing.side_effects.opaque_modules import function_of, key_of
from graphreg.tracing.side_effects.reachable_state import reachable_code

# Their code takes patterns apart, and asks for sizes and the type of a tensor. ``repeat`` of a
# parameter could be traced into, since its sizes are known, but then the names of values would
# depend on what a pattern is applied to.
_EINOPS = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack", "parse_shape")


@dataclass
class Tried:
    """What was tried in the traces of one model.

    Attributes:
        functions: A module's class and the key of a function that was made opaque for it.
        error: The first error of the model's own forward for which a function was made opaque.
    """

    functions: set[tuple[type, str]] = field(default_factory=set)
    error: Exception | None = None


def functions_of_einops() -> list[FunctionType]:
    """Return the functions of einops, if it is imported."""
    einops = sys.modules.get("einops")
    return [vars(einops)[name] for name in _EINOPS if name in vars(einops)] if einops is not None else []


def record_function(changes: Changes, function: FunctionType, record: Callable[..., Any], is_traced: Callable[[Any], bool]) -> None:
    """Record each call of a function with traced values as one call, until the block of ``changes`` ends.

    Args:
        changes: Takes the change back.
        function: The function.
        record: Records a call of a function: it gets the function and the arguments.
        is_traced: Whether a call with these arguments is to be recorded; every other call runs as ever.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        return record(function, *args, **kwargs) if is_traced((args, kwargs)) else original(*args, **kwargs)

    code, original = called_instead(function, called)
    changes.later(partial(setattr, function, "__code__", function.__code__))
    function.__code__ = code


def function_to_blame(error: BaseException, kind: type, opaque: Mapping[str, str], tried: Tried) -> str | None:
    """Return the key of a function in which a trace failed and that may become opaque; None if there is none, or none is left to try.

    Of the functions behind the last method of a module, the outermost one of another package comes
    first, since it is what the model's author called. Then come those of the module's own package,
    the innermost first, so that as little as possible becomes opaque.

    Args:
        error: The error that ended the trace.
        kind: The class of the module whose forward failed.
        opaque: What is opaque already.
        tried: What was tried already. The function is added.
    """
    package, found = functions_behind_modules(error)
    others = [function for function in found if function.__module__.partition(".")[0] != package]
    own = [function for function in reversed(found) if function.__module__.partition(".")[0] == package]
    for function in (*others, *own):
        key = key_of(function)
        if function_of(key) is function and key not in opaque and (kind, key) not in tried.functions and _reaches_no_tensor(function):
            tried.functions.add((kind, key))
            return key
    return None


def can_be_recorded(arguments: Iterable[Any], is_plain: Callable[[Any], bool]) -> bool:
    """Return whether a graph can hold the arguments of a call: plain data, and functions that can be imported, beside values of it."""
    return all(is_plain(each) or (isinstance(each, FunctionType) and function_of(key_of(each)) is each) for each in arguments)


def _reaches_no_tensor(function: FunctionType) -> bool:
    """Return whether a function reaches no module and no tensor through global variables and closures: the graph would not show them."""
    return not any(issubclass(type(value), (Tensor, nn.Module)) for value in reachable_code((), [function]).values())
