"""``Switches``: the open blocks of ``noise_on`` and ``noise_off`` of one session, or those of ``penalties_off``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graphreg.torch_internals.patching import Changes


class Switches:
    """Knows which blocks are open. The block that was entered last decides. A copy has no open blocks, because they would never end."""

    def __init__(self) -> None:
        self._open: dict[object, bool] = {}  # by block, in the order in which they were entered: whether it switches on

    def __reduce__(self) -> tuple[Any, ...]:
        return Switches, ()

    @property
    def state(self) -> bool | None:
        """True if something is on in every mode, False if it is off in every mode, None if the modules' modes decide."""
        return next(reversed(tuple(self._open.values())), None)

    @property
    def has_on(self) -> bool:
        """Whether a block that switches on is open, also around one that switches off."""
        return True in tuple(self._open.values())

    @contextmanager
    def block(self, on: bool, switched: Callable[[], None]) -> Iterator[None]:
        """Open a block that switches on or off. ``switched``: called when it begins and when it ends."""
        block = object()

        def back() -> None:
            self._open.pop(block, None)
            switched()

        with Changes() as changes, changes:
            changes.later(back)
            self._open[block] = on
            switched()
            yield
