"""What a forward does beside its values: it counts, collects, assigns, asks what surrounds it. Followed, asserted, or refused."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import pickle
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg.errors import GraphRegError, OtherInputs, TraceError
from graphreg.torch_internals.global_state import GlobalState

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
FRONT_ENDS = [None, "symbolic", "export"]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(4, 4)


def regularized(model: nn.Module, front_end: str | None) -> nn.Module:
    if front_end is None:
        return graphreg.regularize(model, weight_l2=0.1)
    return graphreg.regularize(model, weight_l2=0.1, example_inputs=X, front_end=front_end)  # type: ignore[arg-type]


def three(model: nn.Module) -> list[Tensor]:
    """What three calls give: the model's output alone."""
    values = [model(X.clone()) for _ in range(3)]
    return [value.output if isinstance(value, graphreg.Regularized) else value for value in values]


def assert_same(module: nn.Module, model: nn.Module) -> None:
    for given, wanted in zip(three(copy.deepcopy(module)), three(copy.deepcopy(model)), strict=True):
        torch.testing.assert_close(given, wanted)


# What the next call would read


class Plain(Base):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.plain.add_(1)
        return self.l(x) * self.plain  # type: ignore[no-any-return]


def test_an_update_of_a_plain_tensor_is_part_of_the_graph() -> None:
    model = Plain()
    module = graphreg.regularize(model, weight_l2=0.1)
    assert model.plain.tolist() == [0] * 4
    assert_same(module, model)
    three(module)
    assert model.plain.tolist() == [3] * 4  # layers and their state are shared


def test_what_is_computed_from_it_alone_is_no_site() -> None:
    assert [site.name for site in graphreg.trace(Plain()).values] == ["x", "l", "mul"]


class Array(Base):
    def __init__(self) -> None:
        super().__init__()
        self.array = np.zeros(4, dtype=np.float32)

    def forward(self, x: Tensor) -> Tensor:
        self.array += 1
        return self.l(x) * torch.from_numpy(self.array)  # type: ignore[no-any-return]


