"""Reads Dynamo's private state: the running compiled call, the code of a graph, and the code left to eager. Also adds guards to graphs.

Dynamo passes a backend only a graph and its inputs. The functions of this file find the other facts on Python's stack and in Dynamo's
translator. Most of these functions are called while Dynamo captures a graph. Some are also called at other times: a guard calls
``first_arguments`` at each call of compiled code, ``compiled_call`` and ``left_to_eager`` are called at the end of a call, and
``compile_record_of`` and ``backend_in`` are called with objects that a user passes to graphreg.

The import of Dynamo takes a second. So each function imports the parts of Dynamo that it needs when it is called.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._guards import Guard

from graphreg.torch_internals.dynamo_marks import assume_constant_result, skip_as_outermost, skip_frame
from graphreg.torch_internals.interpreter import outwards
from graphreg.torch_internals.modules import COMPILED_CALL
from graphreg.torch_internals.other_threads import is_compiling

# The ``co_name`` of torch's functions that call a module's forward. Dynamo may capture one of these functions instead of the forward.
CALLERS_OF_FORWARD = ("_call_impl", "_wrapped_call_impl", "inner")
RESUMED = "torch_dynamo_resume_in_"  # the prefix of Dynamo's name for the rest of a function after a graph break
_ENTRY, _ENTRY_MODULE = "compile_wrapper", "torch._dynamo.eval_frame"  # torch's function that runs every compiled call; its module
_SPLITTING = "torch._dynamo.backends.distributed"  # the module that splits graphs for DistributedDataParallel
_SKIPPED = re.compile(r"frame skipped: (\S+) \((.*) line (\d+)\)")

def plain_number(value: Any) -> Any:
    """Convert a number or a symbol to a plain number. Dynamo traces this function.

    Dynamo replaces a number by a symbol once the number has changed between calls. If a symbol is converted, the compiled code is valid
    for the symbol's present value only: Dynamo compiles the code again for another value.
    """
    if is_compiling() or isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return torch.fx.experimental.symbolic_shapes.guard_scalar(value)  # where there are symbols, this module has been imported
    return value


def known_true(condition: Any) -> bool:
    """Return whether a condition on sizes is true; False if a tracer cannot know, since values of tensors decide it. Dynamo traces this."""
    return bool(torch.fx.experimental.symbolic_shapes.guard_or_false(condition) if is_compiling() else condition)


def known_or_asserted(condition: Any) -> bool:
    """Return whether a condition on sizes is true. If a tracer cannot know, the graph asserts it, and the answer is yes."""
    if not is_compiling():
        return bool(condition)
    if torch.fx.experimental.symbolic_shapes.guard_or_true(condition):
        torch._check(condition)  # type: ignore[no-untyped-call]
        return True
    return False


def runs_compiled(module: torch.nn.Module) -> bool:
    """Return whether torch.compile compiles a call of a module that begins now: ``module.compile()`` was called, or Dynamo is active."""
    return module.__dict__.get(COMPILED_CALL) is not None or get_eval_frame_callback() is not None


skip_frame(runs_compiled)


def graph_break(msg: str) -> None:
    """Make Dynamo, which traces the caller, break the graph. With ``fullgraph=True``, Dynamo raises an error that contains ``msg``."""
    torch._dynamo.graph_break(msg=msg)


skip_as_outermost(graph_break)  # after the break, it runs in eager, where it does nothing


# What Dynamo can do depends on the version of torch


@assume_constant_result
def traces_objects() -> bool:
    """Return whether Dynamo traces a loop over an object's attributes, and ``copy.copy`` of an object: it does both from torch 2.12 on."""
    import torch._dynamo.variables.dicts as kinds  # noqa: PLC0415

    return hasattr(kinds, "DunderDictVariable")


