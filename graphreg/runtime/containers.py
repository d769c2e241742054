"""What emitted code calls on tuples of which a splice replaces an item."""

from __future__ import annotations

import copy
from typing import Any


def with_item(items: Any, index: int, value: Any) -> Any:
    """Return a tuple or list like another one, with a value in place of one of its items."""
    if isinstance(items, list):
        changed = copy.copy(items)
        changed[index] = value
        return changed
    kind, parts = type(items), list(items)
    parts[index] = value
    if kind is tuple:
        return tuple(parts)
    if hasattr(kind, "_fields"):  # a named tuple
        return kind(*parts)
    if kind.__module__.startswith("torch"):  # such as what ``torch.max`` returns
        return kind(parts)
    made = tuple.__new__(kind, parts)  # whatever the constructor of the user's class takes
    vars(made).update(vars(items))
    return made
