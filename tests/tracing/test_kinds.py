"""What isinstance answers of a traced value."""

import builtins
import collections.abc
import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphreg

HELPER = ModuleType("helper_of_test_kinds")  # a function that stands elsewhere than the model's class
sys.modules[HELPER.__name__] = HELPER
exec("from torch import Tensor\ndef doubled(x): return x * 2 if isinstance(x, Tensor) else x", vars(HELPER))
doubled = vars(HELPER)["doubled"]


class Asks(nn.Module):
    """``of`` the value that ``make`` gives: the layer runs where the answer is yes."""

    def __init__(self, make: Callable[[Any, Any], Any], kinds: Any, whole: nn.Module | None = None) -> None:
        super().__init__()
        self.make: Callable[[Any, Any], Any] = make
        self.kinds = kinds
        self.whole = whole or nn.Identity()
        self.attend, self.rnn = nn.MultiheadAttention(4, 1), nn.LSTM(4, 4)
        self.register_buffer("mean", torch.ones(4))
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        value = self.make(x, self)
        return self.out(self.layer(x) if isinstance(value, self.kinds) else torch.relu(x))


class AsksOfEach(Asks):
    """One question of each of the kinds."""

    def forward(self, x: Tensor) -> Any:
        value = self.make(x, self)
        return [self.out(self.layer(x) if isinstance(value, kinds) else torch.relu(x)) for kinds in self.kinds]


class Pair(nn.Module):
    """A forward that no trace sees into; it gives a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x, -x) if float(x.shape[0]) * 0 == 0 and (x > 5).all().item() is not None else (x, x)


VALUES: dict[str, Callable[[Any, Any], Any]] = {
    "the argument": lambda x, m: x,
    "a function's": lambda x, m: torch.relu(x),
    "a method's": lambda x, m: x.abs(),
    "an operator's": lambda x, m: x + 1,
    "a part of a tensor": lambda x, m: x[0],
    "a part of a split": lambda x, m: x.chunk(2)[0],
    "a split": lambda x, m: x.chunk(2),
    "an attention's": lambda x, m: m.attend(x[:, None], x[:, None], x[:, None]),
    "its first part": lambda x, m: m.attend(x[:, None], x[:, None], x[:, None])[0],
    "a state": lambda x, m: m.rnn(x[:, None])[1],
    "a state's part": lambda x, m: m.rnn(x[:, None])[1][0],
    "a maximum": lambda x, m: torch.max(x, 1),
    "a maximum's part": lambda x, m: torch.max(x, 1)[0],
    "means and deviations": lambda x, m: torch.std_mean(x, dim=1),
    "a mean": lambda x, m: torch.std_mean(x, dim=1)[1],
    "factors": lambda x, m: torch.linalg.qr(x),
    "columns": lambda x, m: x.unbind(1),
    "a choice": lambda x, m: torch.where(x > 0, x, x * 2),
    "a layer's": lambda x, m: m.layer(x),
    "a parameter": lambda x, m: m.layer.weight,
    "a buffer": lambda x, m: m.mean,
    "a shape": lambda x, m: x.shape,
    "a size": lambda x, m: x.size(),
    "a number": lambda x, m: x.shape[0],
    "a number of sizes": lambda x, m: x.size(0) * x.size(1) // 2,
    "a ratio": lambda x, m: x.size(0) / 2,
    "a comparison": lambda x, m: x.size(0) == 2,
    "a part of a shape": lambda x, m: x.shape[1:],
    "a dtype": lambda x, m: x.dtype,
    "a device": lambda x, m: x.device,
    "a flag": lambda x, m: x.is_floating_point(),
    "a name": lambda x, m: x.type(),
}
KINDS: dict[str, Any] = {
    "Tensor": torch.Tensor, "Parameter": nn.Parameter, "tuple": (tuple, list), "number": int | float, "Size": torch.Size,
}  # fmt: skip


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("shown", [False, True], ids=["bare", "example"])
def test_the_trace_goes_the_models_way(make: Callable[[Any, Any], Any], shown: bool) -> None:
    model, x = AsksOfEach(make, [*KINDS.values()]), torch.randn(2, 4)
    module: Any = graphreg.regularize(model, weight_l2=1e-3, example_inputs=x if shown else None, front_end="symbolic")
    for kind, ours, theirs in zip(KINDS, module(x)[0], model(x), strict=True):
        assert torch.equal(ours, theirs), kind


@pytest.mark.parametrize("kinds", [torch.Tensor, tuple, list, dict])
def test_the_example_gives_the_type_of_what_an_opaque_module_returns(kinds: type) -> None:
    model, x = Asks(lambda x, m: m.whole(x), kinds, Pair()), torch.randn(2, 4)
    with pytest.raises(graphreg.TraceError, match=r"calls isinstance on 'whole', and the trace cannot tell its type") as told:
        graphreg.trace(model, front_end="symbolic")
    assert "test_kinds.py" in str(told.value)
    module: Any = graphreg.regularize(model, weight_l2=1e-3, example_inputs=x)
    assert torch.equal(module(x)[0], model(x))


class Result:
    def __init__(self, last: Tensor) -> None:
        self.last = last


class Skips(nn.Module):
    """Skips its layer at random, as encoders of transformers do with a ``layerdrop``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Result:
        return Result(x if torch.rand([]) < 0.5 else self.layer(x))


