"""Where a graph of torch.compile was captured: the call it belongs to, the model, the module whose code it is of.

Dynamo tells a backend none of this. It is read off Python's stack and Dynamo's translator while a graph is compiled, and
nothing is read while one runs. All that this package knows of Dynamo's inner parts stands here and in ``guards.py``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import fx, nn

AROUND = ("_call_impl", "_wrapped_call_impl", "inner")  # what torch.compile may capture in the place of a forward: what calls it
RESUMED = "torch_dynamo_resume_in_"  # what Dynamo calls the rest of a function behind a graph break


class Functions(nn.Module):
    """Stands for a model where torch.compile was given a function: the modules that it uses, by the names it has for them."""

    def __init__(self, name: str, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.title = name
        for path, module in modules.items():
            self.add_module(path, module)


def same_modules(one: nn.Module, other: nn.Module) -> bool:
    """Whether two functions that were compiled use the same modules."""
    functions = isinstance(one, Functions) and isinstance(other, Functions)
    return functions and {id(m) for m in one.children()} == {id(m) for m in other.children()}


@dataclass(frozen=True)
class Entry:
    """A call of what torch.compile made: its record (``context``), the callable, and what it does when the call ends."""

    context: Any
    function: Callable[..., Any]
    cleanups: list[Callable[[], Any]]
    arguments: tuple[Any, ...]


def entry() -> Entry | None:
    """The innermost such call that is running; None where there is none, or torch has other inner parts."""
    for frame in _outwards(sys._getframe(1)):
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            found = frame.f_locals  # from Python 3.13 on no dict but a proxy, whose keys() are a list
            if all(name in found for name in ("self", "fn", "cleanups")) and hasattr(found["self"], "enter_exit_hooks"):
                return Entry(found["self"], found["fn"], found["cleanups"], tuple(found.get("args", ())))
    return None


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def root_of(entry: Entry) -> nn.Module:
    """The model of a call: the module that was compiled, or the modules that a compiled function uses."""
    function: Any = entry.function
    owner = getattr(function, "__self__", None)
    inner = getattr(function, "__wrapped__", None)
    for found in (owner, inner):
        if isinstance(found, nn.Module):
            return found
    used: dict[str, Any] = {}
    if inspect.isfunction(inspect.unwrap(getattr(function, "__func__", function))):
        code = inspect.unwrap(getattr(function, "__func__", function))
        variables = inspect.getclosurevars(code)
        used = {**variables.globals, **variables.nonlocals, **vars(owner or object.__new__(_Nothing))}
        used |= dict(zip(code.__code__.co_varnames[bool(owner) :], entry.arguments, strict=False))
    modules = {name: value for name, value in used.items() if isinstance(value, nn.Module)}
    return Functions(getattr(function, "__name__", type(function).__name__), modules)


class _Nothing:
    pass


@dataclass(frozen=True)
class Place:
    """The code that a graph is of. ``path``: of the module whose forward it is, "" for the model's own.

    ``local``: the name of the local that holds that module, None where none does. ``first``: it is the beginning of the model's
    forward; ``last``: what it returns is what the model returns; ``returns``: what it returns is what the module at ``path`` returns.
    """

    path: str
    code: str
    line: int
    local: str | None
    first: bool
    last: bool
    returns: bool


def place_of(gm: fx.GraphModule, translator: Any, root: nn.Module, paths: dict[int, str]) -> Place:
    """The place of the graph that Dynamo is compiling; ``paths``: of the model's modules, by their id."""
    frame: Any = translator.output.root_tx
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    own, locals_ = frame.f_code.co_name, translator.output.local_scope
    name, resumed = own.removeprefix(RESUMED), own.startswith(RESUMED)
    name = name.rpartition("_at_")[0] if resumed else name
    function = isinstance(root, Functions) and name == root.title
    local = next((key for key, value in locals_.items() if isinstance(value, nn.Module) and id(value) in paths and not function), None)
    path = paths[id(locals_[local])] if local is not None else here(sys._getframe(1), paths)
    broken = bool(getattr(reason, "graph_break", False))
    stack = getattr(reason, "user_stack", None) or ()
    line = stack[-1].lineno if stack else frame.f_code.co_firstlineno
    calls = name in ("forward", *AROUND)
    whole = function or (not isinstance(root, Functions) and path == "" and calls)
    returns = path != "" and calls and not broken
    return Place(path, name, line, local, whole and not resumed, whole and not broken, returns)


def here(frame: FrameType | None, paths: dict[int, str]) -> str:
    """The path of the module whose method is running, as far out as the call of what torch.compile made."""
    for each in _outwards(frame):
        if each.f_code.co_name == "compile_wrapper":
            break
        names = each.f_code.co_varnames[: each.f_code.co_argcount]
        if names and id(owner := each.f_locals.get(names[0])) in paths and isinstance(owner, nn.Module):
            return paths[id(owner)]
    return ""
