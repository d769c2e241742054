"""Dynamo: the call and the code that a graph was captured of, what it guards, what it left to eager.

It tells a backend none of this. It is read off Python's stack and Dynamo's translator while a graph is compiled, and nothing is read
while one runs, but for the guards.
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
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.callback import callback_handler
from torch._dynamo.decorators import skip
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, GlobalSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._guards import Guard

# What torch.compile may capture in the place of a forward, by the names of the code: what calls it.
CALLERS_OF_FORWARD = ("_call_impl", "_wrapped_call_impl", "inner")
RESUMED = "torch_dynamo_resume_in_"  # what Dynamo calls the rest of a function behind a graph break
_ENTRY, _ENTRY_MODULE = "compile_wrapper", "torch._dynamo.eval_frame"  # the function of torch's that a compiled call goes through
_SKIPPED = re.compile(r"frame skipped: (\S+) \((.*) line (\d+)\)")

# Has Dynamo compile what a function calls, and not the function: ``torch.compiler.disable`` would leave to eager what it calls, too.
skip_frame: Callable[[Callable[..., Any]], Any] = skip
# Has Dynamo break the graph, with a reason in the error of ``fullgraph=True``. It is Dynamo's own function, which it knows by identity.
graph_break = torch._dynamo.graph_break
# Whether Dynamo writes down what code it leaves to eager as a whole; older ones only log it, and ``skipped_code`` finds none.
TELLS_SKIPPED_CODE = hasattr(InstructionTranslator, "raise_loop_graph_break")


# The call that runs


@dataclass(frozen=True)
class CompiledCall:
    """A call of what torch.compile made: torch's record of it, the callable, and its positional arguments."""

    record: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cleanups: list[Callable[[], Any]]

    def at_each_call(self, begin: Callable[[], Callable[[], None]]) -> None:
        """Call ``begin`` now and at the beginning of each later call, and what it gives at the end of that call.

        Penalties and streams are those of a call, of which a backend is told only its graphs.
        """
        self.cleanups.append(begin())
        self.record.enter_exit_hooks.append(begin)


def compiled_call() -> CompiledCall | None:
    """The innermost call of what torch.compile made that is running; None where there is none, or torch has other inner parts."""
    for frame in _outwards(sys._getframe(1)):
        if frame.f_code.co_name == _ENTRY and frame.f_globals.get("__name__") == _ENTRY_MODULE:
            variables = frame.f_locals  # from Python 3.13 on no dict but a proxy, whose keys() are a list
            if all(name in variables for name in ("self", "fn", "cleanups")) and hasattr(variables["self"], "enter_exit_hooks"):
                return CompiledCall(variables["self"], variables["fn"], tuple(variables.get("args", ())), variables["cleanups"])
    return None


def first_arguments() -> Iterator[Any]:
    """The first argument of each function that is running, the innermost first, as far out as the call of what torch.compile made.

    One of them is the module whose method runs, where no local of the captured code holds it.
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
    """torch.compile's own record of what it compiled: of a module, of one that compiles itself, of a function; None for anything else.

    A backend is found by it, whose penalties and noise the user asks for by what torch.compile returned.
    """
    record = vars(compiled).get("dynamo_ctx") if hasattr(compiled, "__dict__") else None
    if record is not None:
        return record
    wrapper = getattr(compiled, "_compiled_call_impl", None) or compiled
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    cells = getattr(wrapper, "__closure__", None) or ()
    return dict(zip(names, (cell.cell_contents for cell in cells), strict=False)).get("self") if "callback" in names else None


def backend_in(record: object) -> object:
    """The backend as torch.compile was given it, inside torch's wrappers. ``record``: torch.compile's; None for what is no record."""
    inner = getattr(record, "callback", None)
    while (wrapped := getattr(inner, "_torchdynamo_orig_backend", None) or getattr(inner, "__wrapped__", None)) is not None:
        inner = wrapped
    return inner


def function_in(wrapper: object) -> object:
    """The function of a backend that is in torch's wrapper of it, which has its options or its name; None for what is no wrapper."""
    return getattr(wrapper, "compiler_fn", None)


def name_in(wrapper: object) -> str | None:
    """The name by which torch.compile was given the backend that a wrapper of torch's is of; None for what is no such wrapper."""
    name: str | None = getattr(wrapper, "compiler_name", None)
    return name


def asking_wrapper() -> Any:
    """Called by a backend that torch.compile was given by name: torch's wrapper of the name and its options, which is asked each time.

    What a backend makes of its options is kept there, for whoever compiles another model by the same name has another wrapper.
    """
    return sys._getframe(2).f_locals.get("self")


def backend_named(name: str) -> Callable[..., Any]:
    """The backend of a name of ``torch.compiler.list_backends(None)``, to be called with a graph and inputs."""
    backend: Callable[..., Any] = lookup_backend(name)
    return backend


