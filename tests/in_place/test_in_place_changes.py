"""A model that changes between two calls in train mode gives what a model without graphreg gives after the same change."""

from __future__ import annotations

import argparse
import collections
import contextvars
import copy
import functools
import itertools
import logging
import pickle
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import graphreg
from graphreg import GraphRegError
from graphreg.in_place import placed

X = torch.randn(3, 4)
Change = Callable[[Any], Any]


class Act(nn.Module):
    k = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()

    def get(self) -> float:
        return self.k


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.drop, self.last = nn.Linear(4, 4), Act(), nn.Dropout(0.0), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.post(self.drop(self.act(self.a(x)))))

    def post(self, h: Tensor) -> Any:
        return h


class Proxy:
    """Reads the attributes of another object, past its own ``__getattribute__``."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def wrapped(self) -> Any:
        return object.__getattribute__(self, "_of")

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_of"), name)


class Extra:
    """Keeps fields in a dict of its own, which it reads past its own ``__getattribute__``, as pydantic does."""

    __slots__ = ("more",)

    def __init__(self, **more: Any) -> None:
        self.more = more

    def __getattr__(self, name: str) -> Any:
        return object.__getattribute__(self, "more")[name]


class Once:
    def get(self) -> float:
        return 2.0


class Other(Once):
    def get(self) -> float:
        return 5.0


class Weakly:
    def __init__(self) -> None:
        self.values: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self.values.get(owner, 2.0)

    def __set__(self, owner: Any, value: float) -> None:
        self.values[owner] = value


class KeptWeakly:
    gain = Weakly()


class Config:
    def __init__(self) -> None:
        self.gain = 2.0

    @property
    def broken(self) -> float:
        raise RuntimeError("a search called this")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these
            raise AttributeError(name)
        raise RuntimeError("a search called this")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("a comparison called this")

    __hash__ = None  # type: ignore[assignment]


class Slots:
    __slots__ = ("extra", "gain")

    def __init__(self) -> None:
        self.gain = 2.0


class Mapped:
    """Has a ``__getattribute__`` that reads another name than it is asked for, as configurations of transformers do."""

    def __init__(self) -> None:
        self.gain = 2.0

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, {"width": "gain"}.get(name, name))


class Items(list[Any]):
    pass


class Table(dict[str, Any]):
    pass


def _times(items: Any, h: Tensor) -> Tensor:
    return functools.reduce(lambda h, layer: layer(h), items, h)


def _scaled_twice(h: Tensor, factor: float = 2.0) -> Tensor:
    return h * factor


def put(**values: Any) -> Change:
    """Return a change that sets attributes; a function or class in ``values`` makes the value."""
    return lambda m: [setattr(m, n, value() if isinstance(value, (types.FunctionType, type)) else value) for n, value in values.items()]


# For each name: what prepares the model, what its forward computes from it, and the changes.
CASES: dict[str, tuple[Change, Callable[[Any, Tensor], Any], Change]] = {
    "getattr with a default": (put(), lambda m, h: h * getattr(m, "scale", 1.0), put(scale=3.0)),
    "hasattr": (put(), lambda m, h: h * 3 if hasattr(m, "flag") else h, put(flag=1)),
    "vars": (put(), lambda m, h: h * len([n for n in vars(m) if n == "flag"]), put(flag=1)),
    "dir": (put(), lambda m, h: h * 3 if "flag" in dir(m) else h, put(flag=1)),
    "a method is shadowed": (put(), lambda m, h: h * m.act.get(), lambda m: vars(m.act).update(get=lambda: 5.0)),
    "an attribute that another method reads": (put(), lambda m, h: h * m.act.get(), lambda m: setattr(m.act, "k", 4.0)),
    "another class of a submodule": (put(), lambda m, h: h, lambda m: setattr(m.act, "__class__", Tanh)),
    "the parent reads drop.p": (put(), lambda m, h: h * (1 - m.drop.p), lambda m: (setattr(m.drop, "p", 0.25), m.drop.eval())),
    "a buffer that was None": (
        lambda m: m.register_buffer("b", None), lambda m, h: h if m.b is None else h * m.b, put(b=lambda: torch.full((4,), 3.0))
    ),
    "a parameter that was None": (
        lambda m: m.register_parameter("w", None), lambda m, h: h if m.w is None else h * m.w, put(w=lambda: nn.Parameter(torch.zeros(4)))
    ),
    "a buffer that is None now": (
        lambda m: m.register_buffer("b", torch.full((4,), 3.0)), lambda m, h: h if m.b is None else h * m.b, lambda m: setattr(m, "b", None)
    ),
    "a buffer's dtype": (
        lambda m: m.register_buffer("b", torch.ones(4)), lambda m, h: h * 2 if m.b.dtype is torch.float64 else h,
        lambda m: setattr(m, "b", m.b.double()),
    ),
    "a buffer's shape": (
        lambda m: m.register_buffer("b", torch.ones(4)), lambda m, h: h * m.b.shape[0], put(b=lambda: torch.ones(5))
    ),
    "a mode of a layer": (put(), lambda m, h: h * (2 if m.act.training else 1), lambda m: m.act.eval()),
    "a mode that a layer's owner branches on": (put(), lambda m, h: h.tanh() if m.act.training else h, lambda m: m.act.eval()),
    "the first parameter": (
        put(), lambda m, h: h * (1 + len(list(m.act.parameters()))),
        lambda m: m.act.register_parameter("w", nn.Parameter(torch.ones(2))),
    ),
    "an empty ModuleList": (put(c=nn.ModuleList), lambda m, h: _times(m.c, h), lambda m: m.c.append(Tanh())),
    "an empty Sequential": (put(c=nn.Sequential), lambda m, h: m.c(h), lambda m: m.c.append(Tanh())),
    "an empty ModuleDict": (put(c=nn.ModuleDict), lambda m, h: _times(m.c.values(), h), lambda m: m.c.update({"a": Tanh()})),
    "an empty ParameterList": (
        put(c=nn.ParameterList), lambda m, h: h * sum(m.c, 1.0), lambda m: m.c.append(nn.Parameter(torch.ones(4)))
    ),
    "an empty ParameterDict": (
        put(c=nn.ParameterDict), lambda m, h: h * sum(m.c.values(), 1.0),
        lambda m: m.c.update({"a": nn.Parameter(torch.ones(4))}),
    ),
    "the order of a ModuleDict": (
        put(c=lambda: nn.ModuleDict({"a": Act(), "b": Tanh()})), lambda m, h: _times(m.c.values(), h),
        lambda m: m.c._modules.update(a=m.c._modules.pop("a")),
    ),
    "a parameter is renamed": (
        lambda m: m.register_parameter("w", nn.Parameter(torch.full((4,), 2.0))),
        lambda m, h: h * sum(p for _, p in m.named_parameters(recurse=False)),
        lambda m: m.register_parameter("v", m._parameters.pop("w")),
    ),
    "a parameter is deleted": (
        lambda m: m.register_parameter("w", nn.Parameter(torch.full((4,), 2.0))), lambda m, h: h * getattr(m, "w", 1.0),
        lambda m: delattr(m, "w"),
    ),
    "another dict of parameters": (
        lambda m: m.register_parameter("w", nn.Parameter(torch.full((4,), 2.0))), lambda m, h: h * m.w,
        lambda m: vars(m).update(_parameters={"w": nn.Parameter(torch.ones(4))}),
    ),
    "a list of thousands": (put(c=lambda: [1.0] * 3000), lambda m, h: h * sum(m.c), lambda m: m.c.__setitem__(2500, 50.0)),
    "a read-only dict": (
        lambda m: put(u=(u := {"a": 2.0}), c=types.MappingProxyType(u))(m), lambda m, h: h * m.c["a"], lambda m: m.u.update(a=m.u["a"] + 1)
    ),
    "a field that a class keeps in a slot": (
        put(c=lambda: Extra(gain=2.0)), lambda m, h: h * m.c.gain, lambda m: m.c.more.update(gain=5.0)
    ),
    "True for 1": (put(c=1), lambda m, h: h * 3 if m.c is True else h, put(c=True)),
    "-0.0 for 0.0": (put(c=0.0), lambda m, h: h * 3 if str(m.c) == "-0.0" else h, put(c=-0.0)),
    "one list for two": (
        put(p=lambda: [1.0], q=lambda: [1.0]), lambda m, h: h * 2 if m.p is m.q else h, lambda m: setattr(m, "q", m.p)
    ),
    "a weak reference": (
        lambda m: put(c=weakref.ref(m), gain=2.0)(m), lambda m, h: h * m.c().gain, put(gain=3.0)
    ),
    "a method of another object": (lambda m: put(c=m.act.get)(m), lambda m, h: h * m.c(), lambda m: setattr(m.act, "k", 7.0)),
    "a function's default": (
        lambda m: setattr(m, "c", types.FunctionType(_scaled_twice.__code__, globals(), "f", (2.0,))), lambda m, h: m.c(h),
        lambda m: setattr(m.c, "__defaults__", (5.0,)),
    ),
    "the content of a tensor": (put(c=lambda: torch.ones(())), lambda m, h: h * m.c.item(), lambda m: m.c.fill_(4.0)),
    "a compiled layer": (put(), lambda m, h: h, lambda m: setattr(m, "last", torch.compile(m.last, backend="eager"))),
    "a parametrized layer": (put(), lambda m, h: h, lambda m: nn.utils.parametrizations.weight_norm(m.a)),
    "a pruned layer": (put(), lambda m, h: h, lambda m: prune.l1_unstructured(m.a, "weight", 0.5)),
    "tied layers": (put(), lambda m, h: h * 2 if m.a.weight is m.last.weight else h, lambda m: setattr(m.last, "weight", m.a.weight)),
}  # fmt: skip


# The same for what a forward reads of an object that is an attribute.
OBJECTS: dict[str, tuple[Change, Callable[[Any, Tensor], Any], Change]] = {
    "a key is deleted": (put(c=lambda: {"a": 2.0, "b": 1.0}), lambda m, h: h * m.c.get("a", 1.0), lambda m: m.c.pop("a")),
    "SimpleNamespace": (put(c=lambda: types.SimpleNamespace(gain=2.0)), lambda m, h: h * m.c.gain, lambda m: setattr(m.c, "gain", 5.0)),
    "Namespace": (put(c=lambda: argparse.Namespace(gain=2.0)), lambda m, h: h * m.c.gain, lambda m: setattr(m.c, "gain", 5.0)),
    "an attribute of a namespace appears": (
        put(c=types.SimpleNamespace), lambda m, h: h * getattr(m.c, "gain", 1.0), lambda m: setattr(m.c, "gain", 5.0)
    ),
    "an attribute of a configuration appears": (
        put(c=Config), lambda m, h: h * m.c.gain * (3.0 if "more" in vars(m.c) else 1.0), lambda m: setattr(m.c, "more", 5.0)
    ),
    "a slot": (put(c=Slots()), lambda m, h: h * m.c.gain, lambda m: setattr(m.c, "gain", m.c.gain + 1)),
    "an empty slot": (put(c=Slots), lambda m, h: h * getattr(m.c, "extra", 1.0), lambda m: setattr(m.c, "extra", 5.0)),
    "a mapped name": (put(c=Mapped), lambda m, h: h * m.c.width, lambda m: setattr(m.c, "gain", 5.0)),
    "a subclass of list": (put(c=lambda: Items([2.0])), lambda m, h: h * m.c[0], lambda m: m.c.__setitem__(0, 5.0)),
    "a subclass of dict": (put(c=lambda: Table(a=2.0)), lambda m, h: h * m.c["a"], lambda m: m.c.update(a=5.0)),
    "Counter": (put(c=lambda: collections.Counter("a")), lambda m, h: h * (1 + m.c["b"]), lambda m: m.c.update("bb")),
    "the default of a defaultdict": (
        put(c=lambda: collections.defaultdict(lambda: 2.0)), lambda m, h: h * m.c.default_factory(),
        lambda m: setattr(m.c, "default_factory", lambda: 5.0),
    ),
    "the order of an OrderedDict": (
        put(c=lambda: collections.OrderedDict(a=2.0, b=3.0)), lambda m, h: h * next(iter(m.c.values())), lambda m: m.c.move_to_end("a")
    ),
    "a numpy array": (put(c=lambda: np.array([2.0])), lambda m, h: h * float(m.c[0]), lambda m: m.c.__setitem__(0, 5.0)),
    "a bytearray": (put(c=lambda: bytearray(b"\2")), lambda m, h: h * m.c[0], lambda m: m.c.__setitem__(0, 5)),
    "keywords of a partial": (
        put(c=lambda: functools.partial(F.leaky_relu, negative_slope=0.1)), lambda m, h: m.c(h - 1),
        lambda m: m.c.keywords.update(negative_slope=0.9),
    ),
    "deep inside": (
        put(c=lambda: {"a": [{"b": [[{"c": Config()}]]}]}), lambda m, h: h * m.c["a"][0]["b"][0][0]["c"].gain,
        lambda m: setattr(m.c["a"][0]["b"][0][0]["c"], "gain", 8.0),
    ),
    "what a proxy reads by itself": (
        put(c=lambda: Proxy(Config())), lambda m, h: h * m.c.gain, lambda m: setattr(m.c.wrapped(), "gain", 5.0)
    ),
    "the dict of a bound method": (
        lambda m: put(u=(u := {"a": 2.0}), c=u.get)(m), lambda m, h: h * m.c("a"), lambda m: m.u.update(a=m.u["a"] + 1)
    ),
    "the class of an object": (put(c=Once), lambda m, h: h * m.c.get(), lambda m: setattr(m.c, "__class__", Other)),
    "an object in a weak dict": (
        lambda m: put(u=(u := Config()), c=weakref.WeakValueDictionary({"a": u}))(m), lambda m, h: h * m.c["a"].gain,
        lambda m: setattr(m.u, "gain", 5.0),
    ),
    "what a descriptor keeps": (put(c=KeptWeakly), lambda m, h: h * m.c.gain, lambda m: setattr(m.c, "gain", 5.0)),
}  # fmt: skip


def made(start: Change, post: Callable[[Any, Tensor], Any]) -> Any:
    model = type("Net", (Net,), {"post": post})()
    start(model)
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo hides it, of a layer that is compiled
@pytest.mark.parametrize("name", CASES)
def test_a_change_is_noticed(name: str) -> None:
    start, post, change = CASES[name]
    model, plain = graphreg.regularize_(made(start, post), weight_l2=0.0, scale=1), made(start, post)
    before = model(X)
    assert torch.equal(before, plain(X))
    change(model)
    if vars(model).get("c") is None or vars(model)["c"] is not vars(plain)["c"]:
        change(plain)
    after = model(X)
    assert torch.equal(after, plain(X)) and torch.equal(model(X), after)


class Parts(nn.Module):
    """A layer, and behind it a module for each of some names of ``OBJECTS``."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.parts = nn.Linear(4, 4), nn.ModuleDict()
        for name in names:
            start, post, _ = OBJECTS[name]
            self.parts[name] = part = type("Part", (nn.Module,), {"forward": post})()
            start(part)

    def forward(self, x: Tensor) -> Any:
        return _times(self.parts.values(), self.a(x))