def tells_result() -> bool:
    """Return whether torch's function that runs a compiled call stores the result in a local variable.

    If not, ``CompiledCall.result`` is always None.
    """
    from torch._dynamo.eval_frame import _TorchDynamoContext  # noqa: PLC0415

    constants = _TorchDynamoContext.__call__.__code__.co_consts
    return any(getattr(each, "co_name", "") == _ENTRY and "result" in each.co_varnames for each in constants)


# The running call


@dataclass(frozen=True)
class CompiledCall:
    """A call of a module or function that was compiled with torch.compile.

    Attributes:
        record: torch.compile's context object for the module or function (``_TorchDynamoContext``).
        function: The callable that was compiled.
        arguments: The positional arguments.
        cleanups: The functions that torch calls at the end of this call.
        result: The result of the call, if this object is made in one of the ``cleanups``. None if the object is made earlier, and always
            None if ``tells_result()`` is False.
    """

    record: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cleanups: list[Callable[[], Any]]
    result: Any = None

    def at_each_call(self, begin: Callable[[], Callable[[], None]], is_check: bool = False) -> None:
        """Call ``begin`` now and at the beginning of each later call. At the end of each call, call the function that ``begin`` returned.

        graphreg's backend must know when a call of the model begins and ends, because penalties and noise streams belong to a whole call.
        torch passes a backend only the graphs. If one of these functions raises, torch does not call those after it: so a check, which
        ends nothing, comes last (``is_check``).
        """
        self.cleanups.insert(len(self.cleanups) if is_check else 0, begin())
        self.record.enter_exit_hooks.insert(len(self.record.enter_exit_hooks) if is_check else 0, begin)


def compiled_call() -> CompiledCall | None:
    """Return the innermost compiled call that is running; None if no compiled call runs, or if this torch has other internals."""
    for frame in outwards(sys._getframe(1)):
        if frame.f_code.co_name == _ENTRY and frame.f_globals.get("__name__") == _ENTRY_MODULE:
            variables = frame.f_locals  # a dict up to Python 3.12; then a proxy whose keys() is a list, not a set
            if all(name in variables for name in ("self", "fn", "cleanups")) and hasattr(variables["self"], "enter_exit_hooks"):
                return CompiledCall(variables["self"], variables["fn"], tuple(variables.get("args", ())), variables["cleanups"],
                                    variables.get("result"))  # fmt: skip
    return None


def first_arguments() -> Iterator[Any]:
    """Yield the first argument of each running Python function, from the innermost function outwards, up to the compiled call.

    The first argument of a method is ``self``. So the caller finds the module whose method is running, even if no local variable of the
    captured code holds the module.
    """
    for frame in outwards(sys._getframe(1)):
        code = frame.f_code
        if code.co_name == _ENTRY:
            return
        if code.co_argcount:
            yield frame.f_locals.get(code.co_varnames[0])


def compile_record_of(compiled: object) -> object:
    """Return torch.compile's context object (``CompiledCall.record``) of a compiled module or function; None for any other object.

    The context object holds the backend. So a user can pass a compiled module to functions of graphreg that need its backend.

    Args:
        compiled: The module or function that ``torch.compile`` returned, or a module whose ``compile()`` was called.
    """
    record = vars(compiled).get("dynamo_ctx") if hasattr(compiled, "__dict__") else None
    if record is not None:
        return record
    wrapper = getattr(compiled, "_compiled_call_impl", None) or compiled
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    cells = getattr(wrapper, "__closure__", None) or ()
    return dict(zip(names, (cell.cell_contents for cell in cells), strict=False)).get("self") if "callback" in names else None


