"""State is found wherever names in the code lead: through imports within functions, held Python modules, and objects at any depth."""

from __future__ import annotations

import builtins
import functools
import importlib
import itertools
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.side_effects.imports import follow_imports

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
NAMES = (f"graphreg_test_reach_{number}" for number in itertools.count())
HOME = """
scale, calls, kept = 2.0, 0, []

def scaled(x):
    return x * scale

def counted(x):
    global calls
    calls += 1
    return scaled(x)

def collected(x):
    kept.append(1)
    return scaled(x)
"""
IMPORTS = {
    "the module": "import {home}\n        return {home}.{f}(x)",
    "its function": "from {home} import {f}\n        return {f}(x)",
    "within a package": "import {home}_package.inner as inner\n        return inner.{f}(x)",
    "relative": "return relative(x)",
    "by a string": "import importlib\n        return getattr(importlib.import_module('{home}'), '{f}')(x)",
}


class Holder:
    """Holds one thing."""

    def __init__(self, held: Any = None) -> None:
        self.held, self.n, self.log = held, 0, list[int]()

    def add(self) -> None:
        self.n += 1


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Held(nn.Module):
    def __init__(self, call: Callable[[Any, Tensor], Tensor], held: Any) -> None:
        super().__init__()
        self.linear, self.call, self.held = nn.Linear(4, 4), call, held

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, self.linear(x))


