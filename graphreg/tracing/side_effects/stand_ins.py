"""Values that stand for what an earlier trace left behind: code that reads or decides by them raises TypeError."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import Any

from graphreg.tracing.frames import home_of, is_foreign


class StaleValue:
    """Stands for a value of an earlier trace. Reading it raises TypeError; reading the length of a container that holds it does not."""

    def _refuse(self, *args: Any) -> Any:
        raise TypeError("the forward reads what its earlier call left behind")

    def __deepcopy__(self, memo: Any) -> StaleValue:
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class that ``isinstance`` sees. Reading the class raises TypeError in the model's code, but not in torch.fx."""
        frame = sys._getframe(1)
        # Skip the frames of isinstance_patch.py, which calls isinstance on behalf of the model's
        # code.
        while frame.f_back is not None and home_of(frame) == "graphreg.tracing.isinstance_patch":
            frame = frame.f_back
        if not is_foreign(frame):
            self._refuse()
        return StaleValue

    __getattr__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __getitem__ = __iter__ = __len__ = __bool__ = _refuse
    __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__


class ChangingNumber(int):
    """A number that each call changes. Code may count it up or down and print it; other arithmetic and comparisons raise TypeError."""

    def __new__(cls, value: float) -> ChangingNumber:
        return int.__new__(cls, value if math.isfinite(value) else 0)

    def __add__(self, other: int) -> ChangingNumber:
        return ChangingNumber(int.__add__(self, other))

    __radd__ = __add__

    def __sub__(self, other: int) -> ChangingNumber:
        return ChangingNumber(int.__sub__(self, other))

    def _refuse(self, *args: Any) -> Any:
        raise TypeError("the forward decides or computes something with a number that each call changes")


_COMPARISONS = {"__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"}
# All members with which an int computes, decides or converts refuse. With the other members, an int
# is printed and copied.
for _name in vars(int).keys() - vars(object).keys() - vars(ChangingNumber).keys() - {"__format__", "__getnewargs__"} | _COMPARISONS:
    _refusal: Any = ChangingNumber._refuse
    setattr(ChangingNumber, _name, _refusal if callable(vars(int)[_name]) else property(_refusal))


# methods that tell the code nothing about what the container holds
_GROWS = {
    "append", "appendleft", "extend", "extendleft", "insert", "add", "__init__", "__new__", "__iadd__", "__ior__", "__getattribute__",
    "__class_getitem__",
}  # fmt: skip


def _plain_kind(items: Any) -> type:
    return next(kind for kind in type(items).__mro__ if kind.__module__ in ("builtins", "collections"))


def _refusing(method: Any) -> Any:
    """Return a method of a container that raises TypeError in the model's code, and does what ``method`` does elsewhere."""

    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Python's library reads for the model: collections.Counter(self.seen)
        if home_of(sys._getframe(1)).partition(".")[0] not in ("graphreg", "torch"):
            raise TypeError(f"the forward reads a {_plain_kind(self).__name__} that each call makes longer or shorter")
        return method(self, *args, **kwargs)

    return ask


@cache
def _changing(kind: Any) -> type:
    refused = {name: _refusing(method) for name, method in vars(kind).items() if callable(method) and name not in _GROWS}
    return type(f"Changing{kind.__name__.title()}", (kind,), refused)


def changing(items: Any) -> Any:
    """Return a copy of a list, set or deque that each call makes longer or shorter. Code may add to it; what reads it raises TypeError."""
    kind: Any = type(items)
    return _changing(kind)(items, *((items.maxlen,) if kind is deque else ()))


class ChangingIterator:
    """An iterator from which each call takes. Code that decides by the numbers or texts that it gives raises TypeError."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items

    def __iter__(self) -> ChangingIterator:
        return self

    def __next__(self) -> Any:
        item = next(self._items)
        if type(item) in (int, float):
            return ChangingNumber(item)
        return StaleValue() if item is None or isinstance(item, (bool, str, bytes, tuple)) else item
