"""Builds ``forward`` and ``__call__`` of a rewritten module: they choose the emitted code that a call runs, and refuse wrong calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphreg.blocks.block import REPLACED
from graphreg.blocks.shown_call import KEYS
from graphreg.errors import GraphRegError, OtherInputs, TraceError, first_line
from graphreg.ir.call_structures import CallText
from graphreg.ir.module_record import STATE
from graphreg.ir.shape_guards import has_keys
from graphreg.runtime.around_call import AroundCall, addable
from graphreg.runtime.derivative_penalty import run
from graphreg.runtime.other_structures import not_settled, settle_structure
from graphreg.runtime.sharding import refuse_parallelized
from graphreg.torch_internals.distributed import has_process_group
from graphreg.torch_internals.dynamo import runs_compiled
from graphreg.torch_internals.dynamo_marks import skip_frame
from graphreg.torch_internals.functorch import leaving_no_level
from graphreg.torch_internals.fx import is_traced, traces_here
from graphreg.torch_internals.interpreter import with_own_code
from graphreg.torch_internals.other_threads import is_compiling
from graphreg.torch_internals.torch_modes import is_exporting
from graphreg.tracing.capturing import collecting_nothing
from graphreg.tracing.trace import refuse_arguments

SCRIPTED = (  # the error of torch.jit.script, which asks a module for ``__prepare_scriptable__``
    "torch.jit.script cannot compile a rewritten module. Give it a module of torch's own class: plain = graphreg.strip(module).eval(), "
    "then torch.jit.script(torch.fx.GraphModule(plain, plain.graph))."
)
Forwards = Mapping[str, Callable[..., Any]]


def chosen(
    forwards: Forwards, compiled: Forwards, writer: CallText | None, additions: str, derivatives: Sequence[str], enters_levels: bool,
    caught: frozenset[str], switches_gradients: bool,
) -> Callable[..., Any]:
    """Build the class's ``forward``: it refuses to be traced again, checks arguments, and runs the code of the present mode.

    Args:
        forwards: The emitted forwards by mode: ``both``, or ``train`` and ``eval``.
        compiled: The forwards that Dynamo traces, by mode.
        writer: Writes the structure of a call's arguments; None if all structures are right.
        additions: The name of the submodule that holds the runtime modules.
        derivatives: The names that the penalties on derivatives have in that submodule.
        enters_levels: Whether the code enters levels of torch.func.
        caught: The names of the classes of errors that the model's code catches.
        switches_gradients: Whether the code switches gradients off in between.
    """
    in_train, in_eval = (forwards.get("both") or forwards[mode] for mode in ("train", "eval"))
    train_compiled, eval_compiled = (collecting_nothing(compiled.get("both") or compiled[mode]) for mode in ("train", "eval"))
    check, plain = _argument_check(in_train, writer), in_train
    if caught:
        in_train, in_eval = (_catching(code, caught) for code in (in_train, in_eval))
    if switches_gradients:
        in_train, in_eval = map(_restoring_gradients, (in_train, in_eval))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the model in its present mode, with the additions. Returns ``(output, penalties)``; only the output if penalties attach."""
        if not is_compiling() and is_traced() and additions in self._modules and traces_here():
            raise TraceError(
                "a rewritten module cannot be traced again: the trace would freeze its keys and its mode. "
                "Use its .graph, or trace what graphreg.strip(module) gives."
            )
        if check is not None:
            check(self, args, kwargs)
        if torch.compiler.is_dynamo_compiling() and not is_exporting():  # an exported program may contain only torch's operators
            code = train_compiled if self.training else eval_compiled
        else:
            code = in_train if self.training else in_eval
        if enters_levels and not is_compiling():
            code = functools.partial(leaving_no_level, code)
        if (in_group := has_process_group()) and (rules := self._modules.get(additions)) is not None:
            refuse_parallelized(rules)
        if derivatives and additions in self._modules:
            result = run(code, self, args, kwargs, self._modules[additions], derivatives)
        else:
            result = code(self, *args, **kwargs)
        return addable(result) if in_group else result

    # Dynamo limits the recompilations of one code object (8 by default). So each class needs a code object of its own, as in torch.fx.
    own: Any = functools.wraps(plain)(with_own_code(forward))
    own.check = check
    return own  # type: ignore[no-any-return]


def _as_other_inputs(kind: type[Exception]) -> type[OtherInputs]:
    """Return an ``OtherInputs`` that is also an error of this class, for callers that catch it: another place may have raised it."""
    try:
        return type("OtherInputs", (OtherInputs, kind), {"__module__": OtherInputs.__module__})
    except TypeError:  # the class cannot be combined with others
        return OtherInputs


