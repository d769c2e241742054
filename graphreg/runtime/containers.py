"""What emitted code calls on tuples of which a splice replaces an item."""

from __future__ import annotations

from typing import Any


def with_item(items: Any, index: int, value: Any) -> Any:
    """Return a tuple or list like another one, with a value in place of one of its items."""
    changed = list(items)
    changed[index] = value
    kind: Any = type(items)
    return kind(*changed) if hasattr(kind, "_fields") else kind(changed)