def backend_in(record: object) -> object:
    """Return the backend of a context object (``CompiledCall.record``) without Dynamo's wrappers; None for any other object.

    torch.compile may have wrapped the user's backend in a ``torch._TorchCompileWrapper``. If so, the function returns this wrapper, from
    which ``function_in`` and ``name_in`` read the backend's function and name.
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
    """Return the ``torch._TorchCompileWrapper`` through which torch is calling a backend that a user gave by name.

    Only the backend's function itself may call this, because the wrapper is found in the frame of that function's caller. torch makes one
    wrapper for each ``torch.compile(model, backend=name, options=...)``, and calls the wrapper for every graph of the model. So the backend
    can store in the wrapper an object that it has made from the options.
    """
    return sys._getframe(2).f_locals.get("self")


def backend_named(name: str) -> Callable[..., Any]:
    """Return the backend that torch knows by a name; ``torch.compiler.list_backends(None)`` lists the names."""
    from torch._dynamo.backends.registry import lookup_backend  # noqa: PLC0415

    backend: Callable[..., Any] = lookup_backend(name)
    return backend


# The code that is captured


@dataclass(frozen=True)
class CapturedCode:
    """The code that Dynamo is capturing in a graph.

    Attributes:
        name: The name of the function that the code belongs to.
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
    """Return Dynamo's ``InstructionTranslator`` for the code that Dynamo is capturing.

    Some functions of this file take this object as their argument ``translator``.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator  # noqa: PLC0415

    return InstructionTranslator.current_tx()


def splits_for_ddp() -> bool:
    """Return whether Dynamo has split the captured graph, and is asking the backend to compile one part of it.

    Dynamo does so for a model inside DistributedDataParallel whose gradients fill several buckets, while
    ``torch._dynamo.config.optimize_ddp`` is on. The inputs of a part are copies, so that the parameters among them cannot be recognized.
    """
    frames = (frame for frame in outwards(sys._getframe(1)) if frame.f_globals.get("__name__") == _SPLITTING)
    return any(type(frame.f_locals.get("self")).__name__ == "SubmodCompiler" for frame in frames)


def captured_code(translator: Any, gm: fx.GraphModule) -> CapturedCode:
    """Return the code from which Dynamo captures the graph of ``gm``.

    graphreg needs the code in order to find the module whose forward it is. The names of the sites in the graph depend on this module.
    """
    code, reason = translator.output.root_tx.f_code, getattr(gm, "compile_subgraph_reason", None)
    resumed = code.co_name.startswith(RESUMED)
    stack = getattr(reason, "user_stack", None) or ()
    line = stack[-1].lineno if stack else code.co_firstlineno
    broken = bool(getattr(reason, "graph_break", False))
    return CapturedCode(function_name_of(code.co_name), resumed, line, broken, translator.output.local_scope)


def function_name_of(code: str) -> str:
    """Return the name of the function that a code object belongs to.

    Args:
        code: The ``co_name`` of the code object: the function's name, or Dynamo's name for the rest of the function after a graph break,
            such as ``torch_dynamo_resume_in_forward_at_12``.
    """
    return code.removeprefix(RESUMED).rpartition("_at_")[0] if code.startswith(RESUMED) else code


def input_source(node: fx.Node) -> tuple[str, list[str]]:
    """Return the name of the local variable from which an input of a captured graph comes, and the keys that lead to the input.

    For the input ``batch["x"][0]``, the result is ``("batch", ["x", "0"])``. The keys are indices, keys of dicts or names of attributes.
    The name of the variable is ``""`` if the input does not come from a local variable.
    """
    source: Any = getattr(node.meta.get("grapharg"), "source", None)
    keys: list[str] = []
    while hasattr(source, "base"):
        keys.insert(0, str(getattr(source, "index", getattr(source, "member", ""))))
        source = source.base
    return getattr(source, "local_name", ""), keys


def copy_source(node: fx.Node | None, twin: fx.Node) -> None:
    """Copy Dynamo's record of the origin of an input from ``node`` to ``twin``, the same input in another graph.

    AOTAutograd reads the record of each input, and accepts None. ``node``: None for an input that Dynamo does not know.
    """
    if node is None or hasattr(node, "_dynamo_source"):
        twin._dynamo_source = node._dynamo_source if node is not None else None


def copy_notes(gm: fx.GraphModule, module: fx.GraphModule) -> None:
    """Copy the attributes that Dynamo has set on ``gm`` to ``module``, which replaces ``gm``. Compilers below Dynamo read them."""
    for name in ("compile_subgraph_reason", "_param_name_to_source", "_backend_id"):
        if hasattr(gm, name):
            setattr(module, name, getattr(gm, name))


# Guards, which decide whether Dynamo captures code again


def guard_identity(local: str) -> None:
    """Make Dynamo capture the code again if its local variable ``local`` holds another object than now."""
    from torch._dynamo.guards import GuardBuilder, install_guard  # noqa: PLC0415
    from torch._dynamo.source import LocalSource  # noqa: PLC0415

    install_guard(LocalSource(local, is_input=True).make_guard(GuardBuilder.ID_MATCH))


def guard_value(translator: Any, name: str, holder: object, attribute: str, by_module: bool) -> None:
    """Make Dynamo capture the code again if an attribute of an object has another value than now.

    Args:
        translator: Dynamo's translator of the code (see ``translator``).
        name: The prefix of the name of the global variable in which Dynamo stores the object.
        holder: The object.
        attribute: The name of the attribute.
        by_module: Whether the graph is valid for one module only. Then each module that runs the code needs a graph of its own, so the
            graph does not count towards Dynamo's ``recompile_limit``.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard  # noqa: PLC0415
    from torch._dynamo.source import AttrSource, GlobalSource  # noqa: PLC0415

    source = AttrSource(GlobalSource(translator.output.install_global_by_id(name, holder)), attribute)
    install_guard(source.make_guard(_of_one_module if by_module else GuardBuilder.EQUALS_MATCH))