class AsksSkips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = Skips(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.part(x)
        return self.last(y.last if hasattr(y, "last") else y)


def test_the_refusal_says_why_nothing_is_known_of_what_an_opaque_module_returns() -> None:
    message = "has the attribute 'last', and the trace cannot tell: part is an opaque module .*its forward draws random numbers"
    with pytest.raises(graphreg.TraceError, match=message):
        graphreg.trace(AsksSkips(), torch.ones(2, 4))


class Features(nn.Module):
    """Returns a dict, as a frozen backbone does."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            found = {"low": x + 1, "high": x.relu()}
        return found if len(x) < 3 else {"more": x, **found}


def added(low: Any, high: Any, more: Any = 0) -> Any:
    return low - high + more


READ: dict[str, Callable[[Any], Any]] = {
    "items": lambda o: sum(v * (i + 1) for i, (k, v) in enumerate(o.items()) if k != "more"),
    "in": lambda o: o["more"] if "more" in o else o["low"],
    "as keywords": lambda o: added(**o),
    "values": lambda o: torch.stack(list(o.values())).sum(0),
    "length": lambda o: o["low"] * len(o),
    "get": lambda o: o["low"] + o.get("more", 1) + o.get("high"),
    "keys": lambda o: sum(o[k] for k in o),
    "a copy": lambda o: added(**dict(o, low=1)),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_the_example_gives_the_keys_of_a_dict_that_an_opaque_module_returns(read: Callable[[Any], Any]) -> None:
    model = Asks(lambda x, m: read(m.whole(x)), tuple, Features())
    model.forward = lambda x: model.out(model.make(x, model))  # type: ignore[method-assign]
    few, more = torch.randn(2, 4), torch.randn(3, 4)
    module: Any = graphreg.regularize(model, weight_l2=1e-3, example_inputs=few, front_end="symbolic")
    assert torch.equal(module(few)[0], model(few))
    with pytest.raises(graphreg.errors.OtherInputs, match=r"reads the keys of a dict, and these inputs give \['more', 'low', 'high'\]"):
        module(more)


def test_a_submodule_that_calls_isinstance_becomes_opaque_where_the_type_is_not_known() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Asks(lambda x, m: m.whole(x), tuple, Pair()))
    traced = graphreg.trace(model)
    assert "calls isinstance on" in traced.opaque_modules["1"]
    x = torch.randn(2, 4)
    assert torch.equal(graphreg.regularize(model, weight_l2=1e-3)(x)[0], model(x))


class OfDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: Any, scale: Any = 1.0) -> Any:
        x = batch["x"] if isinstance(batch, dict) else batch
        return self.layer(x) * (2 if isinstance(scale, float) else scale)


def test_an_argument_without_an_example_is_a_tensor_and_that_is_said() -> None:
    model, x = OfDicts(), torch.randn(2, 4)
    bare = graphreg.regularize(model, weight_l2=1e-3)
    assert torch.equal(bare(x)[0], model(x))
    note = "assumed to be a tensor: batch, because the forward calls isinstance on it (if it is not a tensor, give example_inputs)"
    assert note in str(graphreg.names(model)) and note in str(graphreg.report(bare)).replace("\n    ", " ")
    shown = graphreg.regularize(model, weight_l2=1e-3, example_inputs=({"x": x},))
    assert torch.equal(shown({"x": x})[0], model({"x": x}))
    assert "taken for" not in str(graphreg.report(shown))


class Helped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        if torch.is_tensor(x):
            x = F.relu(x)
        return self.layer(doubled(x))  # asks isinstance


def test_helpers_of_other_modules_and_is_tensor() -> None:
    model, x = Helped(), torch.randn(2, 4)
    assert torch.equal(graphreg.regularize(model, weight_l2=1e-3)(x)[0], model(x))


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor) and not isinstance(x, nn.Parameter)
        raise ValueError("no forward")


@pytest.mark.parametrize("model", [Helped(), Fails()], ids=["traced", "refused"])
def test_isinstance_is_pythons_own_again(model: nn.Module) -> None:
    homes = [vars(sys.modules[name]) for name in (__name__, HELPER.__name__, "torch")]
    try:
        graphreg.trace(model)
    except graphreg.TraceError as error:
        assert "no forward" in str(error)  # it came past its assertion
    assert all("isinstance" not in home for home in homes)
    assert isinstance is builtins.isinstance


# What only the examples tell, and what they tell is asserted


class Asked(nn.Module):
    """A decision by a function of the layer's value and of a second argument."""

    def __init__(self, ask: Callable[[Any, Any], bool]) -> None:
        super().__init__()
        self.layer, self.ask = nn.Linear(4, 4), ask

    def forward(self, x: Tensor, b: Any = None) -> Tensor:
        y: Tensor = self.layer(x)
        return y * 2 if self.ask(y, b) else y * 3


class Masked(NamedTuple):
    x: Any
    mask: Any


@dataclass
class Data:
    x: Any
    mask: Any = None


X = torch.linspace(-1, 1, 12).view(3, 4)
LEFT_OPEN: dict[str, tuple[Any, ...]] = {
    "an entry that is not there": (lambda y, b: isinstance(b.get("mask"), Tensor), {"q": X}),
    "an entry": (lambda y, b: isinstance(b.get("m"), (list, tuple)), {"m": [X]}),
    "a field": (lambda y, b: isinstance(b.mask, Tensor), Masked(X, None)),
    "an attribute": (lambda y, b: isinstance(b.mask, Tensor), Data(X)),
    "indices": (lambda y, b: isinstance(torch.where(y > 0), tuple),),
    "indices by an option": (lambda y, b: isinstance(torch.nonzero(y, as_tuple=True), tuple),),
    "one or several": (lambda y, b: isinstance(torch.atleast_2d(y, y), tuple),),
    "a longer shape": (lambda y, b: isinstance(y.shape[:1] + (4,), tuple),),
    "strides": (lambda y, b: isinstance(y.stride(), tuple),),
    "half of a size": (lambda y, b: isinstance(y.shape[0] * 0.5, float),),
    "a device's type": (lambda y, b: isinstance(y.device.type, str),),
    "a tensor of a dtype": (lambda y, b: isinstance(y, torch.FloatTensor),),
}


@pytest.mark.parametrize("name", LEFT_OPEN)
def test_what_the_operation_leaves_open_the_example_tells(name: str) -> None:
    ask, *given = LEFT_OPEN[name]
    model = Asked(ask)
    module = graphreg.regularize(model, weight_l2=1e-3, example_inputs=(X, *given))
    assert torch.equal(module(X, *given)[0], model(X, *given))
    if not given:
        with pytest.raises(graphreg.TraceError, match="calls isinstance on"):
            graphreg.trace(model)


UNIONS = [Tensor | None, Optional[Tensor]]  # noqa: UP045


@pytest.mark.parametrize("ask", [collections.abc.Iterable, collections.abc.Callable, *UNIONS, (int, nn.Module)], ids=str)
def test_abstract_classes_and_unions(ask: Any) -> None:
    for make in (lambda y: y, lambda y: y.shape[0]):
        model = Asked(lambda y, b, make=make: isinstance(make(y), ask))  # type: ignore[misc]
        assert torch.equal(graphreg.regularize(model, weight_l2=1e-3)(X)[0], model(X))


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, xs: Any) -> Any:
        return self.layer(xs[0] if isinstance(xs, list) else xs)


