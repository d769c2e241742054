"""What the structure of a call does not describe (functions, methods, modules, classes) is compared as what the model leads to."""

from __future__ import annotations

import collections
import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, TraceError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
GAIN = {"gain": 1.0}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)


class Calls(Base):
    def forward(self, x: Tensor, f: Any) -> Any:
        return f(self.layer(x))


class Reads(Base):
    def forward(self, x: Tensor, f: Any) -> Any:
        return self.layer(x) * f.k


class Sums(Base):
    def forward(self, x: Tensor, f: Any) -> Any:
        return self.layer(x) + sum(f)


class Scale:
    k = 1.0

    def __call__(self, h: Tensor) -> Tensor:
        return h * self.k * GAIN["gain"]

    def scaled(self, h: Tensor) -> Tensor:
        return self(h)

    @classmethod
    def of_class(cls, h: Tensor) -> Tensor:
        return h * cls.k


def by_default(h: Tensor, gains: dict[str, float] = {"gain": 1.0}) -> Tensor:  # noqa: B006
    return h * gains["gain"]


def tripled(h: Tensor) -> Tensor:
    return h * 3


def with_attribute(h: Tensor) -> Any:
    return h * with_attribute.gain  # type: ignore[attr-defined]


with_attribute.gain = 1.0  # type: ignore[attr-defined]


def checked(kind: Callable[[], nn.Module], argument: Any, change: Callable[[], Any]) -> None:
    """Call a model in place with the same argument before and after a change: each time it gives what the model gives."""
    plain, model = kind(), graphreg.regularize_(kind(), hidden_dropout=0.0)
    assert torch.equal(model(X, argument), before := plain(X, argument))
    change()
    after = plain(X, argument)
    assert torch.equal(model(X, argument), after) and torch.equal(model(X, argument), after) and not torch.equal(after, before)
    assert sum(map(len, vars(model)["graphreg_in_place"]._made.values())) == 2


@pytest.mark.parametrize("kind, argument, change", [
    (Calls, (scale := Scale()).scaled, lambda p: p.setattr(scale, "k", 3.0)),
    (Calls, Scale().scaled, lambda p: p.setitem(GAIN, "gain", 3.0)),
    (Calls, Scale.of_class, lambda p: p.setattr(Scale, "k", 3.0)),
    (Calls, Scale(), lambda p: p.setitem(GAIN, "gain", 3.0)),
    (Reads, Scale(), lambda p: p.setattr(Scale, "k", 3.0)),
    (Reads, Scale, lambda p: p.setattr(Scale, "k", 3.0)),
    (Calls, by_default, lambda p: p.setitem(by_default.__defaults__[0], "gain", 3.0)),
    (Calls, by_default, lambda p: p.setattr(by_default, "__code__", tripled.__code__)),
    (Calls, functools.partial(by_default), lambda p: p.setitem(by_default.__defaults__[0], "gain", 3.0)),
    (Calls, with_attribute, lambda p: p.setattr(with_attribute, "gain", 3.0)),
    (Reads, (module := types.ModuleType("module_of_test")), lambda p: p.setattr(module, "k", 3.0)),
    (Sums, (table := {"a": 1.0}).values(), lambda p: p.setitem(table, "a", 3.0)),
    (Sums, (user := collections.UserDict({1.0: 0})), lambda p: user.update({2.0: 0})),
], ids=["bound", "global", "class method", "callable", "class attribute", "class", "default", "code", "partial", "attribute",
        "Python module", "view", "UserDict"])  # fmt: skip
def test_what_an_argument_leads_to_may_change(
    kind: Callable[[], nn.Module], argument: Any, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "k", 1.0, raising=False)
    checked(kind, argument, lambda: change(monkeypatch))


def test_a_closure_may_change() -> None:
    box = [1.0]
    checked(Calls, lambda h: h * box[0], lambda: box.__setitem__(0, 3.0))


@pytest.mark.parametrize("argument, change", [
    (nn.LeakyReLU(0.1), lambda each: setattr(each, "negative_slope", 0.9)),
    (nn.Sequential(nn.Tanh()), lambda each: each.__setitem__(0, nn.Identity())),
    (nn.Sequential(nn.Tanh()), lambda each: each[0].register_forward_hook(lambda module, inputs, output: output * 2)),
], ids=["attribute", "layer", "hook"])  # fmt: skip
def test_a_module_as_an_argument_may_change(argument: Any, change: Any) -> None:
    checked(Calls, argument, lambda: change(argument))


def test_the_mode_of_a_module_as_an_argument() -> None:
    drop, plain, model = nn.Dropout(0.5), Calls(), graphreg.regularize_(Calls(), hidden_dropout=0.0)
    assert (model(X, drop) == 0).any()
    drop.eval()
    assert torch.equal(model(X, drop), plain(X, drop))


def test_what_does_not_change_makes_no_other_graph() -> None:
    model, scale = graphreg.regularize_(Calls(), hidden_dropout=0.0), Scale()
    for _ in range(3):
        model(X, scale.scaled)
        scale.note = object()  # type: ignore[attr-defined]  # nothing reads it
    assert [len(made) for made in vars(model)["graphreg_in_place"]._made.values()] == [1]


@pytest.mark.parametrize("wrapped", [lambda t: {t}, lambda t: {t: 0}, lambda t: [t], lambda t: {(t,): 0}])
def test_tensors_in_a_set_or_as_keys(wrapped: Any) -> None:
    """Each call has its own tensors; gradients reach them; a write into one counts."""

    class Model(Base):
        def forward(self, x: Tensor, more: Any) -> Any:
            return self.layer(x) + sum(each[0] if isinstance(each, tuple) else each for each in more)

    plain, model = Model(), graphreg.regularize_(Model(), hidden_dropout=0.0)
    for k in (1.0, 5.0):
        more = torch.full((4,), k, requires_grad=True)
        output = model(X, wrapped(more))
        assert torch.equal(output, plain(X, wrapped(more)))
        output.sum().backward()
        assert more.grad is not None and torch.equal(more.grad, torch.full((4,), 2.0))
        with torch.no_grad():
            more += 1
        assert torch.equal(model(X, wrapped(more)), plain(X, wrapped(more)))


