"""Python's interpreter: walks the stack, pauses the garbage collector, raises the recursion limit, copies functions with their code."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from graphreg.torch_internals.patching import Changes


def outwards(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    """Yield a frame of Python's stack, then the frame that called it, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Pause Python's garbage collector in a block that builds a large graph.

    Without the pause, the collector would visit all nodes again and again, and free none, because all nodes are in use. With 100,000 nodes,
    this would take half of the block's time. If the user has disabled the collector, it stays disabled after the block.
    """
    with Changes() as changes, changes:
        at_rest(changes)
        yield


def at_rest(changes: Changes) -> None:
    """Pause Python's garbage collector until the block of ``changes`` ends."""
    if gc.isenabled():
        changes.later(gc.enable)
        gc.disable()


_FRAMES = 20  # Python frames allowed for each level of nested module calls in a trace; torch.export needs the most: 14
_CEILING = 50_000  # the highest recursion limit that graphreg sets; with a higher limit, the C stack might overflow and crash the process


def depth(model: nn.Module) -> int:
    """Return how deep modules are nested in a model; 1 for a model without submodules."""
    deepest, waiting, depths = 0, [(model, 1)], dict[nn.Module, int]()
    while waiting:
        module, at = waiting.pop()
        if depths.get(module, 0) >= at or at > _CEILING // _FRAMES:  # a module may contain itself, so the depth is limited
            continue
        depths[module], deepest = at, max(deepest, at)
        waiting.extend((child, at + 1) for child in module.__dict__.get("_modules", {}).values() if child is not None)
    return deepest


def deep_enough(model: nn.Module, changes: Changes) -> None:
    """Raise Python's recursion limit as far as a trace of the model needs, until the block of ``changes`` ends."""
    limit, needed = sys.getrecursionlimit(), depth(model) * _FRAMES
    if needed > limit // 2:  # half of the limit is left for the caller's frames, and for the functions that a forward calls
        changes.later(partial(sys.setrecursionlimit, limit))
        sys.setrecursionlimit(min(limit + needed, max(limit, _CEILING)))


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function with a separate code object.

    Dynamo caches and counts compilations by code object. All functions that one ``def`` statement makes share a code object. After
    8 compilations of this code object, Dynamo would stop compiling these functions.
    """
    made: Any = function
    own = types.FunctionType(made.__code__.replace(), made.__globals__, made.__name__, made.__defaults__, made.__closure__)
    own.__kwdefaults__ = made.__kwdefaults__
    return own


class _Called:
    """What a function's code calls now. torch.export puts the constants of code into a set, so they must have a hash."""

    def __init__(self, now: Callable[..., Any]) -> None:
        self.now = now


class CalledInstead:
    """Has the calls of a function made to another one, with their arguments, from ``patch`` to ``revert``.

    Whoever holds the function then calls the other one: importers of its name, partials, registries, closures. Python reads the defaults of
    a function only for parameters that its code has, and the code that is put in has none. The methods have torch.fx's names.

    Attributes:
        original: A copy of the function as it is without the change.
    """

    def __init__(self, function: Any, instead: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Prepare to change the calls of ``function``. ``instead`` gets ``original``, and returns what is called in its place."""
        self._function, self._before, self.original = function, function.__code__, with_own_code(function)
        self._called = _Called(instead(self.original))
        code = _template(self._before.co_freevars)
        constants = tuple(self._called if each == "instead" else each for each in code.co_consts)
        self._code = code.replace(co_consts=constants, co_name=self._before.co_name)

    def patch(self) -> None:
        self._function.__code__ = self._code

    def revert(self) -> None:
        if self._function.__code__ is self._code:
            self._function.__code__ = self._before
        # The garbage collector does not look into code: what the code held would be held forever, with all that this refers to.
        self._called.now = self.original


@functools.cache
def _template(free: tuple[str, ...]) -> types.CodeType:
    """Return code that calls the constant ``"instead"``, for a function whose closure has these variables.

    The code must have read them itself (COPY_FREE_VARS): up to Python 3.12, whoever asks for the ``f_locals`` of a frame whose code only
    claims to have them, such as a tool that prints the variables of a traceback, ends the process with a segmentation fault.
    """
    text = f"""
def around():
    {" = ".join((*free, "_"))} = None
    def called(*graphreg_args, **graphreg_kwargs):
        graphreg_called = "instead"
        return graphreg_called.now(*graphreg_args, **graphreg_kwargs)
        {", ".join(free) or "pass"}
    return called
"""
    space: dict[str, Any] = {}
    exec(compile(text, __file__, "exec"), space)  # the text consists of identifiers, from code that Python has compiled
    code: types.CodeType = space["around"]().__code__
    return code.replace(co_freevars=free)  # in the order of the function's closure


def show_parameters_of(function: Callable[..., Any], shown: Callable[..., Any]) -> None:
    """Make tools that look into a function see the parameters and the source of the function in whose place it stands, ``shown``.

    ``torch.fx.Tracer`` reads names of parameters from the code of the innermost ``__wrapped__``, and does not call that. accelerate does.
    So it is neither ``shown`` itself nor a function inside it, but one that calls ``function``.
    """
    made, inner = function, inspect.unwrap(shown)
    made.__signature__ = inspect.signature(shown)  # type: ignore[attr-defined]
    if not isinstance(inner, types.FunctionType):
        return
    code = inner.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    by_position, by_name = names[: code.co_argcount], names[code.co_argcount :]
    extra = iter(code.co_varnames[len(names) :])
    rest = [f"*{next(extra)}"] if code.co_flags & inspect.CO_VARARGS else []
    more = [f"**{next(extra)}"] if code.co_flags & inspect.CO_VARKEYWORDS else []
    only = code.co_posonlyargcount
    head = [*by_position[:only], *(["/"] if only else []), *by_position[only:], *(rest or (["*"] if by_name else [])), *by_name, *more]
    call = [*by_position, *rest, *(f"{name}={name}" for name in by_name), *more]
    # the text consists of identifiers, from code that Python has compiled
    like: Any = eval(f"lambda {', '.join(head)}: __graphreg_call__({', '.join(call)})", {"__graphreg_call__": function})
    like.__code__ = like.__code__.replace(co_name=code.co_name, co_filename=code.co_filename, co_firstlineno=code.co_firstlineno)
    like.__defaults__, like.__kwdefaults__, like.__annotations__ = inner.__defaults__, inner.__kwdefaults__, inner.__annotations__
    like.__signature__ = inspect.signature(inner)
    made.__wrapped__ = like  # type: ignore[attr-defined]