def test_another_type_than_was_traced_is_an_error() -> None:
    model = Either()
    listed = graphreg.regularize(model, weight_l2=1e-3, example_inputs=([X],))
    for run in (listed, torch.compile(listed, fullgraph=True, backend="eager")):
        assert torch.equal(run([X])[0], model([X]))
    with pytest.raises(graphreg.GraphRegError, match=r"\(xs=a tensor\), and the graph was made for \(xs=\[a tensor\]\)"):
        listed(X)
    with pytest.raises(graphreg.GraphRegError, match=r"\(xs=\[a tensor\]\), and the graph was made for \(xs=a tensor\), which was assumed"):
        graphreg.regularize(model, weight_l2=1e-3)([X])
    assert "decided: the model itself follows the types it was traced with (1 asserted)" in str(graphreg.names(model, ([X],)))


class AsksAndFails(nn.Module):
    """It becomes opaque after its trace has called isinstance on the model's argument."""

    def forward(self, xs: Any) -> Any:
        x = xs[0] if isinstance(xs, list) else xs
        return x * 2 if x.sum() > -1e9 else x


class AsksAgain(Either):
    def __init__(self) -> None:
        super().__init__()
        self.first = AsksAndFails()

    def forward(self, xs: Any) -> Any:
        return self.first(xs) + self.layer(xs[0] if isinstance(xs, list) else xs)


