"""What submodules change that are kept whole: they run at each call, and in no trace, so what is theirs is taken away for a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from graphreg.torch_internals import forward_hooks
from graphreg.tracing.side_effects.places import REGISTERED, Attributes, Cells, Container, Count, Gone, Items, Variables, is_plain
from graphreg.tracing.side_effects.reach import Reach, others, reached
from graphreg.tracing.side_effects.snapshot import Before

_NOTHING = object()


def unseen(model: nn.Module, leaves: Mapping[str, str]) -> list[nn.Module]:
    """The modules whose code, which is not torch's, runs in no trace: those kept whole with all in them, and layers with hooks."""
    kept = [module for path in leaves if path for module in model.get_submodule(path).modules()]
    hooked = [module for module in model.modules() if others(type(module)) and forward_hooks(module)]
    return list(dict.fromkeys([*(module for module in kept if not others(type(module))), *hooked]))


class Lost:
    """Takes away what modules change, for as long as ``before`` has not put it back."""

    def __init__(self, before: Before) -> None:
        self._attributes = {id(place.owner): place for place in before.places if type(place) is Attributes}
        self._variables = [place for place in before.places if isinstance(place, (Variables, Cells))]
        self._containers = {id(place.owner): place for place in before.places if isinstance(place, (Container, Items))}
        self._names: dict[str, None] = {}

    def of(self, modules: Iterable[nn.Module]) -> list[str]:
        """The names of what is gone now."""
        known: dict[type, Reach] = {}
        for module in modules:
            hooked = forward_hooks(module) or "forward" in vars(module)
            if hooked or type(module) not in known:
                known[type(module)] = reached([module])
            self._module(module, known[type(module)])
        return list(self._names)

    def _module(self, module: nn.Module, reach: Reach) -> None:
        stored = reach.stored
        registered = {name for kind in REGISTERED for name in vars(module)[kind]} | {"training"}
        for name in sorted(stored.attributes - registered):
            self._attribute(self._attributes[id(module)], name, module)
        for name in sorted(stored.items & vars(module).keys()):
            self._items(vars(module)[name], self._attributes[id(module)].label(name))
        for kind in (*type(module).__mro__, *reach.classes):
            if (own := self._attributes.get(id(kind))) is not None:
                for name in sorted(name for name in stored.attributes & own.content.keys() if is_plain(own.content[name])):
                    self._gone(own, name, own.content[name])
        for place, name in self._reached(reach):
            if name in stored.variables:
                self._gone(place, name, place.content[name])
            elif name in stored.items:
                self._items(place.content[name], place.label(name))

    def _reached(self, reach: Reach) -> Iterator[tuple[Attributes, str]]:
        """The variables that this code reaches."""
        functions = set(reach.functions)
        for place in self._variables:
            if isinstance(place, Cells):
                names = set(place.content) if id(place.owner) in functions else set()
            else:
                names = reach.variables.get(id(place.owner), ({}, set()))[1]
            yield from ((place, name) for name in sorted(names & place.content.keys()))

    def _attribute(self, place: Attributes, name: str, module: nn.Module) -> None:
        if name in vars(module):
            self._gone(place, name, vars(module)[name])
        elif not hasattr(type(module), name):  # made by the first call
            self._gone(place, name, _NOTHING)

    def _gone(self, place: Attributes, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) or callable(value):
            return
        place.set(name, _other(value))
        self._names[place.label(name)] = None

    def _items(self, value: Any, label: str) -> None:
        place = self._containers.get(id(value))
        if place is not None:
            items = [Gone() for _ in range(len(place.content) + 1)]
            place.fill(dict(zip([*place.content, items[-1]], items, strict=True)) if isinstance(value, dict) else items)
            self._names[label] = None


def _other(value: Any) -> Any:
    """What is surely not the value, and tells who reads it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return Count(value)
    return f"{value} " if isinstance(value, str) else Gone()
