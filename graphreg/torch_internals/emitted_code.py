"""The forward of a GraphModule: its code is generated at once, but Python compiles the code only when the forward is first called.

torch.fx compiles the code at once. For a graph of 60,000 nodes, this takes 0.5 GB of memory, also for a forward that is never called, such
as that of the other mode. torch.fx has a class that waits, ``_LazyGraphModule``, but its forward generates and compiles the code while it
runs, which Dynamo cannot trace.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import CO_VARARGS, CO_VARKEYWORDS
from threading import Lock
from types import CodeType
from typing import Any

from torch import fx
from torch._guards import TracingContext
from torch.fx import graph_module
from torch.fx.experimental import _config
from torch.fx.graph import CodeGen, PythonCode

from graphreg.torch_internals.dynamo_marks import assume_constant_result
from graphreg.torch_internals.fx import Defining

_PREPARE, _FORWARD = "graphreg_prepare", "graphreg_forward"  # names of globals of the code
_LINES = 500  # how many lines are compiled together where a syntax error is looked for
DEFAULT = "default"  # the key in ``node.meta`` of a placeholder for a default that code cannot write
_DIGITS = str.maketrans("023456789", "1" * 9)


def generate_forward(module: fx.GraphModule) -> PythonCode:
    """Generate the forward of a GraphModule's class from the module's graph, as ``GraphModule.recompile`` does, without compiling it.

    The forward is a function with the arguments of the emitted code. At its first call, also if Dynamo traces the call, it gets the code
    object of the emitted code. ``inspect.getsource`` shows the emitted code before and after.

    torch.fx compiles the code at once if the graph's code generator is neither torch's usual one nor that of ``define_named_tuples``, or
    if the code contains marks for torch's profiler, which torch.fx replaces after the generation.

    Raises:
        SyntaxError: The emitted code is not Python.
    """
    graph = module._graph
    if type(graph._codegen) not in (CodeGen, Defining) or getattr(_config, "enrich_profiler_metadata", False):
        return fx.GraphModule.recompile(module)
    python_code = graph.python_code("self")
    names = ("_lineno_map", "_prologue_start")
    vars(module).update(_code=python_code.src, **{name: getattr(python_code, name) for name in names if hasattr(python_code, name)})
    function = _compiled_later(python_code.src, python_code.globals, getattr(graph, "_co_fields", {}))
    _give_defaults(function, graph, python_code.globals)
    type(module).forward = function
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            child.recompile()
    return python_code


def _compiled_later(source: str, names: dict[str, Any], fields: dict[str, Any]) -> Callable[..., Any]:
    """Return the function ``forward`` that some source defines. Python compiles its code at the function's first call.

    Until then, the function's code calls ``prepare``, and then the function itself, which has the emitted code by then. Dynamo calls
    ``prepare`` while it traces, so Dynamo finds the emitted code, too. If Dynamo is the first, the function keeps its code, which then
    calls another function with the emitted code: Dynamo may trace a call several times, and raises if it meets other code than before.

    Args:
        source: The source.
        names: The globals of the source.
        fields: The attributes that torch.fx wants the code object to have.
    """
    space, lock, waiting = dict(names), Lock(), [True]
    before, header, body = _divided(source)
    _check_syntax(source, body)
    key = graph_module._loader.cache(source, space, fields)  # so that inspect finds the source of the function
    call = f"{_PREPARE}()\n    return {_FORWARD}({_passed_on(header)})"
    exec(compile("\n" * before.count("\n") + f"{header}\n    {call}", key, "exec", dont_inherit=True), space)
    function = space.pop("forward")

    @assume_constant_result
    def prepare() -> bool:
        with lock:
            if waiting:
                graph_module._exec_with_source(source, space, fields)
                emitted = space.pop("forward")
                if TracingContext.try_get() is None:
                    function.__code__, emitted = emitted.__code__, function
                space[_FORWARD] = emitted  # not before: Dynamo notes the globals that are there when the code reads the first one
                waiting.clear()
        return True

    space[_PREPARE] = prepare  # it stays, because Dynamo guards on the globals of code that it has traced
    return function  # type: ignore[no-any-return]


def _give_defaults(function: Any, graph: fx.Graph, names: dict[str, Any]) -> None:
    """Give a function the defaults that its code cannot write, and add them to ``names``."""
    kept = {str(node.target): node.meta[DEFAULT] for node in graph.nodes if node.op == "placeholder" and DEFAULT in node.meta}
    if not kept:
        return
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    last = positional[len(positional) - len(defaults) :]
    function.__defaults__ = tuple(kept.get(name, default) for name, default in zip(last, defaults, strict=True))
    names.update({f"graphreg_default_{name}": default for name, default in kept.items()})


def _divided(source: str) -> tuple[str, str, str]:
    """Divide emitted code into what precedes the function, the function's header, and its body."""
    start = re.search(r"^def forward\(", source, re.MULTILINE).start()  # type: ignore[union-attr]
    end = source.index("\n", start)
    while not _is_python(f"{source[start:end]}\n    pass") and "\n" in source[end + 1 :]:  # a default value may have several lines
        end = source.index("\n", end + 1)
    return source[:start], source[start:end], source[end + 1 :]


def _passed_on(header: str) -> str:
    """Return the arguments with which a function with this header calls a function with the same header."""
    outer = compile(f"{header}\n    pass", "", "exec", dont_inherit=True)
    code = next(each for each in outer.co_consts if isinstance(each, CodeType) and each.co_name == "forward")
    count, names = code.co_argcount, list(code.co_varnames)
    keywords = [f"{name}={name}" for name in names[count : count + code.co_kwonlyargcount]]
    rest = names[count + code.co_kwonlyargcount :]
    several = [f"*{rest.pop(0)}"] if code.co_flags & CO_VARARGS else []
    named = [f"**{rest.pop(0)}"] if code.co_flags & CO_VARKEYWORDS else []
    return ", ".join([*names[:count], *several, *keywords, *named])


def _check_syntax(source: str, body: str) -> None:
    """Raise SyntaxError unless the source is Python, so that no first call fails.

    Emitted code consists of statements of one line, of which most differ from others in digits only. One of each kind is compiled. If that
    fails, perhaps because a statement has several lines, the whole source is compiled.
    """
    kinds = dict(zip(body.translate(_DIGITS).split("\n"), body.split("\n"), strict=True))
    lines = list(kinds.values())
    together = ("\n".join(lines[at : at + _LINES]) for at in range(0, len(lines), _LINES))
    if not all(_is_python(f"def forward():\n{statements}\n    pass") for statements in together):
        compile(source, "<emitted code>", "exec", dont_inherit=True)


def _is_python(source: str) -> bool:
    try:
        compile(source, "<emitted code>", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True
