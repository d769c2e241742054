"""Gives values their names by the rules of torchvision's feature extraction; a module's path always names that module's output."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import fx, nn

from graphreg.ir.metadata import add_label, label_site
from graphreg.ir.operations import IN_PLACE_NAMES, function_name
from graphreg.ir.site import Label

COUNTED = re.compile(r"_\d+$")


def identifier(name: str) -> str:
    """Return a site's name as a Python identifier: ``layer1.0.relu`` becomes ``layer1_0_relu``."""
    text = re.sub(r"\W", "_", name)
    return f"_{text}" if text[0].isdigit() else text


class Namer:
    """Hands out unique names for values by torchvision's rules, except that a module's path is reserved for that module."""

    def __init__(self, paths: Collection[str]) -> None:
        self._paths, self._used, self._order = paths, set[str](), list[str]()
        self._next: dict[str, int] = {}

    def module(self, path: str) -> str:
        """Return a name for the output of the module at ``path``: the path; from the module's second call on, the path with a number."""
        return self._take(path) if path not in self._used else self._count(path)

    def operation(self, scope: str, base: str) -> str:
        """Return a name for the value of an operation ``base`` in the forward of the module at ``scope``."""
        name = f"{scope}.{base}" if scope else base
        return self._take(name) if name not in self._used and name not in self._paths else self._count(name)

    def claim(self, name: str) -> bool:
        """Reserve a name that a value has already. Return False if the name was handed out before, else True."""
        return name not in self._used and bool(self._take(name))

    def mark(self) -> int:
        """Return a number for the current state, to which ``roll_back`` can return."""
        return len(self._order)

    def roll_back(self, mark: int) -> None:
        """Free all names that were handed out since the call of ``mark()`` that returned ``mark``."""
        for name in self._order[mark:]:
            self._used.discard(name)
            base, _, count = name.rpartition("_")
            # the number in the name may be handed out again
            if base in self._next and count.isdigit():
                self._next[base] = max(1, min(self._next[base], int(count)))
        del self._order[mark:]

    def _take(self, name: str) -> str:
        self._used.add(name)
        self._order.append(name)
        return name

    def _count(self, base: str) -> str:
        count = self._next.get(base, 1)
        while (name := f"{base}_{count}") in self._used or name in self._paths:
            count += 1
        self._next[base] = count + 1
        return self._take(name)


def label_node(node: fx.Node, scope: str, modules: Mapping[str, nn.Module], namer: Namer) -> None:
    """Give the node's value its first label, and record the path of the module that made the value."""
    if node.op == "call_module":
        path = str(node.target)
        label = Label(namer.module(path), type(modules[path]).__name__, module=path)
        scope = path
    elif node.op == "placeholder":
        # named by its target: fx gives the node of an argument ``input`` another name
        label = Label(namer.operation("", str(node.target).lstrip("*")), "input")
    else:
        base = COUNTED.sub("", node.name)
        op = "parameter" if node.op == "get_attr" else function_name(node).strip("_") or base
        # ``+=`` is named like ``+``, as in torchvision
        if node.op == "call_function" and op in IN_PLACE_NAMES:
            base, op = re.sub("^i", "", base), op[1:]
        label = Label(namer.operation(scope, base), op)
    label_site(node, scope, label)


def label_output(value: Any, name: str, path: str, kind: str) -> None:
    """Give the output of the module at ``path`` a label called ``name``; if the output is a container, label its elements instead."""
    if isinstance(value, fx.Proxy):
        add_label(value.node, Label(name, kind, module=path))
        return
    for ports, element, default in elements(value):
        if isinstance(element, fx.Proxy):
            add_label(element.node, Label(name, kind, ports, default, module=path))


def elements(value: Any, prefix: str = "") -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """Yield (port names, element, whether it is the default) for each element of a nested tuple, list, dict, named tuple or dataclass.

    The default is the element that a selector without a port selects.
    """
    if isinstance(value, dict):
        items = [(str(key), element) for key, element in value.items()]
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(str(i), element) for i, element in enumerate(value)]
    else:
        return

    plain = isinstance(value, (tuple, list)) and not hasattr(value, "_fields")
    for key, element in items:
        # ``isinstance(proxy, tuple)`` may be true for a traced tuple
        proxy = isinstance(element, fx.Proxy)
        if not proxy and (isinstance(element, (tuple, list, dict)) or (is_dataclass(element) and not isinstance(element, type))):
            yield from elements(element, f"{prefix}{key}.")
        else:
            # the selectors ``name`` and ``name:out`` select the first element
            first = plain and not prefix and key == "0"
            yield ((("out", "0") if first else (prefix + key,)), element, first or prefix + key == "out")
