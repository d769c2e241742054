"""Calls whose arguments have another structure than in the trace: a model in place gets another graph, a module is right or refuses."""

from __future__ import annotations

import copy
import math
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import graphreg
from graphreg import GraphRegError
from graphreg.errors import OtherInputs
from graphreg.ir.module_record import state_of
from graphreg.runtime import other_structures
from graphreg.torch_internals.dynamo import tells_result

GENERATOR = torch.Generator().manual_seed(0)
X, Y, Z = torch.randn(3, 3, 4, generator=GENERATOR).unbind()
NO_PENALTY: Any = {"weight_l2": 0.0}


class Net(nn.Module):
    """Its forward does what a function of the layer and the arguments does."""

    def __init__(self, of: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.of = of


class Optional(Net):
    def forward(self, x: Tensor, k: Any = None, n: float = 1.0) -> Any:
        return self.of(self.layer(x), k, n)


class Two(Net):
    def forward(self, x: Tensor, y: Any) -> Any:
        return self.of(self.layer(x), x, y)


class Batch(Net):
    def forward(self, batch: Any) -> Any:
        return self.of(self.layer, batch)


class Rest(Net):
    def forward(self, x: Tensor, *rest: Tensor, **named: Any) -> Any:
        return self.of(self.layer(x), rest, named)


Pair = namedtuple("Pair", "x m")


class Mode(Enum):
    FAST, SLOW = 1, 2


class Level(IntEnum):
    LOW, HIGH = 1, 2


class Text(str):
    pass


class Sub(Tensor):
    pass


@dataclass
class Record:
    x: Tensor
    m: Any = None


torch.utils._pytree.register_dataclass(Record)


def masked(layer: Any, x: Tensor, m: Any = None) -> Tensor:
    h: Tensor = layer(x)
    return h if m is None else h * m


def folded(h: Tensor, rest: Any, named: Any) -> Tensor:
    for value in named.values():
        h = h * 2 + value
    return h * (1 + len(rest))


Call = tuple[Any, ...]
# For each: the class of the model, its function, and the calls. "!" marks a call that a module traced for the first one must refuse.
CASES: dict[str, tuple[type[Net], Callable[..., Any], list[tuple[str, Call]]]] = {
    "a tensor for None": (Optional, lambda h, k, n: h if k is None else h * k, [("", (X,)), ("!", (X, Y)), ("", (X, None))]),
    "None for a tensor": (Optional, lambda h, k, n: h if k is None else h * k, [("", (X, Y)), ("!", (X,)), ("!", (X, None)), ("", (X, Z))]),
    "None in a dict": (Batch, lambda f, b: masked(f, b["x"], b["m"]), [("", ({"x": X, "m": None},)), ("!", ({"x": X, "m": Y},))]),
    "a tensor in a dict": (Batch, lambda f, b: masked(f, b["x"], b["m"]), [("", ({"x": X, "m": Y},)), ("!", ({"x": X, "m": None},))]),
    "a missing key": (Batch, lambda f, b: masked(f, b["x"], b.get("m")), [("", ({"x": X},)), ("!", ({"x": X, "m": Y},))]),
    "a key": (Batch, lambda f, b: masked(f, b["x"], b.get("m")), [("", ({"x": X, "m": Y},)), ("!", ({"x": X},))]),
    "a key that is asked for": (Batch, lambda f, b: f(b["x"]) * b["m"] if "m" in b else f(b["x"]),
        [("", ({"x": X, "m": Y},)), ("!", ({"x": X},))]),
    "items": (Batch, lambda f, b: sum(f(v) * i for i, (_, v) in enumerate(b.items(), 1)),
        [("", ({"a": X, "b": Y},)), ("!", ({"b": Y, "a": X},))]),
    "unpacked": (Batch, lambda f, b: masked(f, **b), [("", ({"x": X, "m": Y},)), ("!", ({"x": X},))]),
    "a named tuple": (Batch, lambda f, b: masked(f, b.x, b.m), [("", (Pair(X, None),)), ("!", (Pair(X, Y),))]),
    "a named tuple, unpacked": (Batch, lambda f, b: masked(f, *b), [("", (Pair(X, Y),)), ("!", (Pair(X, None),))]),
    "a list": (Batch, lambda f, b: sum(map(f, b)), [("", ([X, Y],)), ("!", ([X, Y, Z],)), ("", ((X, Y),))]),
    "None in a list": (Batch, lambda f, b: masked(f, b[0], b[1]), [("", ([X, None],)), ("!", ([X, Y],))]),
    "a dataclass": (Batch, lambda f, b: masked(f, b.x, b.m), [("", (Record(X),)), ("!", (Record(X, Y),))]),
    "one object": (Two, lambda h, x, y: h * 2 if x is y else h * 3, [("", (X, Y)), ("!", (X, X)), ("", (Y, Z))]),
    "no longer one object": (Two, lambda h, x, y: h * 2 if x is y else h * 3, [("", (X, X)), ("!", (X, Y)), ("", (Y, Y))]),
    "one object, and nobody asks": (Two, lambda h, x, y: h * y, [("", (X, X)), ("", (X, Y)), ("", (Y, Y))]),
    "one object in a dict": (Batch, lambda f, b: f(b["q"]) * (2 if b["q"] is b["k"] else 3),
        [("", ({"q": X, "k": X},)), ("!", ({"q": X, "k": Y},))]),
    "a parameter": (Two, lambda h, x, y: h * 2 if isinstance(y, nn.Parameter) else h * 3,
        [("", (X, Y)), ("!", (X, nn.Parameter(Y))), ("", (X, Z))]),
    "a subclass": (Two, lambda h, x, y: h * 2 if isinstance(y, Sub) else h * 3, [("", (X, Y)), ("!", (X, Y.as_subclass(Sub)))]),
    "no subclass": (Two, lambda h, x, y: h * 2 if isinstance(y, Sub) else h * 3, [("", (X, Y.as_subclass(Sub))), ("!", (X, Y))]),
    "True for 1": (Optional, lambda h, k, n: h * 2 if k is True else h * 3, [("", (X, 1)), ("!", (X, True)), ("", (X, 1))]),
    "1 for True": (Optional, lambda h, k, n: h * 2 if k is True else h * 3, [("", (X, True)), ("!", (X, 1)), ("!", (X, 1.0))]),
    "a flag in a dict": (Batch, lambda f, b: f(b["x"]) * (2 if b["f"] is True else 3),
        [("", ({"x": X, "f": True},)), ("!", ({"x": X, "f": 1},))]),
    "-0.0 for 0.0": (Optional, lambda h, k, n: h * math.copysign(1, n), [("", (X, None, 0.0)), ("!", (X, None, -0.0))]),
    "a member of an enum": (Optional, lambda h, k, n: h * 2 if k is Mode.FAST else h * 3, [("", (X, Mode.FAST)), ("!", (X, Mode.SLOW))]),
    "an int for a member": (Optional, lambda h, k, n: h * 2 if isinstance(k, Level) else h * 3, [("", (X, Level.LOW)), ("!", (X, 1))]),
    "a float for a tensor": (Two, lambda h, x, y: h * y if isinstance(y, float) else h * y * 2,
        [("", (X, Y[0, 0])), ("!", (X, 2.0)), ("!", (X, 3.0))]),
    "a float as a number": (Two, lambda h, x, y: h * y, [("", (X, Y[0, 0])), ("", (X, 2.0)), ("", (X, 3.0))]),
    "the number of arguments": (Rest, folded, [("", (X, Y)), ("!", (X, Y, Z)), ("!", (X,))]),
    "a function": (Optional, lambda h, k, n: k(h), [("", (X, torch.relu)), ("!", (X, torch.tanh))]),
    "a partial": (Optional, lambda h, k, n: h * k(3),
        [("", (X, partial(max, 1))), ("", (X, partial(max, 1))), ("!", (X, partial(max, 5)))]),
    "a class": (Optional, lambda h, k, n: h * 2 if k is int else h * 3, [("", (X, int)), ("!", (X, float))]),
    "a slice": (Optional, lambda h, k, n: h[:, k], [("", (X, slice(2))), ("", (X, slice(2))), ("!", (X, slice(3)))]),
    "a text": (Optional, lambda h, k, n: h * len(k), [("", (X, Text("ab"))), ("!", (X, Text("abc")))]),
    "what nobody reads": (Optional, lambda h, k, n: h, [("", (X, Y)), ("", (X,)), ("", (X, "a"))]),
    "a number that is left out": (Optional, lambda h, k, n: h * n, [("", (X, None, 2.0)), ("!", (X,)), ("!", (X, None, 1.0))]),
    "a default for None": (Optional, lambda h, k, n: h if n is None else h * n, [("", (X, None, None)), ("!", (X,))]),
    "None for an object": (Optional, lambda h, k, n: h * (2 if k else 3), [("", (X, Text("ab"))), ("!", (X,)), ("", (X, Text("ab")))]),
    "a flag that is left out, and nobody reads": (Optional, lambda h, k, n: h, [("", (X, True)), ("", (X,)), ("", (X, None, 3.0))]),
    "a class that cannot be copied": (Two, lambda h, x, y: h + (2 if type(y) is Tensor else 3),
        [("", (X, Y.as_subclass(Sub))), ("!", (X, Y))]),
    "another dtype": (Two, lambda h, x, y: h.to(y.dtype) * y, [("", (X, Y)), ("", (X, Y.double()))]),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "of", "calls"), CASES.values(), ids=CASES)
