"""What a model returns keeps its class, or is refused: torch.fx alone makes plain dicts, lists and tuples of their subclasses."""

from __future__ import annotations

import copy
import pickle
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum, Flag, auto
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import ModelOutput

import graphreg
from graphreg.errors import TraceError
from graphreg.tracing.proof.values import difference
from lacking import needs_objects


class Sub(dict[str, Any]):
    pass


class Named(dict[str, Any]):
    """Its class takes something else than what is in it."""

    def __init__(self, name: str, **items: Any) -> None:
        super().__init__(**items)
        self.name = name


class Pile(list[Any]):
    pass


class Row(tuple[Any, ...]):
    pass


class Lists(defaultdict[str, Any]):
    pass


@dataclass
class Record:
    first: Any
    second: Any = None


@dataclass
class Output(ModelOutput):  # type: ignore[misc]  # transformers has no types
    loss: Any = None
    logits: Any = None


Point = namedtuple("Point", "x y")


class Pair(Point):
    """Has a ``__dict__``."""


def with_more(point: Any) -> Pair:
    pair = Pair(*point)
    pair.more = 1
    return pair


class Kind(Enum):
    LOGITS = 1
    LOSS = print  # whose repr is no Python


class Ways(Flag):
    LEFT = auto()
    RIGHT = auto()


def gathered(h: Tensor) -> Any:
    """Lists by name."""
    found: defaultdict[str, list[Tensor]] = defaultdict(list)
    found["a"].append(h)
    found["b"].append(h * 2)
    return found


CARRIED: dict[str, Callable[[Tensor], Any]] = {
    "defaultdict": gathered,
    "defaultdict without a factory": lambda h: defaultdict(None, a=h),
    "OrderedDict": lambda h: OrderedDict(b=h, a=[h * 2]),
    "Counter": lambda h: Counter(a=h),
    "dict of its own": lambda h: Sub(a=h),
    "list of its own": lambda h: Pile([h, h * 2]),
    "tuple of its own": lambda h: Row((h, 1)),
    "named tuple": lambda h: Point(h, [h * 2]),
    "dataclass": lambda h: Record(h, {"deep": h * 2}),
    "transformers' output": lambda h: Output(logits=h),
    "enum": lambda h: (h, Kind.LOGITS),
    "enums in a dict": lambda h: {"a": h, "kind": [Kind.LOSS], Kind.LOSS: Ways.LEFT},
    "enums in a named tuple": lambda h: Point(h, (Kind.LOGITS, Ways.LEFT)),
    "nested": lambda h: {"a": gathered(h), "b": Point(Record(h), (Pile([Sub(c=h)]), None))},
}
WITH_LOSS: dict[str, Callable[[Tensor], Any]] = {
    "a defaultdict with a loss": lambda h: defaultdict(list, loss=h.mean(), logits=h),
    "transformers' output with a loss": lambda h: Output(loss=h.mean(), logits=h),
}
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "factory without a name": lambda h: defaultdict(lambda: 0.0, a=h),
    "a defaultdict of its own": lambda h: Lists(list, {"a": h}),
    "made of something else": lambda h: Named("n", a=h),
    "named tuple with more": lambda h: with_more(Point(h, h)),
    "deque": lambda h: deque([h]),
    "frozenset": lambda h: frozenset([h]),
    "UserDict": lambda h: UserDict(a=h),
    "mapping proxy": lambda h: MappingProxyType({"a": h}),
}