class Counted(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.l(x) * self.calls


class CountedTo(Counted):
    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return x if self.calls > 5 else self.l(x)


class Appended(Base):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        self.log.append(1)
        return self.l(x) * len(self.log)


class Nested(Base):
    def __init__(self) -> None:
        super().__init__()
        self.log: Any = {"a": [1, {"b": []}]}

    def forward(self, x: Tensor) -> Any:
        self.log["a"][1]["b"].append(self.l(x))
        return self.l(x) * len(self.log["a"][1]["b"])


class OfClass(Base):
    n = 0

    def forward(self, x: Tensor) -> Any:
        type(self).n += 1
        return self.l(x) * self.n


class Cached(Base):
    def forward(self, x: Tensor, cache: list[Tensor] = []) -> Any:  # noqa: B006
        h = self.l(x)
        cache.append(h)
        return h + sum(cache)


def state(model: nn.Module) -> str:
    own = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    return f"{own} {type(model).forward.__defaults__} {vars(type(model)).get('n')}"


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("kind", [Array, Counted, CountedTo, Appended, Nested, OfClass, Cached])
def test_what_the_next_call_reads_is_refused_and_put_back(kind: type[nn.Module], front_end: str | None) -> None:
    model = kind()
    before = state(model)
    with pytest.raises(TraceError):
        regularized(model, front_end)
    assert state(model) == before


def test_the_refusal_says_what_and_how() -> None:
    with pytest.raises(TraceError, match=r"changes self\.calls for its next call.*register_buffer"):
        graphreg.trace(Counted())
    with pytest.raises(TraceError, match=r"a default argument of Cached\.forward"):
        graphreg.trace(Cached())


class OnlyCounted(Counted):
    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.l(x)


class OnlyGrows(Base):
    """Adds to containers and takes from an iterator, and asks nothing of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.last, self.names, self.steps = list[int](), deque[int](maxlen=3), set[Any](), itertools.count()

    def forward(self, x: Tensor) -> Any:
        self.seen.append(1)
        self.last.append(1)
        self.names.add(object())
        next(self.steps)
        return self.l(x)


class OnlyKept(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.width = 3
        self.last = self.l(x)
        self.seen.append(self.last)
        return self.last * self.width


class HasCounted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.o = Counted(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.o(self.c(x))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("kind", [OnlyCounted, OnlyGrows, OnlyKept, HasCounted])
def test_what_nobody_reads_is_no_matter_and_a_submodule_becomes_opaque(kind: type[nn.Module], front_end: str | None) -> None:
    model = kind()
    before = state(model)
    module = regularized(model, front_end)
    assert state(model) == before
    assert_same(module, model)


# each call makes it longer, or takes from it, and a call behind many decides by it
GROWS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "list": ([], lambda c: c.append(1) or len(c) > 4),
    "list that is asked first": ([], lambda c: len(c) > 4 or c.append(1)),
    "deque": (deque(maxlen=5), lambda c: c.append(1) or len(c) == 5),
    "set": (set(), lambda c: c.add(object()) or len(c) > 4),
    "dict": ({}, lambda c: c.update({object(): 1}) or len(c) > 4),
    "list in a dict": ({"a": []}, lambda c: c["a"].append(1) or len(c["a"]) > 4),
    "iterator of numbers": (iter(range(99)), lambda c: next(c) > 4),
    "iterator of texts": (itertools.cycle("aaaaab"), lambda c: next(c) == "b"),
}


class Grows(Base):
    def __init__(self, held: Any, asks: Callable[[Any], Any]) -> None:
        super().__init__()
        self.held, self.asks = held, asks

    def forward(self, x: Tensor) -> Any:
        return self.l(x) * 2 if self.asks(self.held) else self.l(x)


# what is compared is what a trace has changed, whichever front end made it
@pytest.mark.parametrize(
    ("name", "front_end"), [*((name, "symbolic") for name in GROWS), ("deque", "export"), ("iterator of texts", "export")]
)
def test_what_a_later_call_reads_of_what_grows_is_refused(name: str, front_end: str) -> None:
    model = Grows(*copy.deepcopy(GROWS[name]))
    before = repr(model.held)
    with pytest.raises(TraceError, match="changes self.held for its next call"):
        regularized(model, front_end)
    assert name.startswith("iterator") or repr(model.held) == before


@functools.cache
def table(n: int, m: int) -> Tensor:
    return torch.ones(n, m).tril()


nothing = functools.cache(functools.partial(lambda n: None, 1))  # a cache without a name


class Caches(Base):
    @functools.cache  # noqa: B019
    def mask(self, n: int) -> Tensor:
        return torch.ones(n, n).tril()

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def fixed(n: int) -> Tensor:
        return torch.ones(n, n).tril()

    def forward(self, x: Tensor) -> Any:
        n = x.shape[0]
        nothing()
        return self.mask(n) @ self.l(x) + table(n, n) @ x + self.fixed(4) @ x


@pytest.mark.parametrize("in_place", [False, True])
def test_a_trace_leaves_nothing_in_the_caches_of_functions(in_place: bool) -> None:
    """Their keys would be traced sizes, and their values traced tensors, which the model would get at its next call."""
    model, plain = Caches(), Caches()
    if in_place:
        regular = graphreg.regularize_(model, weight_l2=0.1, penalties="attach", scale=1)
        assert torch.equal(regular(X), plain(X))
    else:
        assert_same(regularized(model, "symbolic"), plain)
    for made in (model.mask(4), table(4, 4), Caches.fixed(4)):
        assert type(made) is Tensor and torch.equal(made, torch.ones(4, 4).tril())
    Caches.mask.cache_clear()


class Node:
    def __init__(self, value: Tensor, *parents: Any) -> None:
        self.value, self.parents = value, list(parents)


class Shared(Base):
    def forward(self, x: Tensor) -> Any:
        node = Node(self.l(x))
        for _ in range(40):
            node = Node(node.value + 1, node, node)
        return node


def test_objects_that_refer_to_one_another_in_many_ways_are_compared_once() -> None:
    model, plain = graphreg.regularize_(Shared(), weight_l2=0.1, penalties="attach", scale=1), Shared()
    assert torch.equal(model(X).value, plain(X).value)


class Tries(Base):
    """Takes another row where an index is out of range, or where a matrix has no Cholesky factor. What else is raised goes on."""

    def __init__(self, factor: bool) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Any:
        h = self.l(x)
        try:
            return torch.linalg.cholesky(h.mT @ h) if self.factor else h[5]
        except KeyError:
            return h[1]
        except (IndexError, torch.linalg.LinAlgError):
            return h[0]


class Clauses(Base):
    """The second clause catches; the first one has a cleanup of its own. A layer outside of the try raises errors of that class, too."""

    def forward(self, x: Tensor) -> Any:
        h = self.l(x)
        try:
            y = h[5]
        except KeyError as error:
            raise RuntimeError from error
        except (ValueError, LookupError):
            y = h[0]
        return y


def test_a_later_clause_catches_and_what_is_raised_is_of_the_errors_class_too() -> None:
    plain, model = Clauses(), Clauses()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=torch.randn(7, 4))
    with pytest.raises(IndexError, match="may catch this error") as raised:
        module(X)
    assert isinstance(raised.value, OtherInputs)
    placed = graphreg.regularize_(model, weight_l2=0.1, penalties="attach", scale=1)
    for x in (torch.randn(7, 4), X):
        assert torch.equal(placed(x), plain(x))


class Kept:
    value = 1.0


@functools.cache
def kept(name: str) -> Kept:
    return Kept()


class KeepsInCache(Base):
    def forward(self, x: Tensor) -> Any:
        return self.l(x) * kept("new").value * kept("old").value


def test_what_a_program_keeps_in_a_cache_stays_there() -> None:
    kept.cache_clear()
    mine = kept("old")
    mine.value = 5.0
    model, plain = KeepsInCache(), KeepsInCache()
    assert torch.equal(graphreg.regularize_(model, weight_l2=0.1, penalties="attach", scale=1)(X), plain(X))
    assert kept("old") is mine


CachedFunction = type(kept)  # a class made in C, whose ``__doc__`` nobody can set


class Documents(Base):
    """It asks for a value, so a model calls it as an opaque module."""

    def forward(self, x: Tensor) -> Any:
        def twice(y: Tensor) -> Tensor:
            return 2 * y

        twice.__doc__ = "made at each call"
        h = self.l(x)
        return twice(h) if h.sum() > 0 and not isinstance(twice, CachedFunction) else h


class Contains(Base):
    def __init__(self) -> None:
        super().__init__()
        self.opaque = Documents()

    def forward(self, x: Tensor) -> Any:
        return self.opaque(self.l(x).relu())


@pytest.mark.parametrize("front_end", FRONT_ENDS[:2])
def test_an_opaque_module_that_mentions_a_class_made_in_c(front_end: str | None) -> None:
    assert_same(regularized(Contains(), front_end), Contains())


class Suppresses(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.l(x)
        y = h[0]
        with contextlib.suppress(IndexError):
            y = h[5]
        return y


def test_an_error_that_suppress_catches() -> None:
    """Also where modules of the same code without it were made before: they have other classes."""
    plain, model = Suppresses(), Suppresses()
    graphreg.regularize(type("Suppresses", (Base,), {"forward": lambda self, x: self.l(x)[5]})(), weight_l2=0.1)
    with pytest.raises(OtherInputs, match="may catch this error"):
        graphreg.regularize(model, weight_l2=0.1, example_inputs=torch.randn(7, 4))(X)
    placed = graphreg.regularize_(model, weight_l2=0.1, penalties="attach", scale=1)
    for x in (torch.randn(7, 4), X, torch.randn(7, 4), X):
        assert torch.equal(placed(x), plain(x))


@pytest.mark.parametrize("factor", [False, True])
def test_an_error_that_the_model_catches(factor: bool) -> None:
    """The graph has the way without the error. In place a call with the error is traced anew; otherwise it is refused."""
    fits, fails = torch.randn(7, 4), torch.zeros(7, 4) if factor else X
    plain, model = Tries(factor), Tries(factor)
    plain.l.bias.data.zero_()
    model.l.bias.data.zero_()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=fits)
    assert torch.equal(module(fits).output, plain(fits))
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with pytest.raises(OtherInputs, match=r"^(IndexError|_LinAlgError): .* The model's forward may catch this error"):
            each(fails)
    placed = graphreg.regularize_(model, weight_l2=0.1, penalties="attach", scale=1)
    assert torch.equal(placed(fits), plain(fits))
    if factor:  # that it is not positive definite shows only when it runs
        with pytest.raises(GraphRegError, match="its graph does not give the model's result"):
            placed(fails)
    else:
        assert torch.equal(placed(fails), plain(fails))
    assert torch.equal(placed(fits), plain(fits))
    for each in (module, placed, plain):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # of which the model knows nothing
            each(torch.zeros(7, 3))


def keeps_last(layer: str, argument: str) -> nn.Module:
    """A model that adds its last call's value, with these names of its layer and its argument."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h, last = self.get_submodule(layer)(x), self.last
        self.last = h.detach()
        return h if last is None else h + last

    code = forward.__code__.replace(co_varnames=tuple(argument if name == "x" else name for name in forward.__code__.co_varnames))
    named = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    model = type("Last", (nn.Module,), {"forward": named, "last": None})()
    model.add_module(layer, nn.Linear(4, 4))
    return model


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize(
    ("layer", "argument"),
    [("l", "x"), ("l", "p_x"), ("l", "b_mask"), ("l", "c_0"), ("size", "x"), ("dim", "x"), ("new_head", "x"), ("out_like", "x")],
)
def test_what_is_remembered_is_seen_whatever_things_are_called(layer: str, argument: str, front_end: str) -> None:
    with pytest.raises(graphreg.GraphRegError, match=r"changes self\.last for its next call"):
        graphreg.regularize(keeps_last(layer, argument), weight_l2=1.0, example_inputs=torch.ones(2, 4), front_end=front_end)


def test_the_reason_of_an_opaque_submodule() -> None:
    assert graphreg.trace(HasCounted()).opaque_modules == {"c": "its forward changes what its next call reads"}


# Assignments to what is traced


class AssignsData(Base):
    def forward(self, x: Tensor) -> Any:
        v = self.l(x)
        v.data = v.data * 2
        return v


class AssignsGrad(Base):
    def forward(self, x: Tensor) -> Any:
        x.grad = None
        return self.l(x)


class AssignsWeight(Base):
    def forward(self, x: Tensor) -> Any:
        self.l.weight.data = self.l.weight.data * 0.5
        return self.l(x)


class AssignsOwn(Base):
    def forward(self, x: Tensor) -> Any:
        t = torch.zeros(4, 4)
        t.data = self.l(x).detach()
        return t + self.l(x)


class Hooks(Base):
    def forward(self, x: Tensor) -> Any:
        v = self.l(x)
        v.register_hook(lambda grad: grad * 2)
        return v * 2


class AssignsName(Base):
    def forward(self, x: Tensor) -> Any:
        v = self.l(x)
        v.foo = 1
        return v


class Deletes(Base):
    def forward(self, x: Tensor) -> Any:
        v = self.l(x)
        del v.foo
        return v


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("kind", [AssignsData, AssignsGrad, AssignsWeight, AssignsOwn, Hooks])
def test_an_assignment_to_a_value_is_refused(kind: type[nn.Module], front_end: str | None) -> None:
    model = kind()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TraceError):
        regularized(model, front_end)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "told"), [(AssignsName, "assigns .foo"), (Deletes, "deletes .foo"), (AssignsData, "assigns .data")])
