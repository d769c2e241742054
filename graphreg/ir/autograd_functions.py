"""A call of a ``torch.autograd.Function`` of the user's, which stays one call in a graph: its derivative is its own."""

from __future__ import annotations

from typing import Any


class FunctionCall:
    """The target of such a node. Two of one class are equal.

    Attributes:
        function: The class.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        # what it belongs to, for the analyses of graphs, and what torch.fx writes into the code
        self.__self__ = function
        self.__name__, self.__qualname__, self.__module__ = function.__name__, function.__qualname__, function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionCall) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return FunctionCall, (self.function,)

    def __repr__(self) -> str:
        return f"{self.__qualname__}.apply"
