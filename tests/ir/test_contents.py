"""The contents of arguments: texts that differ where a forward may see a difference, and copies that stay as they are."""

from __future__ import annotations

import argparse
import copy
import functools
import pathlib
import pickle
import types
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphreg.ir.contents import contents_of, copied_contents, may_change, shown_contents, unshared


class Mode(Enum):
    FAST, SLOW = 1, 2


class Rank(int, Enum):
    ONE = 1


class Text(str):
    pass


class Sub(torch.Tensor):
    pass


class Twin:
    class Mode(Enum):
        FAST = 1


class Config:
    def __init__(self, gain: float = 2.0) -> None:
        self.gain, self.names, self.inner = gain, ["a"], {"b": [1, (2, "c")]}

    def method(self) -> None:
        """Do nothing."""

    @cached_property
    def twice(self) -> float:
        return 2 * self.gain


class Slots:
    __slots__ = ("a", "b")

    def __init__(self, a: Any) -> None:
        self.a = a


@dataclass(frozen=True)
class Point:
    x: Any


def function() -> None:
    """Do nothing."""


def other_function() -> None:
    """Do nothing."""


TENSOR, OTHER, LAYER = torch.ones(2), torch.ones(2), nn.Linear(2, 2)
# each differs from every other one
DIFFERENT: list[Any] = [
    None, 1, 1.0, True, "1", b"1", 1j, [], (), {}, set(), [1], (1,), [1.0], [True], [[1]], {1}, frozenset({1}), {"a": 1}, {"a": [1]},
    OrderedDict(a=1), deque([1]), range(2), Mode.FAST, Mode.SLOW, torch.float32, torch.device("cpu"), Config(), Config(3.0), Slots(1),
    Slots([1]), Point(1), Point(1.0), types.SimpleNamespace(a=1), argparse.Namespace(a=1), pathlib.Path("a"), Fraction(1, 2), function,
    other_function, LAYER, Config, np.ones(2), np.ones(3), np.ones(2, dtype=np.float32), np.float32(1), Point(TENSOR), Point(OTHER),
    bytearray(b"1"), slice(1), slice(2), functools.partial(function, 1), functools.partial(function, 2),
    functools.partial(other_function, 1), Config().__init__, Text("a"), Text("b"), 0.0, -0.0, Rank.ONE, "a",
    nn.Parameter(TENSOR), TENSOR, TENSOR.as_subclass(Sub), Twin.Mode.FAST,
]  # fmt: skip


def test_what_differs_has_another_text() -> None:
    texts = [contents_of(value) for value in DIFFERENT]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("value", DIFFERENT, ids=lambda value: f"{type(value).__name__}")
def test_a_copy_has_the_same_contents(value: Any) -> None:
    twin = copied_contents(value)
    assert contents_of(twin) == contents_of(value) and type(twin) is type(value)
    if not isinstance(value, (nn.Module, Point, Config, types.MethodType, Sub)):  # whose tensors or classes compare by identity
        assert contents_of(copy.deepcopy(value)) == contents_of(value)


def test_the_text_says_which_tensors_are_one() -> None:
    pairs = [[TENSOR, TENSOR], [TENSOR, OTHER], [TENSOR, [TENSOR]], [TENSOR, [OTHER]]]
    for seen in (lambda: [], dict):  # for Dynamo, and quicker
        texts = [contents_of(pair, (), True, seen()) for pair in pairs]  # type: ignore[no-untyped-call]
        assert len(set(texts)) == 4 and texts[0] == "[torch.float32[1], <no. 0 again>]"
    kept = [copied_contents(pair, {}, is_data=True) for pair in pairs]
    for pair, twin in zip(pairs, kept, strict=True):
        for each in (twin, pickle.loads(pickle.dumps(twin)), copy.deepcopy(twin)):
            assert contents_of(each, (), True, {}) == contents_of(pair, (), True, {})
    assert contents_of(unshared(kept[0]), (), True, {}) == contents_of(pairs[1], (), True, {})


def test_a_method_and_a_partial_are_the_same_each_time() -> None:
    config = Config()
    assert contents_of(config.method) == contents_of(config.method) != contents_of(Config().method)
    assert contents_of(functools.partial(function, [1])) == contents_of(functools.partial(function, [1]))


def test_a_tensor_in_a_container_is_data_and_in_an_object_it_is_not() -> None:
    assert contents_of([TENSOR]) == contents_of([OTHER]) == "[torch.float32[1]]"
    assert contents_of(Point(TENSOR)) != contents_of(Point(OTHER))
    assert contents_of(torch.return_types.max((TENSOR, TENSOR))) == contents_of(torch.return_types.max((OTHER, OTHER)))


CHANGES: dict[str, tuple[Any, Any]] = {
    "an attribute": (Config(), lambda value: setattr(value, "gain", 3.0)),
    "another attribute": (Config(), lambda value: setattr(value, "more", 3.0)),
    "a list in an object": (Config(), lambda value: value.names.append("b")),
    "deep inside": (Config(), lambda value: value.inner["b"].pop()),
    "a list": ([1, 2], lambda value: value.reverse()),
    "a dict": ({"a": 1}, lambda value: value.update(a=2)),
    "a set": ({1}, lambda value: value.add(2)),
    "a deque": (deque([1]), lambda value: value.append(2)),
    "a list in a tuple": (([1],), lambda value: value[0].append(2)),
    "a slot": (Slots(1), lambda value: setattr(value, "b", 2)),
    "a namespace": (types.SimpleNamespace(a=[1]), lambda value: value.a.append(2)),
    "a tensor of an object": (types.SimpleNamespace(a=TENSOR), lambda value: setattr(value, "a", OTHER)),
    "an array": (np.ones(2), lambda value: value.__setitem__(0, 5.0)),
}


@pytest.mark.parametrize(("value", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_is_seen_and_does_not_reach_the_copy(value: Any, change: Any) -> None:
    before, twin = contents_of(value), copied_contents(value)
    assert may_change(value)
    change(value)
    assert contents_of(value) != before == contents_of(twin)


def test_what_is_cached_does_not_count() -> None:
    config = Config()
    before = contents_of(config)
    assert config.twice == 4.0 and contents_of(config) == before


def test_cycles_and_shared_parts() -> None:
    config = Config()
    config.names = [config]  # type: ignore[list-item]
    twin = copied_contents(config)
    assert twin.names[0] is twin and contents_of(twin) == contents_of(config)
    items: list[Any] = [1]
    twins = copied_contents([items, items])
    assert twins[0] is twins[1] is not items


def test_what_cannot_change_is_not_looked_at() -> None:
    fixed = [None, 1, 2.0, "a", (1, ("b",)), Mode.FAST, torch.float32, pathlib.Path("a"), Fraction(1, 2), function, Config]
    assert not any(map(may_change, fixed)) and all(copied_contents(value) is value for value in fixed if not isinstance(value, tuple))


def test_text_for_messages() -> None:
    assert shown_contents(Config()) == "Config(gain=2.0, inner={'b': [1, (2, 'c')]}, names=['a'])"
    assert shown_contents([1, "a"]) == "[1, 'a']"
