"""Generates the class that ``regularize_`` gives a model: a subclass of the model's own class, with the same name, that runs the graphs."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from graphreg.blocks.placed_block import scriptable
from graphreg.errors import GraphRegError, TraceError
from graphreg.in_place.calls import CallForm, not_traced
from graphreg.in_place.placed import Placed, refuse_other_class
from graphreg.in_place.turns import graphreg_traces_here, wait_for_trace
from graphreg.ir.module_record import MEMBERS, ORIGINAL, PLACED, RESTS
from graphreg.runtime.averaging import follow_averages
from graphreg.torch_internals.dynamo_marks import assume_constant_result, skip_as_outermost
from graphreg.torch_internals.fx import is_traced
from graphreg.torch_internals.fx import traces_here as is_traced_here
from graphreg.torch_internals.interpreter import show_parameters_of, with_own_code
from graphreg.torch_internals.modules import COMPILED_CALL, REPLICATE


def generated_class(model: nn.Module, original: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of ``original`` for one model.

    Each model has a subclass of its own, because Dynamo counts the compilations of each code object, and stops compiling it after eight.
    """
    signature = inspect.signature(original.forward.__get__(model))
    form = CallForm(signature)
    # Weak, or the class and its model would keep each other alive.
    forward = _forward(original, form, weakref.ref(model))
    members: dict[str, Any] = {
        ORIGINAL: original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__init__": _init(original),
        "__call__": _call(original, form, forward),
        "forward": forward,
        "__reduce_ex__": _reduce,
        "_apply": _apply(original),
        "named_modules": follow_averages(original.named_modules, hides_buffers=False),
        REPLICATE: _refuse_replica,
        "__prepare_scriptable__": _scriptable,
    }
    if not hasattr(original, "penalties") and not hasattr(model, "penalties"):
        members["penalties"] = _penalties
    made = types.new_class(original.__name__, (original,), exec_body=lambda space: space.update(members))
    setattr(made, MEMBERS, frozenset((*vars(made), MEMBERS)))
    return made


def state_in(model: nn.Module) -> Placed:
    """Return the state of a model with a generated class."""
    placed = vars(model).get(PLACED)
    if placed is None and not graphreg_traces_here():
        wait_for_trace()  # another thread may trace the model, and has put its state aside
        placed = vars(model).get(PLACED)
    if not isinstance(placed, Placed):
        raise GraphRegError(
            f"this {type(model).__name__} has the class of a model that is regularized in place, but no regularizers: it is a copy that "
            "lacks attributes. Copy the model with copy.deepcopy, or strip_ the model, copy it, and regularize both."
        )
    return placed


skip_as_outermost(state_in)


def _forward(original: type[nn.Module], form: CallForm, of: weakref.ref[nn.Module]) -> Callable[..., Any]:
    @assume_constant_result
    def guarded(key: str) -> bool:
        """While Dynamo compiles, add the guard for the structure's graph. Raise GraphRegError if there is no graph, or only a stale one."""
        model = of()
        assert model is not None
        if not hasattr(state_in(model).graphs, key) or not state_in(model).guard(key):
            raise not_traced(key, original.__name__)
        return True

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            if not hasattr(kind := type(self), ORIGINAL) and RESTS not in vars(kind):  # stripped, and something has wrapped this forward
                return original.forward(self, *args, **kwargs)
            placed = state_in(self)
            if is_traced():
                _refuse_trace(self, placed, args)
            if not (self.training or placed.in_eval):
                return original.forward(self, *args, **kwargs)
            return placed.run(self, form, args, kwargs)
        # Dynamo traces what follows, and cannot trace state_in, which may wait for another thread.
        placed = self.graphreg_in_place
        if not (self.training or placed.in_eval):
            return original.forward(self, *args, **kwargs)
        key = form.key(args, kwargs, placed.loosened)
        guarded(key)
        placed.last = key
        module = getattr(placed.graphs, key)
        return type(module).forward(module, *args, **kwargs)

    own: Any = with_own_code(forward)
    theirs: Any = original.forward
    for name in ("__name__", "__qualname__", "__doc__", "__module__", "__annotations__"):
        if hasattr(theirs, name):
            setattr(own, name, getattr(theirs, name))
    show_parameters_of(own, theirs)
    return own  # type: ignore[no-any-return]


