"""Builds ``forward`` and ``__call__`` of a rewritten module: they choose the emitted code that a call runs, and refuse wrong calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphreg.errors import GraphRegError, TraceError
from graphreg.ir import contents_of, has_keys, may_change, shown_contents
from graphreg.runtime.attach import collect
from graphreg.runtime.clock import CLOCK, ClockRule, SharedClock
from graphreg.runtime.counter import settle
from graphreg.runtime.derivative_penalty import run
from graphreg.runtime.distributed_values import with_plain_gradient
from graphreg.runtime.gradient_join import begin_call, end_call
from graphreg.runtime.noise_keys import KeyRule, SharedKeyRule
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
    skip_frame,
    traces_here,
    with_own_code,
)

SCRIPTED = (  # the error of torch.jit.script, which asks a module for ``__prepare_scriptable__``
    "torch.jit.script cannot compile a rewritten module. Give it a module of torch's own class: plain = graphreg.strip(module).eval(), "
    "then torch.jit.script(torch.fx.GraphModule(plain, plain.graph))."
)
Forwards = Mapping[str, Callable[..., Any]]


def chosen(
    forwards: Forwards, compiled: Forwards, specialized: Mapping[str, Any], carried: Sequence[str], additions: str,
    derivatives: Sequence[str], enters_levels: bool,
) -> Callable[..., Any]:
    """Build the class's ``forward``: it refuses to be traced again, checks arguments, and runs the code of the present mode.

    Args:
        forwards: The emitted forwards by mode: ``both``, or ``train`` and ``eval``.
        compiled: The forwards that Dynamo traces, by mode.
        specialized: The specialized arguments, each with its value.
        carried: The optional arguments that the example inputs had, so that each call must give them.
        additions: The name of the submodule that holds the runtime modules.
        derivatives: The names that the penalties on derivatives have in that submodule.
        enters_levels: Whether the code enters levels of torch.func.
    """
    in_train, in_eval = (forwards.get("both") or forwards[mode] for mode in ("train", "eval"))
    train_compiled, eval_compiled = (compiled.get("both") or compiled[mode] for mode in ("train", "eval"))
    check = _argument_check(in_train, specialized, carried)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the model in its present mode, with the additions. Returns ``(output, penalties)``; only the output if penalties attach."""
        if not torch.compiler.is_compiling() and is_traced() and additions in self._modules and traces_here():
            raise TraceError(
                "a rewritten module cannot be traced again: the trace would freeze its keys and its mode. "
                "Use its .graph, or trace what graphreg.strip(module) gives."
            )
        check(args, kwargs)
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
    return own


def _argument_check(
    forward: Callable[..., Any], specialized: Mapping[str, Any], carried: Sequence[str]
) -> Callable[[Sequence[Any], Mapping[str, Any]], None]:
    """Return a function that raises GraphRegError for arguments that the graph was not made for. Dynamo traces that function."""
    positions, required = _positions(forward, specialized), _positions(forward, dict.fromkeys(carried))
    fixed = {name: (i, value) for name, (i, value) in positions.items() if not may_change(value)}
    changing = {n: (i, v, contents_of(v), shown_contents(v)) for n, (i, v) in positions.items() if n not in fixed}

    def check(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for name, (position, value) in fixed.items():
            passed = args[position] if position < len(args) else kwargs.get(name, value)
            if passed is not value and not (type(passed) is type(value) and passed == value):
                raise GraphRegError(
                    f"{name} was specialized to {value!r} when the model was traced. Give regularize example_inputs that carry {name}."
                )
        for name, (position, value, contents, then) in changing.items():
            if contents_of(args[position] if position < len(args) else kwargs.get(name, value)) != contents:
                raise GraphRegError(
                    f"{name} was {then} when the model was traced, and the graph is specialized to that. It has other contents now, or is "
                    f"another object. Regularize the model once more, with this {name} in the example_inputs."
                )
        for name, (position, _) in required.items():
            if position >= len(args) and name not in kwargs:
                raise GraphRegError(
                    f"{name} was carried by the example_inputs, so the graph needs it. Give it at each call, or trace without it."
                )
    return check


def signature(forward: Callable[..., Any], graph: fx.Graph) -> inspect.Signature:
    """Return the signature of a forward, without ``**kwargs`` if the graph asserts that they are empty.

    Trainers inspect the signature. The Trainer of transformers passes ``num_items_in_batch`` to a forward that takes ``**kwargs``, and then
    expects this forward to divide the loss by it.
    """
    empty = {str(n.args[0].target) for n in graph.nodes if n.target is has_keys and isinstance(n.args[0], fx.Node) and not n.args[2]}
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
                _before(self, rules, args, kwargs)
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
            "Call it on the model before graphreg.regularize: layers that checkpoint their own forward (as in transformers) then do so "
            "here, too; a root that checkpoints its blocks (as in timm) is refused. Called now it would change nothing here."
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
def _before(module: nn.Module, rules: Any, args: Any, kwargs: Any) -> None:
    """Do before a call what compiled code cannot do, or what would fail there with an error of Dynamo's around that of graphreg."""
    if rules.awaits_proof and rules.prover is not None:
        type(module).forward.check(args, kwargs)
        rules.prover(module, args, kwargs)
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


def _positions(forward: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, tuple[int, Any]]:
    """Return, for each argument of ``forward`` that has a value in ``values``, its position and this value."""
    names = list(forward.__code__.co_varnames[1 : forward.__code__.co_argcount])
    return {name: (names.index(name), value) for name, value in values.items() if name in names}
