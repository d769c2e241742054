"""A model that is regularized in place computes what ``regularize`` gives for the same arguments, and stays the object that it is."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from traces_left import seen, stored

import graphreg
from graphreg import GraphRegError, NoMatchError, RegularizerError, TraceError
from graphreg.in_place import placed
from graphreg.in_place.calls import CallForm, structure_text
from graphreg.in_place.structure import traced_for
from graphreg.passes import BernoulliDropout, HiddenL1
from pages import run_page

ASKED: dict[str, Any] = {"hidden_dropout": 0.5, "weight_l2": 0.3, "hidden_l1": 0.1, "rng": 3, "scale": 1}


class Net(nn.Module):
    """With an optional mask, a constant in an attribute and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.gain = 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None, *, twice: bool = False) -> Tensor:
        """Compute."""
        h = torch.relu(self.norm(self.body(x))) * self.gain
        if mask is not None:
            h = h * mask
        y: Tensor = self.head(h)
        return y * 2 if twice else y

    def method(self) -> str:
        return "the model's own"


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def inputs(rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, generator=generator), (torch.rand(rows, 8, generator=generator) > 0.3).float()


X, MASK = inputs()
CALLS: list[dict[str, Any]] = [{"x": X}, {"x": X, "mask": MASK}, {"x": X}, {"x": X, "mask": MASK, "twice": True}, {"x": X, "twice": True}]


class Separate:
    """What ``regularize`` gives for each structure of a model's calls, with one call number and the model's parameters."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.options, self.modules, self.call = model, options, dict[tuple[str, ...], Any](), 0
        self.strengths = dict[str, float]()  # which were set

    def __call__(self, **call: Any) -> Any:
        structure = tuple(call)
        if structure not in self.modules:
            self.modules[structure] = graphreg.regularize(self.model, example_inputs=call, **({"penalties": "attach"} | self.options))
        module = self.modules[structure]
        state = graphreg.rng_state(module)
        graphreg.set_rng_state(module, state | {"call": self.call} | ({"clock": self.call} if "clock" in state else {}))
        self.call += 1
        for name, strength in self.strengths.items():
            graphreg.set_strength(module, name, strength)
        return module(**call)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What it computes


def test_each_structure_has_the_graph_of_regularize_and_all_share_one_noise() -> None:
    model, other = net(), net()
    separate = Separate(other, **ASKED)
    assert graphreg.regularize_(model, **ASKED) is model
    for call in CALLS:
        ours, theirs = model(**call), separate(**call)
        assert torch.equal(ours, theirs)
        (ours**2).sum().backward()
        (theirs**2).sum().backward()
        assert equal(gradients(model), gradients(other))
        assert equal(model.state_dict(), other.state_dict())
    assert graphreg.rng_state(model) == {"version": 1, "call": 5, "ranks": "differ", "seeds": {"": 3}}


def test_position_name_and_defaults_make_no_other_structure() -> None:
    model = graphreg.regularize_(net(), **ASKED)
    for call in ((X,), (X, None)):
        model(*call)
    model(x=X, twice=False)
    model(mask=None, x=X)
    assert [line for line in str(graphreg.report(model)).splitlines() if "in place" in line] == [
        "in place: a graph for arguments of the structure (x=float32[2])"
    ]


def test_eval_mode_is_the_models_own_forward() -> None:
    model, plain = net().eval(), net().eval()
    graphreg.regularize_(model, **ASKED)
    assert torch.equal(model(X, MASK), plain(X, MASK))
    assert graphreg.rng_state(model)["call"] == 0
    with pytest.raises(GraphRegError, match="has no graph yet: it is traced at the first call in train mode"):
        graphreg.report(model)
    model.train()(X)
    plain.train()(X)
    assert torch.equal(model.eval()(X), plain.eval()(X))


def test_eval_penalties() -> None:
    model, other = net().eval(), net().eval()
    graphreg.regularize_(model, eval_penalties=True, penalties="return", weight_l2=0.3)
    output, penalties = model(X)
    expected = graphreg.regularize(other, weight_l2=0.3)(X)
    assert torch.equal(output, expected.output) and torch.equal(penalties["weight_l2"], expected.penalties["weight_l2"])


def test_returned_penalties_in_train_mode() -> None:
    model = graphreg.regularize_(net(), **(ASKED | {"penalties": "return", "scale": None}))
    output, penalties = model(X)
    assert set(penalties) == {"weight_l2", "hidden_l1"} and output.shape == (5, 2)
    assert model.eval()(X).shape == (5, 2)
    with pytest.raises(GraphRegError, match="returns its penalties with its output"):
        model.penalties()  # type: ignore[operator]


def test_the_forward_called_directly_is_the_same() -> None:
    model, other = graphreg.regularize_(net(), **ASKED), graphreg.regularize_(net(), **ASKED)
    assert torch.equal(model.forward(X), other(X))
    assert equal(model.penalties(), other.penalties())  # type: ignore[operator]


class Decides(nn.Module):
    """Decides on a size, after it has changed statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y: Tensor = self.head(h if x.shape[0] > 3 else -h)
        return y


