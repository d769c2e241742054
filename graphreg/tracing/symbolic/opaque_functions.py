"""Opaque functions: functions of the model's code that a trace records as one call each, because it cannot see into them.

The functions of einops always are. Any other becomes one when the trace fails in it; a module
becomes opaque only if that does not help. The graph calls the function itself, so what it draws, and
under which grad mode it computes, stays as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FrameType, FunctionType
from typing import Any

from torch import Tensor, nn

from graphreg.torch_internals.interpreter import called_instead
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.frames import home_of, is_foreign
from graphreg.tracing.side_effects.opaque_modules import function_of, key_of
from graphreg.tracing.side_effects.reachable_state import reachable_code
from graphreg.tracing.side_effects.state_places import content

# Their code takes patterns apart, and asks for sizes and the type of a tensor. ``repeat`` of a
# parameter could be traced into, since its sizes are known, but then the names of values would
# depend on what a pattern is applied to.
_EINOPS = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack", "parse_shape")
Tried = set[tuple[type, str]]  # a module's class, and a function that was opaque in vain for it


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
    frames, trace = list[FrameType](), error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    last = max((i for i, frame in enumerate(frames) if not is_foreign(frame) and _is_method_of_module(frame)), default=None)
    if last is None:
        return None

    own = home_of(frames[last]).partition(".")[0]
    found = [(home_of(frame), function) for frame in frames[last + 1 :] if not is_foreign(frame) for function in _importable(frame)]
    others = [function for home, function in found if home.partition(".")[0] != own]
    theirs = [function for home, function in reversed(found) if home.partition(".")[0] == own]
    for function in (*others, *theirs):
        key = key_of(function)
        if key not in opaque and (kind, key) not in tried and _reaches_no_tensor(function):
            tried.add((kind, key))
            return key
    return None


def can_be_recorded(arguments: Iterable[Any], is_plain: Callable[[Any], bool]) -> bool:
    """Return whether a graph can hold the arguments of a call: plain data, and functions that can be imported, beside values of it."""
    return all(is_plain(each) or (isinstance(each, FunctionType) and function_of(key_of(each)) is each) for each in arguments)


def _is_method_of_module(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_argcount > 0 and issubclass(type(frame.f_locals.get(code.co_varnames[0])), nn.Module)


def _importable(frame: FrameType) -> Iterator[FunctionType]:
    """Yield the function whose code runs in a frame, if it can be imported by its name, and is no generator."""
    function = frame.f_globals.get(frame.f_code.co_name)
    if isinstance(function, FunctionType) and getattr(inspect.unwrap(function), "__code__", None) is frame.f_code:
        is_plain = not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
        if is_plain and function_of(key_of(function)) is function:
            yield function


def _reaches_no_tensor(function: FunctionType) -> bool:
    """Return whether a function reaches no module and no tensor through global variables and closures: the graph would not show them."""
    code = reachable_code((), [function])
    values = [space[name] for space, names in code.variables.values() for name in names if name in space]
    values += [content(cell) for each in code.functions.values() for cell in each.__closure__ or ()]
    return not any(issubclass(type(value), (Tensor, nn.Module)) for value in values)