class Net(nn.Module):
    """``case``: the name of what makes the output of the layer's, for no pickle holds a lambda."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.layer, self.case = nn.Linear(4, 4), case

    def forward(self, x: Tensor) -> Any:
        return (CARRIED | WITH_LOSS | REFUSED)[self.case](self.layer(x))


def same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs) and getattr(ours, "default_factory", 0) == getattr(theirs, "default_factory", 0)
        same(list(ours.values()), list(theirs.values()))
    elif is_dataclass(theirs):
        same([getattr(ours, f.name) for f in fields(theirs)], [getattr(theirs, f.name) for f in fields(theirs)])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert ours == theirs


@pytest.mark.parametrize(("case", "penalties"), [*((case, "return") for case in CARRIED), ("OrderedDict", "attach"), ("nested", "attach")])
def test_an_output_keeps_its_class(case: str, penalties: Any) -> None:
    model, x = Net(case), torch.ones(3, 4)
    options = {"scale": 1} if penalties == "attach" else {}
    module = graphreg.regularize(model, weight_l2=1.0, penalties=penalties, **options)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), graphreg.strip(module)):
        given = each(x)
        same(given.output if isinstance(given, graphreg.Regularized) else given, model(x))


@pytest.mark.parametrize("case", ["defaultdict", "transformers' output", pytest.param("nested", marks=needs_objects)])
def test_so_compiled_and_attached(case: str) -> None:
    torch._dynamo.reset()
    model, x = Net(case), torch.ones(3, 4)
    module = graphreg.regularize(model, weight_l2=1.0, penalties="attach", scale=1)
    module.compile(backend="eager", fullgraph=True)
    same(module(x), model(x))


@pytest.mark.parametrize("case", WITH_LOSS)
def test_penalties_are_added_to_a_loss_in_it(case: str) -> None:
    model, x = Net(case), torch.ones(3, 4)
    module = graphreg.regularize(model, weight_l2=1.0, penalties="attach")
    torch.testing.assert_close(module(x)["loss"], model(x)["loss"] + model.layer.weight.square().mean())


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_graph_builds_again_is_refused(case: str) -> None:
    what = r"a (\w+,? (which|whose)|named tuple of class Pair with)"
    with pytest.raises(TraceError, match=rf"{what}.*Return a tuple, list, dict, named tuple or dataclass"):
        graphreg.regularize(Net(case), weight_l2=1.0, front_end="symbolic")


def test_a_tuple_with_attributes_is_refused_as_an_argument() -> None:
    class Takes(Net):
        def forward(self, pair: Any) -> Any:
            return self.layer(pair.x) * pair.more

    pair = with_more(Point(torch.ones(3, 4), 1))
    placed = graphreg.regularize_(Takes(""), weight_l2=1.0, scale=1)
    for call in (lambda: graphreg.regularize(Takes(""), weight_l2=1.0, example_inputs=(pair,)), lambda: placed(pair)):
        with pytest.raises(TraceError, match=r"^the call carries a Pair, a named tuple with attributes \(more\).*Pass them as arguments"):
            call()


def test_the_proof_compares_attributes_and_enums() -> None:
    """torch.export gives the tuple without its attributes."""
    with pytest.raises(TraceError, match=r"Pair of 3.*does not give the model's result|does not give the model's result.*Pair of"):
        graphreg.regularize(Net("named tuple with more"), weight_l2=1.0, front_end="export", example_inputs=torch.ones(3, 4))
    assert difference(Ways.LEFT, Ways.RIGHT) and not difference(Ways.LEFT, Ways.LEFT)


def test_what_no_code_can_write_is_refused() -> None:
    class Dicts(Net):
        def forward(self, x: Tensor) -> Any:
            return OrderedDict(a=self.layer(x), kind={"kind": Kind.LOGITS})

    with pytest.raises(TraceError, match="^the code of Dicts's graph would be no Python: .*Make the object outside of the forward"):
        graphreg.regularize(Dicts("dict"), weight_l2=1.0)


def test_what_is_hidden_from_a_second_trace_is_not_told_as_assigned() -> None:
    """torch.fx takes all of BERT's inside for opaque, hides the state that its code may change, and stops; torch.export goes on."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    config = BertConfig(**sizes, problem_type="multi_label_classification")
    ids, labels = torch.randint(0, 20, (2, 5)), torch.rand(2, 2)
    model = BertForSequenceClassification(config)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    assert not [note for note in graphreg.trace(model, inputs).notes if note.startswith("not assigned")]