def test_other_sizes_are_traced_anew_and_nothing_counts_twice() -> None:
    def made() -> Decides:
        torch.manual_seed(0)
        return Decides()

    model, other = made(), made()
    graphreg.regularize_(model, input_dropout=0.3, rng=1)
    for call, rows in enumerate([5, 2, 5, 2, 3]):
        x = X[:rows]
        module = graphreg.regularize(other, input_dropout=0.3, rng=1, example_inputs=x)
        graphreg.set_rng_state(module, graphreg.rng_state(module) | {"call": call})
        assert torch.equal(model(x), module(x).output)
        assert equal(model.state_dict(), other.state_dict())
    assert graphreg.rng_state(model)["call"] == 5


class ByRows:
    """A scale that depends on the arguments of the call, as that of the Trainer's callback does."""

    def of_call(self, args: Any, kwargs: Any, reads: Any) -> tuple[float, float]:
        return 1.0 / args[0].shape[0], 1.0 / args[0].shape[0]


def test_the_scale_of_a_call_reaches_the_graph_that_runs() -> None:
    torch.manual_seed(0)
    model: Any = graphreg.regularize_(Decides(), weight_l2=0.5, scale=ByRows())
    weight = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
    by_hand = 2 * 0.5 * weight.detach() / weight.numel()
    for rows in [5, 2, 5, 2, 3]:  # the second call begins in the graph of the first
        model.zero_grad()
        (model(X[:rows]) * 0).sum().backward()
        torch.testing.assert_close(weight.grad, by_hand / rows)
        assert "weight_l2" in model.penalties()


