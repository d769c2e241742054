"""Further kinds of places that a forward may change (``StatePlace``): byte arrays, random generators, context variables, iterators."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graphreg.tracing.side_effects.stand_ins import ChangingIterator, ChangingNumber
from graphreg.tracing.side_effects.state_places import NOTHING, PLAIN, Attributes, StatePlace


class ByteArray(StatePlace):
    """The content of a bytearray or array.array."""

    def __init__(self, owner: Any, name: str, holder: Attributes | None = None, key: str = "") -> None:
        """Note the content. ``holder``, ``key``: as for a container."""
        self.holder, self.key = holder, key
        super().__init__(owner, name)
        self.after = self.content  # after ``note``: what the forward left

    def read(self) -> Any:
        return self.owner[:]

    def note(self) -> None:
        self.after = self.read()

    def mark_counters(self) -> bool:
        now = self.read()
        if now == self.after or self.holder is None or self.holder.read().get(self.key) is not self.owner:
            return False
        self.holder.set(self.key, list(map(ChangingNumber, now)))
        return True

    def restore(self) -> None:
        if self.read() != self.content:
            self.owner[:] = self.content


class RandomGenerator(StatePlace):
    """The state of a random generator that the model's code can reach."""

    def read(self) -> bytes:
        source = self.owner
        if issubclass(type(source), torch.Generator):
            return bytes(source.get_state().numpy().tobytes())
        if issubclass(type(source), random.Random):
            return pickle.dumps(source.getstate())
        # numpy's older generators have ``get_state``, its newer ones a bit generator
        return pickle.dumps(source.get_state(legacy=False) if hasattr(source, "get_state") else source.bit_generator.state)

    def restore(self) -> None:
        if self.read() == self.content:
            return
        if issubclass(type(self.owner), torch.Generator):
            self.owner.set_state(torch.frombuffer(bytearray(self.content), dtype=torch.uint8))
        elif issubclass(type(self.owner), random.Random):
            self.owner.setstate(pickle.loads(self.content))
        elif hasattr(self.owner, "set_state"):
            self.owner.set_state(pickle.loads(self.content))
        else:
            self.owner.bit_generator.state = pickle.loads(self.content)


class ContextVariable(StatePlace):
    """The value of a context variable."""

    after: Any = NOTHING  # after ``note``: what the forward left

    def read(self) -> Any:
        return self.owner.get(NOTHING)

    def same(self) -> bool:
        return self.read() is self.content

    def note(self) -> None:
        self.after = self.read()

    def mark_counters(self) -> bool:
        now = self.read()
        if type(now) not in (int, float) or now is self.after or now is self.content:
            return False
        self.owner.set(ChangingNumber(now))
        return True

    def restore(self) -> None:
        if self.read() is not self.content:
            self.owner.set(self.content)


class IteratorPosition(StatePlace):
    """The position of an iterator that is an attribute or variable. ``restore`` replaces the iterator by a copy made before the forward."""

    def __init__(self, owner: Any, name: str, holder: Attributes, key: str, copied: Any) -> None:
        """Note the position.

        Args:
            owner: The iterator.
            name: The name of the iterator, for errors.
            holder: The place that has the iterator as an attribute or variable.
            key: The name of that attribute or variable.
            copied: A copy of the iterator, from its present position.
        """
        self.holder, self.key, self.copied = holder, key, copied
        super().__init__(owner, name)
        self.after = self.content  # after ``note``: the position in which the forward left it

    def read(self) -> Any:
        return _position(self.owner)

    def note(self) -> None:
        self.after = self.read()

    def mark_counters(self) -> bool:
        taken: Any = self.owner
        if self.read() == self.after or self.holder.read().get(self.key) is not self.owner:
            return False
        self.holder.set(self.key, ChangingIterator(taken))
        return True

    def restore(self) -> None:
        now = self.holder.read().get(self.key)  # the holder has put back which iterator it was
        if is_iterator(now) and _position(now) != self.content:
            self.holder.set(self.key, copied_iterator(self.copied))


def is_random_generator(value: Any) -> bool:
    """Return whether a value is a random generator other than Python's global one."""
    kind = type(value)
    named = kind.__module__.startswith("numpy.random") and (hasattr(kind, "bit_generator") or hasattr(kind, "set_state"))
    return value is not getattr(random, "_inst", None) and (issubclass(type(value), (random.Random, torch.Generator)) or named)


def is_iterator(value: Any) -> bool:
    """Return whether a value is one of Python's iterators, a generator, or a queue whose content cannot be read."""
    kind = type(value)
    return kind.__module__ in ("builtins", "itertools", "_queue") and (hasattr(kind, "__next__") or kind.__name__ == "SimpleQueue")


def copied_iterator(value: Any) -> Any:
    """Return a copy of an iterator that continues from the same place; NOTHING if it cannot be copied or would copy tensors."""
    memo: dict[int, Any] = {}
    try:
        with _still_copied():
            twin = copy.deepcopy(value, memo)
    except Exception:
        # the iterator is a generator, a file or, from Python 3.14 on, one of itertools
        return NOTHING
    return NOTHING if any(isinstance(each, (torch.Tensor, nn.Module)) for each in memo.values()) else twin


@contextmanager
def _still_copied() -> Iterator[None]:
    """Within the block, Python 3.12 and 3.13 do not warn that itertools cannot be copied from 3.14 on; then, an exception says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Pickle, copy, and deepcopy support", DeprecationWarning)
        yield


def _position(value: Any) -> Any:
    """Return the position of an iterator, in a form that can be compared."""
    if is_iterator(value):
        # what pickle would write: what makes the iterator, what it runs over, and how far it is
        with _still_copied():
            made = value.__reduce__()
        return (getattr(made[0], "__name__", ""), *map(_position, made[1:]))
    if issubclass(type(value), tuple):
        return tuple(map(_position, value))
    return value if issubclass(type(value), PLAIN) else (type(value), len(value) if hasattr(value, "__len__") else 0)
