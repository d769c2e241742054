"""Dynamo: the call and the code that a graph was captured from, additional guards, and what was left to eager.

Dynamo passes none of these facts to a backend. So they are read from Python's stack and from Dynamo's translator: most of them while a
graph is compiled, the running module by a guard at each call, and the result at the end of a call.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch._dynamo.config
import torch._dynamo.variables.dicts
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.callback import callback_handler
from torch._dynamo.decorators import skip
from torch._dynamo.eval_frame import _TorchDynamoContext, skip_code
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, GlobalSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._guards import Guard
from torch.fx.experimental.symbolic_shapes import guard_scalar

# The names of the code of those functions that call a module's forward. torch.compile may capture one of them instead of the forward.
CALLERS_OF_FORWARD = ("_call_impl", "_wrapped_call_impl", "inner")
RESUMED = "torch_dynamo_resume_in_"  # begins Dynamo's name for the rest of a function, after a graph break
_ENTRY, _ENTRY_MODULE = "compile_wrapper", "torch._dynamo.eval_frame"  # torch's function through which every compiled call goes
_SKIPPED = re.compile(r"frame skipped: (\S+) \((.*) line (\d+)\)")

# Makes Dynamo skip a function, but compile the functions that it calls. ``torch.compiler.disable`` would leave these to eager, too.
skip_frame: Callable[[Callable[..., Any]], Any] = skip


def skip_as_outermost(function: Callable[..., Any]) -> None:
    """Make Dynamo skip a function at which it would begin to compile, but still trace into it when other compiled code calls it.

    After ``skip_frame``, Dynamo would not trace into the function at all.
    """
    skip_code(function.__code__)


# Makes Dynamo break the graph; with ``fullgraph=True`` the given reason is in the error. It must be Dynamo's own function, because Dynamo
# recognizes it by identity.
graph_break = torch._dynamo.graph_break
# Returns a number itself. In code that Dynamo traces, the number may be a symbol, because it has changed between calls. Then the code is
# compiled for this one number, and again for another.
plain_number: Callable[[Any], Any] = guard_scalar
# Whether Dynamo traces a loop over the attributes of an object, and ``copy.copy`` of an object. torch before 2.12 does not.
TRACES_OBJECTS = hasattr(torch._dynamo.variables.dicts, "DunderDictVariable")
# Whether Dynamo records which functions it leaves to eager as a whole. Older versions only log them, and ``skipped_code`` finds none.
TELLS_SKIPPED_CODE = hasattr(InstructionTranslator, "raise_loop_graph_break")
# Whether torch.compile keeps what a call returns until the call ends; without it, ``CompiledCall.result`` is always None.
TELLS_RESULT = any(
    getattr(constant, "co_name", "") == _ENTRY and "result" in constant.co_varnames
    for constant in _TorchDynamoContext.__call__.__code__.co_consts
)


# The running call


@dataclass(frozen=True)
class CompiledCall:
    """A call of a module or function that was compiled with torch.compile.

    Attributes:
        record: torch.compile's context object for the module or function (``_TorchDynamoContext``).
        function: The callable that was compiled.
        arguments: The positional arguments.
        cleanups: The functions that torch calls at the end of this call.
        result: What the call returns, for the functions that run at its end. None until the call ends, and without ``TELLS_RESULT``.
    """

    record: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cleanups: list[Callable[[], Any]]
    result: Any = None

    def at_each_call(self, begin: Callable[[], Callable[[], None]]) -> None:
        """Call ``begin`` now and at the beginning of each later call. At the end of each call, call the function that ``begin`` returned.

        Penalties and noise streams belong to a call of the model, but torch passes a backend only the graphs of the call.
        """
        self.cleanups.append(begin())
        self.record.enter_exit_hooks.append(begin)


def compiled_call() -> CompiledCall | None:
    """Return the innermost compiled call that is running; None if there is none, or if this torch has other internals."""
    for frame in _outwards(sys._getframe(1)):
        if frame.f_code.co_name == _ENTRY and frame.f_globals.get("__name__") == _ENTRY_MODULE:
            variables = frame.f_locals  # from Python 3.13 on a proxy, not a dict; its keys() is a list
            if all(name in variables for name in ("self", "fn", "cleanups")) and hasattr(variables["self"], "enter_exit_hooks"):
                return CompiledCall(variables["self"], variables["fn"], tuple(variables.get("args", ())), variables["cleanups"],
                                    variables.get("result"))  # fmt: skip
    return None


def first_arguments() -> Iterator[Any]:
    """Yield the first argument of each running function, from the innermost outwards to the compiled call.

    In a method, this is ``self``. So the module whose method is running is found even if no local variable of the captured code holds it.
    """
    for frame in _outwards(sys._getframe(1)):
        code = frame.f_code
        if code.co_name == _ENTRY:
            return
        if code.co_argcount:
            yield frame.f_locals.get(code.co_varnames[0])


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def compile_record_of(compiled: object) -> object:
    """Return torch.compile's context object (``CompiledCall.record``) for what it compiled; None for anything else.

    ``compiled`` is what ``torch.compile`` returned for a module or function, or a module after ``module.compile()``. The context holds the
    backend, so a user can pass the compiled module where graphreg needs its backend.
    """
    record = vars(compiled).get("dynamo_ctx") if hasattr(compiled, "__dict__") else None
    if record is not None:
        return record
    wrapper = getattr(compiled, "_compiled_call_impl", None) or compiled
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    cells = getattr(wrapper, "__closure__", None) or ()
    return dict(zip(names, (cell.cell_contents for cell in cells), strict=False)).get("self") if "callback" in names else None


def backend_in(record: object) -> object:
    """Return a context object's backend without Dynamo's wrappers; None for any other object.

    If torch.compile has put the user's backend into a ``torch._TorchCompileWrapper``, return this wrapper. ``function_in`` and ``name_in``
    read it.
    """
    inner = getattr(record, "callback", None)
    while (wrapped := getattr(inner, "_torchdynamo_orig_backend", None) or getattr(inner, "__wrapped__", None)) is not None:
        inner = wrapped
    return inner


def function_in(wrapper: object) -> object:
    """Return the backend inside a ``torch._TorchCompileWrapper``, which adds a name and options; None for any other object."""
    return getattr(wrapper, "compiler_fn", None)


def name_in(wrapper: object) -> str | None:
    """Return the backend's name from a ``torch._TorchCompileWrapper``; None for any other object."""
    name: str | None = getattr(wrapper, "compiler_name", None)
    return name


