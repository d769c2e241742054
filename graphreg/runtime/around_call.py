"""``AroundCall``: what happens before and after a call of a rewritten module, a stage of a pipeline or a model in place."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import GraphRegError
from graphreg.runtime.attach import collect
from graphreg.runtime.clock import CLOCK, ClockRule, SharedClock
from graphreg.runtime.counter import settle
from graphreg.runtime.distributed_values import with_plain_gradient
from graphreg.runtime.gradient_join import begin_call, end_call
from graphreg.runtime.noise_keys import KeyRule, SharedKeyRule
from graphreg.runtime.optimizer_steps import warn_of_missed_prox
from graphreg.runtime.parameter_identity import require_same_parameters
from graphreg.runtime.result import Kept, Regularized
from graphreg.runtime.runtime_module import DrawingRule, device_with_values
from graphreg.runtime.sharding import explained, refuse_parallelized
from graphreg.runtime.unfinished import running, take_back
from graphreg.runtime.unseen_changes import warn_of_uncalled_checkpoints
from graphreg.torch_internals.autograd import NO_BACKWARD, backward_task
from graphreg.torch_internals.distributed import has_process_group, is_distributed
from graphreg.torch_internals.dynamo_marks import disable
from graphreg.torch_internals.other_threads import is_compiling


class AroundCall:
    """The context of one call: ``with AroundCall(module, rules, args, kwargs) as around: return around.after(call())``.

    Before the call, it refuses a backward pass that runs the forward again, reads the scale of attached penalties, and begins to count.
    After it, it ends all that, and takes back what was counted if the call has raised. Dynamo compiles none of this: a compiled forward
    could not do it. Its methods are long, because each function takes its time at each call of a small net.

    Args:
        module: The rewritten module.
        rules: The container of its runtime modules.
        args: The positional arguments of the call.
        kwargs: Its keyword arguments.
        compiled: Whether compiled code runs the call of the module; None if a model in place is called, which has checked it already.
    """

    __slots__ = ("args", "attach", "before", "compiled", "in_group", "is_compiling", "kwargs", "module", "outer", "rules", "storages")

    def __init__(self, module: nn.Module, rules: Any, args: Any, kwargs: Mapping[str, Any], compiled: bool | None = None) -> None:
        self.module, self.rules, self.args, self.kwargs, self.compiled = module, rules, args, kwargs, compiled

    def __enter__(self) -> AroundCall:
        rules = self.rules
        if backward_task() != NO_BACKWARD:
            refuse_backward(rules)
        self.is_compiling = is_compiling()
        if self.is_compiling:  # by a tracer that runs this function, such as torch.export without Dynamo
            return self

        self.in_group = has_process_group()
        if self.compiled is not None:
            asks = rules.is_uncalled or rules.awaits_device or rules.regularized or rules.unseen is not None
            if asks or self.compiled or self.in_group or (rules.prover is not None and self._is_unproved()):
                self._check_call(rules)
        if rules.proxed and self.module.training:
            warn_of_missed_prox(self.module, rules)
        self.before = None if rules.stage_calls is None else rules.stage_calls.begin(self.module)

        # what may raise comes first: Python calls ``__exit__`` only if this method returns
        self.attach = rules._modules.get("attach")
        if self.attach is not None:
            tensors: list[Tensor] = []
            strange: list[str] = []
            collect((self.args, self.kwargs), tensors, strange)
            if self.attach.asks:
                self.attach.feed(self.args, self.kwargs)
                self.attach.fed = True
            self.storages = begin_call(None if strange else tensors)
        self.outer, running.call = running.call, []
        return self

    def _check_call(self, rules: Any) -> None:
        """Do before a call what compiled code cannot do, or what would fail there with an error of Dynamo's around that of graphreg."""
        module = self.module
        # a model that was made on the meta device may have got its values since the last call
        if rules.awaits_device and (device := device_with_values(module)) is not None:
            rules.awaits_device = False
            rules.to(device)
        proves = rules.prover is not None and self._is_unproved()
        if proves or self.compiled:  # compiled code cannot trace the model for another structure of arguments
            forward: Any = type(module).forward
            if forward.check is not None:
                forward.check(module, self.args, self.kwargs)
        if proves:
            rules.prover(module, self.args, self.kwargs)
            rules.prover = rules.prover if rules.awaits_proof else None
        if rules.is_uncalled:
            warn_of_uncalled_checkpoints(rules)
        if rules.regularized:
            require_same_parameters(module, rules)
        if self.in_group:
            refuse_parallelized(rules)
        if rules.unseen is not None:  # last: what is refused needs no warning
            rules.unseen.look()

    def _is_unproved(self) -> bool:
        """Whether this call can prove the graph of the mode that the module is in."""
        return bool(self.rules.is_unproved(self.module.training))

    def after(self, result: Any) -> Any:
        """Return the result of the call as the user gets it."""
        rules = self.rules
        if rules.watching is not None:
            rules.watching.after(self.module)
        if self.is_compiling:
            return result
        if torch.is_inference_mode_enabled():
            settle(rules)  # else compiled code could not save what this call made for the next one
        # a compiled forward assumes that the gradients of its results are plain
        return addable(result) if self.in_group else result

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not self.is_compiling:
            if self.attach is not None:
                end_call(self.storages)
                if self.attach.asks:
                    self.attach.fed = False
            try:
                if error is not None:
                    take_back()
            finally:
                running.call = self.outer
                if self.before is not None:
                    self.rules.stage_calls.end(self.module, self.before)
        if isinstance(error, RuntimeError) and "DTensor" in str(error) and (why := explained(self.module)):
            raise GraphRegError(why) from error


for _method in (AroundCall.__init__, AroundCall.__enter__, AroundCall.after, AroundCall.__exit__):
    disable()(_method)  # Dynamo leaves each of them, and all that it calls, to eager


def refuse_backward(rules: nn.Module) -> None:
    """Raise GraphRegError if a module that runs in a backward pass would draw other masks than the forward did, or have other strengths."""
    key = rules._modules.get("key")
    always = any(child.always for child in rules.children() if isinstance(child, DrawingRule))
    if isinstance(key, (KeyRule, SharedKeyRule)) and key.draws(always):
        key.refuse_backward()
    clock = rules._modules.get(CLOCK)
    if isinstance(clock, (ClockRule, SharedClock)) and clock.counts():
        clock.refuse_backward()


def addable(result: Any) -> Any:
    """Return a call's result, with penalties that can be added to a loss that is a DTensor, if the model's output has DTensors."""
    if not isinstance(result, (Regularized, Kept)):
        return result
    tensors: list[Tensor] = []
    collect(result.output, tensors, [])
    if not any(map(is_distributed, tensors)):
        return result
    output, penalties, *values = result
    return type(result)(output, {name: with_plain_gradient(total) for name, total in penalties.items()}, *values)
