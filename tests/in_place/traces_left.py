"""What can be seen of an object and of the modules in it, to compare before and after ``regularize_`` and ``strip_``."""

from __future__ import annotations

from typing import Any

from torch import nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


def seen(model: nn.Module) -> dict[str, Any]:
    """Return, by path, the class of each module, and by identity what its ``__dict__`` has; of dicts, such as hooks, also the entries."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        space = vars(module)
        entries = {name: {key: id(each) for key, each in value.items()} for name, value in space.items() if isinstance(value, dict)}
        found[path] = type(module), {name: id(value) for name, value in space.items()}, entries, list(space)
        assert set(_REGISTRIES) <= entries.keys()
    return found


def stored(model: nn.Module) -> tuple[Any, ...]:
    """Return what ``state_dict`` has: names and tensors, by identity, and its metadata."""
    state = model.state_dict(keep_vars=True)
    return [(name, id(value)) for name, value in state.items()], dict(state._metadata)  # type: ignore[attr-defined]