class Heads(nn.Module):
    """Puts its results into the list that it gets, as YOLOv5's does; what it keeps makes it opaque."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.seen = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]), [torch.zeros(1)] * 2

    def forward(self, levels: list[Tensor]) -> Any:
        for i, layer in enumerate(self.layers):
            levels[i] = layer(levels[i])
            if not self.training and self.seen[i].shape != levels[i].shape:
                self.seen[i] = torch.ones(levels[i].shape)
        return levels if self.training else (torch.cat([h + seen for h, seen in zip(levels, self.seen, strict=True)]), levels)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.heads = nn.Linear(4, 4), Heads()

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        return self.heads([h, h.relu()])


@pytest.mark.parametrize("how", ["bare", "inputs", "in place"])
def test_a_submodule_may_write_into_the_list_that_it_gets(how: str) -> None:
    """Where the graph runs to find sizes, too, and not only in its code."""
    plain = Detector()
    ours: Any = copy.deepcopy(plain)
    if how == "in place":
        graphreg.regularize_(ours, weight_l2=0.0, scale=1)
    else:
        ours = graphreg.regularize(ours, weight_l2=0.0, example_inputs=torch.ones(3, 4) if how == "inputs" else None)
    for training in (True, False):
        for rows in (3, 5):
            given = [model.train(training)(torch.ones(rows, 4)) for model in (plain, ours)]
            same(given[1].output if isinstance(given[1], graphreg.Regularized) else given[1], given[0])


def popped(m: Any, b: Any) -> Any:
    y = b.pop("y")
    b["z"] = m(b["x"])
    return m(**{"x": b["z"]}) + y + sum(b.values()) + len(b)


def updated(m: Any, b: Any) -> Any:
    b.update(z=m(b["x"]), y=0)
    b |= {"w": b["z"] * 2}
    return b.setdefault("w", None) + b.setdefault("more", b["z"]) + len(b)


def deleted(m: Any, b: Any) -> Any:
    y = b["y"]
    del b["y"]
    return dict(b, out=m(b["x"]) * y)


def missed(m: Any, b: Any) -> Any:
    try:
        b.pop("nothing")
    except KeyError:
        return m(b["x"]) if b.pop("nothing", None) is None else b["x"]
    return b["y"]


def within(m: Any, b: Any) -> Any:
    b["inner"]["z"] = m(b["x"])
    inner = b.pop("inner")
    return inner["z"] * len(inner) + len(b)


def emptied(m: Any, xs: Any) -> Any:
    total = 0
    while xs:
        total = total + m(xs.pop())
    return total


def grown(m: Any, xs: Any) -> Any:
    xs += [m(xs[0])]
    xs.insert(0, xs.pop(1))
    xs[1:2] = [xs[-1] * 2, xs[1]]
    xs.reverse()
    return sum(xs) * len(xs)


def as_sorted(m: Any, xs: Any) -> Any:
    xs.sort(key=lambda x: x.shape[0])
    return m(xs[0]) * len(xs)


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, given: Any) -> Any:
        return self.function(self.layer_of, given)

    def layer_of(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("function", [popped, updated, deleted, missed, within, emptied, grown, as_sorted])
def test_a_forward_changes_the_container_that_it_gets(function: Callable[..., Any], in_place: bool) -> None:
    """The result and the caller's container are those of the model, at the call that is traced and at the next."""

    def batch() -> Any:
        if function in (emptied, grown, as_sorted):
            return [torch.rand(3, 4), torch.rand(3, 4), torch.rand(3, 4)]
        return {"x": torch.rand(3, 4), "y": torch.rand(3, 4)} | ({"inner": {"a": torch.rand(1)}} if function is within else {})

    plain = Calls(function)
    ours: Any = copy.deepcopy(plain)
    if in_place:
        graphreg.regularize_(ours, hidden_dropout=0.0)
    else:
        ours = graphreg.regularize(ours, hidden_dropout=0.0, example_inputs=(batch(),), front_end="symbolic")
    for _ in range(2):
        given = batch()
        theirs = copy.deepcopy(given)
        result = ours(given)
        same(result if in_place else result.output, plain(theirs))
        same(given, theirs)


@dataclass
class Unregistered:
    x: Tensor


@pytest.mark.parametrize("kind", [Unregistered, UserDict, MappingProxyType])
def test_a_call_whose_tensors_are_all_in_an_object_that_is_not_registered_is_refused(kind: type[Any]) -> None:
    """The graph would have no inputs: each batch would be a constant of a graph of its own."""
    given = Unregistered(torch.ones(2, 4)) if kind is Unregistered else kind({"x": torch.ones(2, 4)})
    model = Calls(lambda m, b: m(b.x if kind is Unregistered else b["x"]))
    message = (
        rf"Calls gets its tensors in given, an object of class {kind.__name__} that torch's pytree does not take apart.*"
        rf"\(a dataclass by torch.export.register_dataclass\({kind.__name__}\)\), or pass a dict, or the tensors as arguments of their own"
    )
    with pytest.raises(TraceError, match=message):
        graphreg.regularize(model, hidden_dropout=0.1, example_inputs=(given,))
    with pytest.raises(TraceError, match=message):
        graphreg.regularize_(model, hidden_dropout=0.1)(given)