def test_a_tensor_of_an_object_that_is_an_input_too() -> None:
    class Model(Base):
        def forward(self, x: Tensor, f: Any) -> Any:
            return self.layer(x) * f.k

    plain, model = Model(), graphreg.regularize_(Model(), hidden_dropout=0.0)
    for x in (X, X + 1):
        assert torch.equal(model(x, f := Holding(x)), plain(x, f))


class Holding:
    def __init__(self, k: Tensor) -> None:
        self.k = k


@pytest.mark.parametrize("make", [lambda: iter([1.0, 2.0]), lambda: map(float, "12"), lambda: (float(c) for c in "12"),
                                  lambda: [zip([1.0], [2.0], strict=True)]], ids=["iter", "map", "generator", "in a list"])  # fmt: skip
def test_iterators_are_refused_before_anything_is_taken(make: Any) -> None:
    model, given = graphreg.regularize_(Sums(), hidden_dropout=0.0), make()
    with pytest.raises(TraceError, match="the call carries an iterator, of class .*, and a trace of Sums would use it up"):
        model(X, given)
    with pytest.raises(TraceError, match=r"Nothing was taken from it. Pass a list or a tuple: list\(iterator\)"):
        graphreg.regularize(Sums(), hidden_dropout=0.0, example_inputs=(X, given))
    module = graphreg.regularize(Sums(), hidden_dropout=0.0, example_inputs=(X, [1.0, 2.0]))
    with pytest.raises(GraphRegError, match="the call carries an iterator"):
        module(X, given)
    assert len(list(given[0] if isinstance(given, list) else given)) == (1 if isinstance(given, list) else 2)


def test_a_container_that_contains_itself_is_refused() -> None:
    class First(Base):
        def forward(self, x: Tensor, items: Any) -> Any:
            return self.layer(x) * items[0]

    around: list[Any] = [1.0]
    around.append(around)
    module = graphreg.regularize(First(), hidden_dropout=0.0, example_inputs=(X, [1.0]))
    sentence = "the call carries a list that contains itself, which a graph cannot take apart. Pass what the forward reads of it as arg"
    for call in (graphreg.regularize_(First(), hidden_dropout=0.0), module):
        with pytest.raises(TraceError, match=sentence):
            call(X, around)

    class Kind(Base):
        def forward(self, x: Tensor, items: Any) -> Any:
            return self.layer(x) * items[0].k

    child = Scale()
    child.around = [child]  # type: ignore[attr-defined]  # no container of containers alone
    model = graphreg.regularize_(Kind(), hidden_dropout=0.0)
    assert torch.equal(model(X, child.around), Kind()(X, child.around))  # type: ignore[attr-defined]


def test_a_size_stays_a_size() -> None:
    class Model(Base):
        def forward(self, x: Tensor, size: Any) -> Any:
            return self.layer(x) * (size.numel() if isinstance(size, torch.Size) else 1)

    plain = Model()
    model = graphreg.regularize_(Model(), hidden_dropout=0.0)
    module = graphreg.regularize(plain, hidden_dropout=0.0, example_inputs=(X, X.shape))
    assert torch.equal(model(X, X.shape), plain(X, X.shape)) and torch.equal(module(X, X.shape).output, plain(X, X.shape))
    assert torch.equal(model(X, (2, 4)), plain(X, (2, 4)))


def test_a_keyword_that_is_no_identifier() -> None:
    class Model(Base):
        def forward(self, x: Tensor, **batch: Tensor) -> Any:
            return self.layer(x) + sum(batch.values())

    plain, model = Model(), graphreg.regularize_(Model(), hidden_dropout=0.0)
    for names in (("side-input",), ("class", "mask"), ("mask",)):
        batch = {"x": X, **dict.fromkeys(names, torch.ones(4))}
        assert torch.equal(model(**batch), plain(**batch))


def takes_more(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, extra: int = 0, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


def test_a_decorator_that_takes_other_arguments_than_it_shows() -> None:
    class Model(Base):
        @takes_more
        def forward(self, x: Tensor) -> Any:
            return self.layer(x)

    model = graphreg.regularize_(Model(), hidden_dropout=0.0)
    assert torch.equal(model(X), Model()(X))
    with pytest.raises(TraceError, match=r"does not fit Model.forward\(x\): got an unexpected keyword argument 'extra'. A decorator"):
        model(X, extra=1)
    hooked = graphreg.regularize_(Calls(), hidden_dropout=0.0)
    hooked.register_forward_pre_hook(lambda module, given: (*given, torch.relu))
    with pytest.raises(TraceError, match="missing a required argument: 'f'. A decorator of the forward, or a hook, takes other arguments"):
        hooked(X)


@pytest.mark.parametrize("call", [lambda model: model(), lambda model: model(X, 1, 2), lambda model: model(X, other=1)])
def test_a_call_that_does_not_fit_raises_the_error_of_the_plain_model(call: Any) -> None:
    with pytest.raises(TypeError) as plain:
        call(Calls())
    model = graphreg.regularize_(Calls(), hidden_dropout=0.0)
    with pytest.raises(TypeError) as error:
        call(model)
    assert str(error.value) == str(plain.value)
    assert torch.equal(copy.deepcopy(model)(X, torch.relu), Calls()(X, torch.relu))