def asking_wrapper() -> Any:
    """Return the wrapper by which torch is calling a backend that was given by name. Only the backend function itself may call this.

    torch makes one wrapper for each ``torch.compile(model, backend=name, options=...)`` and calls it for every graph of that model. So a
    backend can store in the wrapper what it has made from the options.
    """
    return sys._getframe(2).f_locals.get("self")


def backend_named(name: str) -> Callable[..., Any]:
    """Return the backend that torch knows by a name; ``torch.compiler.list_backends(None)`` lists the names."""
    backend: Callable[..., Any] = lookup_backend(name)
    return backend


# The code that is captured


@dataclass(frozen=True)
class CapturedCode:
    """The code that Dynamo is capturing in a graph.

    Attributes:
        name: The name of the function.
        resumed: Whether the code is only the rest of the function after a graph break.
        line: The line at which the graph ends, if it is known; else the first line of the function.
        broken: Whether the graph ends at a graph break.
        values: The local variables by name.
    """

    name: str
    resumed: bool
    line: int
    broken: bool
    values: Mapping[str, Any]


def translator() -> Any:
    """Return the object with which Dynamo translates the code that it is capturing. Some functions of this file take it as an argument."""
    return InstructionTranslator.current_tx()


def captured_code(translator: Any, gm: fx.GraphModule) -> CapturedCode:
    """Return the code that a graph is captured from. The names of the graph's sites depend on the module whose forward this code is."""
    code, reason = translator.output.root_tx.f_code, getattr(gm, "compile_subgraph_reason", None)
    resumed = code.co_name.startswith(RESUMED)
    stack = getattr(reason, "user_stack", None) or ()
    line = stack[-1].lineno if stack else code.co_firstlineno
    broken = bool(getattr(reason, "graph_break", False))
    return CapturedCode(function_of(code.co_name), resumed, line, broken, translator.output.local_scope)