class ActsThenDecides(nn.Module):
    """Counts or draws by an operation that is no module, then decides on a size."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.head, self.kind = nn.Linear(4, 2), kind
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        factor: Any = 1.0
        if self.kind == "method":
            self.n.add_(1)
        elif self.kind == "out":
            torch.add(self.n, 1, out=self.n)
        elif self.kind == "operator":
            self.n += 1
        elif self.kind == "item":
            self.n[...] = self.n + 1
        elif self.kind == "draw":
            factor = torch.rand_like(x[:1, :1])
        elif self.kind == "dropout":
            x = torch.nn.functional.dropout(x, 0.5, self.training)
        y: Tensor = self.head(x) * factor
        return y * 2 if x.shape[0] > 3 else y


@pytest.mark.parametrize("kind", ["method", "out", "operator", "item", "draw", "dropout"])
def test_what_an_operation_did_before_a_new_size_is_found_happens_once(kind: str) -> None:
    torch.manual_seed(0)
    model, other = ActsThenDecides(kind), ActsThenDecides(kind)
    other.load_state_dict(model.state_dict())
    graphreg.regularize_(model, weight_l2=0.1, scale=1.0)
    torch.manual_seed(5)
    ours = [model(X[:rows]) for rows in (5, 2, 5, 3, 4)] + [torch.rand(1)]
    torch.manual_seed(5)
    theirs = [other(X[:rows]) for rows in (5, 2, 5, 3, 4)] + [torch.rand(1)]
    assert all(map(torch.equal, ours, theirs)) and equal(model.state_dict(), other.state_dict())


class WritesThenDecides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y: Tensor = self.head(x if x.shape[0] > 3 else -x)
        return y


def test_an_argument_that_is_written_before_a_new_size_is_found_is_refused() -> None:
    model = WritesThenDecides()
    graphreg.regularize_(model, weight_l2=0.1, scale=1.0)
    model(X[:5].clone())
    with pytest.raises(graphreg.GraphRegError, match="WritesThenDecides writes into an argument, and then tests a condition on a shape"):
        model(X[:2].clone())


# The object


def test_the_model_is_its_own_object() -> None:
    model, plain = net(), net()
    parameters, keys, metadata = list(model.parameters()), list(model.state_dict()), model.state_dict()._metadata
    graphreg.regularize_(model, **ASKED)(X)
    assert isinstance(model, Net) and type(model).__name__ == "Net" and type(model).__module__ == Net.__module__
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__doc__ == "Compute."
    assert model.method() == "the model's own" and repr(model) == repr(plain)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys and model.state_dict()._metadata == metadata
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert type(type(model)()) is Net  # type: ignore[call-arg]


def test_strip_leaves_no_trace() -> None:
    model = net()
    model.register_forward_hook(lambda *args: None)
    before, kept, plain = seen(model), stored(model), copy.deepcopy(model)
    graphreg.regularize_(model, **ASKED, compile={"backend": "eager"})
    for call in CALLS[:2]:
        model(**call).sum().backward()
        plain(**call)
    assert seen(model) != before
    assert graphreg.strip_(model) is model
    assert type(model) is Net and seen(model) == before and stored(model) == kept
    assert equal(model.state_dict(), plain.state_dict())
    assert "forward" not in vars(model) and torch.equal(model.eval()(X), plain.eval()(X))
    with pytest.raises(GraphRegError, match="Net is not regularized in place. Give strip_ the model that graphreg.regularize_ returned"):
        graphreg.strip_(model)
    graphreg.regularize_(model, **ASKED)  # once more


def copies(model: Net) -> dict[str, Net]:
    return {"deepcopy": copy.deepcopy(model), "copy": copy.copy(model), "pickle": pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("used", [False, True])
def test_each_copy_has_a_state_of_its_own(used: bool) -> None:
    model = graphreg.regularize_(net(), **ASKED)
    if used:
        model(X)
    graphreg.set_strength(model, "weight_l2", 0.7)
    for name, twin in copies(model).items():
        assert type(twin).__name__ == "Net" and isinstance(twin, Net), name
        assert graphreg.strengths(twin) == graphreg.strengths(model) and graphreg.rng_state(twin) == graphreg.rng_state(model), name
        graphreg.set_strength(twin, "hidden_dropout", 0.1)
        before = graphreg.rng_state(model)
        twin(X)
        assert graphreg.strengths(model)["hidden_dropout"] == 0.5 and graphreg.rng_state(model) == before, name
        graphreg.strip_(twin)
        assert type(twin) is Net, name
    expected = net()
    module = graphreg.regularize(expected, **(ASKED | {"penalties": "attach", "weight_l2": 0.7}))
    graphreg.set_rng_state(module, graphreg.rng_state(module) | {"call": int(used)})
    assert torch.equal(copy.deepcopy(model)(X), module(X))


def test_an_average_of_weights_follows() -> None:
    model = graphreg.regularize_(net(), **ASKED)
    plain = net()
    average, expected = (AveragedModel(each, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for each in (model, plain))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        graphreg.set_strength(model, "hidden_dropout", 0.5 + 0.1 * step)
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()
        average.update_parameters(model)
        with torch.no_grad():
            for ours, theirs in zip([*plain.parameters(), *plain.buffers()], [*model.parameters(), *model.buffers()], strict=True):
                ours.copy_(theirs)
        expected.update_parameters(plain)
        assert equal(average.module.state_dict(), expected.module.state_dict())
        assert graphreg.rng_state(average.module) == graphreg.rng_state(model)
        assert graphreg.strengths(average.module) == graphreg.strengths(model)
    average.eval()
    assert torch.equal(average(X), expected.eval()(X)) and not torch.equal(average(X), model.eval()(X))
    module = graphreg.regularize(expected.train().module, **(ASKED | {"penalties": "attach", "hidden_dropout": 0.7}))
    graphreg.set_rng_state(module, graphreg.rng_state(module) | {"call": 3})
    assert torch.equal(average.train()(X), module(X))  # as a teacher with noise


def test_apply_reaches_strengths_and_keys() -> None:
    model, other = graphreg.regularize_(net(), **ASKED), net()
    model(X)
    model.double()
    session = vars(model)["graphreg_in_place"].session
    (graph,) = (reader for reader in session.readers if getattr(reader, "strengths", None))
    assert graph.strengths["weight_l2"].dtype == torch.float64 and session.streams.key.step.dtype == torch.int64
    assert float(graph.strengths["weight_l2"][0]) == graphreg.strengths(model)["weight_l2"]
    module = graphreg.regularize(other.double(), **(ASKED | {"penalties": "attach"}))
    graphreg.set_rng_state(module, graphreg.rng_state(module) | {"call": 1})
    assert torch.equal(model(X.double()), module(X.double()))
    graphreg.set_strength(model, "weight_l2", 0.0)
    model(X.double())
    assert float(model.penalties()["weight_l2"]) == 0  # type: ignore[operator]


# What the public functions do with it


def test_the_public_functions_take_it() -> None:
    model = graphreg.regularize_(net(), **ASKED)
    assert graphreg.strengths(model) == {"hidden_dropout": 0.5, "weight_l2": 0.3, "hidden_l1": 0.1}
    graphreg.set_ranks(model, "same")
    model(X)
    assert "hidden_dropout" in str(graphreg.report(model)) and "relu" in str(graphreg.diff(model))
    assert graphreg.rng_state(model)["ranks"] == "same"
    with graphreg.frozen_noise(model):
        assert torch.equal(model(X), model(X)) and torch.equal(model(X, MASK), model(X, MASK))
    assert graphreg.rng_state(model)["call"] == 2
    with graphreg.noise_on(model):
        assert not torch.equal(model.eval()(X), model(X))
    assert torch.equal(model.eval()(X), model(X))
    assert float(graphreg.sample(model, X, 3, progress=False).spread.sum()) > 0 and not model.training
    with graphreg.monitor(model.train()) as watched:
        model(X)
    assert watched.calls == 1 and watched.values()["penalty/weight_l2"] == pytest.approx(float(model.penalties()["weight_l2"]))  # type: ignore[operator]
    with pytest.raises(NoMatchError, match="no regularizer is named 'weight_l3'. Near names: weight_l2"):
        graphreg.set_strength(model, "weight_l3", 1.0)


def test_draw_and_doctor(tmp_path: Any) -> None:
    model = graphreg.regularize_(net(), **ASKED, example_inputs=X)
    assert "hidden_dropout" in graphreg.draw(model, tmp_path / "net.dot").read_text()
    before = graphreg.rng_state(model)
    assert graphreg.doctor(model, lambda: model(X).sum().backward(), backend="eager", progress=False)
    assert graphreg.rng_state(model) == before


def test_the_state_of_the_noise_can_be_set_before_the_first_trace() -> None:
    model = graphreg.regularize_(net(), BernoulliDropout("body", 0.2, rng=5), **ASKED)
    model(X)
    state = graphreg.rng_state(model)
    assert state["seeds"] == {"": 3, "dropout": 5}
    expected = model(X, MASK)
    other = graphreg.regularize_(net(), BernoulliDropout("body", 0.2, rng=8), **(ASKED | {"rng": 9}))
    other.load_state_dict(model.state_dict())
    graphreg.set_rng_state(other, state)
    with torch.no_grad():
        assert torch.equal(other(X, MASK), expected)
    with pytest.raises(RegularizerError, match="another model: only the state or only the model has a seed of its own for dropout"):
        graphreg.set_rng_state(graphreg.regularize_(net(), **ASKED), state)
    with pytest.raises(RegularizerError, match="the state of a rewritten module is no state of a model that is regularized in place"):
        graphreg.set_rng_state(other, graphreg.rng_state(graphreg.regularize(net(), hidden_dropout=0.1)))


def test_no_noise_to_sample() -> None:
    with pytest.raises(GraphRegError, match="this module draws no noise"):
        graphreg.sample(graphreg.regularize_(net(), weight_l2=0.1), X, 2)


# A model that changes


CHANGES: dict[str, Callable[[Net], Any]] = {
    "a layer is replaced": lambda model: setattr(model, "head", nn.Linear(8, 3)),
    "a constant is set": lambda model: setattr(model, "gain", 3.0),
    "a parameter has another shape": lambda model: (setattr(model.head.weight, "data", torch.ones(3, 8)),
                                                    setattr(model.head.bias, "data", torch.zeros(3))),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_traced_anew(change: Callable[[Net], Any]) -> None:
    model, other = graphreg.regularize_(net(), **ASKED), net()
    model(X)
    Separate(other, **ASKED)(x=X)
    for each in (model, other):
        torch.manual_seed(4)
        change(each)
    separate = Separate(other, **ASKED)
    separate.call = 1
    assert torch.equal(model(X), separate(x=X))


def test_a_change_that_is_undone_needs_no_other_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "info", lambda text, *args: lines.append(text % args))
    model = graphreg.regularize_(net(), **ASKED)
    for gain in (1.0, 2.0, 1.0, 2.0):
        model.gain = gain
        model(X)
    assert lines[3:] == ["traced once more for (x=float32[2]): other values of 'gain'"]


def test_a_failed_trace_is_remembered_until_the_model_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.plain = nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y if self.plain or y.sum() > 0 else -y

    traces = []
    monkeypatch.setattr(placed, "traced_for", lambda model, *args: traces.append(model.plain) or traced_for(model, *args))
    model = graphreg.regularize_(Branches(), output_dropout=0.1, front_end="symbolic", rng=2)

    def error() -> str:
        with pytest.raises(TraceError) as raised:
            model(X)
        return str(raised.value)

    first = error()
    assert error() == first and model.eval()(X).shape == (5, 4) and model.train() is model and error() == first
    assert traces == [False]
    model.plain = True
    assert model(X).shape == model(X).shape == (5, 4)
    assert traces == [False, True] and graphreg.rng_state(model)["call"] == 2
    model.layer = nn.Linear(4, 3)
    assert model(X).shape == (5, 3) and traces == [False, True, True]
    model.plain = False
    assert error() == first and error() == first and traces == [False, True, True, False]


# Hooks and contexts


def test_hooks_of_the_model_run_around_the_graph() -> None:
    model, other, seen = graphreg.regularize_(net(), **ASKED), net(), list[Any]()
    model.register_forward_hook(lambda module, args, output: seen.append(output.shape) or output + 1)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert torch.equal(model(X), Separate(other, **ASKED)(x=X * 2) + 1) and seen == [(5, 2)]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Net()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


def test_a_hook_on_a_module_that_is_not_called_is_refused() -> None:
    model = graphreg.regularize_(Inner(), **ASKED)
    model.block.body.register_forward_hook(lambda *args: None)  # the graph calls it
    model(X)
    handle = model.block.register_forward_hook(lambda *args: None)
    with pytest.raises(GraphRegError, match="block has a hook, and in train mode the model runs as a graph, which contains the operations"):
        model(X)
    assert model.eval()(X).shape == (5, 2)
    handle.remove()
    model.train()(X)


class Point(nn.Module):
    """Computes nothing: a place for hooks, as in TransformerLens."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_hook_on_a_module_that_computes_nothing_is_refused_or_warned_of() -> None:
    """No node of the graph is made in it, but the trace has recorded its call."""
    model = graphreg.regularize_(nn.Sequential(nn.Linear(3, 4), Point(), nn.Linear(4, 2)), **ASKED)
    model(torch.randn(5, 3))
    model[1].register_forward_hook(lambda *args: args[2] * 0)
    with pytest.raises(GraphRegError, match="1 has a hook"):
        model(torch.randn(5, 3))
    rewritten = graphreg.regularize(nn.Sequential(nn.Linear(3, 4), Point(), nn.Linear(4, 2)), weight_l2=0.1)
    rewritten.get_submodule("1").register_forward_hook(lambda *args: args[2] * 0)
    with pytest.warns(UserWarning, match="1 got a hook after graphreg.regularize, and the hook does not run"):
        rewritten(torch.randn(5, 3))


