"""A call of a ``torch.autograd.Function`` of the user's, which stays one call in a graph: its derivative is its own."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

_known: WeakValueDictionary[Any, FunctionCall] = WeakValueDictionary()


def function_call(function: Any) -> FunctionCall:
    """Return the target of a node that calls a ``torch.autograd.Function``: one for each class, so that modules can share their code."""
    call = _known.get(function)
    if call is None:
        call = _known[function] = FunctionCall(function)
    return call


class FunctionCall:
    """The target of such a node.

    Attributes:
        function: The class.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        # ``__self__``: the analyses of graphs ask for the owner. The others: torch.fx writes them into the code.
        self.__self__ = function
        self.__name__, self.__qualname__, self.__module__ = function.__name__, function.__qualname__, function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return function_call, (self.function,)

    def __repr__(self) -> str:
        return f"{self.__qualname__}.apply"