def function_of(code: str) -> str:
    """Return the name of a function. ``code``: the name of the function's code; after a graph break, Dynamo's name for the rest of it."""
    return code.removeprefix(RESUMED).rpartition("_at_")[0] if code.startswith(RESUMED) else code


def source_of(node: fx.Node) -> tuple[str, list[str]]:
    """Return the local variable that an input of a captured graph comes from, and the keys that lead from it to the input.

    The name of the variable is ``""`` if the input does not come from a local variable.
    """
    source: Any = getattr(node.meta.get("grapharg"), "source", None)
    keys: list[str] = []
    while hasattr(source, "base"):
        keys.insert(0, str(getattr(source, "index", getattr(source, "member", ""))))
        source = source.base
    return getattr(source, "local_name", ""), keys


def copy_source(node: fx.Node, twin: fx.Node) -> None:
    """Give the twin of an input, the same input in another graph, Dynamo's note on the input's origin. AOTAutograd reads the note."""
    if hasattr(node, "_dynamo_source"):
        twin._dynamo_source = node._dynamo_source


def without_source(twin: fx.Node) -> None:
    """Mark an input as one without a source in Dynamo. AOTAutograd requires the attribute, and accepts None."""
    twin._dynamo_source = None


def copy_notes(gm: fx.GraphModule, module: fx.GraphModule) -> None:
    """Copy to ``module`` the attributes that Dynamo set on ``gm``, the graph module that it replaces. Compilers read these attributes."""
    for name in ("compile_subgraph_reason", "_param_name_to_source", "_backend_id"):
        if hasattr(gm, name):
            setattr(module, name, getattr(gm, name))


# What decides whether a graph is captured again


def guard_identity(local: str) -> None:
    """Have Dynamo capture the code again if one of its local variables holds another object."""
    install_guard(LocalSource(local, is_input=True).make_guard(GuardBuilder.ID_MATCH))


def guard_value(translator: Any, name: str, holder: object, attribute: str, by_module: bool) -> None:
    """Have Dynamo capture the code again if an attribute of an object has another value.

    Args:
        translator: Dynamo's translator of the code.
        name: The name of the global variable in which Dynamo will find the object.
        holder: The object.
        attribute: The name of the attribute.
        by_module: Whether the graph is for one module only. Such graphs do not count towards Dynamo's ``recompile_limit``, because each
            module that runs the code needs one.
    """
    source = AttrSource(GlobalSource(translator.output.install_global_by_id(name, holder)), attribute)
    install_guard(source.make_guard(_of_one_module if by_module else GuardBuilder.EQUALS_MATCH))


def _of_one_module(builder: GuardBuilder, guard: Guard) -> None:
    builder.EQUALS_MATCH(guard)
    holder = builder.get(guard.originating_source.base)  # type: ignore[attr-defined]
    builder.id_matched_objs["graphreg"] = weakref.ref(holder)


def strict_limit() -> AbstractContextManager[None]:
    """Open a block in which Dynamo raises when it reaches its recompile limit.

    By default, Dynamo runs the code in eager from then on, and nothing that a backend has added acts.
    """
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    return patched


# Callbacks and counters of Dynamo


def on_compilation_start(function: Callable[[Any], None]) -> None:
    """Have Dynamo call a function whenever it begins to compile, until ``torch.compiler.reset``.

    The function must not raise, because it is called for all compilations of the process. With such a function, graphreg notices a call
    from which no graph is captured: Dynamo calls a backend only with a graph.
    """
    if function not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(function)


def left_to_eager() -> Counter[str]:
    """Return the reasons, as texts, for which Dynamo has left code to eager so far, each with its count."""
    reasons: Counter[str] = counters["unimplemented"]
    return reasons


def skipped_code(text: str) -> list[tuple[str, str, str]]:
    """Return the name, file and line of each function that was skipped as a whole, according to a text of ``left_to_eager``."""
    return _SKIPPED.findall(text)