@pytest.mark.parametrize("names", [list(OBJECTS)[i::4] for i in range(4)], ids=lambda names: f"{names[0]} and others")
def test_changes_of_objects_are_noticed_one_after_another(names: list[str]) -> None:
    model, plain = graphreg.regularize_(Parts(names), weight_l2=0.0, scale=1), Parts(names)
    assert torch.equal(model(X), plain(X))
    for name in names:
        ours, theirs = model.parts[name], plain.parts[name]
        before, change = model(X), OBJECTS[name][2]
        change(ours)
        if vars(ours)["c"] is not vars(theirs)["c"]:
            change(theirs)
        after = model(X)
        assert torch.equal(after, plain(X)) and not torch.equal(after, before), name
        assert torch.equal(model(X), after), name


class Delegates(Net):
    """Reads what it has not from a layer of its own, as wrappers of adapters do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("a"), name)


def test_what_a_wrapper_does_not_read_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    traces, original = [], placed.traced_for
    monkeypatch.setattr(placed, "traced_for", lambda *args, **kwargs: traces.append(1) or original(*args, **kwargs))
    model = graphreg.regularize_(Delegates(), weight_l2=0.1, scale=1)
    for step in range(3):
        model.global_step = step
        model(X)
    assert traces == [1]


GAINS = {name: Config() for name in ("method", "class", "function", "default", "attribute")}
GAIN = contextvars.ContextVar("GAIN", default=2.0)
LOCAL = threading.local()
LOCAL.gain = 2.0
MEMORY = bytearray(b"\2")
VIEW = memoryview(MEMORY)
WEAK: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary({GAINS["class"].__class__: 2.0})


class Holder:
    config = GAINS["class"]
    only: Any = None

    def __new__(cls) -> Any:
        cls.only = cls.only or object.__new__(cls)
        return cls.only

    @classmethod
    def held(cls) -> Any:
        return cls.config


HELD = vars(Holder())
HELD["gain"] = 2.0


class Meta(type):
    @property
    def gain(cls) -> Any:
        return cls._gain


class WithMeta(metaclass=Meta):
    _gain = 2.0


def closed(config: Any) -> Any:
    def gain() -> Any:
        return config.gain

    return gain


closed_gain = closed(GAINS["function"])


def default_gain(config: Any = GAINS["default"]) -> Any:
    return config.gain


def attribute_gain() -> Any:
    return attribute_gain.config.gain  # type: ignore[attr-defined]


attribute_gain.config = GAINS["attribute"]  # type: ignore[attr-defined]


class Described:
    """A descriptor that keeps the values of its owners."""

    def __init__(self) -> None:
        self.values = {"gain": 2.0}

    def __get__(self, owner: Any, kind: Any) -> Any:
        return self.values["gain"]


class HasDescribed:
    described = Described()


# For each name: what the forward reads, which is no attribute of the model, and what is done to it.
OUTSIDE: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "an object in a class": (lambda m: Holder.config.gain, lambda: setattr(Holder.config, "gain", 3.0)),
    "an object in a class, by a method": (lambda m: Holder.held().gain, lambda: setattr(Holder.config, "gain", 4.0)),
    "the only object of a class": (lambda m: Holder().gain, lambda: setattr(Holder.only, "gain", 3.0)),
    "a property of a class": (lambda m: WithMeta.gain, lambda: setattr(WithMeta, "_gain", 3.0)),
    "an object in a variable around a function": (lambda m: closed_gain(), lambda: setattr(GAINS["function"], "gain", 3.0)),
    "an object that is a default": (lambda m: default_gain(), lambda: setattr(GAINS["default"], "gain", 3.0)),
    "an object in an attribute of a function": (lambda m: attribute_gain(), lambda: setattr(GAINS["attribute"], "gain", 3.0)),
    "a descriptor": (lambda m: m.described, lambda: vars(HasDescribed)["described"].values.update(gain=3.0)),
    "a context variable": (lambda m: GAIN.get(), lambda: GAIN.set(3.0)),
    "a variable of the thread": (lambda m: LOCAL.gain, lambda: setattr(LOCAL, "gain", 3.0)),
    "a view of memory": (lambda m: VIEW[0], lambda: MEMORY.__setitem__(0, 3)),
    "a weak dict": (lambda m: WEAK.get(Config, 1.0), lambda: WEAK.update({Config: 3.0})),
}


def _and_times(post: Callable[[Any, Tensor], Any], gain: Callable[[Any], Any]) -> Callable[[Any, Tensor], Any]:
    return lambda m, h: post(m, h) * gain(m)


def test_changes_of_what_is_outside_of_the_model_are_noticed_one_after_another() -> None:
    post = functools.reduce(_and_times, [gain for gain, _ in OUTSIDE.values()], lambda m, h: h)
    kind = type("Outside", (Net,), {"post": post, "described": vars(HasDescribed)["described"]})
    model, plain = graphreg.regularize_(kind(), weight_l2=0.0, scale=1), kind()
    after = model(X)
    for name, (_, change) in OUTSIDE.items():
        before = after
        assert torch.equal(before, plain(X)), name
        change()
        after = model(X)
        assert torch.equal(after, plain(X)) and not torch.equal(after, before), name


def test_another_default_dtype_is_noticed() -> None:
    model, plain = (made(put(), lambda m, h: h * torch.ones(4)) for _ in range(2))
    graphreg.regularize_(model, weight_l2=0.0, scale=1)
    model.last = plain.last = nn.Identity()
    assert model(X).dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert model(X).dtype is plain(X).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(model(X), plain(X))


def in_grad(model: Any) -> Any:
    return torch.func.grad(lambda x: model(x).sum())(X)


def in_export(model: Any) -> Any:
    return torch.export.export(model, (X,), strict=False).module()(X)


def on_fakes(model: Any) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = tuple(model(mode.from_tensor(X)).shape)
    return torch.ones(shape)


@pytest.mark.parametrize("run", [in_grad, in_export, on_fakes])
def test_what_has_equal_contents_within_a_transform_is_no_change(run: Callable[[Any], Any]) -> None:
    def made_with_list() -> Any:
        return made(put(c=lambda: [torch.ones(2), 2.0], d=lambda: [3.0]), lambda m, h: h * m.c[1] * m.d[0])

    model, plain = graphreg.regularize_(made_with_list(), weight_l2=0.0, scale=1), made_with_list()
    with pytest.raises(GraphRegError, match="for which it has no graph"):  # the first call
        run(model)
    model(X)
    model.d = [3.0]
    assert torch.equal(run(model), run(plain))


def test_a_buffer_that_was_none_is_noticed_by_compiled_code() -> None:
    start, post, change = CASES["a buffer that was None"]
    model, plain = graphreg.regularize_(made(start, post), weight_l2=0.0, scale=1), made(start, post)
    torch.compiler.reset()
    call = torch.compile(model, backend="eager")
    assert torch.equal(call(X), plain(X))
    change(model)
    change(plain)
    assert torch.equal(call(X), plain(X)) and torch.equal(model(X), plain(X))


def graphs(model: Any) -> int:
    return sum(len(each) for each in vars(model)["graphreg_in_place"]._made.values())


class Trainer:
    """Counts, as the Trainer of Lightning does, which is an attribute of the model."""

    def __init__(self) -> None:
        self.steps, self.log = 0, list[int]()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_the_forward_does_not_read_makes_no_other_graph(compiled: bool) -> None:
    model = graphreg.regularize_(made(put(trainer=Trainer, gain=2.0, table=lambda: [1.0]), lambda m, h: h * m.gain * m.table[0]))
    torch.compiler.reset()
    call = torch.compile(model, backend="eager") if compiled else model
    for step in range(3):
        model.trainer.steps += 1
        model.trainer.log.append(step)
        model.global_step, model.note, type(model).__mro__[1].seen = step, [object()], step
        model.gain, model.table = float("2.0"), [float("1.0")]  # equal values in other objects
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        call(X).sum().backward()
    assert graphs(model) == 1


@pytest.mark.parametrize("kind", ["class", "property", "helper"])
def test_what_a_class_defines_may_be_replaced(kind: str) -> None:
    class Inner(nn.Module):
        factor = property(lambda self: 2.0)

        def forward(self, x: Tensor) -> Any:
            return self.helper(x) * self.factor

        def helper(self, x: Tensor) -> Any:
            return x.relu()

    change = {
        "class": lambda: setattr(Inner, "forward", lambda self, x: x.sigmoid()),
        "property": lambda: setattr(Inner, "factor", property(lambda self: 3.0)),
        "helper": lambda: setattr(Inner, "helper", lambda self, x: x.tanh()),
    }[kind]
    model = graphreg.regularize_(made(put(act=Inner), lambda m, h: h), weight_l2=0.0, scale=1)
    before = model(X)
    change()
    after = model(X)
    assert torch.equal(after, model.eval()(X)) and not torch.equal(after, before)


def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which graphreg's log lines are added."""
    text: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging.getLogger("graphreg"), level, lambda line, *args: text.append(line % args))
    return text