def test_a_layer_with_a_replaced_parameter_is_called_with_its_hooks() -> None:
    """Pruning is such a hook."""
    seen: list[Tensor] = []
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    prune.l1_unstructured(model[0], "weight", 0.5)
    mask = model[0].weight_mask
    model[0].register_forward_hook(lambda layer, args, output: seen.append(layer.weight))
    graphreg.regularize_(model, drop_connect={"strength": 0.4, "pattern": "0.*"}, rng=0)(x).sum().backward()
    (weight,) = seen
    assert (weight[mask == 0] == 0).all() and (weight == 0).sum() >= (mask == 0).sum()
    assert (model[0].weight_orig.grad[mask == 0] == 0).all()


def test_autocast_reaches_the_graph_and_not_the_trace() -> None:
    model, other = graphreg.regularize_(net(), **ASKED), net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(X), Separate(other, **ASKED)(x=X)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    assert model(X).dtype == torch.float32


def test_activation_checkpointing_around_the_model_raises_as_for_a_module() -> None:
    model = graphreg.regularize_(net(), **ASKED)
    loss = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False).sum()
    with pytest.raises(GraphRegError, match="this module runs inside a backward pass"):
        loss.backward()


# What is refused


@pytest.fixture
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Chooses(nn.Module):
    """Its class has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.forward = self.features  # type: ignore[assignment]

    def features(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_what_is_refused_before_anything_changes() -> None:
    model = net()
    model.forward = model.forward  # type: ignore[method-assign]  # as accelerate does
    with pytest.raises(TraceError, match="the forward of this Net was replaced on the object .* Regularize first, prepare after"):
        graphreg.regularize_(model, **ASKED)
    with pytest.raises(TraceError, match="the forward of this Chooses was replaced on the object .* If the class has no forward"):
        graphreg.regularize_(Chooses(), **ASKED)
    with pytest.raises(TraceError, match="Net is regularized in place already. Call graphreg.strip_ on it first"):
        graphreg.regularize_(graphreg.regularize_(net(), **ASKED), **ASKED)
    with pytest.raises(TraceError, match="Net is regularized in place already. Call graphreg.strip_ on it first"):
        graphreg.regularize(graphreg.regularize_(net(), **ASKED), weight_l2=0.1)
    inner = Inner()
    graphreg.regularize_(inner.block, **ASKED)
    with pytest.raises(TraceError, match="the submodule 'block' of Inner is regularized in place already"):
        graphreg.regularize(inner, weight_l2=0.1)
    with pytest.raises(TraceError, match="is a torch.fx.GraphModule, which has a graph already"):
        graphreg.regularize_(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 2))), **ASKED)
    with pytest.raises(TraceError, match="this model is wrapped already .OptimizedModule."):
        graphreg.regularize_(torch.compile(net()), **ASKED)  # type: ignore[type-var]
    with pytest.raises(RegularizerError, match="eval_penalties='yes' is not allowed; give True or False."):
        graphreg.regularize_(net(), eval_penalties="yes", **ASKED)  # type: ignore[arg-type]


def test_a_model_with_penalties_of_its_own() -> None:
    class Own(Net):
        def penalties(self) -> str:
            return "own"

    with pytest.raises(TraceError, match="Own has something called 'penalties'"):
        graphreg.regularize_(Own(), **ASKED)
    model = graphreg.regularize_(Own(), weight_l2=0.1, penalties="return")
    assert model.penalties() == "own" and set(model(X).penalties) == {"weight_l2"}


def test_replicas_are_refused() -> None:
    model = graphreg.regularize_(net(), **ASKED)
    with pytest.raises(GraphRegError, match="nn.DataParallel on several devices calls replicas of it"):
        model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]


def test_a_selector_that_matches_nothing_leaves_the_model_alone() -> None:
    model = net()
    with pytest.raises(NoMatchError, match="'hed' matches no value of Net"):
        graphreg.regularize_(model, HiddenL1("hed", 0.1), scale=1, example_inputs=X)
    assert type(model) is Net and "graphreg_in_place" not in vars(model)
    graphreg.regularize_(model, HiddenL1("hed", 0.1), scale=1)
    with pytest.raises(NoMatchError, match="'hed' matches no value of Net"):
        model(X)


def test_a_site_that_is_gone_since_an_earlier_call() -> None:
    """As after adapters are merged: the message says what has happened, twice, and ``strip_`` is the cure."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))
    x = torch.ones(3, 4)
    graphreg.regularize_(model, HiddenL1("1.0", 0.1), scale=1)(x)
    model[1] = nn.ReLU()
    for _ in range(2):
        with pytest.raises(NoMatchError, match=r"^'1\.0' matches no value .* traces it once more\. If the model .*strip_\(model\)"):
            model(x)
    assert graphreg.strip_(model)(x).shape == (3, 2)


