"""The proxies of arguments that are containers, such as a batch that is a dict.

What a container holds besides tensors and numbers is known from the example inputs, and so are its
keys and its length: the structure of a call's arguments includes them (``CallStructures``). So the
forward gets them as they are, and only tensors and numbers are proxies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor, fx

from graphreg.torch_internals import pytree
from graphreg.torch_internals.bytecode import unpacked
from graphreg.tracing.frames import is_caught
from graphreg.tracing.symbolic.proxies import AttributeProxy, Value, attributes_of

# in a node's ``meta``: the id of the example input that the node's value stands for
LEAF = "graphreg_leaf"
# in ``__dict__``, where no field has such a name
_CONTENTS, _INNER = "graphreg_contents", "graphreg_inner"
_PLAIN = (list, tuple, Mapping)
_CHANGING = frozenset({
    "append", "extend", "insert", "remove", "pop", "popitem", "clear", "update", "setdefault", "sort", "reverse", "move_to_end",
})  # fmt: skip


def is_container(value: Any) -> bool:
    """Return whether an example input is a list, tuple or dict, or an object of a class that is registered with torch's pytree."""
    return isinstance(value, _PLAIN) or type(value) in pytree.SUPPORTED_NODES


def stand_in(proxy: fx.Proxy, example: Any) -> Any:
    """Return what stands for an example input in a trace, or for something in one: a proxy, or the value itself.

    Args:
        proxy: The proxy of the value.
        example: The value that it has in the example inputs.
    """
    if isinstance(example, Tensor):
        return proxy.tracer.input_leaf(proxy, example)  # type: ignore[attr-defined]
    return Holder.around(proxy, example) if is_container(example) else proxy


class Holder(Value):
    """The proxy of a container. What the forward changes in a list or dict, it changes in the proxy's contents, too."""

    @classmethod
    def around(cls, proxy: fx.Proxy, example: Any) -> Holder:
        """Return the proxy of a container that has the node of ``proxy``."""
        made = (MappingHolder if isinstance(example, Mapping) else SequenceHolder if isinstance(example, (list, tuple)) else cls)(
            proxy.node, proxy.tracer
        )
        attributes_of(made).update({_CONTENTS: example, _INNER: {}})
        return made

    def _item(self, item: Any, make: Callable[[], Any]) -> Any:
        """Return what stands for an item. ``make``: records how the item is read, and returns its proxy."""
        if self._is_changed:
            return item
        if isinstance(item, Tensor) or (isinstance(item, (int, float)) and type(item) in (int, float)):
            return stand_in(make(), item)
        if not is_container(item):
            return item
        inner = attributes_of(self)[_INNER]
        if id(item) not in inner:
            inner[id(item)] = stand_in(make(), item)
        return inner[id(item)]

    @property
    def _known(self) -> Any:
        """The container in the example inputs; after a change, a copy of what it holds in the trace; None if that is not known."""
        return attributes_of(self)[_CONTENTS]

    @property
    def _is_changed(self) -> bool:
        return attributes_of(self)[_INNER] is None

    def _held(self) -> Any:
        """Return what the container holds in the trace, for a change; None if that is not known."""
        known = self._known
        if not isinstance(known, (list, dict)):
            attributes_of(self).update({_CONTENTS: None, _INNER: None})
        elif not self._is_changed:
            held = copy(known)
            for key in range(len(known)) if isinstance(known, list) else known:
                held[key] = self[key]
            attributes_of(self).update({_CONTENTS: held, _INNER: None})
        return self._known

    def _change(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Change the container by one of its methods, in the graph and in the trace; return what the method returns."""
        held = self._held()
        result = None if held is None else getattr(held, method)(*args, **kwargs)
        if method == "sort" and held is not None:  # by the key, a function, which a graph cannot have as an argument
            super().__setitem__(slice(None), [*held])
            return None
        recorded = super().__getattr__(method)(*args, **kwargs)
        return recorded if held is None else result

    def __getitem__(self, key: Any) -> Any:
        def make() -> Any:
            return super(Holder, self).__getitem__(key)  # type: ignore[misc]  # fx sets its methods at run time

        known = self._known
        if known is None or isinstance(key, (slice, fx.Proxy)):
            return make()
        return self._item(known[key], make)

    def __getattr__(self, k: str) -> Any:
        known = self._known
        if k in _CHANGING and not hasattr(type(known), "_fields"):
            return partial(self._change, k)
        if known is None:
            return super().__getattr__(k)
        if isinstance(known, Mapping) and k in ("get", "values", "items", "copy"):
            return getattr(self, f"_{k}")
        fields = getattr(type(known), "_fields", None) or getattr(known, "__dict__", {}) or getattr(type(known), "__slots__", ())
        if k not in fields:
            return super().__getattr__(k)
        value = getattr(known, k)
        return AttributeProxy(self, k) if type(value) in (int, float) else self._item(value, lambda: AttributeProxy(self, k))

    def __setitem__(self, key: Any, value: Any) -> None:
        if (held := self._held()) is not None:
            held[key] = value
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        if isinstance(key, slice):
            raise TypeError("it deletes a slice of an argument")
        self._change("pop", key)

    def __contains__(self, key: Any) -> bool:
        if not isinstance(known := self._known, Mapping):
            return any(item is key or bool(item == key) for item in self)
        return key in known

    def __iter__(self) -> Iterator[Any]:
        known = self._known
        if isinstance(known, Mapping):
            return iter(list(known))
        frame = sys._getframe(1)
        if not isinstance(known, (list, tuple)) or (unpacked(frame) == (len(known), 0, False) and not is_caught(frame)):
            # asserts the number of unpacked items, as a trace without examples does, for one graph
            # of both
            return super().__iter__()
        return iter([self[i] for i in range(len(known))])

    def __len__(self) -> int:
        return len(known) if isinstance(known := self._known, _PLAIN) else super().__len__()

    def __bool__(self) -> bool:
        return bool(known) if isinstance(known := self._known, _PLAIN) else super().__bool__()

    def keys(self) -> Any:
        """Return the keys. torch.fx calls this method for ``**batch``."""
        known = self._known
        return list(known) if isinstance(known, Mapping) else super().keys()

    def _get(self, key: Any, default: Any = None) -> Any:
        if key not in self._known:
            return default

        def make() -> Any:
            return self.tracer.create_proxy("call_method", "get", (self, key), {})

        return self._item(self._known[key], make)

    def _values(self) -> list[Any]:
        return [self[key] for key in self._known]

    def _items(self) -> list[tuple[Any, Any]]:
        return [(key, self[key]) for key in self._known]

    def _copy(self) -> dict[Any, Any]:
        return dict(self._items())


@Mapping.register
class MappingHolder(Holder):
    """The proxy of a dict. Python asks the class alone whether a pattern of a mapping (``case {"q": q}:``) may match."""

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of a key, or the default. Python calls this method for such a pattern."""
        return super().__getattr__("get")(key, default)

    def __ior__(self, other: Any) -> Any:
        if not isinstance(self._known, dict):
            return NotImplemented
        self._change("update", other)
        return self


@Sequence.register
class SequenceHolder(Holder):
    """The proxy of a list or tuple. Python asks the class alone whether a pattern of a sequence (``case [a, b]:``) may match."""

    def __iadd__(self, other: Any) -> Any:
        if not isinstance(self._known, list):
            return NotImplemented
        self._change("extend", other)
        return self