# What regularizers own, and what penalties count


def tie(m: Any) -> None:
    m.last.weight = m.a.weight


def untie(m: Any) -> None:
    m.last.weight = nn.Parameter(m.a.weight.detach() * 3)


def assign(m: Any) -> None:
    m.load_state_dict({name: tensor.clone() + len(name) for name, tensor in m.state_dict().items()}, assign=True)


def reparametrize_and_prune(m: Any) -> None:
    nn.utils.parametrizations.weight_norm(m.a)
    m(X)
    nn.utils.parametrize.remove_parametrizations(m.a, "weight")
    m(X)
    prune.l1_unstructured(m.a, "weight", 0.5)


@pytest.mark.parametrize("changes", [(tie,), (tie, untie), (tie, assign), (reparametrize_and_prune,)])
def test_penalties_count_each_parameter_once(changes: tuple[Change, ...]) -> None:
    model: Any = graphreg.regularize_(Net(), weight_l2=1.0, scale=1)
    model(X)
    for change in changes:
        change(model)
        model(X)
    counted = model.penalties()["weight_l2"]
    graphreg.regularize_(graphreg.strip_(model), weight_l2=1.0, scale=1)
    model(X)
    assert torch.equal(counted, model.penalties()["weight_l2"])


class OfMethods(nn.Module):
    """As the layers of torch.ao.nn.quantized, whose weight is a method."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def weight(self) -> Any:
        return self.inner.weight

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


@pytest.mark.parametrize(("before", "after", "error"), [
    (put(), tie, "a.weight and last.weight are one tied parameter now, and were two"),
    (tie, untie, "a.weight and last.weight were one tied parameter when the model was regularized, and are 2 parameters now"),
    (tie, assign, "a.weight and last.weight were one tied parameter"),
    (put(), lambda m: prune.l1_unstructured(m.a, "weight", 0.5), "a.weight is no parameter any more: a hook computes it before each call"),
    (put(), lambda m: nn.utils.parametrizations.spectral_norm(m.a), "a.weight is no parameter any more: a parametrization with buffers"),
    (put(), lambda m: setattr(m, "a", OfMethods(m.a)), "a.weight is no parameter any more: OfMethods, which is now at a, has none"),
    (put(), lambda m: setattr(m, "a", nn.Sequential(m.a)), "a.weight is no parameter any more: Sequential, which is now at a, has none"),
])  # fmt: skip
def test_a_module_of_regularize_refuses_other_ties(before: Change, after: Change, error: str) -> None:
    model = Net()
    before(model)
    module = graphreg.regularize(model, weight_l2=1.0)
    module(X)
    after(module)
    with pytest.raises(GraphRegError, match=error):
        module(X)


@pytest.mark.parametrize("key", ["drop_connect", "weight_noise"])
def test_a_module_of_regularize_cannot_replace_a_weight_that_is_computed(key: str) -> None:
    model = Net()
    module: Any = graphreg.regularize(model, rng=0, **{key: 0.5})
    nn.utils.parametrizations.weight_norm(model.a)
    for call in (module, torch.compile(module, backend="eager")):
        with pytest.raises(GraphRegError, match="a.weight is no parameter any more: a parametrization computes it, and a call"):
            call(X)


def test_new_parameters_with_the_same_ties_are_no_change() -> None:
    model = Net()
    module = graphreg.regularize(model, weight_l2=1.0)
    first = module(X).penalties["weight_l2"]
    module.load_state_dict({name: tensor.clone() * 2 for name, tensor in module.state_dict().items()}, assign=True)
    torch.testing.assert_close(module(X).penalties["weight_l2"], 4 * first)
    nn.utils.parametrizations.weight_norm(module.a)
    torch.testing.assert_close(module(X).penalties["weight_l2"], 4 * first)


@pytest.mark.parametrize("key", ["l2_sp", "spectral"])
def test_what_regularizers_own_follows_the_shapes(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = lines(monkeypatch)
    model: Any = graphreg.regularize_(Net(), scale=1, rng=0, **{key: 0.1})
    model(X)
    with torch.no_grad():
        model.a.weight.add_(1.0)
    kept = model.last
    model.last = nn.Linear(4, 3)
    assert model(X).shape == (3, 3)
    assert f"{key}: last.weight is another parameter now, or has another shape; its state starts anew" in text
    if key == "l2_sp":  # a.weight has moved by 1 everywhere, and its anchor stays
        torch.testing.assert_close(model.penalties()[key] * 2, torch.tensor(0.1), rtol=0.2, atol=0.05)
    model.last = kept
    assert model(X).shape == (3, 4)
    model.last = nn.Identity()
    model(X)
    assert f"{key}: the model has no parameter last.weight any more; its state is dropped" in text
    graphreg.reset_state(model)
    graphreg.set_rng_state(model, graphreg.rng_state(model))
    model(X)


@pytest.mark.parametrize("key", ["l2_sp", "spectral"])
def test_a_module_of_regularize_says_that_a_state_has_another_shape(key: str) -> None:
    module: Any = graphreg.regularize(Net(), **{key: 0.1})
    module(X)
    module.last = nn.Linear(4, 3)
    with pytest.raises(GraphRegError, match=r"has the shape \(3, 4\), and its state was made for \(4, 4\). Call graphreg.reset"):
        module(X)
    graphreg.reset_state(module)
    module(X)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x).relu()


class Deep(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return _times(self.layers, x)


def test_by_depth_after_a_layer_was_appended_and_removed() -> None:
    ramp = graphreg.by_depth(graphreg.schedules.linear(0, 1, 10), graphreg.schedules.linear(0, 2, 10))
    model: Any = graphreg.regularize_(Deep(2), weight_l2=ramp, scale=1)
    layer = Block()
    for step, count in enumerate((2, 3, 2, 3), 1):
        if count == 3:
            model.layers.append(layer)
        elif step > 1:
            model.layers.pop(2)
        model(X)
        other: Any = Deep(count)
        other.load_state_dict(model.state_dict())
        graphreg.regularize_(other, weight_l2=ramp, scale=1)
        for _ in range(step):
            other(X)
        torch.testing.assert_close(model.penalties(), other.penalties())
    assert graphs(model) == 2


def test_a_block_that_torch_compile_has_wrapped() -> None:
    model: Any = graphreg.regularize_(Deep(2), hidden_l2=0.0, scale=1, blocks="layers.*")
    block = model.layers[0]
    model.layers[0] = torch.compile(block, backend="eager")
    with pytest.raises(GraphRegError, match=r"'layers.0' is a block \(blocks=\), and torch.compile has wrapped it in another module"):
        model(X)
    model.layers[0] = block
    model.get_submodule("layers.0").compile(backend="eager")
    torch.testing.assert_close(model(X), model.eval()(X))


def test_a_block_whose_class_or_forward_is_replaced() -> None:
    class Doubled(Block):
        def forward(self, x: Tensor) -> Any:
            return self.layer(x) * 2

    model: Any = graphreg.regularize_(Deep(2), hidden_l2=0.0, scale=1, blocks="layers.*")
    model(X)
    model.layers[0].__class__ = Doubled
    assert torch.equal(model.train()(X), model.eval()(X))
    model.train().layers[1].forward = lambda x: x * 2
    with pytest.raises(GraphRegError, match="the forward of a block of class Block was replaced on the object by .*lambda"):
        model(X)
    del model.layers[1].forward
    assert torch.equal(model(X), model.eval()(X))
    assert [type(layer) for layer in graphreg.strip_(model).layers] == [Doubled, Block]


class Assigns(Net):
    n, last_value = 0, None

    def forward(self, x: Tensor) -> Any:
        self.last_value = self.a(x)
        self.n += 1
        return self.last(self.last_value)


@pytest.mark.parametrize("regularize", [graphreg.regularize, graphreg.regularize_])
def test_what_the_forward_assigns_is_named(regularize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = lines(monkeypatch)
    model = regularize(Assigns(), hidden_l2=0.1, example_inputs=X, penalties="return")
    model(X)
    told = "not assigned: last_value, n. The forward assigns this, and the graph does not"
    assert told in text and told in str(graphreg.report(model))
    if regularize is graphreg.regularize_:
        model.eval()(X)  # assigns both
        model.train()(X)
        assert graphs(model) == 1 and model.n == 1


class Grows(Net):
    """Keeps a table that is long enough for all calls so far."""

    table = torch.ones(2, 1)

    def forward(self, x: Tensor) -> Any:
        if len(x) > len(self.table):
            self.table = torch.ones(len(x), 1)
        return self.last(self.a(x)) * self.table[: len(x)]


def test_what_only_a_later_graph_assigns_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    text = lines(monkeypatch)
    model = graphreg.regularize_(Grows(), hidden_l2=0.1, penalties="return")
    model(X[:2])
    assert not any(line.startswith("not assigned") for line in text)
    for _ in range(2):
        model(X)
    assert text.count("not assigned: table. The forward assigns this, and the graph does not") == 1


class Collects(Net):
    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.seen, self.table, self.kept = list[int](), dict[str, Tensor](), {"a": [0]}, types.SimpleNamespace(count=0)

    def forward(self, x: Tensor) -> Any:
        self.sizes.append(len(x))
        self.seen["last"] = x.detach()
        self.table["a"].append(1)
        self.kept.count += 1
        return self.last(x)


def test_what_the_forward_puts_into_containers_is_named() -> None:
    model = graphreg.regularize_(Collects(), weight_l2=0.1, scale=1, example_inputs=X)
    assert "not assigned: sizes, seen, kept.count, table. The forward assigns this, and the graph does not" in str(graphreg.report(model))
    assert (model.sizes, model.seen, model.table, model.kept.count) == ([], {}, {"a": [0]}, 0)


class Shared:
    """What functions in the containers of global variables read."""

    gain = 2.0


BY_NAME, IN_ORDER = {"gain": (lambda: Shared.gain, 1)}, [lambda: Shared.gain]


@pytest.mark.parametrize("gain", [lambda: BY_NAME["gain"][0]() + 1, lambda: IN_ORDER[0]() + 1], ids=["a tuple in a dict", "a list"])
def test_what_a_function_in_a_global_container_reads_is_watched(gain: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(Net):
        def post(self, h: Tensor) -> Tensor:
            return h * gain()

    model, plain = graphreg.regularize_(Scaled(), weight_l2=0.1, scale=1, rng=0), Scaled()
    torch.testing.assert_close(model(X), plain(X))
    monkeypatch.setattr(Shared, "gain", 3.0)
    torch.testing.assert_close(model(X), plain(X))


class Keeps(Net):
    """Its forward writes what it has read: a limit, a default, a value that is put back, a count."""

    def __init__(self) -> None:
        super().__init__()
        self.limited, self.lazy, self.lent, self.n = 1.0, None, 1.0, 0

    def forward(self, x: Tensor) -> Any:
        self.limited = max(self.limited, 0.1)
        if self.lazy is None:
            self.lazy = 1.0
        lent, self.lent = self.lent, 3.0
        try:
            h = self.act(self.a(x)) * self.lent
        finally:
            self.lent = lent
        self.n += 1
        return self.last(h) * self.limited * self.lazy * self.lent


def test_what_the_forward_writes_and_does_not_change_is_watched() -> None:
    plain, model = Keeps(), graphreg.regularize_(Keeps(), hidden_dropout=0.0)
    assert torch.equal(model(X), plain(X))
    for name in ("limited", "lazy", "lent"):
        for each in (plain, model):
            setattr(each, name, 0.5)
        assert torch.equal(model(X), plain(X)), name
    known = graphs(model)
    model.n = 7  # nothing depends on a count
    assert torch.equal(model(X), plain(X)) and graphs(model) == known


class Counts(nn.Module):
    """Its code runs at each call, and counts."""

    n = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return x if x.sum() > 0 else -x


def test_what_opaque_code_and_hooks_count_is_no_change() -> None:
    model = Net()
    model.act = Counts()
    model.a.register_forward_hook(lambda module, inputs, output: setattr(module, "seen", getattr(module, "seen", 0) + 1))

    def hook(module: Any, inputs: Any, output: Any) -> None:
        module.seen = getattr(module, "seen", 0) + 1

    model.last.register_forward_hook(hook)
    graphreg.regularize_(model, hidden_dropout=0.0)
    for _ in range(3):
        model(X)
    assert graphs(model) == 1 and model.act.n == 3 and model.last.seen == 3


class Factor:
    def __init__(self, by: float) -> None:
        self.by = by


class Lazily(Net):
    """A hook sets what its forward reads, once."""

    def __init__(self) -> None:
        super().__init__()
        self.factor: Any = None

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.factor.by


def test_what_a_hook_of_a_layer_sets_for_the_forward_is_refused() -> None:
    model = Lazily()

    def hook(module: Any, inputs: Any) -> None:
        if model.factor is None:
            model.factor = Factor(1.0)

    model.a.register_forward_pre_hook(hook)
    graphreg.regularize_(model, hidden_dropout=0.0)
    with pytest.raises(graphreg.TraceError, match=r"Lazily\.forward reads what an opaque module changes"):
        model(X)
    assert model.factor is None


class CountsInTheClass(Net):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        type(self).calls += 1
        return super().forward(x)


def test_what_the_model_counts_in_its_class_is_left_alone() -> None:
    model = graphreg.regularize_(CountsInTheClass(), hidden_dropout=0.0)
    expected = model(X)
    model.eval()(X)
    assert torch.equal(model.train()(X), expected) and type(model).calls > 0


def test_what_is_set_on_the_class_of_the_model_is_refused() -> None:
    class Scaled(Net):
        scale = 1.0

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * self.scale

    model: Any = graphreg.regularize_(Scaled(), hidden_dropout=0.0)
    before = model(X)
    assert type(model).__annotations__ == {}  # Python makes the dict now
    Scaled.scale = 2.0
    assert torch.equal(model(X), before * 2)
    type(model).scale = 3.0
    with pytest.raises(GraphRegError, match="^scale was set on type\\(model\\), a class that graphreg made for this model"):
        model(X)
    del type(model).scale
    assert torch.equal(model(X), before * 2)


class Inner:
    factor = 1.0


class Variants:
    """A configuration, of which the forward makes a variant."""

    def __init__(self) -> None:
        self.scale, self.bias, self.inner = 1.0, 0.0, Inner()


class InSlots:
    __slots__ = ("bias", "inner", "scale")
    __init__ = Variants.__init__


def by_state(config: Any) -> Any:
    made = object.__new__(type(config))
    vars(made).update(config.__getstate__())
    return made


def by_pickle(config: Any) -> Any:
    return pickle.loads(pickle.dumps(config))


READ = [(Variants, each) for each in (copy.copy, copy.deepcopy, by_pickle, by_state)] + [(InSlots, copy.copy), (InSlots, copy.deepcopy)]


@pytest.mark.parametrize(("kind", "copied"), READ)
def test_what_is_read_through_a_copy_is_compared(kind: type[Any], copied: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = kind()

        def forward(self, x: Tensor) -> Tensor:
            config = copied(self.config)
            config.bias = 1.0
            return x * config.scale * config.inner.factor + config.bias

    model = graphreg.regularize_(Net(), input_dropout=0.0)
    for scale, factor in ((1.0, 1.0), (5.0, 1.0), (5.0, 3.0)):
        model.config.scale, model.config.inner.factor = scale, factor
        assert torch.equal(model(X), X * scale * factor + 1)


class DecidesByDtype(nn.Module):
    """T5 does so in its feed-forward layers. ``asks``: by asking for autocast itself, which no graph can assert."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.linear, self.asks = nn.Linear(4, 4), asks

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        casts = torch.is_autocast_enabled("cpu") if self.asks else x.dtype is not self.linear.weight.dtype
        return x.float() * 3 if casts else x


