"""Placed blocks: the blocks of a model that is regularized in place, which are the model's own modules.

When a graph of the model calls a placed block, the block runs code that was emitted from a graph. Hooks, ``module.compile()``, FSDP2, and
wrappers of activation checkpointing act on this call as on any call of the module. A placed block gets a generated subclass of its class
as its class. For each graph of the model, it has a ``PlacedCall`` for each variant of its code (two calls may have different code).
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from graphreg.blocks.block import CALLS, Block
from graphreg.blocks.shown_call import BlockCode, call_of_block
from graphreg.errors import GraphRegError, first_line
from graphreg.ir.module_record import ORIGINAL
from graphreg.torch_internals.checkpointing import checkpoint_wrapped
from graphreg.torch_internals.hooked_calls import CALL
from graphreg.torch_internals.interpreter import show_parameters_of, with_own_code
from graphreg.torch_internals.modules import buffers_by_name, parameters_by_name
from graphreg.torch_internals.torch_modes import is_exporting, is_scripted_within

_numbers = itertools.count()
_classes: WeakKeyDictionary[type, type[nn.Module]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class PlacedCall:
    """A variant of a block's code.

    Attributes:
        twin: The object that the code gets as ``self``. The object shares the block's parameters, buffers and submodules, and has the
            runtime modules of one graph of the model.
        eager: The code that runs without torch.compile.
        compiled: The code that Dynamo traces.
        source: The source text of ``eager``.
    """

    twin: Block
    eager: BlockCode
    compiled: BlockCode
    source: str


class Calls:
    """Has an attribute for each ``PlacedCall`` of a block; graphs pass its name to the block. Dynamo guards each attribute separately."""


# The ``Calls`` of each placed block. During a trace, the block lacks its attribute with the ``Calls``, but this entry stays. The reference
# is weak, because a strong one would keep the block alive.
_calls: WeakKeyDictionary[nn.Module, weakref.ref[Calls]] = WeakKeyDictionary()


def new_owner() -> str:
    """Return a new name for a rewritten module whose blocks are placed blocks. The names of its ``PlacedCall``s begin with this name."""
    return f"g{next(_numbers)}"


def place(block: nn.Module) -> None:
    """Make a module a placed block: give it the generated class. Do nothing if it is a placed block already."""
    if _calls_of(block) is None:
        # Neither attribute goes through ``__setattr__``, which the user's class may have
        # overridden.
        vars(block)[CALLS] = calls = Calls()
        _calls[block] = weakref.ref(calls)
        object.__setattr__(block, "__class__", _class_of(type(block)))


def place_again(block: nn.Module) -> None:
    """Give a placed block whose class the user has replaced the generated class for its new class. Other modules stay as they are."""
    if _calls_of(block) is not None and not hasattr(type(block), ORIGINAL):
        object.__setattr__(block, "__class__", _class_of(type(block)))


def require_own_forward(block: nn.Module) -> None:
    """Raise GraphRegError if the forward of a placed block was replaced on the object, unless it passes all keywords on.

    Functions that wrap the forward do so, as those of accelerate, and thus run what the graph needs.
    """
    forward: Any = vars(block).get("forward")
    if forward is None:
        return
    while isinstance(forward, (functools.partial, types.MethodType)):
        forward = forward.func if isinstance(forward, functools.partial) else forward.__func__
    if isinstance(forward, types.FunctionType) and not forward.__code__.co_flags & inspect.CO_VARKEYWORDS:
        raise GraphRegError(
            f"the forward of a block of class {type(block).__name__} was replaced on the object by {forward.__qualname__}, and the graph "
            "calls the block with keywords of its own, which this function does not take. Give the block another class, or replace the "
            "forward before graphreg.regularize_, and leave the block out of blocks=."
        )


def _calls_of(block: nn.Module) -> Calls | None:
    known = _calls.get(block)
    return None if known is None else known()


def add_call(block: nn.Module, name: str, call: PlacedCall) -> None:
    """Add a variant of a block's code, or replace the variant that has this name."""
    place(block)
    setattr(_calls_of(block), name, call)