def test_a_module_is_right_or_refuses(kind: type[Net], of: Any, calls: list[tuple[str, Call]]) -> None:
    model = kind(of)
    module = graphreg.regularize(model, example_inputs=calls[0][1], **NO_PENALTY)
    for _ in range(2):  # what is found out about a structure is remembered
        for refused, call in calls:
            if not refused:
                assert torch.equal(module(*call).output, model(*call))
                continue
            with pytest.raises(OtherInputs, match=r"The arguments of this call have the structure \(.*\), and the graph was made for \("):
                module(*call)


# The same calls as another case's, in another order: in place each structure is traced.
TWINS = (
    "None for a tensor", "a tensor in a dict", "a key", "a named tuple, unpacked", "no longer one object", "no subclass", "1 for True",
)  # fmt: skip
IN_PLACE = {name: case for name, case in CASES.items() if name not in TWINS}


@pytest.mark.parametrize(("kind", "of", "calls"), IN_PLACE.values(), ids=IN_PLACE)
def test_in_place_another_structure_is_another_trace(kind: type[Net], of: Any, calls: list[tuple[str, Call]]) -> None:
    model, plain = kind(of), kind(of)
    graphreg.regularize_(model, penalties="return", **NO_PENALTY)
    for _ in range(2):
        for _, call in calls:
            assert torch.equal(model(*call).output, plain(*call))