def test_a_model_that_decides_by_a_dtype_has_a_graph_for_autocast_and_one_for_none() -> None:
    plain, order = DecidesByDtype(asks=False), [True, False, True, False]
    model, x = graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.0, penalties="attach", scale=1), torch.randn(2, 4)
    for is_on in order:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            ours, theirs = model(x), plain(x)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        for each in (model, plain):
            each.zero_grad()
        ours.sum().backward()
        theirs.sum().backward()
        assert torch.equal(model.linear.weight.grad, plain.linear.weight.grad)
    assert graphs(model) == 2
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(graphreg.errors.TraceError, match="does not give the model's result"):
        graphreg.regularize_(DecidesByDtype(asks=True), weight_l2=0.1, penalties="attach", scale=1)(x)


def test_another_autocast_counts_and_draws_once() -> None:
    """The first graph runs until its check of a dtype fails. What it has done by then is put back."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.drop, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(self.norm(self.first(x)))
            x = self.first(x)
            return self.last(x.float() * 2 if x.dtype != self.last.weight.dtype else x)

    plain, x = Normed(), torch.randn(6, 4)
    model = graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.0, penalties="attach", scale=1)
    for is_on in (False, True, False, True):
        results = []
        for each in (model, plain):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                results.append((each(x), torch.rand(1), each.norm.running_mean.clone(), each.norm.num_batches_tracked.clone()))
        assert all(map(torch.equal, *results))


def test_an_unfrozen_layer_counts_and_draws_once() -> None:
    """As does an input of another layout: the graph has run with such sizes before, and its check comes late."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.drop(self.norm(self.first(x)))
            return h * (2 if self.first.weight.requires_grad else 1) * (3 if x.is_contiguous() else 1)

    plain, inputs = Asks(), [torch.randn(6, 4), torch.randn(4, 6).T]
    model = graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.0, penalties="attach", scale=1, missing="ignore")
    for trained, i in itertools.product([True, False, False, True], [0, 1, 0]):
        results = []
        for each in (model, plain):
            each.first.requires_grad_(trained)
            torch.manual_seed(0)
            results.append((each(inputs[i]), torch.rand(1), each.norm.running_mean.clone(), each.norm.num_batches_tracked.clone()))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("how", ["each", "pairs", "mean"])