def test_an_unknown_scale_warns_once() -> None:
    model = graphreg.regularize_(net(), weight_l2=0.1)
    with pytest.warns(UserWarning, match="the model returns no loss, so graphreg cannot know how the loss is scaled"):
        model(X)
    model(X, MASK)
    with pytest.raises(RegularizerError, match="scale= is for penalties='attach'"):
        graphreg.regularize_(net(), weight_l2=0.1, penalties="return", scale=1)


def test_verify() -> None:
    model = net()
    graphreg.regularize_(model, **ASKED, example_inputs=(X, MASK), verify=True)
    with pytest.raises(RegularizerError, match="verify=True runs the model, so it needs example_inputs"):
        graphreg.regularize_(net(), **ASKED, verify=True)


def test_the_page() -> None:
    assert type(run_page("in_place.md")["model"]).__name__ == "Net"


def test_other_constants_are_other_structures() -> None:
    """Also those whose hashes are equal, or whose texts are but for a dot or quotes; the text is an attribute's name, without a dot."""
    form = CallForm(inspect.signature(lambda x, k=None: x))
    constants = [
        0, 0.0, False, None, 1, 1.0, True, -1, -2, -1.0, -2.0, 0.5, math.inf, -math.inf, 314159.0, -314159.0, (1 << 61) - 1, 1 << 61,
        1 << 62, -(1 << 61), (), (0,), ((0,),), {}, {1: 2}, {"1": 2}, "", "1", "a.b", "a·b", "a· b", "a·.b", "a.·b", "a··b", "None",
    ]  # fmt: skip
    keys = [form.key((torch.zeros(2, 3),), {"k": constant}) for constant in constants]
    assert len(set(keys)) == len(keys) and not any("." in key for key in keys)
    assert structure_text(form.key((torch.zeros(2, 3),), {"k": "a.·b"})) == "(x=float32[2], k='a.·b')"


