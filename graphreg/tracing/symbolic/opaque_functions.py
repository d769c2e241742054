"""Opaque functions: functions of the model's code that a trace records as one call each, because it cannot see into them.

The functions of einops always are. Any other becomes one when the trace fails in it; a module
becomes opaque only if that does not help. The graph calls the function itself, so what it draws, and
under which grad mode it computes, stays as it is.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from graphreg.torch_internals.interpreter import CalledInstead
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.frames import home_of, is_foreign
from graphreg.tracing.side_effects.opaque_modules import function_of, key_of
from graphreg.tracing.side_effects.reachable_state import reachable_code
from graphreg.tracing.side_effects.state_places import content

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


def functions_of_einops() -> list[types.FunctionType]:
    """Return the functions of einops, if it is imported."""
    einops = sys.modules.get("einops")
    return [vars(einops)[name] for name in _EINOPS if name in vars(einops)] if einops is not None else []


def record_function(changes: Changes, function: types.FunctionType, record: Callable[..., Any], is_traced: Callable[[Any], bool]) -> None:
    """Record each call of a function with traced values as one call, until the block of ``changes`` ends.

    Args:
        changes: Takes the change back.
        function: The function.
        record: Records a call of a function: it gets the function and the arguments.
        is_traced: Whether a call with these arguments is to be recorded; every other call runs as ever.
    """

    def instead(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return record(function, *args, **kwargs) if is_traced((args, kwargs)) else original(*args, **kwargs)

        return call

    calls = CalledInstead(function, instead)
    changes.later(calls.revert)
    calls.patch()


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
    package, found = _functions_behind_modules(error)
    others = [function for function in found if function.__module__.partition(".")[0] != package]
    own = [function for function in reversed(found) if function.__module__.partition(".")[0] == package]
    for function in (*others, *own):
        key = key_of(function)
        if function_of(key) is function and key not in opaque and (kind, key) not in tried.functions and _reaches_no_tensor(function):
            tried.functions.add((kind, key))
            return key
    return None


def can_be_recorded(arguments: Iterable[Any], is_plain: Callable[[Any], bool]) -> bool:
    """Return whether a graph can hold the arguments of a call: values of it, plain data, tuples, and functions that can be imported.

    A list or dict is none: the function may change it, and the caller goes on with it.
    """
    for each in arguments:
        is_function = isinstance(each, types.FunctionType) and function_of(key_of(each)) is each
        if not (is_plain(each) or is_function or (type(each) is tuple and can_be_recorded(each, is_plain))):
            return False
    return True


def _functions_behind_modules(error: BaseException) -> tuple[str, list[types.FunctionType]]:
    """Return the package of the last method of a module through which an error came, and the functions behind that, outermost first.

    Only functions that their Python module has under their own name count, and no generators.
    """
    frames, trace = list[types.FrameType](), error.__traceback__
    while trace is not None:
        if not is_foreign(trace.tb_frame):
            frames.append(trace.tb_frame)
        trace = trace.tb_next

    last, functions = -1, list[types.FunctionType]()
    for i, frame in enumerate(frames):
        code = frame.f_code
        if code.co_argcount and issubclass(type(frame.f_locals.get(code.co_varnames[0])), nn.Module):
            last = i
    for caller, frame in itertools.pairwise(frames[last:] if last >= 0 else []):
        generates = frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
        function = None if generates else _function_in(frame, caller)
        if function is not None and function not in functions:
            functions.append(function)
    return home_of(frames[last]).partition(".")[0] if last >= 0 else "", functions


def _function_in(frame: types.FrameType, caller: types.FrameType) -> types.FunctionType | None:
    """Return the function whose code runs in a frame; None if no global variable of its module, or of its caller's, has it."""
    code, function = frame.f_code, frame.f_globals.get(frame.f_code.co_name)
    # of a decorated function, what stands under its name runs its code, too
    if isinstance(function, types.FunctionType) and getattr(inspect.unwrap(function), "__code__", None) is code:
        return function
    if not code.co_freevars:
        return None

    # the code of a decorator, which all functions that it decorates share: their closures tell them apart
    def runs_here(value: object) -> bool:
        if not isinstance(value, types.FunctionType) or value.__code__ is not code:
            return False
        variables = zip(code.co_freevars, value.__closure__ or (), strict=True)
        return all(content(cell) is frame.f_locals.get(name) for name, cell in variables)

    return next((each for space in (caller.f_globals, frame.f_globals) for each in space.values() if runs_here(each)), None)


def _reaches_no_tensor(function: types.FunctionType) -> bool:
    """Return whether a function reaches no module and no tensor through global variables and closures: the graph would not show them."""
    return not any(issubclass(type(value), (Tensor, nn.Module)) for value in reachable_code((), [function]).values())