def _call(original: type[nn.Module], form: CallForm, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return original.__call__(self, *args, **kwargs)
        placed = state_in(self)
        if is_traced():
            _refuse_trace(self, placed, args)
        if not (self.training or placed.in_eval):
            return original.__call__(self, *args, **kwargs)
        kind = type(self)
        if kind.forward is not forward and RESTS not in vars(kind):  # else another thread traces the model, for which this call waits
            refuse_other_class(self)
        return placed.call(self, form, partial(original.__call__, self, *args, **kwargs), args, kwargs)

    own = with_own_code(call)
    own.__name__ = "__call__"
    skip_as_outermost(own)  # so that ``placed.call`` can trace the model and prepare attached penalties before Dynamo compiles the forward
    return own


def _init(original: type[nn.Module]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        """Construct a model of the original class, so that the result of ``type(model)(...)`` is not regularized."""
        original.__init__(self, *args, **kwargs)
        object.__setattr__(self, "__class__", original)

    own: Any = init
    own.__name__, own.__signature__ = "__init__", inspect.signature(original.__init__)
    return own  # type: ignore[no-any-return]


def _apply(original: type[nn.Module]) -> Callable[..., Any]:
    def apply(self: Any, fn: Callable[..., Any], recurse: bool = True) -> Any:
        result = original._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        if (placed := vars(self).get(PLACED)) is not None:  # None if code of the model moves a copy that has no attributes yet
            placed.move(fn)
        return result

    return apply


def _penalties(self: Any) -> dict[str, torch.Tensor]:
    """Return the penalties of the last call by name, detached from autograd. This method is for models with ``penalties="attach"``."""
    return state_in(self).last_penalties()


def _refuse_trace(model: nn.Module, placed: Placed, args: Any) -> None:
    """Raise TraceError if torch.fx traces the model where it runs a graph.

    Also raise it if the forward has parameters by name alone, or takes ``*args`` or ``**kwargs``: torch.fx changes the code of such a
    forward, and then ``args`` is no tuple.
    """
    if not is_traced_here():
        return
    if model.training or placed.in_eval:
        raise TraceError(_no_trace(model, "torch.fx", "trace"))
    if not isinstance(args, tuple):
        raise TraceError(
            f"torch.fx cannot trace the forward of this {type(model).__name__} in place, because it takes *args or **kwargs, or arguments "
            "by name alone. Trace a plain copy: graphreg.strip_(copy.deepcopy(model))."
        )


def _no_trace(model: nn.Module, tool: str, verb: str) -> str:
    return (
        f"{tool} cannot {verb} this {type(model).__name__} where it runs the graph of graphreg.regularize_. Call model.eval() first "
        "(without eval_penalties=True), or give it a plain copy: graphreg.strip_(copy.deepcopy(model))."
    )


def _scriptable(self: Any) -> nn.Module:
    """Return the module that torch.jit.script compiles in place of a model in eval mode: its plain copy, with the same tensors."""
    if self.training or state_in(self).in_eval:
        raise TraceError(_no_trace(self, "torch.jit.script", "compile"))
    twin = scriptable(self)
    strip(twin)
    return twin


def strip(model: nn.Module) -> None:
    """Give a model that is regularized in place its own class back, and remove all that graphreg added."""
    if isinstance(placed := vars(model).get(PLACED), Placed):
        placed.leave(model)
    object.__setattr__(model, "__class__", getattr(type(model), ORIGINAL, type(model)))
    vars(model).pop(PLACED, None)
    vars(model).pop(COMPILED_CALL, None)  # after ``model.compile()``: a compiled call of the regularized model


def _refuse_replica(self: Any) -> None:
    raise GraphRegError(
        "this model is regularized in place, and nn.DataParallel on several devices calls replicas of it, which would share the noise "
        "and the graphs. Use DistributedDataParallel, or regularize with graphreg.regularize."
    )


def _reduce(self: Any, protocol: Any) -> Any:
    """Return what ``__reduce_ex__`` of the model's own class returns, but with a new ``Placed`` object for the copy.

    The function in the result is ``_remade``, which generates the class of the copy: pickle cannot find a generated class by name.
    """
    original = getattr(type(self), ORIGINAL)
    reduced = super(type(self), self).__reduce_ex__(protocol)
    if isinstance(reduced, str):
        return reduced
    function, arguments, *rest = reduced
    kind = type(self)
    arguments = tuple(original if argument is kind else argument for argument in arguments)
    if rest and isinstance(rest[0], dict):
        rest[0] = {**rest[0], PLACED: state_in(self).fresh()}
    return _remade, (function, arguments), *rest


def _remade(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    model = function(*arguments)
    object.__setattr__(model, "__class__", generated_class(model, type(model)))
    return model
