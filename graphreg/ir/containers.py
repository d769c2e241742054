"""Rebuilds containers that torch.fx does not know (dataclasses, OrderedDict, subclasses of dict) in a graph that returns them."""

from __future__ import annotations

from collections import ChainMap, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.fx import immutable_collections

_PLAIN = (dict, list, tuple, torch.Size, immutable_collections.immutable_list, immutable_collections.immutable_dict)
_UNSUPPORTED = (deque, set, frozenset, UserDict, UserList, ChainMap, MappingProxyType)
_FACTORIES: dict[str, Any] = {each.__name__: each for each in (list, dict, set, tuple, int, float, str, bool)} | {"None": None}
_INSTEAD = "Return a tuple, list, dict, named tuple or dataclass"

Building = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def building(value: Any) -> Building | None:
    """Find the call that makes a container again.

    Returns:
        The function, its arguments and keywords; None where torch.fx handles the container itself.

    Raises:
        NotImplementedError: where no call does. torch.fx would turn it into a plain dict, list or tuple without a warning.
    """
    kind = type(value)
    if isinstance(value, _UNSUPPORTED):
        raise NotImplementedError(f"a {kind.__name__}, which no graph of torch.fx holds. {_INSTEAD}")
    structured = hasattr(value, "_fields") or hasattr(value, "n_sequence_fields")  # named tuples: fx makes those again itself
    if kind in _PLAIN or structured or not isinstance(value, (dict, list, tuple)):
        return None
    if isinstance(value, defaultdict) and kind is defaultdict:
        name = next((name for name, factory in _FACTORIES.items() if value.default_factory is factory), None)
        if name is None:
            raise NotImplementedError(
                f"a defaultdict whose factory, {value.default_factory}, is none of {', '.join(_FACTORIES)}. {_INSTEAD}, or dict(...) of it"
            )
        return made_defaultdict, (name, dict(value)), {}
    call: Building
    if isinstance(value, dict):  # transformers' outputs are dataclasses and dicts at once
        call = (kind, (), dict(value)) if is_dataclass(value) else (kind, (dict(value),), {})
    else:
        call = kind, (list(value),), {}
    try:
        same = _content(kind(*call[1], **call[2])) == _content(value)
    except Exception:  # whatever its class raises on what it does not take
        same = False
    if not same:
        raise NotImplementedError(f"a {kind.__name__}, which its class does not make again of what is in it. {_INSTEAD}")
    return call


def made_defaultdict(factory: str, items: Mapping[Any, Any]) -> defaultdict[Any, Any]:
    """Make a defaultdict from the name of its factory, as no argument in a graph can be a type."""
    return defaultdict(_FACTORIES[factory], items)


def builds(node: fx.Node) -> bool:
    """Whether a node builds a container: a dataclass, or a class of its own."""
    return node.op == "call_function" and (isinstance(node.target, type) or node.target is made_defaultdict)


def _content(value: Any) -> Any:
    """The content of a container, for comparison; elements by identity, as a traced value cannot be compared."""
    items = [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else list(map(id, value))
    return items, {name: id(attribute) for name, attribute in getattr(value, "__dict__", {}).items()}
