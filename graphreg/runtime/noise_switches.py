"""``NoiseSwitches``: the open blocks of ``noise_on`` and ``noise_off`` of one module or backend, or those of ``penalties_off``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graphreg.torch_internals import Changes


class NoiseSwitches:
    """Knows which blocks are open. The block that was entered last decides. A copy has no open blocks, because they would never end."""

    def __init__(self) -> None:
        self._open: dict[object, bool] = {}  # by block, in the order in which they were entered: whether it switches the noise on

    def __reduce__(self) -> tuple[Any, ...]:
        return NoiseSwitches, ()

    @contextmanager
    def block(self, on: bool, switch: Callable[[bool | None], None]) -> Iterator[None]:
        """Open a block.

        Args:
            on: True if the block switches the noise on, False if it switches the noise off.
            switch: A function that is called when the block begins and when it ends. Its argument is True if the noise is now on in every
                mode, False if it is off in every mode, and None if the modules' modes decide.
        """
        block = object()

        def back() -> None:
            self._open.pop(block, None)
            switch(self._last())

        with Changes() as changes, changes:
            changes.later(back)
            self._open[block] = on
            switch(self._last())
            yield

    def _last(self) -> bool | None:
        return next(reversed(self._open.values()), None)
