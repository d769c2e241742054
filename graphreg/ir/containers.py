"""Finds the call by which a graph builds a container of a subclass, and the loss in an output.

torch.fx turns containers such as OrderedDict and the outputs of transformers into plain dicts,
lists or tuples, so the graph must build them again. Of the subclasses of dict, list and tuple,
torch.fx itself keeps only named tuples.
"""

from __future__ import annotations

from collections import ChainMap, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.fx import immutable_collections

from graphreg.ir.made_objects import MadeObject

_PLAIN = (dict, list, tuple, torch.Size, immutable_collections.immutable_list, immutable_collections.immutable_dict)
_UNSUPPORTED = (deque, set, frozenset, UserDict, UserList, ChainMap, MappingProxyType)
_FACTORIES: dict[str, Any] = {each.__name__: each for each in (list, dict, set, tuple, int, float, str, bool)} | {"None": None}
_INSTEAD = "Return a tuple, list, dict, named tuple or dataclass"

Building = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def building(value: Any) -> Building | None:
    """Find the call that rebuilds a container from its elements.

    Returns:
        The function, its arguments and keywords; None if torch.fx rebuilds the container itself, or
        if the value is no container.

    Raises:
        NotImplementedError: No call rebuilds the container. torch.fx would turn it into a plain
            dict, list or tuple without a warning.
    """
    kind = type(value)
    if isinstance(value, _UNSUPPORTED):
        raise NotImplementedError(f"a {kind.__name__}, which a graph of torch.fx cannot hold. {_INSTEAD}")
    # a named tuple, which torch.fx rebuilds itself
    structured = hasattr(value, "_fields") or hasattr(value, "n_sequence_fields")
    if isinstance(value, tuple) and structured and getattr(value, "__dict__", None):
        raise NotImplementedError(f"a named tuple of class {kind.__name__} with attributes of its own. {_INSTEAD}")
    if kind in _PLAIN or structured or not isinstance(value, (dict, list, tuple)):
        return None

    if isinstance(value, defaultdict) and kind is defaultdict:
        name = next((name for name, factory in _FACTORIES.items() if value.default_factory is factory), None)
        if name is None:
            raise NotImplementedError(
                f"a defaultdict whose factory, {value.default_factory}, is none of {', '.join(_FACTORIES)}. {_INSTEAD}, or convert it by "
                "dict()"
            )
        return made_defaultdict, (name, dict(value)), {}

    # A call of the class with its elements, if that gives the same value again.
    call: Building
    if isinstance(value, dict):  # outputs of transformers are both dataclasses and dicts
        call = (kind, (), dict(value)) if is_dataclass(value) else (kind, (dict(value),), {})
    else:
        call = kind, (list(value),), {}

    try:
        same = _content(kind(*call[1], **call[2])) == _content(value)
    except Exception:  # a user's class may raise anything
        same = False

    if not same:
        raise NotImplementedError(f"a {kind.__name__}, which calling {kind.__name__} with its elements does not rebuild. {_INSTEAD}")
    return call


def made_defaultdict(factory: str, items: Mapping[Any, Any]) -> defaultdict[Any, Any]:
    """Make a defaultdict from the name of its factory, because an argument in a graph cannot be a type."""
    return defaultdict(_FACTORIES[factory], items)


def builds(node: fx.Node) -> bool:
    """Return whether a node builds a container by calling its class or ``made_defaultdict``, or makes an object of the model's."""
    return node.op == "call_function" and (isinstance(node.target, (type, MadeObject)) or node.target is made_defaultdict)


def end_of(output: fx.Node) -> fx.Node:
    """Return the node that builds the output: the graph's output node, or the call that makes the container which the graph returns."""
    value = output.args[0]
    return value if isinstance(value, fx.Node) and builds(value) else output


def loss_of(output: fx.Node) -> fx.Node | None:
    """Return the node of the output's ``loss``; None if the output has no loss."""
    end, value = end_of(output), output.args[0]
    # a node builds the container: a dataclass or named tuple from its fields, a dict subclass from
    # a dict
    if end is not output:
        names: Any = getattr(end.target, "_fields", None) or getattr(end.target, "__dataclass_fields__", ())
        mapping = next((arg for arg in end.args if isinstance(arg, dict)), None)
        value = dict(zip(names, end.args, strict=False)) | end.kwargs if mapping is None else mapping
    loss = value.get("loss") if isinstance(value, dict) else getattr(value, "loss", None) if isinstance(value, tuple) else None
    return loss if isinstance(loss, fx.Node) else None


def _content(value: Any) -> Any:
    """Return the ids of a container's elements and attributes. ``building`` compares ids, because traced values cannot be compared."""
    items = [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else list(map(id, value))
    return items, {name: id(attribute) for name, attribute in getattr(value, "__dict__", {}).items()}


def plain_containers(value: Any) -> Any:
    """Return an argument of a node, or its values, as emitted code passes it: torch.fx has immutable lists and dicts in a graph."""
    kind = type(value)
    # a list of the graph; a list that a node gave is the same object for all that read it
    if kind is immutable_collections.immutable_list:
        return list(map(plain_containers, value))
    if kind is immutable_collections.immutable_dict:
        return {key: plain_containers(item) for key, item in value.items()}
    if kind is tuple:
        return tuple(map(plain_containers, value))
    return type(value)(*map(plain_containers, value)) if issubclass(kind, tuple) and hasattr(kind, "_fields") else value
