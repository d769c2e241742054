"""What moves on as it is used: arrays of Python's own, generators of random numbers, iterators; where they stood, and going back there."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from graphreg.tracing.side_effects.places import NOTHING, PLAIN, Attributes, Place


class Bytes(Place):
    """A bytearray, an array.array."""

    def read(self) -> Any:
        return self.owner[:]

    def settle(self) -> Iterator[str]:
        if self.read() != self.content:
            yield self.name

    def put_back(self) -> None:
        if self.read() != self.content:
            self.owner[:] = self.content


class Stream(Place):
    """A generator of random numbers that the model has for itself."""

    def read(self) -> bytes:
        source = self.owner
        if isinstance(source, torch.Generator):
            return bytes(source.get_state().numpy().tobytes())
        return pickle.dumps(source.getstate() if isinstance(source, random.Random) else _words(source))

    def settle(self) -> Iterator[str]:
        if self.read() != self.content:
            yield self.name

    def put_back(self) -> None:
        if self.read() == self.content:
            return
        if isinstance(self.owner, torch.Generator):
            self.owner.set_state(torch.frombuffer(bytearray(self.content), dtype=torch.uint8))
        elif isinstance(self.owner, random.Random):
            self.owner.setstate(pickle.loads(self.content))
        elif hasattr(self.owner, "set_state"):
            self.owner.set_state(pickle.loads(self.content))
        else:
            self.owner.bit_generator.state = pickle.loads(self.content)


class Context(Place):
    """A context variable."""

    def read(self) -> Any:
        return self.owner.get(NOTHING)

    def settle(self) -> Iterator[str]:
        if self.read() is not self.content:
            yield self.name

    def put_back(self) -> None:
        if self.read() is not self.content:
            self.owner.set(self.content)


class Steps(Place):
    """An iterator that stands in ``holder`` under a key. One that has moved on is replaced by a copy of what it was."""

    def __init__(self, owner: Any, name: str, holder: Attributes, key: str) -> None:
        self.holder, self.key = holder, key
        self.copied = _copied(owner)
        super().__init__(owner, name)

    def read(self) -> Any:
        return _trail(self.owner)

    def settle(self) -> Iterator[str]:
        if self.read() != self.content:
            yield self.name

    def put_back(self) -> None:
        if self.read() != self.content and self.holder.read().get(self.key) is self.owner:
            self.holder.set(self.key, self.copied)


def is_stream(value: Any) -> bool:
    """Whether a value is a generator of random numbers, save Python's own, which all share."""
    kind = type(value)
    named = kind.__module__.startswith("numpy.random") and (hasattr(kind, "bit_generator") or hasattr(kind, "set_state"))
    return value is not getattr(random, "_inst", None) and (isinstance(value, (random.Random, torch.Generator)) or named)


def is_iterator(value: Any) -> bool:
    """Whether a value is one of Python's own iterators, a generator or a queue of which nobody can tell what is in it."""
    kind = type(value)
    return kind.__module__ in ("builtins", "itertools", "_queue") and (hasattr(kind, "__next__") or kind.__name__ == "SimpleQueue")


def can_be_copied(value: Any) -> bool:
    return _copied(value) is not NOTHING


def _copied(value: Any) -> Any:
    """An iterator that goes on from the same place; none where that cannot be had, or would have other tensors."""
    memo: dict[int, Any] = {}
    try:
        twin = copy.deepcopy(value, memo)
    except Exception:  # a generator, a file, and from Python 3.14 on what itertools makes
        return NOTHING
    return NOTHING if any(isinstance(each, (torch.Tensor, nn.Module)) for each in memo.values()) else twin


def _trail(value: Any) -> Any:
    """Where an iterator stands."""
    if is_iterator(value):
        made = value.__reduce__()
        return (getattr(made[0], "__name__", ""), *map(_trail, made[1:]))
    if isinstance(value, tuple):
        return tuple(map(_trail, value))
    return value if isinstance(value, PLAIN) else (type(value), len(value) if hasattr(value, "__len__") else 0)


def _words(source: Any) -> Any:
    """The state of one of numpy's generators."""
    return source.get_state(legacy=False) if hasattr(source, "get_state") else source.bit_generator.state
