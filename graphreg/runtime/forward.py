"""Builds ``forward`` and ``__call__`` of a rewritten module: they choose the emitted code that a call runs, and refuse wrong calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphreg.errors import GraphRegError, TraceError
from graphreg.ir import STATE, CallText, has_keys
from graphreg.runtime.attach import collect
from graphreg.runtime.clock import CLOCK, ClockRule, SharedClock
from graphreg.runtime.counter import settle
from graphreg.runtime.derivative_penalty import run
from graphreg.runtime.distributed_values import with_plain_gradient
from graphreg.runtime.gradient_join import begin_call, end_call
from graphreg.runtime.noise_keys import KeyRule, SharedKeyRule
from graphreg.runtime.other_structures import not_settled, settle_structure
from graphreg.runtime.parameter_identity import require_same_parameters
from graphreg.runtime.result import Regularized
from graphreg.runtime.runtime_module import Drawing
from graphreg.runtime.sharding import explained, refuse_parallelized
from graphreg.runtime.uncalled_checkpoints import warn_of_uncalled_checkpoints
from graphreg.runtime.unfinished import begin_counting, end_counting, take_back
from graphreg.torch_internals import (
    NO_BACKWARD,
    backward_task,
    disable,
    has_process_group,
    is_distributed,
    is_exporting,
    is_traced,
    leaving_no_level,
    runs_compiled,
    skip_frame,
    traces_here,
    with_own_code,
)
from graphreg.tracing import collecting_nothing

SCRIPTED = (  # the error of torch.jit.script, which asks a module for ``__prepare_scriptable__``
    "torch.jit.script cannot compile a rewritten module. Give it a module of torch's own class: plain = graphreg.strip(module).eval(), "
    "then torch.jit.script(torch.fx.GraphModule(plain, plain.graph))."
)
Forwards = Mapping[str, Callable[..., Any]]


def chosen(
    forwards: Forwards, compiled: Forwards, writer: CallText | None, additions: str, derivatives: Sequence[str], enters_levels: bool
) -> Callable[..., Any]:
    """Build the class's ``forward``: it refuses to be traced again, checks arguments, and runs the code of the present mode.

    Args:
        forwards: The emitted forwards by mode: ``both``, or ``train`` and ``eval``.
        compiled: The forwards that Dynamo traces, by mode.
        writer: Writes the structure of a call's arguments; None if all structures are right.
        additions: The name of the submodule that holds the runtime modules.
        derivatives: The names that the penalties on derivatives have in that submodule.
        enters_levels: Whether the code enters levels of torch.func.
    """
    in_train, in_eval = (forwards.get("both") or forwards[mode] for mode in ("train", "eval"))
    train_compiled, eval_compiled = (collecting_nothing(compiled.get("both") or compiled[mode]) for mode in ("train", "eval"))
    check = _argument_check(in_train, writer)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the model in its present mode, with the additions. Returns ``(output, penalties)``; only the output if penalties attach."""
        if not torch.compiler.is_compiling() and is_traced() and additions in self._modules and traces_here():
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
        if enters_levels and not torch.compiler.is_compiling():
            code = functools.partial(leaving_no_level, code)
        if (in_group := has_process_group()) and (rules := self._modules.get(additions)) is not None:
            refuse_parallelized(rules)
        if derivatives and additions in self._modules:
            result = run(code, self, args, kwargs, self._modules[additions], derivatives)
        else:
            result = code(self, *args, **kwargs)
        return _addable(result) if in_group else result

    # Dynamo limits the recompilations of one code object (8 by default). So each class needs a code object of its own, as in torch.fx.
    own: Any = functools.wraps(in_train)(with_own_code(forward))
    own.check = check
    return own  # type: ignore[no-any-return]


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
        key = writer.quick_key(args, kwargs)
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
        if rules is not None:
            if backward_task() != NO_BACKWARD:
                _refuse(rules)
            if not torch.compiler.is_compiling():
                if runs_compiled(self):
                    _settle(self, args, kwargs)
                _before(self, rules, args, kwargs)
                if rules.__dict__.get("regularized"):
                    require_same_parameters(self, rules)
        if rules is None or torch.compiler.is_compiling():
            return _called(self, rules, args, kwargs)
        outer, stage = begin_counting(), rules.__dict__.get("stage")
        try:
            return _called(self, rules, args, kwargs) if stage is None else _called_in(stage, self, rules, args, kwargs)
        except BaseException:
            take_back()
            raise
        finally:
            end_counting(outer)

    skip_frame(call)  # so Dynamo compiles the forward of each module, and not this code object, which all modules share
    return call


def _called_in(stage: Any, module: nn.Module, rules: Any, args: Any, kwargs: Any) -> Any:
    """Call a module that is a stage of a pipeline."""
    before = stage.begin(module)
    try:
        return _called(module, rules, args, kwargs)
    finally:
        stage.end(module, before)


skip_frame(_called_in)


