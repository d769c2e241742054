"""Functions of other packages that a trace records as one call each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

from graphreg.torch_internals.interpreter import called_instead
from graphreg.torch_internals.patching import Changes

# Their code takes patterns apart, and asks for sizes and the type of a tensor. ``repeat`` of a parameter could be traced
# into, since its sizes are known, but then the names of values would depend on what a pattern is applied to.
_EINOPS = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack", "parse_shape")


def record_functions(changes: Changes, record: Callable[..., Any], is_traced: Callable[[Any], bool]) -> None:
    """Record a call of one of these functions with traced values as one call, until the block of ``changes`` ends.

    Args:
        changes: Takes the changes back.
        record: Records a call of a function: it gets the function and the arguments.
        is_traced: Whether a call with these arguments is to be recorded; every other call runs as ever.
    """
    einops = sys.modules.get("einops")
    for function in [vars(einops)[name] for name in _EINOPS if name in vars(einops)] if einops else []:
        if isinstance(function, FunctionType):
            code, original = called_instead(function, partial(_called, record, is_traced, function, copies := []))
            copies.append(original)
            changes.later(partial(setattr, function, "__code__", function.__code__))
            function.__code__ = code


def _called(record: Any, is_traced: Any, function: Any, copies: list[Any], /, *args: Any, **kwargs: Any) -> Any:
    return record(function, *args, **kwargs) if is_traced((args, kwargs)) else copies[0](*args, **kwargs)