def _catching(code: Callable[..., Any], caught: frozenset[str]) -> Callable[..., Any]:
    """Return code that raises OtherInputs in place of an error which the model's code may catch: then the model goes on another way."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return code(*args, **kwargs)
        except GraphRegError:
            raise
        except Exception as error:
            lacks_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if lacks_memory or caught.isdisjoint(kind.__name__ for kind in type(error).__mro__):
                raise
            raise _as_other_inputs(type(error))(
                f"{first_line(error).rstrip('.')}. The model's forward may catch this error (try, except), and then does "
                "something else; a graph does what the forward did with the example_inputs. Use graphreg.regularize_, which traces the "
                "model for such a call anew, or move the try into a submodule of its own and make that opaque."
            ) from error

    return run


def _restoring_gradients(code: Callable[..., Any]) -> Callable[..., Any]:
    """Return code that leaves grad mode as it was, also after an error between two nodes that switch it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return code(*args, **kwargs)

    return run


def _argument_check(
    forward: Callable[..., Any], writer: CallText | None
) -> Callable[[Any, Sequence[Any], Mapping[str, Any]], None] | None:
    """Return a function that raises GraphRegError for arguments of a structure that the graph is not right for. Dynamo traces it.

    In eager, a set lookup settles a call of tensors alone whose structure is known. Other calls write the text of their structure.
    """
    if writer is None:
        return None
    first = writer.first

    def check(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            text = writer.text(args, kwargs)
            if text != first and text not in module.graphreg_state.structures.accepted:
                raise not_settled(writer, module.graphreg_state.structures, args, kwargs)
            return
        structures = module.__dict__[STATE].structures
        if len(args) == 1 and type(args[0]) is Tensor and not kwargs:  # as ``quick_key``, for most calls of small nets
            key: Any = (Tensor,) if writer.loose else (Tensor, args[0].dtype)
        else:
            try:
                key = writer.quick_key(args, kwargs)
            except RecursionError:
                refuse_arguments(module, (tuple(args), dict(kwargs)))  # a container that contains itself
                raise
        if key in structures.quick:
            return
        if writer.text(args, kwargs) not in structures.accepted:
            settle_structure(module, forward, writer, structures, args, kwargs)
        elif writer.is_quick(args, kwargs):
            structures.quick.add(key)

    return check


def signature(forward: Callable[..., Any], graph: fx.Graph) -> inspect.Signature:
    """Return the signature of a forward, without ``**kwargs`` if the graph asserts that they are empty, or reads nothing of them.

    Trainers inspect the signature. The Trainer of transformers passes ``num_items_in_batch`` to a forward that takes ``**kwargs``, and then
    expects this forward to divide the loss by it.
    """
    empty = {str(n.args[0].target) for n in graph.nodes if n.target is has_keys and isinstance(n.args[0], fx.Node) and not n.args[2]}
    empty |= {str(n.target) for n in graph.nodes if n.op == "placeholder" and not n.users}
    full = inspect.signature(forward)
    return full.replace(parameters=[p for p in full.parameters.values() if p.kind is not p.VAR_KEYWORD or f"**{p.name}" not in empty])


def guarded(additions: str) -> Callable[..., Any]:
    """Build the class's ``__call__``. Dynamo does not compile it, so ``__call__`` can notice a backward pass that runs the forward again.

    It replaces the ``__call__`` of torch.fx, which prints the line of emitted code that raised an error. To find the line, torch.fx walks
    the traceback of every exception. ``checkpoint(use_reentrant=False)`` ends a recomputation early by an exception, too. Under
    fullgraph=True the walk raises "Attempt to trace generator" (torch 2.13, for every GraphModule).
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rules = self._modules.get(additions)
        if rules is None:
            return nn.Module.__call__(self, *args, **kwargs)
        try:
            with AroundCall(self, rules, args, kwargs, runs_compiled(self)) as around:
                return around.after(nn.Module.__call__(self, *args, **kwargs))
        except TypeError as error:
            if KEYS not in str(error):
                raise
            raise GraphRegError(REPLACED.format("a block")) from error  # a module that is no block has got the keywords of one
        except AttributeError as error:
            if "no attribute 'parametrizations'" not in str(error):
                raise
            raise GraphRegError(
                f"the graph of {type(self).__name__} computes a parametrization that was removed from its layer after graphreg.regularize. "
                "Regularize the model again, or in place, where it is traced again (graphreg.regularize_)."
            ) from error

    skip_frame(call)  # so Dynamo compiles the forward of each module, and not this code object, which all modules share
    return call


def no_method(name: str, model: str) -> str:
    """Say, for the error, what to do instead of calling a method that only the model has."""
    if "checkpointing" in name and not name.startswith("is_"):  # such a method sets a flag that the forward read when it was traced
        advice = (
            "Call it on the model before graphreg.regularize: layers that checkpoint their own forward (as in transformers), and blocks "
            "that the model checkpoints (as in timm), then do so here, too. Called now it would change nothing here."
        )
    else:
        advice = (
            f"Call it on the model itself, which shares its layers with this module. If {name} changes what the model's forward does, or "
            "which modules it has, this graph does not follow: then regularize the model again."
        )
    return f"{name!r} belongs to {model}, and a graph has no method but its forward. {advice}"
