"""The forward of a rewritten module: which of the emitted codes a call goes to, and what it refuses before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphreg.errors import GraphRegError, TraceError
from graphreg.ir import holds
from graphreg.runtime.attach import collect
from graphreg.runtime.join import forget, know
from graphreg.runtime.keys import KeyRule
from graphreg.runtime.leaf import Drawing
from graphreg.runtime.vjp import run
from graphreg.torch_internals import NO_BACKWARD, backward_task, is_traced, skip_frame, traces_here, with_own_code

Forwards = Mapping[str, Callable[..., Any]]


def chosen(
    forwards: Forwards, compiled: Forwards, held: Mapping[str, Any], carried: Sequence[str], additions: str, derivatives: Sequence[str]
) -> Callable[..., Any]:
    """The forward of the class: refuses another tracer, checks held arguments, goes to the mode's own code.

    ``derivatives``: names of the additions that differentiate, which have the code run under their conditions.
    """
    in_train, in_eval = (forwards.get("both") or forwards[mode] for mode in ("train", "eval"))
    train_compiled, eval_compiled = (compiled.get("both") or compiled[mode] for mode in ("train", "eval"))
    positions, required = _positions(in_train, held), _positions(in_train, dict.fromkeys(carried))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The model's, in the mode that it is in, with what was added: ``(output, penalties)``, or the output where these attach."""
        if not torch.compiler.is_compiling() and is_traced() and additions in self._modules and traces_here():
            raise TraceError(
                "a rewritten module cannot be traced again: the trace would freeze its keys and its mode. "
                "Use its .graph, or trace what graphreg.strip(module) gives."
            )
        for name, (position, value) in positions.items():
            given = args[position] if position < len(args) else kwargs.get(name, value)
            if given is not value and not (type(given) is type(value) and given == value):
                raise GraphRegError(
                    f"{name} was held at {value!r} when the model was traced. Give regularize example_inputs that carry {name}."
                )
        for name, (position, _) in required.items():
            if position >= len(args) and name not in kwargs:
                raise GraphRegError(
                    f"{name} was carried by the example_inputs, so the graph needs it. Give it at each call, or trace without it."
                )
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():  # an exported program is torch's alone
            code = train_compiled if self.training else eval_compiled
        else:
            code = in_train if self.training else in_eval
        if derivatives and additions in self._modules:
            return run(code, self, args, kwargs, self._modules[additions], derivatives)
        return code(self, *args, **kwargs)

    # Dynamo counts recompilations by code object (8 and it gives up): each module needs one of its own, as fx's have.
    return functools.wraps(in_train)(with_own_code(forward))


def signature(forward: Callable[..., Any], graph: fx.Graph) -> inspect.Signature:
    """What a forward takes: no ``**kwargs`` where the graph asserts that nothing comes by it.

    Trainers ask: that of transformers gives ``num_items_in_batch`` to whatever takes ``**kwargs``, and leaves to it what the
    loss is divided by.
    """
    empty = {str(n.args[0].target) for n in graph.nodes if n.target is holds and isinstance(n.args[0], fx.Node) and not n.args[2]}
    found = inspect.signature(forward)
    return found.replace(parameters=[p for p in found.parameters.values() if p.kind is not p.VAR_KEYWORD or f"**{p.name}" not in empty])


def guarded(additions: str) -> Callable[..., Any]:
    """The ``__call__`` of the class, around what torch.compile compiles: a compiled forward cannot know that backward runs it.

    In place of torch.fx's, which prints the line of the emitted code where an error arose, and walks the traceback for that of the
    exception, too, by which ``checkpoint(use_reentrant=False)`` ends a recomputation early. Under fullgraph=True that raises
    "Attempt to trace generator" (torch 2.13, for every GraphModule).
    """

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if backward_task() != NO_BACKWARD and additions in self._modules:
            _refuse(self._modules[additions])
        rules = self._modules.get(additions)
        attach = None if rules is None else rules._modules.get("attach")
        if attach is not None and not torch.compiler.is_compiling():
            result = _attached(attach, self, args, kwargs)
        else:
            result = nn.Module.__call__(self, *args, **kwargs)
        if rules is not None and (watching := rules.__dict__.get("watching")) is not None:
            watching.after(self)
        return result

    skip_frame(called)  # Dynamo compiles what it calls: the forward of each module, not this one code of all
    return called


def _attached(attach: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A call whose penalties attach, with the scale that they have at it; where they join its arguments are known."""
    before = _begin(attach, args, kwargs)
    try:
        return nn.Module.__call__(module, *args, **kwargs)
    finally:
        _end(attach, before)


skip_frame(_attached)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begin(attach: Any, args: Any, kwargs: Any) -> frozenset[int] | None:
    if attach.asks:
        attach.feed()
        attach.fed = True
    found: list[Tensor] = []
    strange: list[str] = []
    collect((args, kwargs), found, strange)
    return know(None if strange else found)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _end(attach: Any, before: frozenset[int] | None) -> None:
    forget(before)
    if attach.asks:
        attach.fed = False


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse(rules: nn.Module) -> None:
    key = rules._modules.get("key")
    if isinstance(key, KeyRule) and key.draws(any(leaf.always for leaf in rules.children() if isinstance(leaf, Drawing))):
        key.refuse_backward()


def _positions(forward: Callable[..., Any], held: Mapping[str, Any]) -> dict[str, tuple[int, Any]]:
    names = list(forward.__code__.co_varnames[1 : forward.__code__.co_argcount])
    return {name: (names.index(name), value) for name, value in held.items() if name in names}