def test_what_was_asserted_in_a_part_that_becomes_opaque_is_asserted_again() -> None:
    model = AsksAgain()
    module = graphreg.regularize(model, weight_l2=1e-3)
    assert torch.equal(module(X)[0], model(X)) and list(graphreg.trace(model).opaque_modules) == ["first"]
    with pytest.raises(graphreg.GraphRegError, match=r"\(xs=\[a tensor\]\), and the graph was made for \(xs=a tensor\), which was assumed"):
        module([X])


# Code that stands elsewhere, and what cannot be answered


def doubled_in_a_hook(module: nn.Module, given: Any, output: Any) -> Any:
    return output * 2 if isinstance(output, Tensor) else output * 3


def by_partial(module: Any, x: Tensor) -> Any:
    return doubled_in_a_hook(module, x, module.layer(x))


def test_hooks_and_forwards_that_are_set() -> None:
    for hooked in ("", "0"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        model.get_submodule(hooked).register_forward_hook(doubled_in_a_hook)
        assert torch.equal(graphreg.regularize(model, weight_l2=1e-3)(X)[0], model(X))
    bound = Either()
    bound.forward = functools.partial(by_partial, bound)  # type: ignore[method-assign]
    assert torch.equal(graphreg.regularize(bound, weight_l2=1e-3)(X)[0], bound(X))


def test_a_class_whose_module_nobody_has() -> None:
    space: dict[str, Any] = {"__name__": "nowhere_to_be_found", "nn": nn, "Tensor": Tensor}
    exec(
        "class Hidden(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        y = self.layer(x)\n        return y * 2 if isinstance(y, Tensor) else y * 3\n", space,
    )  # fmt: skip
    model = space["Hidden"]()
    assert torch.equal(graphreg.regularize(model, weight_l2=1e-3)(X)[0], model(X)) and "isinstance" not in space


class Typed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        z = y.type(torch.float32)  # y itself: the write below reaches it
        z += 1
        return torch.relu(y)


def test_type_with_a_dtype_is_a_tensor() -> None:
    model = Typed()
    assert torch.equal(graphreg.regularize(model, weight_l2=1e-3)(X)[0], model(X))


def test_threads_trace_one_after_the_other() -> None:
    models = [nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(4, 4), nn.ReLU()))) for _ in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            made = list(pool.map(lambda model: graphreg.regularize(model, hidden_l1=1e-3, rng=0), models))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(module(X)[0], model(X)) for module, model in zip(made, models, strict=True))


class AsksForTheTrace(nn.Module):
    """Without a trace it decides by values, as transformers does to leave out a mask that masks nothing."""

    def __init__(self, otherwise: float, kinds: Any = torch.fx.Proxy) -> None:
        super().__init__()
        self.layer, self.otherwise, self.kinds = nn.Linear(4, 4), otherwise, kinds

    def forward(self, x: Tensor) -> Any:
        if not isinstance(x, self.kinds) and bool((x > 0).all()):
            return self.layer(x) * self.otherwise
        return self.layer(x.clamp(min=0))


@pytest.mark.parametrize("kinds", [torch.fx.Proxy, (list, torch.fx.Proxy)])
def test_who_asks_for_a_trace_is_told_of_it(kinds: Any) -> None:
    """The graph then has what serves all inputs. If that is not what the model does, the proof says so."""
    model, ones, x = AsksForTheTrace(1.0, kinds), torch.ones(2, 4), torch.randn(2, 4)
    stripped = graphreg.strip(graphreg.regularize(model, weight_l2=0.1, front_end="symbolic", example_inputs=ones))
    assert torch.equal(stripped(ones), model(ones)) and torch.equal(stripped(x), model(x))
    with pytest.raises(graphreg.TraceError, match="its graph does not give the model's result"):
        graphreg.regularize(AsksForTheTrace(2.0, kinds), weight_l2=0.1, front_end="symbolic", example_inputs=ones)