class More(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(X.shape[-1], 4)

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        value = named["batch"]["value"] if "batch" in named else named["value"] if named else more[0]
        factor = max(value) if isinstance(value, set) else value
        return self.layer(x)[:, factor] if isinstance(factor, slice) else self.layer(x) * factor


@pytest.mark.parametrize("how", ["by position", "by name", "in a dict"])
@pytest.mark.parametrize(("one", "other"), [(2.0, 3.0), (slice(0, 2), slice(1, 3)), ({1, 2}, {1, 7})], ids=["number", "slice", "set"])
def test_what_no_parameter_names_counts_by_its_value(how: str, one: Any, other: Any) -> None:
    plain, module = More(), None
    for value in (one, other, one):
        args, named = ([value], {}) if how == "by position" else ([], {"value": value} if how == "by name" else {"batch": {"value": value}})
        if module is None:
            given = (X, *args) if args else {"x": X, **named}
            module = graphreg.regularize(plain, weight_l2=0.1, example_inputs=given)
        if value == other:
            with pytest.raises(graphreg.errors.OtherInputs, match="Traced for these arguments, More gives another graph"):
                module(X, *args, **named)
        else:
            assert torch.equal(module(X, *args, **named).output, plain(X, *args, **named))


def test_the_dtype_of_what_no_parameter_names_does_not_count() -> None:
    plain = More()
    module = graphreg.regularize(plain, weight_l2=0.1, example_inputs={"x": X, "batch": {"value": X[:, :1]}})
    taken = len(state_of(module).structures.accepted)
    low = {"batch": {"value": X[:, :1].bfloat16()}}
    assert torch.equal(module.bfloat16()(X.bfloat16(), **low).output, plain(X.bfloat16(), **low))
    assert len(state_of(module).structures.accepted) == taken


def test_the_order_of_keyword_arguments() -> None:
    plain, model = Rest(folded), graphreg.regularize_(Rest(folded), penalties="return", **NO_PENALTY)
    module = graphreg.regularize(plain, example_inputs={"x": X, "a": Y, "b": Z}, **NO_PENALTY)
    assert torch.equal(module(X, a=Y, b=Z).output, plain(X, a=Y, b=Z))
    with pytest.raises(GraphRegError, match=r"named=\{'b': a tensor, 'a': a tensor\}\), and the graph was made for .*\{'a': a tensor, 'b'"):
        module(X, b=Z, a=Y)
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        for named in ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}, {"a": Y, "b": Z}, {"b": Z, "a": Y}):
            assert torch.equal(run(X, **named).output, plain(X, **named))


@pytest.mark.parametrize("name", ["a list", "a key that is asked for", "one object", "1 for True", "a parameter"])
def test_compiled(name: str) -> None:
    """A call settles the structure before Dynamo sees it, so the error is graphreg's, and a structure that is known compiles once."""
    kind, of, calls = CASES[name]
    model = kind(of)
    module = graphreg.regularize(model, example_inputs=calls[0][1], **NO_PENALTY)
    counter, plain_counter = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    run, plain = (torch.compile(each, backend=to, fullgraph=True) for each, to in ((module, counter), (kind(of), plain_counter)))
    for _ in range(3):
        for refused, call in calls:
            if refused:
                with pytest.raises(GraphRegError, match="The arguments of this call have the structure"):
                    run(*call)
            else:
                assert torch.equal(run(*call).output, model(*call)) and torch.equal(plain(*call), model(*call))
    assert counter.frame_count == plain_counter.frame_count
    in_place = graphreg.regularize_(kind(of), penalties="return", **NO_PENALTY)
    run = torch.compile(in_place, backend="eager", fullgraph=True)
    for _, call in calls:
        assert torch.equal(run(*call).output, model(*call))


