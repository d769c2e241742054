"""What stands in the place of a value that the next call would find: whoever does more with it than count is told."""

from __future__ import annotations

import sys
from typing import Any

from graphreg.proxies import FOREIGN


class Gone:
    """Stands for a value of an earlier trace in a list; whoever does more with it than count it is told."""

    def _refuse(self, *args: Any) -> Any:
        raise TypeError("the forward reads what an earlier call of it left behind")

    def __deepcopy__(self, memo: Any) -> Gone:
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What ``isinstance`` asks: the model's code is refused, torch.fx's, which looks through all attributes, is told."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") == "graphreg.kinds":  # it asks for the model's code
            frame = frame.f_back
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in FOREIGN:
            self._refuse()
        return Gone

    __getattr__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __getitem__ = __iter__ = __len__ = __bool__ = _refuse


class Count(int):
    """A number that each call changes. It can be counted on and shown; whoever decides or computes by it is told."""

    def __add__(self, other: int) -> Count:
        return Count(int.__add__(self, other))

    __radd__ = __add__

    def __sub__(self, other: int) -> Count:
        return Count(int.__sub__(self, other))

    def _refuse(self, *args: Any) -> Any:
        raise TypeError("the forward decides or computes by a number that each call changes")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = __mul__ = __rmul__ = __rsub__ = _refuse
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse
    __index__ = __int__ = __float__ = __divmod__ = __and__ = __or__ = __neg__ = __abs__ = _refuse
    __hash__ = int.__hash__