def _called(module: nn.Module, rules: Any, args: Any, kwargs: Any) -> Any:
    """Call a module, given the container of its runtime modules, or None."""
    attach = None if rules is None else rules._modules.get("attach")
    try:
        if attach is not None and not torch.compiler.is_compiling():
            result = _call_attaching(attach, module, args, kwargs)
        else:
            result = nn.Module.__call__(module, *args, **kwargs)
    except RuntimeError as error:
        if "DTensor" in str(error) and (why := explained(module)):
            raise GraphRegError(why) from error
        raise
    if rules is not None and (watching := rules.__dict__.get("watching")) is not None:
        watching.after(module)
    if rules is not None and torch.is_inference_mode_enabled() and not torch.compiler.is_compiling():
        settle(rules)  # else compiled code could not save what this call made for the next one
    return result if torch.compiler.is_compiling() else _after(result)


skip_frame(_called)


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


def _call_attaching(attach: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a module whose penalties attach: read the scale first, and record the arguments' storages for ``join``."""
    before = _begin(attach, args, kwargs)
    try:
        return nn.Module.__call__(module, *args, **kwargs)
    finally:
        _end(attach, before)


skip_frame(_call_attaching)


def call_within(module: nn.Module, additions: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
    """Return the result of ``call``, which runs a rewritten module's forward. Before and after it, do what the module's ``__call__`` does.

    This function is for a model that is regularized in place: torch calls this model, so no call reaches the rewritten module's
    ``__call__``. Dynamo does not compile this function.
    """
    rules = module._modules.get(additions)
    if rules is None:
        return call()
    if backward_task() != NO_BACKWARD:
        _refuse(rules)
    outer = begin_counting()
    try:
        return _within(module, rules, call, args, kwargs)
    except BaseException:
        take_back()
        raise
    finally:
        end_counting(outer)


skip_frame(call_within)


def _within(module: nn.Module, rules: Any, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
    attach = rules._modules.get("attach")
    before = _begin(attach, args, kwargs) if attach is not None else None
    try:
        result = call()
    except RuntimeError as error:
        if "DTensor" in str(error) and (why := explained(module)):
            raise GraphRegError(why) from error
        raise
    finally:
        if attach is not None:
            _end(attach, before)
    if (watching := rules.__dict__.get("watching")) is not None:
        watching.after(module)
    return result if torch.compiler.is_compiling() else _after(result)


skip_frame(_within)


def _addable(result: Any) -> Any:
    """Return a call's result, with penalties that can be added to a loss that is a DTensor, if the model's output has DTensors."""
    if not isinstance(result, Regularized):
        return result
    tensors: list[Tensor] = []
    collect(result.output, tensors, [])
    if not any(map(is_distributed, tensors)):
        return result
    return Regularized(result.output, {name: with_plain_gradient(total) for name, total in result.penalties.items()})


@disable()
def _settle(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Check the structure of the arguments before compiled code does, which cannot trace the model for another structure."""
    _check(module, args, kwargs)


def _check(module: nn.Module, args: Any, kwargs: Any) -> None:
    forward: Any = type(module).forward
    if forward.check is not None:
        forward.check(module, args, kwargs)


@disable()
def _before(module: nn.Module, rules: Any, args: Any, kwargs: Any) -> None:
    """Do before a call what compiled code cannot do, or what would fail there with an error of Dynamo's around that of graphreg."""
    if rules.awaits_device:
        rules.settle_device(module)
    if rules.awaits_proof and rules.prover is not None:
        _check(module, args, kwargs)
        rules.prover(module, args, kwargs)
    if rules.unseen is not None:
        rules.unseen.look()
    if rules.is_uncalled:
        warn_of_uncalled_checkpoints(rules)
    if has_process_group():
        refuse_parallelized(rules)


@disable()
def _after(result: Any) -> Any:
    """Do after a call what concerns DTensors. A compiled forward assumes that the gradients of its results are plain."""
    return _addable(result) if has_process_group() else result


@disable()
def _begin(attach: Any, args: Any, kwargs: Any) -> frozenset[int] | None:
    """Prepare a call; return the argument ``before`` for ``_end``, which must run after the call."""
    if attach.asks:
        attach.feed(args, kwargs)
        attach.fed = True
    tensors: list[Tensor] = []
    strange: list[str] = []
    collect((args, kwargs), tensors, strange)
    return begin_call(None if strange else tensors)


@disable()
def _end(attach: Any, before: frozenset[int] | None) -> None:
    end_call(before)
    if attach.asks:
        attach.fed = False


@disable()
def _refuse(rules: nn.Module) -> None:
    """Raise GraphRegError if a module that runs in a backward pass would draw other masks than the forward did, or have other strengths."""
    key = rules._modules.get("key")
    always = any(child.always for child in rules.children() if isinstance(child, Drawing))
    if isinstance(key, (KeyRule, SharedKeyRule)) and key.draws(always):
        key.refuse_backward()
    clock = rules._modules.get(CLOCK)
    if isinstance(clock, (ClockRule, SharedClock)) and clock.counts():
        clock.refuse_backward()