def _of_one_module(builder: Any, guard: Guard) -> None:
    builder.EQUALS_MATCH(guard)
    holder = builder.get(guard.originating_source.base)  # type: ignore[attr-defined]
    builder.id_matched_objs["graphreg"] = weakref.ref(holder)


def tensor_guard(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Return a function that takes these tensors and returns True only if their shapes, dtypes and devices are as they are now.

    It may return False although these are the same, for example under another autocast. None if torch has no such function for them.
    """
    unique = len(set(map(id, tensors))) == len(tensors)
    if not unique or not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
        return None
    try:
        from torch._C._dynamo.guards import TensorGuards  # noqa: PLC0415  # a private name, which a version of torch may lack

        sizes: Any = [list(tensor.shape) for tensor in tensors]
        strides: Any = [[None] * tensor.dim() for tensor in tensors]
        check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except Exception:  # a version of torch with another form of guards: the caller then compares in Python
        return None


def strict_limit() -> AbstractContextManager[None]:
    """Open a block in which Dynamo raises an error when it reaches its ``recompile_limit``.

    By default, Dynamo runs the code in eager once it has reached the limit. Then the regularizers have no effect, because graphreg's
    backend adds them to graphs only.
    """
    from torch._dynamo import config  # noqa: PLC0415

    patched: AbstractContextManager[None] = config.patch(fail_on_recompile_limit_hit=True)
    return patched


# Callbacks and counters of Dynamo


def on_compilation_start(function: Callable[[Any], None]) -> None:
    """Make Dynamo call a function at the start of each compilation, until ``torch.compiler.reset()`` is called.

    The function must not raise, because Dynamo calls it for all compilations of the process. graphreg needs such a function in order to
    notice a compiled call from which Dynamo captures no graph: without a graph, Dynamo does not call the backend.
    """
    from torch._dynamo.callback import callback_handler  # noqa: PLC0415

    if function not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(function)


def left_to_eager() -> Counter[str]:
    """Return Dynamo's counter of the reasons for which it has left code to eager so far. Each key is a text that gives the reason."""
    from torch._dynamo.utils import counters  # noqa: PLC0415

    reasons: Counter[str] = counters["unimplemented"]
    return reasons


def skipped_code(text: str) -> list[tuple[str, str, str]]:
    """Return the name, file and line of each function that Dynamo skipped because of a graph break in a loop.

    ``text``: a key of ``left_to_eager()``.
    """
    return _SKIPPED.findall(text)