def deep(levels: int) -> Holder:
    return functools.reduce(lambda inner, _: Holder(inner), range(levels), Holder())


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the Python module, and a package that imports from it; return its name."""
    name = next(NAMES)
    (tmp_path / f"{name}.py").write_text(HOME)
    package = tmp_path / f"{name}_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text(f"from {name} import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def importing(name: str, how: str, function: str) -> nn.Module:
    """Return a model that imports within its forward."""
    body = IMPORTS[how].format(home=name, f=function)
    text = f"class Importing(nn.Module):\n    def forward(self, x):\n        x = self.linear(x)\n        {body}\n"
    text += f"def relative(x):\n    from ..inner import {function}\n    return {function}(x)\n"
    space: dict[str, Any] = {"nn": nn, "__name__": __name__, "__package__": f"{name}_package.other"}
    exec(text, space)
    model: nn.Module = space["Importing"]()
    model.linear = nn.Linear(4, 4)
    return model


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("how", IMPORTS)
def test_what_a_forward_imports_is_put_back(how: str, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether another part of the program has imported it before, or the forward is the first."""
    name = written(tmp_path, monkeypatch)
    if earlier:
        importlib.import_module(f"{name}_package.inner")
    for function, example in itertools.product(["counted", "collected"], [None, X]):
        graphreg.regularize(importing(name, how, function), weight_l2=0.1, example_inputs=example)
        home = sys.modules[name]
        assert (home.calls, home.kept) == (0, [])


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("how", list(IMPORTS)[:2])
def test_in_place_it_is_followed(how: str, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = written(tmp_path, monkeypatch)
    if earlier:
        importlib.import_module(name)
    model = graphreg.regularize_(importing(name, how, "scaled"), weight_l2=0.1, penalties="attach", scale=1)
    first = model(X)
    sys.modules[name].scale = 6.0
    assert torch.allclose(model(X), 3 * first)


def test_blocks_that_follow_imports_may_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs of two threads do: the one that began first may end first."""
    name = written(tmp_path, monkeypatch)
    before, told = (builtins.__import__, importlib.import_module), list[str]()
    begun, other_began = threading.Event(), threading.Event()

    def first() -> None:
        with Changes() as changes, changes:
            follow_imports(changes, lambda: told.append("first"))
            begun.set()
            other_began.wait()

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    with Changes() as changes, changes:
        follow_imports(changes, lambda: told.append("second"))
        other_began.set()
        thread.join()
        importlib.import_module(name)
    assert told == ["second"] and (builtins.__import__, importlib.import_module) == before


def reached(home: types.ModuleType) -> dict[str, tuple[Any, Callable[[Any, Tensor], Tensor]]]:
    """Return what a model may hold, and how it then calls a function of ``home``."""
    return {
        "a Python module": (home, lambda self, x: self.held.counted(x)),
        "one in a dict": ({"a": home}, lambda self, x: self.held["a"].counted(x)),
        "one in an object": (Holder(home), lambda self, x: self.held.held.counted(x)),
        "one in a namespace": (types.SimpleNamespace(a=home), lambda self, x: self.held.a.counted(x)),
        "a function in an object": (Holder(home.counted), lambda self, x: self.held.held(x)),
        "a function deep inside": (Holder([Holder({"a": Holder(home.counted)})]), lambda self, x: self.held.held[0].held["a"].held(x)),
        "a function in a slot": (Slotted(home.counted), lambda self, x: self.held.held(x)),
        "a function by a string": (Holder(home.counted), lambda self, x: getattr(getattr(self, "held"), "held")(x)),  # noqa: B009
        "a global by a string": (globals().update(COUNTED=home.counted), lambda self, x: globals()["COUNTED"](x)),
        "a loaded module by a string": (None, lambda self, x: sys.modules["graphreg_test_reach_loaded"].counted(x)),
        "a partial": (Holder(functools.partial(home.counted)), lambda self, x: self.held.held(x)),
        "a class": (type("Kind", (), {"table": {"a": home.counted}}), lambda self, x: self.held.table["a"](x)),
        "an object's method": ([type("Kind", (), {"run": staticmethod(home.counted)})()], lambda self, x: self.held[0].run(x)),
    }


@pytest.mark.parametrize("what", reached(types.SimpleNamespace(counted=len)))  # type: ignore[arg-type]
def test_what_a_model_holds_is_searched(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = importlib.import_module(written(tmp_path, monkeypatch))
    monkeypatch.setitem(sys.modules, "graphreg_test_reach_loaded", home)
    held, call = reached(home)[what]
    for example in (None, X):
        graphreg.regularize(Held(call, held), weight_l2=0.1, example_inputs=example)
        assert home.calls == 0
    model = graphreg.regularize_(Held(call, held), weight_l2=0.1, penalties="attach", scale=1)
    first = model(X)
    home.scale = 6.0
    assert torch.allclose(model(X), 3 * first)


GLOBAL = deep(6)
LISTED = [{"a": (deep(3),)}]


class OfAll:
    shared = deep(4)


def with_default(x: Tensor, at: Holder = deep(3)) -> Tensor:  # noqa: B008  # one for all calls, as in a model that does so
    at.held.held.n += 1
    return x


def in_the_function() -> Callable[[], Holder]:
    around = deep(4)
    return lambda: around.held.held.held


AROUND = in_the_function()
PLACES: dict[str, Callable[[Any], Holder]] = {
    "a global": lambda self: GLOBAL.held.held.held.held.held,
    "an attribute": lambda self: self.held.held.held.held.held,
    "a list": lambda self: LISTED[0]["a"][0].held.held,
    "a class": lambda self: OfAll.shared.held.held,
    "a function around": lambda self: AROUND(),
}


def counts(place: Callable[[Any], Holder], decides: bool) -> Callable[[Any, Tensor], Tensor]:
    def call(self: Any, x: Tensor) -> Tensor:
        at = place(self)
        at.add()
        at.log.append(1)
        return x * at.n if decides else x

    return call


@pytest.mark.parametrize("place", PLACES)
def test_objects_are_put_back_at_any_depth(place: str) -> None:
    for example in (None, X):
        model = Held(counts(PLACES[place], False), deep(5))
        graphreg.regularize(model, weight_l2=0.1, example_inputs=example)
        assert (PLACES[place](model).n, PLACES[place](model).log) == (0, [])
        model = Held(counts(PLACES[place], True), deep(5))
        with pytest.raises(graphreg.errors.TraceError, match="for its next call"):
            graphreg.regularize(model, weight_l2=0.1, example_inputs=example, front_end="symbolic")
        assert (PLACES[place](model).n, PLACES[place](model).log) == (0, [])


def test_so_are_those_in_default_arguments() -> None:
    for example in (None, X):
        graphreg.regularize(Held(lambda self, x: with_default(x), None), weight_l2=0.1, example_inputs=example)
        assert with_default.__defaults__[0].held.held.n == 0  # type: ignore[index]


def test_a_long_chain_is_no_recursion() -> None:
    model = Held(counts(lambda self: self.held.held, False), deep(5000))
    graphreg.regularize(model, weight_l2=0.1)
    assert model.held.held.n == 0