# The code that is captured


@dataclass(frozen=True)
class CapturedCode:
    """The code that Dynamo is making a graph of. ``name``: of the function; ``resumed``: whether it is the rest of it, behind a break.

    ``broken``: whether the graph ends at a break; ``line``: that at which it ends, or the function begins. ``values``: of its locals.
    """

    name: str
    resumed: bool
    line: int
    broken: bool
    values: Mapping[str, Any]


def translator() -> Any:
    """Dynamo's translator of the code that it is capturing, for the functions below."""
    return InstructionTranslator.current_tx()


def captured_code(translator: Any, gm: fx.GraphModule) -> CapturedCode:
    """What code a graph is of: Dynamo calls values after it, and whose forward it is tells how the graph's values are named."""
    code, reason = translator.output.root_tx.f_code, getattr(gm, "compile_subgraph_reason", None)
    resumed = code.co_name.startswith(RESUMED)
    stack = getattr(reason, "user_stack", None) or ()
    line = stack[-1].lineno if stack else code.co_firstlineno
    broken = bool(getattr(reason, "graph_break", False))
    return CapturedCode(function_of(code.co_name), resumed, line, broken, translator.output.local_scope)


def function_of(code: str) -> str:
    """The name of a function by that of its code, which may be the rest of it behind a graph break."""
    return code.removeprefix(RESUMED).rpartition("_at_")[0] if code.startswith(RESUMED) else code


def source_of(node: fx.Node) -> tuple[str, list[str]]:
    """The local that an input of a captured graph comes from, and the keys that lead from there to it; "" where it is no local's."""
    source: Any = getattr(node.meta.get("grapharg"), "source", None)
    keys: list[str] = []
    while hasattr(source, "base"):
        keys.insert(0, str(getattr(source, "index", getattr(source, "member", ""))))
        source = source.base
    return getattr(source, "local_name", ""), keys


def copy_source(node: fx.Node, twin: fx.Node) -> None:
    """Have an input of another graph tell AOTAutograd what Dynamo guards of it, as the input that it stands for does."""
    if hasattr(node, "_dynamo_source"):
        twin._dynamo_source = node._dynamo_source


def without_source(twin: fx.Node) -> None:
    """Have an input that Dynamo does not know say so, as torch's own splitting of a graph has it."""
    twin._dynamo_source = None


def copy_notes(gm: fx.GraphModule, module: fx.GraphModule) -> None:
    """Write to a graph what Dynamo has written to the one that it stands for: compilers read it."""
    for name in ("compile_subgraph_reason", "_param_name_to_source", "_backend_id"):
        if hasattr(gm, name):
            setattr(module, name, getattr(gm, name))


# What decides whether a graph is captured again


def guard_identity(local: str) -> None:
    """Have Dynamo capture the code anew where a local of it is another object."""
    install_guard(LocalSource(local, is_input=True).make_guard(GuardBuilder.ID_MATCH))


def guard_value(translator: Any, name: str, holder: object, attribute: str, by_module: bool) -> None:
    """Have Dynamo capture the code anew where an attribute of an object has another value. ``name``: of the global to hold the object.

    ``by_module``: as with Dynamo's own guards on a module, the graphs of other modules do not count as recompilations.
    """
    source = AttrSource(GlobalSource(translator.output.install_global_by_id(name, holder)), attribute)
    install_guard(source.make_guard(_of_one_module if by_module else GuardBuilder.EQUALS_MATCH))


def _of_one_module(builder: GuardBuilder, guard: Guard) -> None:
    builder.EQUALS_MATCH(guard)
    holder = builder.get(guard.originating_source.base)  # type: ignore[attr-defined]
    builder.id_matched_objs["graphreg"] = weakref.ref(holder)


def strict_limit() -> AbstractContextManager[None]:
    """A block in which Dynamo raises past its limit of recompilations; else it runs the code in eager, without what a backend adds."""
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    return patched


# What Dynamo says of its work


def on_compilation_start(function: Callable[[Any], None]) -> None:
    """Have Dynamo call a function whenever it begins to compile, until ``torch.compiler.reset``. It must not raise: the compilations are
    those of the whole process.

    A backend is asked only when there is a graph, and a call of which no graph is captured must not go unseen.
    """
    if function not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(function)


def left_to_eager() -> Counter[str]:
    """What Dynamo left to eager so far, and why, as texts, with how often."""
    reasons: Counter[str] = counters["unimplemented"]
    return reasons


def skipped_code(text: str) -> list[tuple[str, str, str]]:
    """The code that one of these texts says was left to eager as a whole: its name, file and line."""
    return _SKIPPED.findall(text)
