"""Where Python looks for modules while a command runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def on_the_path(folder: Path) -> Iterator[None]:
    """A folder whose modules can be imported meanwhile."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the model's code has taken it out already
            sys.path.remove(str(folder))