def test_a_forward_that_is_replaced_on_a_submodule_is_noticed() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = Inner(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x))

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).relu()

    model, x = graphreg.regularize_(Outer(), weight_l2=0.1, scale=1), torch.randn(3, 4)
    inner: Any = model.inner
    for replacement in (None, lambda x: inner.first(x).tanh(), lambda x: inner.first(x) * 2, None):
        if replacement is None:
            vars(inner).pop("forward", None)
        else:
            inner.forward = replacement
        assert torch.equal(model.train()(x), model.eval()(x))


def test_torchs_own_tools_may_watch_a_call() -> None:
    """They register hooks of all modules, which change no value."""
    model = graphreg.regularize_(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)), weight_l2=0.1, scale=1)
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(torch.ones(3, 4))
    assert counter.get_total_flops() == 2 * 3 * (4 * 4 + 4 * 2)


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hid = nn.Linear(4, 4)

    def forward(self, x: Tensor, /, *more: Tensor, gain: Any = 1.0, **named: Any) -> Tensor:
        return sum((self.hid(each) for each in more), self.hid(x)) * gain + len(named)


def test_arguments_that_only_a_position_or_only_a_name_can_give() -> None:
    model, plain = graphreg.regularize_(Sums(), weight_l2=0.0, scale=1), Sums()
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    calls: Any = [((x,), {"gain": 2.0}), ((x, y), {"gain": y}), ((x, y), {"a": 1, "gain": 3.0}), ((x, y, x), {}), ((x,), {"a": y, "b": x})]
    for args, kwargs in calls * 2:
        assert torch.equal(model(*args, **kwargs), plain(*args, **kwargs))


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hid = nn.Linear(4, 4)

    def forward(self, x: Tensor, gain: Any) -> Any:
        return self.hid(x) * gain


@pytest.mark.parametrize("gain", [numpy.float32(2.5), numpy.float64(2.5), numpy.int64(3)])
def test_a_number_of_numpy_is_an_argument_like_a_number(gain: Any) -> None:
    model, plain, x = graphreg.regularize_(Times(), weight_l2=0.0, scale=1), Times(), torch.randn(3, 4)
    for each in (gain, gain + 1, float(gain)):
        assert torch.equal(model(x, each), plain(x, each))
    with pytest.raises(GraphRegError, match="carry an array that is not a tensor"):
        model(x, numpy.array([2.0]))


def test_a_trace_that_failed_because_of_a_hook_of_all_modules_is_tried_again_without_it() -> None:
    model = graphreg.regularize_(net(), weight_l2=0.1, scale=1)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        for _ in range(2):
            with pytest.raises(GraphRegError, match="a hook is registered for all modules"):
                model(X)
    finally:
        handle.remove()
    assert model(X).shape == (5, 2)