def test_within_compiled_code_another_structure_asks_for_an_eager_call() -> None:
    model = Optional(lambda h, k, n: h)
    module = graphreg.regularize(model, **NO_PENALTY)
    outer = nn.Sequential(module)
    compiled = torch.compile(lambda *call: outer[0](*call).output, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
    told = "While the call is traced .* Call the module once with such arguments outside" if tells_result() else None  # else Dynamo's words
    with pytest.raises(torch._dynamo.exc.Unsupported, match=told):
        compiled(X, Y)
    module(X, Y)
    assert torch.equal(compiled(X, Y), model(X))


def test_a_structure_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = list[Any]()

    def counted(*given: Any) -> Any:
        traced.append(given)
        return original(*given)

    original = other_structures.traced_for_call
    monkeypatch.setattr(other_structures, "traced_for_call", counted)
    model = Optional(lambda h, k, n: h if k is None else h * 2)
    module = graphreg.regularize(model, example_inputs=(X, Y), **NO_PENALTY)
    module.train()
    module(X[:1], Z), module.to(torch.bfloat16)(X.bfloat16(), Y), module.eval()(X.bfloat16(), Y.double()), module.float()
    assert not traced  # sizes, dtypes and modes are no structure
    for _ in range(3):
        module(X, nn.Parameter(Y))
        with pytest.raises(GraphRegError):
            module(X)
    assert len(traced) == 2
    twin = copy.deepcopy(module)
    twin(X, nn.Parameter(Y))
    stranger = pickle.loads(pickle.dumps(graphreg.regularize(nn.Linear(4, 4), example_inputs=X, **NO_PENALTY)))
    assert len(traced) == 2 and stranger(X).output.shape == (3, 4)
    with pytest.raises(GraphRegError, match="This module has no link to the model"):
        stranger([X])
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        module()


def test_without_example_inputs_each_argument_is_assumed_to_be_a_tensor() -> None:
    model = Two(lambda h, x, y: h if y is None else h * y)
    module = graphreg.regularize(model, **NO_PENALTY)
    for y in (Y, 2.0, 3, Y.double()):
        assert torch.equal(module(X, y).output, model(X, y))
    shown = r"structure \(x=a tensor, y=None\), .* for \(x=a tensor, y=a tensor\), which was assumed for a"
    with pytest.raises(GraphRegError, match=shown):
        module(X, None)
    dicts = graphreg.regularize(Batch(lambda f, b: f(b["x"]) * b["y"]), **NO_PENALTY)
    assert torch.equal(dicts({"x": X, "y": 2.0}).output, dicts({"x": X, "y": 4.0}).output / 2)


def test_exported_graphs_fix_dtypes() -> None:
    class Ones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h: Tensor = self.layer(x)
            return h * 2 if y.dtype is torch.float32 else h * 3

    model = Ones()
    module = graphreg.regularize(model, example_inputs=(X, Y), front_end="export", **NO_PENALTY)
    assert torch.equal(module(X[:2], Z[:2]).output, model(X[:2], Z[:2]))
    with pytest.raises(GraphRegError, match=r"y=a tensor of float64\), and the graph was made for \(.*y=a tensor of float32\)"):
        module(X, Y.double())


def test_transforms_and_tracers_take_the_structure_that_is_known() -> None:
    model = Optional(lambda h, k, n: h if k is None else h * k)
    module = graphreg.strip(graphreg.regularize(model, example_inputs=(X, Y), **NO_PENALTY))
    assert torch.allclose(torch.vmap(module)(X, Y), model(X, Y))
    assert torch.allclose(make_fx(module)(X, Y)(X, Z), model(X, Z))
    assert torch.allclose(torch.export.export(module, (X, Y)).module()(X, Z), model(X, Z))
    for call in (lambda: torch.vmap(module)(X), lambda: make_fx(module)(X)):
        with pytest.raises(GraphRegError, match="While the call is traced or transformed"):
            call()


def test_a_batch_that_the_forward_writes_into() -> None:
    def of(layer: Any, batch: Any) -> Any:
        batch["h"] = layer(batch["x"])
        return batch["h"] * 2

    model = Batch(of)
    module, batch = graphreg.regularize(model, example_inputs=({"x": X},), **NO_PENALTY), {"x": Y}
    assert torch.equal(module(batch).output, model({"x": Y})) and torch.equal(batch["h"], model.layer(Y))