def test_the_refusal_names_the_attribute_and_the_line(kind: type[nn.Module], told: str) -> None:
    with pytest.raises(TraceError, match=rf"test_left_behind\.py:\d+: .*it {told} of a traced value"):
        graphreg.trace(kind())


class RequiresGrad(Base):
    def forward(self, x: Tensor) -> Any:
        x.requires_grad = True
        return torch.autograd.grad(self.l(x).square().sum(), x, create_graph=True)[0]


def test_requires_grad_is_followed() -> None:
    model = RequiresGrad()
    for inputs in ({}, {"example_inputs": torch.randn(3, 4)}):  # to know the shapes, the graph is run where the model runs: with gradients
        assert_same(graphreg.regularize(model, weight_l2=0.1, **inputs), model)


class HasAssigning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = AssignsData(), AssignsName(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.o(self.a(x) + self.b(x))


def test_a_submodule_that_assigns_becomes_opaque() -> None:
    model = HasAssigning()
    assert set(graphreg.trace(model).opaque_modules) == {"a", "b"}
    assert_same(graphreg.regularize(model, weight_l2=0.1), model)


class DropsWeight(nn.Module):
    """As AWD-LSTM's WeightDrop does: the layer reads an attribute that is computed at each call."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name
        raw = layer._parameters.pop(name)
        assert raw is not None
        layer.register_parameter(f"{name}_raw", nn.Parameter(raw.data))

    def forward(self, x: Tensor) -> Any:
        setattr(self.layer, self.name, functional.dropout(getattr(self.layer, f"{self.name}_raw"), 0.5))
        return self.layer(x)


class HasDropped(Base):
    def __init__(self, recurrent: bool, asks: bool) -> None:
        super().__init__()
        self.asks, self.o = asks, nn.Linear(4, 4)
        self.drop = DropsWeight(nn.LSTM(4, 4), "weight_hh_l0") if recurrent else DropsWeight(nn.Linear(4, 4), "weight")

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.l(x))
        if self.asks:  # for which the opaque module runs during the trace
            return self.o(y[0] if isinstance(y, tuple) else y)
        return self.o(y[0]) if isinstance(self.drop.layer, nn.LSTM) else self.o(y)


@pytest.mark.parametrize("way", ["regularize", "example_inputs", "in_place"])
@pytest.mark.parametrize(("recurrent", "asks"), [(False, False), (False, True), (True, False)])
def test_a_submodule_that_computes_the_weight_of_a_layer_becomes_opaque(recurrent: bool, asks: bool, way: str) -> None:
    if asks and way == "regularize":
        pytest.skip("without inputs, what an opaque module returns is not known")
    model, plain = HasDropped(recurrent, asks), HasDropped(recurrent, asks)
    example = {"example_inputs": X} if way == "example_inputs" else {}
    in_place = {"scale": 1} if way == "in_place" else {}
    make: Any = graphreg.regularize_ if in_place else graphreg.regularize
    module = make(model, weight_l2=0.1, **example, **in_place)
    for seed in range(3):
        torch.manual_seed(seed)
        given = module(X)
        torch.manual_seed(seed)
        assert torch.equal(given if in_place else given.output, plain(X))


def test_in_the_models_own_forward_the_error_says_which_weight() -> None:
    with pytest.raises(TraceError, match="assigns a traced value to .weight of a layer of torch"):
        graphreg.regularize(DropsWeight(nn.Linear(4, 4), "weight"), weight_l2=0.1)


# What surrounds the call


class AsksGrad(Base):
    def forward(self, x: Tensor) -> Any:
        return self.l(x) if torch.is_grad_enabled() else self.l(x) * 2


class AsksInference(Base):
    def forward(self, x: Tensor) -> Any:
        return self.l(x) * 2 if torch.is_inference_mode_enabled() else self.l(x)


class AsksDtype(Base):
    def forward(self, x: Tensor) -> Any:
        return self.l(x) if torch.get_default_dtype() is torch.float32 else self.l(x) * 2


class AsksWeight(Base):
    def forward(self, x: Tensor) -> Any:
        return self.l(x) if self.l.weight.requires_grad else self.l(x) * 2


class AsksAll(Base):
    def forward(self, x: Tensor) -> Any:
        return self.l(x) if any(p.requires_grad for p in self.parameters()) else self.l(x) * 2


def no_grad(module: nn.Module) -> None:
    with torch.no_grad():
        module(X)


def inference(module: nn.Module) -> None:
    with torch.inference_mode():
        module(X)


def in_double(module: nn.Module) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        module(X)
    finally:
        torch.set_default_dtype(torch.float32)


def frozen(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module(X)


ASKS = [(AsksGrad, no_grad), (AsksInference, inference), (AsksDtype, in_double), (AsksWeight, frozen), (AsksAll, frozen)]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize(("kind", "call"), ASKS)
def test_what_is_asked_is_asserted_at_each_call(kind: type[nn.Module], call: Callable[[nn.Module], None], front_end: str | None) -> None:
    model = kind()
    module = regularized(model, front_end)
    assert_same(module, model)
    with pytest.raises(GraphRegError, match="(calls|reads) .* and branches on"):
        call(module)


def test_it_is_traced_as_in_training_wherever_that_is() -> None:
    model = AsksGrad()
    with torch.no_grad():
        module = graphreg.regularize(model, weight_l2=0.1)
    assert_same(module, model)


class HasAsking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = AsksGrad(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.o(self.a(x))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_submodule_that_queries_becomes_opaque_and_queries_at_each_call(front_end: str | None) -> None:
    model = HasAsking()
    module = regularized(model, front_end)
    assert_same(module, model)
    with torch.no_grad():
        assert_same(module, model)


class AsksForNothing(Base):
    def forward(self, x: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.jit.is_scripting():
            x = x.contiguous() if self.training and len(self.l._modules) > 1 else x
        return self.l(x)


def test_what_decides_nothing_is_not_asserted() -> None:
    (graph,) = graphreg.trace(AsksForNothing()).graphs.values()
    assert [node.name for node in graph.nodes] == ["x", "l", "output"]


class AsksValue(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.l(x)
        return h * 2 if h.requires_grad else h


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_whether_a_value_requires_gradients_is_refused(front_end: str | None) -> None:
    with pytest.raises(TraceError):
        regularized(AsksValue(), front_end)


class Forces(Base):
    """The derivative of an energy by positions, which the model prepares itself."""

    def forward(self, x: Tensor) -> Any:
        if not x.requires_grad:
            x = x.clone().requires_grad_()
        return torch.autograd.grad(self.l(x).tanh().sum(), x, create_graph=True)[0]


def test_whether_an_input_requires_gradients_is_asserted() -> None:
    model, x = Forces(), torch.randn(3, 4)
    for example in (x, x.clone().requires_grad_()):
        module = graphreg.regularize(model, weight_l2=0.1, example_inputs=example)
        for each in (x, x.clone().requires_grad_()):
            if each.requires_grad == example.requires_grad:
                torch.testing.assert_close(module(each).output, model(each), rtol=0, atol=0)
            else:
                with pytest.raises(GraphRegError, match="reads x.requires_grad and branches on it. .* give example_inputs like those"):
                    module(each)
    in_place = graphreg.regularize_(copy.deepcopy(model), weight_l2=0.0)
    for each in (x, x.clone().requires_grad_(), x):
        torch.testing.assert_close(in_place(each), model(each), rtol=0, atol=0)


class Reentrant(Base):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.l, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpoint_that_cuts_the_gradient_is_named() -> None:
    with pytest.raises(TraceError, match=r"cuts the gradient, such as checkpoint\(use_reentrant=True\) whose inputs need none"):
        graphreg.regularize(Reentrant(), weight_l2=0.1, example_inputs=torch.randn(3, 4))


class AsksCompiling(Base):
    def forward(self, x: Tensor) -> Any:
        return self.l(x) * 2 if torch.compiler.is_compiling() or torch.jit.is_tracing() else self.l(x)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_torch_export_counts_as_no_compiler(front_end: str | None) -> None:
    model = AsksCompiling()
    assert_same(regularized(model, front_end), model)


# An opaque module whose result is only indexed


class Shut(Base):
    def forward(self, x: Tensor) -> Any:
        return self.l(x) if x.sum() < 1e9 else x


class ShutTold(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) if x.sum() < 1e9 else x  # type: ignore[no-any-return]


class ShutTwo(Base):
    def forward(self, x: Tensor) -> Any:
        return (self.l(x), x) if x.sum() < 1e9 else (x, x)


class Indexes(nn.Module):
    def __init__(self, kept: nn.Module, index: int) -> None:
        super().__init__()
        self.k, self.o, self.index = kept, nn.Linear(4, 4), index

    def forward(self, x: Tensor) -> Any:
        return self.o(self.k(x)[self.index])


@pytest.mark.parametrize(("kept", "example"), [(Shut, X), (ShutTold, None), (ShutTold, X), (ShutTwo, None), (ShutTwo, X)])
@pytest.mark.parametrize("index", [0, -1])
def test_what_is_indexed_is_measured_whole(kept: type[nn.Module], example: Tensor | None, index: int) -> None:
    model = Indexes(kept(), index)
    value = model.k(X)
    port, value = ("k", value) if isinstance(value, Tensor) else ("k:-1", value[-1]) if index else ("k", value[0])
    module = graphreg.regularize(model, hidden_l1={"weight": 1.0, "pattern": port}, example_inputs=example)
    output, penalties = module(X)
    torch.testing.assert_close(penalties["hidden_l1"], value.abs().mean())
    torch.testing.assert_close(output, model(X))


def test_a_wrong_guess_is_found_at_the_call() -> None:
    module = graphreg.regularize(Indexes(Shut(), 0), hidden_l1={"weight": 1.0, "pattern": "k"})
    with pytest.raises(GraphRegError, match="k is an opaque module, and its result was assumed to be a tuple.*example_inputs"):
        module(X)
    with pytest.raises(GraphRegError, match="only indexed; give example_inputs"):
        graphreg.regularize(Indexes(Shut(), -1), hidden_l1={"weight": 1.0, "pattern": "k"})


class Keeps(nn.Module):
    """Each kind leaves something in an attribute that it assigns."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.sum, self.prev, self.table = torch.zeros(()), None, None
        self.made, self.tensors, self.state = dict[str, Tensor](), {"sum": torch.zeros(())}, State()


class Sums(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        self.sum = self.sum + 1
        return self.l(x) * self.sum


class SumsBesideATable(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0)
        self.sum = self.sum + 1
        return self.l(x) * self.sum * self.table


class Averages(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        self.sum = self.sum + self.l(x).detach().mean()
        return self.l(x) * self.sum


class Recurs(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x)
        if self.prev is not None:
            h = h + self.prev
        self.prev = h
        return h


class Asks(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x)
        h = h + self.prev if isinstance(self.prev, Tensor) else h
        self.prev = h
        return h


class Fills(Keeps):
    """It writes at each call into what its first call has made."""

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.zeros(4)
        self.table.add_(1.0)
        return self.l(x) * self.table


class FillsItsDict(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.made:
            self.made["table"] = torch.zeros(4)
        self.made["table"] += 1.0
        return self.l(x) * self.made["table"]


class FillsAnObject(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if self.state.now is None:
            self.state.now = torch.zeros(4)
        self.state.now.add_(1.0)
        return self.l(x) * self.state.now


class SumsInADict(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        self.made["sum"] = self.made.get("sum", 0.0) + self.l(x).detach().mean()
        return self.l(x) * self.made["sum"]


class ReplacesInADict(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        self.tensors["sum"] = self.tensors["sum"] + 1.0
        return self.l(x) * self.tensors["sum"]


class RecursByAPair(Keeps):
    """As keys and values of an attention are kept."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x)
        if self.prev is not None:
            h = h + self.prev[0]
        self.prev = h, h.detach()
        return h


class RecursByAnObject(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x)
        if self.state.now is not None:
            h = h + self.state.now
        self.state.now = h.detach()
        return h


class State:
    """An object of the user's."""

    now: Any = None


FRONT_ENDS = [(None, "symbolic"), (torch.ones(3, 4), "auto"), (torch.ones(3, 4), "export")]
REMEMBERS = [
    Sums, SumsBesideATable, Averages, Recurs, Asks, Fills, FillsItsDict, FillsAnObject, SumsInADict, ReplacesInADict, RecursByAPair,
    RecursByAnObject,
]  # fmt: skip


@pytest.mark.parametrize(("example", "front_end"), FRONT_ENDS)
@pytest.mark.parametrize("kind", REMEMBERS)
def test_an_attribute_that_carries_data_to_the_next_call_is_refused(kind: type[Keeps], example: Any, front_end: Any) -> None:
    model = kind()
    before = [dict(each) for each in (vars(model), vars(model.state), model.made, model.tensors)]
    with pytest.raises(TraceError, match=r"changes self\.(sum|prev|table|made|tensors|state\.now) for its next call"):
        graphreg.regularize(model, weight_l2=1e-4, example_inputs=example, front_end=front_end)
    assert [dict(each) for each in (vars(model), vars(model.state), model.made, model.tensors)] == before


@pytest.mark.parametrize("kind", REMEMBERS)
def test_a_submodule_that_carries_data_is_kept_whole(kind: type[Keeps]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), kind())
    plain = copy.deepcopy(model)
    module = graphreg.regularize(model, noise={"0": 0.0}, front_end="symbolic")
    for _ in range(3):
        torch.testing.assert_close(module(x := torch.randn(3, 4)).output, plain(x))


class Registers(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(4))
        self.late.add_(1.0)
        return self.l(x) * self.late


class FillsNone(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.l(x).detach().mean()
        self.late = mean if self.late is None else (self.late + mean) / 2
        return self.l(x) * self.late


class Builds(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.ReLU()
        out: Tensor = self.late(self.l(x))
        return out


@pytest.mark.parametrize(("example", "front_end"), FRONT_ENDS)
@pytest.mark.parametrize("kind", [Registers, FillsNone, Builds])
def test_what_the_forward_registers_is_refused(kind: type[Keeps], example: Any, front_end: Any) -> None:
    model = kind()
    before = list(model.state_dict())
    said = r"(changes self\.late .*it registers a parameter|registers late|assigns the buffer self\.late)"
    with pytest.raises(TraceError, match=said):
        graphreg.regularize(model, weight_l2=1e-4, example_inputs=example, front_end=front_end)
    assert list(model.state_dict()) == before


class Shows(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        self.prev = self.l(x)
        return self.prev.tanh()


class Tables(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.size(0) != 4:
            self.table = torch.arange(4.0)
        return self.l(x) * self.table


class ShowsAndTables(Keeps):
    """What it shows is another operation's, and the table is made once."""

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0)
        self.prev = self.l(x)
        return self.prev.tanh() * self.table


class TablesOfItsInput(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = x.new_ones(4) * 3
        return self.l(x) * self.table


class TablesInADict(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if 4 not in self.made:
            self.made[4] = torch.arange(4.0)  # type: ignore[index]
        return self.l(x) * self.made[4]  # type: ignore[index]


class PairsOfTables(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0), torch.ones(4)
        return self.l(x) * self.table[0] + self.table[1]


@pytest.mark.parametrize(("example", "front_end"), FRONT_ENDS)
@pytest.mark.parametrize("kind", [Shows, Tables, ShowsAndTables, TablesOfItsInput, TablesInADict, PairsOfTables])
def test_what_is_shown_and_tables_that_are_made_once_are_no_matter(kind: type[Keeps], example: Any, front_end: Any) -> None:
    model, x = kind(), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    module = graphreg.regularize(model, weight_l2=1e-4, example_inputs=example, front_end=front_end)
    for _ in range(3):
        torch.testing.assert_close(module(x).output, plain(x))


class ForEval(Keeps):
    """Train mode keeps what eval mode reads."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x)
        if self.training:
            self.prev = h.detach().mean(0)
        return h if self.prev is None else h - self.prev


class CountsForEval(Keeps):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            return self.l(x)
        return self.l(x) * (1 - 0.9**self.count)


class ForOtherArguments(Keeps):
    """A call with ``memory`` keeps it for those without."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if memory is not None:
            self.prev = self.l(memory).detach().mean()
        h: Tensor = self.l(x)
        return h if self.prev is None else h + self.prev


class ForFewerRows(Keeps):
    """The numbers in the table depend on its length."""

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(x) > len(self.table):
            self.table = torch.arange(1.0, len(x) + 1)[:, None] / len(x)
        return self.l(x) * self.table[: len(x)]


class OneTable(Keeps):
    """The table is the same for all calls."""

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        if self.table is None:
            self.table = torch.arange(1.0, 9.0)[:, None]
        return self.l(x) * self.table[: len(x)] * gain


OTHER_CALLS: list[tuple[type[Keeps], tuple[Any, ...], str]] = [
    (ForEval, (torch.ones(3, 4),), r"self\.prev .*\(in eval mode: output differs"),
    (CountsForEval, (torch.ones(3, 4),), r"self\.count .*\(in eval mode: output differs"),
    (ForOtherArguments, (torch.ones(3, 4), torch.ones(2, 4)), r"self\.prev .*\(without memory: output differs"),
    (ForFewerRows, (torch.ones(3, 4),), r"self\.table .*\(with fewer items: output differs"),
    (OneTable, (torch.ones(3, 4), 2.0), ""),
]


@pytest.mark.parametrize("regularize", [graphreg.regularize, graphreg.regularize_])
@pytest.mark.parametrize(("kind", "call", "why"), OTHER_CALLS)
def test_what_a_call_of_another_kind_reads_is_refused(kind: type[Keeps], call: tuple[Any, ...], why: str, regularize: Any) -> None:
    model = kind()
    before, modes = dict(vars(model)), [module.training for module in model.modules()]
    if why:
        with pytest.raises(TraceError, match=rf"changes {why}"):
            regularize(model, weight_l2=1e-4, example_inputs=call)
    else:
        regularize(copy.deepcopy(model), weight_l2=1e-4, example_inputs=call, penalties="return")
    assert vars(model) == before and [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("kind", [ForEval, CountsForEval, ForFewerRows])
def test_a_submodule_that_keeps_it_becomes_opaque(kind: type[Keeps]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), kind())
    plain = copy.deepcopy(model)
    graphreg.regularize_(model, noise={"0": 0.0})
    for rows, training in ((3, True), (5, True), (3, False), (4, True), (2, False)):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x), rtol=0, atol=0)


def test_a_model_that_cannot_be_copied() -> None:
    model, x = Shows(), torch.ones(3, 4)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TraceError, match=r"Shows cannot be copied \(TypeError: cannot pickle '_thread.lock' object\)"):
        graphreg.regularize(model, weight_l2=1e-4, example_inputs=x, front_end="symbolic")
    for example in (None, x):  # by the export front end it needs no copy
        assert torch.equal(graphreg.regularize(model, weight_l2=1e-4, example_inputs=example)(x).output, model(x))


@pytest.mark.parametrize("front_end", ["auto", "symbolic", "export"])
def test_a_lazy_module_runs_once_first(front_end: Any) -> None:
    model, x = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(4, 2)), torch.ones(3, 4)
    first = r"^0\.weight of Sequential belongs to a lazy module, .* Run one forward first, model\(\*inputs\), which gives it its shape\.$"
    for example in (None, x):
        with pytest.raises(TraceError, match=first):
            graphreg.regularize(model, weight_l2=1e-4, example_inputs=example, front_end=front_end)
    with pytest.raises(TraceError, match=first):
        graphreg.regularize_(model, weight_l2=1e-4, front_end=front_end)(x)
    model(x)
    graphreg.regularize(model, weight_l2=1e-4, example_inputs=x, front_end=front_end)(x)


class AsksForGradients(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) * (2 if self.l.weight.grad is None else 3)


def test_a_forward_that_goes_by_gradients_is_refused_and_opaque_in_a_submodule() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(TraceError, match=r"reads \.grad of a tensor"):
        graphreg.trace(AsksForGradients())
    model = nn.Sequential(AsksForGradients(), nn.Linear(4, 4))
    module = graphreg.regularize(model, weight_l2={"weight": 0.0})
    assert "0" in graphreg.trace(model).opaque_modules
    for _ in range(2):
        assert torch.equal(module(x).output, model(x))
        module(x).output.sum().backward()


class AsksWhatIsLeft(nn.Module):
    """Branches on an attribute of a tensor that depends on the calls before, or on whether gradients are recorded."""

    def __init__(self, of: str, attribute: str) -> None:
        super().__init__()
        self.l, self.of, self.attribute = nn.Linear(3, 3), of, attribute

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x)
        left = getattr(self.l.weight if self.of == "weight" else h, self.attribute)
        return h * 2 if (left if isinstance(left, int) else left is not None) else h


LEFT = [("weight", "_version"), ("value", "_version"), ("weight", "grad"), ("value", "grad_fn"), ("value", "is_leaf")]


@pytest.mark.parametrize("name", ["_base", "_backward_hooks", "grad_dtype"])
def test_how_an_input_was_made_is_refused(name: str) -> None:
    """Most of these are None, which code tells from others by ``is``. A stand-in is not None, and a copy of an input may be a view."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.l(x) * 2 if getattr(x, name) is None else self.l(x)

    for inputs in ({}, {"example_inputs": torch.randn(2, 3)}):
        with pytest.raises(TraceError, match=rf"it reads \.{name} of a tensor, which .* or on how the tensor was made"):
            graphreg.regularize(Asks(), hidden_dropout=0.1, **inputs)
    with pytest.raises(TraceError, match=rf"it reads \.{name} of a tensor"):
        graphreg.regularize_(Asks(), hidden_dropout=0.1)(torch.randn(2, 3))


@pytest.mark.parametrize("front_end", ["symbolic", "auto", "export"])
@pytest.mark.parametrize(("of", "attribute"), LEFT)
def test_what_earlier_calls_have_left_in_a_tensor_is_refused(of: str, attribute: str, front_end: Any) -> None:
    x = torch.randn(2, 3)
    with pytest.raises(TraceError, match=rf"it reads \.{attribute} of a tensor, which depends on earlier calls"):
        graphreg.regularize(AsksWhatIsLeft(of, attribute), hidden_dropout=0.1, front_end=front_end, example_inputs=x)


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize(("of", "attribute"), LEFT)
def test_a_submodule_that_reads_it_becomes_opaque(of: str, attribute: str, front_end: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), AsksWhatIsLeft(of, attribute)), torch.randn(2, 3)
    module = graphreg.regularize(model, weight_l2=0.1, front_end=front_end, example_inputs=x)
    for _ in range(3):
        model.zero_grad()
        assert torch.equal(module(x).output, model(x))
        with torch.no_grad():
            assert torch.equal(module(x).output, model(x))
            model[1].l.weight.add_(0.1)
        module(x).output.sum().backward()


class Counts(nn.Module):
    """Counts its calls, and uses the count in a way that has the same result for some calls."""

    def __init__(self, use: Callable[[int], int]) -> None:
        super().__init__()
        self.l, self.use, self.calls = nn.Linear(3, 3), use, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.l(x) * (1 + self.use(self.calls))


SLOW = {
    "shifted": lambda n: n >> 3, "masked": lambda n: n & 64, "lengths": lambda n: n.bit_length() // 9, "rounded": lambda n: round(n, -2),
    "equal": lambda n: int(n == 40), "whole": lambda n: n.real // 50,
}  # fmt: skip


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("use", SLOW)
def test_a_count_that_changes_nothing_for_some_calls_is_refused(use: str, front_end: Any) -> None:
    with pytest.raises(TraceError):
        graphreg.regularize(Counts(SLOW[use]), weight_l2=0.1, front_end=front_end, example_inputs=torch.ones(2, 3))


class Compares(nn.Module):
    """Compares what it kept from the call before with an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.last = nn.Linear(3, 3), "none"

    def forward(self, x: Tensor, mode: str) -> Tensor:
        again, self.last = self.last == mode, mode
        return self.l(x) * 2 if again else self.l(x)


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_a_comparison_with_what_a_call_left_behind_is_refused(front_end: Any) -> None:
    with pytest.raises(TraceError):
        graphreg.regularize(Compares(), weight_l2=0.1, front_end=front_end, example_inputs=(torch.ones(2, 3), "a"))


# torch's own state


class Opened(Base):
    """Enters a block by hand, and computes there."""

    def __init__(self, block: Callable[[], Any]) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x)
        block = self.block()
        block.__enter__()
        z = self.l(h)
        block.__exit__(None, None, None)
        return self.l(h) * z  # type: ignore[no-any-return]


class Leaves(Base):
    """Changes torch's state for the code after the call."""

    def __init__(self, step: Callable[[], Any]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x).relu()
        self.step()
        return h  # type: ignore[no-any-return]


class LeavesHalfway(Leaves):
    def forward(self, x: Tensor) -> Tensor:
        self.step()
        return self.l(x) if self.l(x).sum() > 100 else self.l(-x)  # type: ignore[no-any-return]


def closed_later() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    return stack


BLOCKS = {
    "no_grad": torch.no_grad, "set_grad_enabled": lambda: torch.set_grad_enabled(False), "a stack": closed_later,
    "inference_mode": torch.inference_mode, "autocast": lambda: torch.autocast("cpu"),
}  # fmt: skip
STEPS: dict[str, Callable[[], Any]] = {
    "grad mode": lambda: torch.set_grad_enabled(False), "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"), "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "autocast": lambda: torch.autocast("cpu").__enter__(), "precision": lambda: torch.set_float32_matmul_precision("high"),
    "benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True), "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "kernels": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(torch.neg, torch.neg).__enter__(),
}  # fmt: skip


@pytest.fixture
def torchs() -> Iterator[GlobalState]:
    state = GlobalState()
    yield state
    state.restore()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_is_entered_by_hand_is_followed_or_refused_and_ends(name: str, torchs: GlobalState) -> None:
    """By torch.fx without inputs and with them, by torch.export, and in place, where torch.fx comes first and then torch.export."""
    is_followed = name in ("no_grad", "set_grad_enabled", "a stack")
    if is_followed:
        plain = Opened(BLOCKS[name])
        for ours in (graphreg.regularize(plain, weight_l2=0.1), graphreg.regularize(plain, weight_l2=0.1, example_inputs=X)):
            assert_same(ours, plain)
            assert not torchs.changed()
        assert torch.equal(graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.0, scale=1)(X), plain(X))
        assert not torchs.changed()
    for front_end in ("export",) if is_followed else (None, "symbolic", "export"):  # it was accepted the second time
        with pytest.raises(TraceError, match=r"no_grad|inference_mode|autocast"):
            regularized(Opened(BLOCKS[name]), front_end)
        assert not torchs.changed()
    if is_followed:
        return
    with pytest.raises(TraceError, match=r"no_grad|inference_mode|autocast"):
        graphreg.regularize_(Opened(BLOCKS[name]), weight_l2=0.1)(X)
    assert not torchs.changed()


class Importing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        import graphreg_test_imported  # type: ignore[import-not-found]  # noqa: PLC0415

        output: Tensor = graphreg_test_imported.ones_like(x) * x
        return output


@pytest.mark.parametrize("how", ["symbolic", "export", "in place"])
def test_what_a_forward_imports_first_holds_torchs_functions(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "torch import arange, is_grad_enabled, ones_like", "torch.compiler import is_compiling", "torch.random import default_generator"
    (tmp_path / "graphreg_test_imported.py").write_text("".join(f"from {line}\n" for line in lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "graphreg_test_imported", raising=False)
    model = nn.Sequential(nn.Linear(4, 4), Importing())
    if how == "in place":
        graphreg.regularize_(model, weight_l2=0.1, penalties="attach", scale=1)(X)
    else:
        graphreg.regularize(model, weight_l2=0.1, example_inputs=X, front_end=how)  # type: ignore[arg-type]
    found = vars(sys.modules["graphreg_test_imported"])
    for name in ("arange", "is_grad_enabled", "ones_like"):
        assert found[name] is getattr(torch, name)
    assert found["is_compiling"] is torch.compiler.is_compiling and found["default_generator"] is torch.random.default_generator


class Ensemble(nn.Module):
    def __init__(self, members: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(members, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda weight: x @ weight)(self.weights).mean(0)


def test_a_trace_leaves_the_levels_of_torch_func(torchs: GlobalState) -> None:
    """Whether an operation writes is found by calling it, and each number of members is another call."""
    for members in (8, 16):
        model = Ensemble(members)
        assert torch.equal(graphreg.regularize(model, example_inputs=X, weight_l2=0.1)(X).output, model(X))
        assert not torchs.changed()
        graphreg.regularize_(Ensemble(members), weight_l2=0.1, penalties="attach", scale=1)(X)
        assert not torchs.changed()


@pytest.mark.parametrize("name", STEPS)
def test_a_trace_leaves_torchs_state_as_it_was(name: str, torchs: GlobalState) -> None:
    """What torch.export itself looks at is changed under it, too, as "auto" goes on to it."""
    exported = name in ("grad mode", "default dtype", "default device", "autocast", "hooks")
    with pytest.raises(TraceError, match="the change of torch's"):
        graphreg.regularize(Leaves(STEPS[name]), weight_l2=0.1, example_inputs=X, front_end="auto" if exported else "symbolic")
    assert not torchs.changed()
    if name in ("grad mode", "hooks"):  # in place the same traces come about at the first call
        with pytest.raises(TraceError, match="the change of torch's"):
            graphreg.regularize_(Leaves(STEPS[name]), weight_l2=0.1)(X)
        assert not torchs.changed()
    regularized(Leaves(STEPS[name]), None)
    assert not torchs.changed()
    with pytest.raises(TraceError):
        regularized(LeavesHalfway(STEPS[name]), None)
    assert not torchs.changed()


def test_a_change_that_the_forward_takes_back_is_followed(torchs: GlobalState) -> None:
    class Careful(Base):
        def forward(self, x: Tensor) -> Tensor:
            torch.set_default_dtype(torch.float64)
            h = self.l(x)
            torch.set_default_dtype(torch.float32)
            return h  # type: ignore[no-any-return]

    assert_same(graphreg.regularize(Careful(), weight_l2=0.1, example_inputs=X), Careful())
    assert not torchs.changed()


def test_a_change_that_was_made_before_is_none(torchs: GlobalState) -> None:
    STEPS["benchmark"]()
    graphreg.regularize(Leaves(STEPS["benchmark"]), weight_l2=0.1, example_inputs=X)
    assert torchs.changed() == {"cudnn_benchmark": True}


class Compresses(nn.Module):
    """It keeps saved tensors in half the memory, and so computes other gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(torch.bfloat16), lambda t: t.to(torch.float32)):
            y = torch.tanh(self.a(x))
        return self.b(y)


def test_hooks_on_saved_tensors_are_kept_or_refused() -> None:
    torch.manual_seed(0)
    model, x = Compresses(), torch.randn(8, 4)
    with pytest.raises(graphreg.TraceError, match="hooks on saved tensors"):
        graphreg.trace(model, front_end="symbolic")
    outer = nn.Sequential(model, nn.ReLU())
    module = graphreg.regularize(outer, hidden_dropout=0.0, weight_l2=1e-3)
    assert graphreg.trace(outer).opaque_modules.keys() == {"0"}
    wanted = torch.autograd.grad(outer(x).sum(), [*outer.parameters()])
    found = torch.autograd.grad(module(x)[0].sum(), [*module.parameters()])
    assert all(torch.equal(*each) for each in zip(found, wanted, strict=True))


class Grids(nn.Module):
    """As YOLO's head: a list of grids, each made again for another size, in eval mode or in both."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.conv, self.grid, self.counts = nn.Conv2d(3, 4, 1), [torch.zeros(1)], counts

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        height, width = y.shape[2:]
        if self.counts:
            self.grid[0] = self.grid[0] + height
            return y + self.grid[0].sum()
        if self.grid[0].shape[2:4] != y.shape[2:4]:
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            self.grid[0] = (rows + columns).float().expand(1, 1, height, width)
        return y.sigmoid() + self.grid[0]


def test_a_table_of_sizes_in_a_list_is_no_state() -> None:
    model, plain, x = Grids(), Grids(), torch.randn(2, 3, 8, 8)
    plain.load_state_dict(model.state_dict())
    module = graphreg.regularize(model, dropout={"conv": 0.0}, example_inputs=x)
    for mode in (True, False):
        for size in ((8, 8), (6, 4), (8, 8)):
            z = torch.randn(2, 3, *size)
            assert torch.equal(module.train(mode)(z).output, plain.train(mode)(z))
    with pytest.raises(TraceError, match=r"changes self\.grid for its next call"):
        graphreg.regularize(Grids(counts=True), dropout={"conv": 0.0}, example_inputs=x)