def leave(block: nn.Module, owner: str = "") -> None:
    """Remove the code of one rewritten module from a block. A block without other code gets its own class back.

    Args:
        block: A module. If it is no placed block, nothing happens.
        owner: The name of the rewritten module (see ``new_owner``); ``""`` to remove no code.

    Raises:
        GraphRegError: Another library has changed the class of the block.
    """
    if (calls := _calls_of(block)) is None:
        return
    kept = {name: call for name, call in vars(calls).items() if name.partition("_")[0] != owner}
    if not kept:
        check_class(block)
        object.__setattr__(block, "__class__", getattr(type(block), ORIGINAL))
        # During a trace, the attribute is not there.
        vars(block).pop(CALLS, None)
        del _calls[block]
    calls.__dict__ = kept


def check_class(block: nn.Module) -> None:
    """Raise GraphRegError if another library has changed the class of a block since ``place``."""
    if ORIGINAL not in vars(type(block)):
        raise GraphRegError(
            f"another library has changed the class of a block of this model to {type(block).__name__} since the model was regularized. "
            "Undo that first."
        )


def is_placed(module: nn.Module) -> bool:
    """Return whether a module is a placed block, that is, a block of a model that is regularized in place."""
    return _calls_of(module) is not None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers of activation checkpointing; the module itself if it is no such wrapper."""
    while (wrapped := checkpoint_wrapped(module)) is not None:
        module = wrapped
    return module


def unwrapped_block(module: nn.Module) -> nn.Module:
    """Return the placed block inside wrappers of activation checkpointing; ``module`` itself if there is no placed block inside."""
    return inner if is_placed(inner := unwrapped(module)) else module


def scriptable(module: nn.Module) -> nn.Module:
    """Return a copy of a model or block in place that shares its tensors, for torch.jit.script, which calls this in its preparation.

    Raises:
        GraphRegError: A module that contains this one is compiled: torch would leave the copy in it. Or the module cannot be copied.
    """
    title, cure = type(module).__name__, "Give torch.jit.script what graphreg.strip_ makes of a copy (copy.deepcopy) of the model."
    if is_scripted_within():
        raise GraphRegError(f"torch.jit.script compiles a module that contains a {title}, which is, or is in, a model in place. {cure}")
    # deepcopy takes what its memo has already, so the copy has these very tensors.
    kept = [*parameters_by_name(module).values(), *buffers_by_name(module).values()]
    kept += (value for each in module.modules() for value in vars(each).values())
    try:
        return copy.deepcopy(module, {id(value): value for value in kept if isinstance(value, torch.Tensor)})
    except Exception as error:
        raise GraphRegError(
            f"{title} cannot be copied ({first_line(error)}), and torch.jit.script would change the modules that it gets. Call "
            "graphreg.strip_(model) first."
        ) from error


def is_block(module: nn.Module) -> bool:
    """Return whether a module is a block object or a placed block, which run emitted code when a graph calls them."""
    return isinstance(module, Block) or is_placed(module)


def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the generated subclass of a class. All blocks of the class share it, so that torch.compile compiles equal blocks once."""
    if kind not in _classes:
        members = {
            ORIGINAL: kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
            "forward": _forward(kind), "__prepare_scriptable__": scriptable, CALL: call_of_block(),
        }  # fmt: skip
        metaclass: Any = type(kind)
        made = metaclass(kind.__name__, (kind,), members)
        made.__reduce_ex__ = _reduce(made)
        _classes[kind] = made
    return _classes[kind]


def _forward(kind: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: Any, *values: Any, graphreg_keys: Any = (), graphreg_variant: str | None = None, **options: Any) -> Any:
        if graphreg_variant is None:  # the call does not come from a graph
            return kind.forward(self, *values, **options)
        call = getattr(self.graphreg_calls, graphreg_variant)
        code, shown = call.compiled if torch.compiler.is_dynamo_compiling() and not is_exporting() else call.eager
        return code(call.twin, shown, *values, *graphreg_keys)

    own: Any = with_own_code(forward)
    theirs: Any = kind.forward
    own.__doc__ = theirs.__doc__
    show_parameters_of(own, theirs)
    return own  # type: ignore[no-any-return]


def _reduce(made: type[nn.Module]) -> Callable[..., Any]:
    def reduce(self: Any, protocol: Any) -> Any:
        """Return what ``__reduce_ex__`` of the block's own class returns, so that a copy has this class.

        The copy becomes a placed block when the copied model is traced.
        """
        reduced = super(made, self).__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        arguments = tuple(getattr(made, ORIGINAL) if argument is type(self) else argument for argument in arguments)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != CALLS}
        # not ``function`` itself: if this is ``copyreg.__newobj__``, pickle requires that its first argument is ``type(self)``
        return _remade, (function, arguments), *rest

    return reduce


def _remade(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)