def test_fewer_parts_than_before_have_a_graph_of_their_own(how: str) -> None:
    class Parts(nn.Module):
        def __init__(self, joined: Callable[[nn.Module, Tensor], Tensor]) -> None:
            super().__init__()
            self.linear, self.joined = nn.Linear(4, 4), joined

        def forward(self, x: Tensor) -> Tensor:
            return self.joined(self.linear, x)

    def pairs(linear: nn.Module, x: Tensor) -> Tensor:
        parts = x.split(2)
        return linear(torch.stack([a + b for a, b in zip(parts, (*parts[1:], parts[0]))]))  # noqa: B905

    def around_the_mean(linear: nn.Module, x: Tensor) -> Tensor:
        parts = x.split(2)
        mean = torch.stack(parts).mean(0)
        return linear(sum(((part - mean).relu() for part in parts), mean))

    ways = {"each": lambda linear, x: torch.cat(list(map(linear, x.split(2)))), "pairs": pairs, "mean": around_the_mean}
    plain = Parts(ways[how])
    model = graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.0, penalties="attach", scale=1)
    for rows in (4, 8, 2, 6, 2, 4):
        assert torch.equal(model(x := torch.randn(rows, 4)), plain(x))
    module = graphreg.regularize(plain, weight_l2=0.1, example_inputs=torch.randn(8, 4))
    with pytest.raises(graphreg.errors.OtherInputs):
        module(torch.randn(4, 4))


