"""Marks on functions that tell Dynamo how to treat them, made without importing Dynamo.

torch's own decorators (``torch.compiler.disable`` and the like) import Dynamo when they are applied, which takes a second. A process that
never compiles anything need not spend it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch
from torch import _compile
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

Function = TypeVar("Function", bound=Callable[..., Any])


def assume_constant_result(function: Function) -> Function:
    """Make Dynamo call a function while it traces, and take the result as a constant: ``torch.compiler.assume_constant_result``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def disable(reason: str | None = None) -> Callable[[Function], Function]:
    """Return a decorator that makes Dynamo leave a function, and all that it calls, to eager, as ``torch.compiler.disable`` does.

    torch's decorator wraps the function, which takes two microseconds at each call. This one only marks the function and its code.

    Args:
        reason: Why the function is not compiled. Dynamo's error with ``fullgraph=True`` contains it.
    """

    def marked(function: Function) -> Function:
        _set_strategy(function.__code__, _FrameAction.SKIP)
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return marked


def skip_frame(function: Function) -> Function:
    """Make Dynamo skip a function, but compile the functions that it calls. Functions marked by ``disable`` call all in eager."""
    skip_as_outermost(function)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def skip_as_outermost(function: Callable[..., Any]) -> None:
    """Prevent Dynamo from starting a compilation at a function, or at one that is defined in it.

    Dynamo still traces the function if other compiled code calls it. After ``skip_frame``, Dynamo would not do that either.
    """
    codes = [function.__code__]
    for code in codes:
        codes.extend(inner for inner in code.co_consts if isinstance(inner, CodeType))
        _set_strategy(code, _FrameAction.DEFAULT)


def _set_strategy(code: CodeType, callees: Any) -> None:
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, callees))


def allow_in_graph(*functions: Callable[..., Any]) -> None:
    """Make Dynamo treat functions as opaque calls.

    Call this while Dynamo traces, from a function marked by ``assume_constant_result``. Unlike the other marks, this one is no attribute
    of the function: torch stores the ids of such functions in a table of Dynamo's.
    """
    for function in functions:
        torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]


@contextmanager
def without_importing_dynamo() -> Iterator[None]:
    """Open a block in which operators on meta tensors do not import Dynamo.

    torch computes the shapes of most operators in Python, by functions that it keeps from being compiled. Each of these functions imports
    Dynamo at its first call, in order to make the function that it calls from then on. In the block, it calls the original function. As
    long as Dynamo has not been imported, nothing can compile it.
    """
    functions = () if "torch._dynamo" in sys.modules else _uncompiled()
    for function in functions:
        vars(function)[_REMEMBERED] = function
    try:
        yield
    finally:
        for function in functions:
            vars(function).pop(_REMEMBERED, None)


_REMEMBERED = "__dynamo_disable"  # torch's name for the attribute of a function for the function that Dynamo does not compile


@cache
def _uncompiled() -> tuple[Any, ...]:
    """Return the functions behind torch's decompositions that Dynamo must not compile; none if torch wraps such functions differently."""
    wrapper = next((each for each in _compile._disable_dynamo.__code__.co_consts if isinstance(each, CodeType)), None)
    waiting = [function for table in torch._decomp.global_decomposition_table.values() for function in table.values()]
    found, seen = list[Any](), set[int]()
    while waiting:
        function: Any = waiting.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        inner = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if function.__code__ is wrapper and "fn" in inner:
            found.append(inner["fn"].cell_contents)
        waiting += [cell.cell_contents for cell in inner.values()]  # decorators wrap one another
    return tuple(found)
