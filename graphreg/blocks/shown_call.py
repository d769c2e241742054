"""Shows the hooks of a block the call that the model makes: its arguments and its result.

The emitted code of a block takes the values that the code reads, and returns those that are read outside of the block. What acts on the
call itself, such as FSDP2 and wrappers of activation checkpointing, gets these. The hooks of all others run within the call, around the
code (``hooked``), and ``call_of_block`` leaves them out around the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphreg.errors import GraphRegError
from graphreg.torch_internals import pytree
from graphreg.torch_internals.dynamo_marks import skip_as_outermost
from graphreg.torch_internals.hooked_calls import (
    call_with_hooks,
    has_users_hooks,
    hooks_take_keywords,
    is_machinery,
    is_users_hook,
    plain_call,
)
from graphreg.torch_internals.interpreter import with_own_code

KEYS, VARIANT = "graphreg_keys", "graphreg_variant"  # the keyword arguments of a block's forward
Code = Callable[..., Any]


@dataclass(frozen=True)
class CallElement:
    """An element of the arguments or of the result of a call in the model.

    Attributes:
        given: Its place among the values that the code gets; None if it is none of them.
        left: Its place among the values that the code returns; None if it is none of them.
        fixed: Whether the code reads it from elsewhere, too, and so does not follow if a hook replaces it.
        plain: The element itself, if it is a number, a string or the like.
        kind: What it is, for an error, if the code has no such value.
    """

    given: int | None = None
    left: int | None = None
    fixed: bool = False
    plain: Any = None
    kind: str = ""


@dataclass(frozen=True)
class Shape:
    """Nested containers with elements in them: those of the arguments or of the result of a call."""

    elements: tuple[CallElement, ...]
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, containers: Any) -> Shape:
        """Return the shape of containers that have elements in them."""
        elements, structure = pytree.tree_flatten(containers)
        return cls(tuple(elements), structure)

    def filled(self, given: Sequence[Any], left: Sequence[Any]) -> Any:
        """Return the containers with the values in place of the elements."""
        return pytree.tree_unflatten([_found(element, given, left) for element in self.elements], self.structure)

    def missing(self) -> str:
        """Return what the first element is that no call of the code has; ``""`` if the code has all."""
        return next((element.kind for element in self.elements if element.kind), "")


def _found(element: CallElement, given: Sequence[Any], left: Sequence[Any]) -> Any:
    if element.left is not None:
        return left[element.left]
    return element.plain if element.given is None else given[element.given]


@dataclass(frozen=True)
class ShownCall:
    """A call of a block as the model makes it.

    Attributes:
        arguments: The pair of the arguments and the keyword arguments.
        positional: The arguments.
        output: The result.
        single: Whether the code returns one value, and not a tuple of values.
    """

    arguments: Shape
    positional: Shape
    output: Shape
    single: bool

    def run(self, block: nn.Module, path: str, code: Code, values: Sequence[Any]) -> Any:
        """Run the code of a block with the user's hooks of the block, and return what the code returns.

        Raises:
            GraphRegError: A hook gets or replaces what is no value of the code.
        """
        # A hook may look at all that it gets, so nothing of it may be lacking.
        kind = self.output.missing() or (self.arguments if hooks_take_keywords(block) else self.positional).missing()
        if kind:
            raise GraphRegError(f"{_who(path)} would get {kind}, which the emitted code does not have there. {_CURE}")
        left: list[Any] = []

        def run(args: Any, kwargs: Any) -> Any:
            results = code(*self._replaced(path, values, "given", self.arguments, (args, kwargs), values, ()))
            left.extend([results] if self.single else results)
            return self.output.filled(values, left)

        output = call_with_hooks(block, is_users_hook, run, *self.arguments.filled(values, ()))
        results = self._replaced(path, left, "left", self.output, output, values, left)
        return results[0] if self.single else tuple(results)

    def _replaced(
        self, path: str, old: Sequence[Any], place: str, shape: Shape, now: Any, given: Sequence[Any], left: Sequence[Any]
    ) -> list[Any]:
        """Return the values of the code after hooks, which may have replaced some in their containers."""
        new = list(old)
        try:
            pairs = list(zip(shape.elements, shape.structure.flatten_up_to(now), strict=True))
        except ValueError:
            pairs = None
        # a container may also stand where the structure has a single value
        if pairs is None or any(isinstance(v, (tuple, list, dict)) and v is not _found(e, given, left) for e, v in pairs):
            raise GraphRegError(f"{_who(path)} has returned another structure than it got. {_CURE}")
        for element, value in pairs:
            if value is not _found(element, given, left) and (index := getattr(element, place)) is not None and not element.fixed:
                new[index] = value
        # A value may stand in several places: a hook that replaces it must have done so in all.
        for element, value in pairs:
            if value is not _found(element, *((new, left) if place == "given" else (given, new))):
                raise GraphRegError(f"{_who(path)} has replaced a value that the emitted code reads from elsewhere, too. {_CURE}")
        return new


def _who(path: str) -> str:
    return f"a hook on the block {path!r}"


BlockCode = tuple[Code, ShownCall | None]  # a function that ``hooked`` made, and its second argument
_CURE = (
    "Register the hook on a layer that the graph calls, such as an nn.Linear, or on a module that has no such values, and name that in "
    "blocks=."
)


def hooked(code: Code) -> Code:
    """Return a function that runs the code of a block, with the user's hooks of the block around it.

    Its second argument says what the hooks get. It is not a part of the function, so that equal blocks have one function.
    """

    def run(block: Any, shown: ShownCall | None, *values: Any) -> Any:
        record = block.graphreg_block
        called = record.called[0] if record.called else block
        if not has_users_hooks(called):
            return code(block, *values)
        if shown is None:
            raise GraphRegError(
                f"{_who(record.path)} would get what the model's call gets, which a graph knows only if graphreg has traced the model, and "
                "this one was a GraphModule. Regularize the model that it was made from."
            )
        return shown.run(called, record.path, functools.partial(code, block), values)

    return run


def call_of_block() -> Callable[..., Any]:
    """Return the method by which torch calls a block, with its hooks. A call by a graph runs the user's hooks within the forward."""

    def call(self: Any, *values: Any, **options: Any) -> Any:
        if VARIANT not in options or not has_users_hooks(self):
            return plain_call(self, *values, **options)
        return call_with_hooks(self, is_machinery, lambda args, kwargs: self.forward(*args, **kwargs), values, options)

    own = with_own_code(call)
    # As in torch, block.compile() compiles the forward, and leaves out the hooks: Dynamo refuses to trace those of FSDP2.
    skip_as_outermost(own)
    return own