class Doubled:
    """A mixin."""

    def post(self, h: Tensor) -> Any:
        return 2 * h


def mixed_in(model: nn.Module) -> None:
    model.__class__ = type("Mixed", (Doubled, type(model)), {})


def parametrized(model: nn.Module) -> None:
    model.register_parameter("gain", nn.Parameter(torch.ones(1)))
    nn.utils.parametrize.register_parametrization(model, "gain", nn.Identity())


def given_a_forward(model: nn.Module) -> None:
    type(model).forward = lambda self, x: self.last(self.a(x))


@pytest.mark.parametrize("change", [mixed_in, parametrized, given_a_forward])
@pytest.mark.parametrize("traced", [False, True])
def test_another_class_of_the_model_is_refused_in_train_mode(change: Change, traced: bool) -> None:
    model = graphreg.regularize_(Net(), hidden_l2=0.1, scale=1)
    if traced:
        model(X)
    change(model)
    with pytest.raises(GraphRegError, match="in place, or the forward of that class, was replaced after graphreg.regularize_"):
        model(X)
    plain = Net().eval()
    if change is not parametrized:
        assert torch.equal(model.eval()(X), plain.last(2 * plain.act(plain.a(X)) if change is mixed_in else plain.a(X)))


def test_a_stripped_model_runs_within_what_has_wrapped_its_forward() -> None:
    model = graphreg.regularize_(Net(), hidden_dropout=0.5, scale=1)
    inner = model.forward
    model.forward = lambda *args: inner(*args).float()  # as accelerate does
    model(X)
    graphreg.verify(model, model, X)
    assert torch.equal(graphreg.strip_(model)(X), Net()(X)) and type(model) is Net


class HoldsByName(Net):
    """Its forward reads a weight from a dict of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name = dict(self.a.named_parameters())

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.by_name["weight"].sum()


def test_a_parameter_that_a_dict_holds_and_that_is_replaced_is_noticed() -> None:
    model = graphreg.regularize_(HoldsByName(), hidden_dropout=0.0)
    model(X), model(X)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(graphreg.TraceError, match="computes with a parameter that is not registered with any module"):
        model(X)
