"""The report: what its records say, worked out by hand or measured; what it prints is in docs/report.md."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import graphreg
from graphreg.passes import BernoulliDropout, HiddenL1, RecurrentNorm, WeightL2
from graphreg.reporting.records import Act


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hid, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hid(x).relu())  # type: ignore[no-any-return]


X = torch.randn(5, 4)


def reported(model: nn.Module, *regularizers: Any, cost: bool = False, **keywords: Any) -> graphreg.Report:
    return graphreg.report(graphreg.regularize(model, *regularizers, **keywords), cost=cost)


def test_by_regularizer() -> None:
    report = reported(Net(), HiddenL1(("relu", "hid"), 0.5), weight_l2={"weight": 0.1, "pattern": "out.*"}, example_inputs=X)
    l1, l2 = report.regularizers
    assert (l1.name, l1.type, l1.strength, l1.selector) == ("hidden_l1", "HiddenL1", 0.5, ("relu", "hid"))
    assert (l1.sites, l1.of, l1.share) == (("hid", "relu"), 4, pytest.approx(80 / (20 + 40 + 40 + 10)))  # x, hid, relu, out
    assert (l2.sites, l2.of, l2.share) == (("out.weight",), 4, pytest.approx(16 / (32 + 8 + 16 + 2)))
    assert l1.trains == ("hid.weight", "hid.bias") and l2.trains == ("out.weight",) and report.parameters == 4
    assert l1.penalty and l2.options == {"reduction": "mean"} and l1.options == {}


def test_strengths_are_the_present_ones() -> None:
    module = graphreg.regularize(Net(), hidden_dropout=0.1)
    graphreg.set_strength(module, "hidden_dropout", 0.25)
    report = graphreg.report(module, cost=False)
    assert report.regularizers[0].strength == report.sites[0].acts[0].strength == 0.25
    assert "BernoulliDropout  0.25" in report.text()


def test_frozen_parameters_and_what_no_gradient_reaches() -> None:
    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.hid(x).detach().relu()).relu()  # type: ignore[no-any-return]

    model = Detached()
    model.out.bias.requires_grad_(False)
    found = reported(model, HiddenL1("relu_1", 1.0))
    assert found.regularizers[0].trains == ("out.weight",) and found.regularizers[0].frozen == ("out.bias",)
    assert "hidden_l1: trains out.weight (1 of 4 parameters); frozen: out.bias" in found.text(None)
    model.out.bias.requires_grad_(True)
    assert reported(model, HiddenL1("relu_1", 1.0)).regularizers[0].trains == ("out.weight", "out.bias")


def test_by_site_in_the_order_of_action() -> None:
    report = reported(Net(), [HiddenL1("relu", 0.1), BernoulliDropout("*", 0.2), HiddenL1("relu", 0.3, clean=True)], example_inputs=X)
    (site,) = report.sites
    assert (site.name, site.kind, site.op, site.shape, site.dtype) == ("relu", "value", "relu", (5, 8), "float32")
    assert site.acts == (
        Act("hidden_l1_1", "measures first", 0.3, "relu"), Act("dropout", "replaces", 0.2, "*"), Act("hidden_l1", "measures", 0.1, "relu"),
    )  # fmt: skip
    assert report.regularizers[2].options == {"clean": True}


def test_sites_stand_in_the_order_of_the_graph() -> None:
    report = reported(Net(), [WeightL2("*", 0.1), HiddenL1(("out", "hid"), 0.1), BernoulliDropout("relu", 0.1)])
    assert [site.name for site in report.sites] == ["hid", "relu", "out", "hid.weight", "out.weight"]


def test_what_is_not_known_is_told() -> None:
    report = reported(Net(), hidden_dropout=0.1, cost=True)
    assert report.sites[0].shape is None and report.regularizers[0].share is None and report.cost is None
    told = report.text(None)
    assert "cost: not known, because the model was traced without example inputs" in told
    assert "\nunknown: the model was traced without" in told
    known = reported(Net(), hidden_dropout=0.1, cost=True, example_inputs=X)
    assert known.cost is not None and "unknown" not in known.text(None)
    assert "unknown" not in reported(Net(), weight_l2=0.1).text(None)  # parameters have shapes


def test_the_cost_is_known_with_lengths() -> None:
    """It is computed on shapes alone, where no length can be read."""

    class Padded(Net):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return super().forward(x)

    given = {"example_inputs": (torch.randn(2, 5, X.shape[-1]), torch.tensor([5, 3])), "cost": True}
    report = reported(Padded(), [HiddenL1("relu", 0.1, lengths="lengths")], **given)
    assert report.cost is not None and "not known" not in report.text(None)


def test_strings_that_match_nothing() -> None:
    options: dict[str, Any] = {"missing": "ignore", "own_dropout": {"1": "seeded", "7": "off"}}
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    report = reported(model, BernoulliDropout(("0", "nothing", "!none"), 0.1), HiddenL1(lambda site: False, 0.1), **options)
    assert report.missed == {"dropout": ("nothing", "!none"), "hidden_l1": ("<<lambda>>",), "own_dropout": ("7",)}
    assert "matches nothing: 'nothing' of dropout" in report.text()
    assert graphreg.plan(graphreg.trace(model), BernoulliDropout("0", 0.1)).missed == {}


def test_options_of_penalties_on_sequences_and_derivatives() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.rnn(x)[0].tanh()  # type: ignore[no-any-return]

    report = reported(Reader(), RecurrentNorm("rnn", 1.0, lengths="lengths", norm="l2"))
    assert report.regularizers[0].options == {"norm": "l2", "lengths": "lengths"}
    assert report.notes == ("rnn: GRU, lowered to graphreg::recurrent when compiled",)  # whether it is ever compiled
    found = reported(Net(), contractive={"weight": 0.1, "pattern": "relu", "n": 3}).regularizers[0]
    assert found.options == {"wrt": "*", "estimator": "projection", "n": 3, "always": False}
    assert found.notes == ("with respect to x",) and found.trains == ("hid.weight", "hid.bias")


def test_the_models_own_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout(0.2), nn.Dropout(0.0), nn.Linear(4, 2))
    kept = reported(model)
    assert [(row.site, row.becomes) for row in kept.own_dropout] == [("1", "kept"), ("2", "kept")]  # the third drops nothing
    assert str(kept).startswith("Sequential, traced by the symbolic front end: nothing acts")
    assert "frozen_noise and noise_on do not affect them" in kept.text(None)
    moved = reported(model, own_dropout={"1": 0.3, "2": "off"})
    assert [(row.site, row.becomes, row.matched) for row in moved.own_dropout] == [("1", "seeded at 0.3", "1"), ("2", "off", "2")]
    assert moved.text().startswith("Sequential, traced by the symbolic front end: 2 native dropouts replaced\n")
    assert "kept" not in moved.text()


# ---- cost


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.out = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Linear(144, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.norm(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])  # type: ignore[no-any-return]


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.AlphaDropout(0.2), nn.Linear(8, 2))


CASES: list[tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = [
    (Net, X, {"hidden_dropout": 0.1, "hidden_noise": 0.1, "hidden_l1": 0.1, "weight_l2": 0.1}),
    (Net, X, {"contractive": 0.1, "input_noise": 0.1}),
    (Net, X, {"hidden_l1": 0.1, "penalties": "attach", "scale": 1.0}),
    (InPlace, torch.randn(2, 1, 8, 8), {"dropout": {"norm": 0.1}, "hidden_l1": {"weight": 0.1, "pattern": "norm"}}),
    (Sequences, torch.randn(2, 5, 3), {"recurrent_norm": {"weight": 1.0, "pattern": "rnn"}}),
    (dropping, X, {"own_dropout": "seeded"}),
]


@pytest.mark.parametrize(("make", "x", "keywords"), CASES, ids=["+".join(case[2]) for case in CASES])
def test_the_bytes_kept_are_those_that_autograd_keeps(make: Callable[[], nn.Module], x: Tensor, keywords: dict[str, Any]) -> None:
    module = graphreg.regularize(make(), example_inputs=x, rng=0, **keywords)
    cost = graphreg.report(module).cost
    assert cost is not None
    # The report counts the share of each site's strength; eager code does not multiply by shares that are all 1.
    shares = 4 * len(list(module.parameters())[::2]) if "weight_l2" in keywords else 0
    assert sum(cost.kept.values()) - shares == kept(module, x) - kept(graphreg.strip(module), x)
    assert min(cost.operations.values()) >= 0 and cost.model_operations > 0 and "other" not in cost.kept  # all of it has an owner


def kept(module: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that autograd keeps in a real forward pass, without parameters and buffers."""
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(x)
    there = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for key, tensor in held.items() if key not in there)


def test_operations_by_hand() -> None:
    """[5, 4] times [4, 8]: 2·5·4·8; relu: 40; [5, 8] times [8, 2]: 2·5·8·2. Of the penalty: 40 of abs, 40 of the mean, and numbers."""
    cost = reported(Net(), hidden_l1=0.1, example_inputs=X, cost=True).cost
    assert cost is not None and cost.model_operations == 320 + 40 + 160
    assert 80 <= cost.operations["hidden_l1"] <= 90


def test_the_cost_leaves_the_module_alone() -> None:
    model = InPlace().eval()
    module = graphreg.regularize(model, hidden_dropout=0.1, example_inputs=torch.randn(2, 1, 8, 8), rng=0)
    state, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert graphreg.report(module).cost is not None and not module.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn) and graphreg.rng_state(module)["call"] == 0


calls = 0


class Counts(nn.Module):
    """Is opaque: what it computes depends on a count, which is of no module."""

    def forward(self, x: Tensor) -> Tensor:
        global calls  # noqa: PLW0603
        calls += 1
        return x * calls + torch.rand(())


def test_the_cost_leaves_alone_what_opaque_code_changes_elsewhere() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Linear(4, 4), Counts()), weight_l2=0.1, example_inputs=X, rng=0)
    drawn = torch.get_rng_state()
    assert graphreg.report(module).cost is not None
    assert calls == 0 and torch.equal(torch.get_rng_state(), drawn)
    module(X)
    assert calls == 1


def test_a_model_that_asks_for_values() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(4, 4), Asks(), nn.Linear(4, 2))
    report = reported(model, weight_l2=0.1, cost=True, example_inputs=X)
    assert report.cost is None and report.no_cost.startswith("the model does not run on shapes alone (")


# ---- what it takes


def test_a_plan_that_is_not_applied() -> None:
    model = Net()
    before, drawn = {name: id(p) for name, p in model.named_parameters()}, torch.get_rng_state()
    plan = graphreg.plan(graphreg.trace(model, X), [BernoulliDropout("*", 0.1), WeightL2("*", 0.1)])
    report = graphreg.report(plan)
    assert report.made == "planned and not applied yet" and "graphreg_rules" not in dict(model.named_children())
    assert {name: id(p) for name, p in model.named_parameters()} == before and torch.equal(torch.get_rng_state(), drawn)
    applied = graphreg.report(graphreg.rewrite(graphreg.trace(model, X), plan))
    assert (applied.regularizers, applied.sites, applied.cost) == (report.regularizers, report.sites, report.cost)


def test_through_wrappers() -> None:
    module = graphreg.regularize(Net(), hidden_dropout=0.1, example_inputs=X)
    wrapped = torch.compile(nn.DataParallel(module), backend="eager")
    assert graphreg.report(wrapped) == graphreg.report(torch.compile(module, backend="eager")) == graphreg.report(module)


@pytest.mark.parametrize("given", [Net(), None, 3, "resnet18", Net], ids=["model", "nothing", "number", "name", "class"])
def test_what_it_does_not_take(given: Any) -> None:
    with pytest.raises(graphreg.GraphRegError, match="is not a module that graphreg rewrote. Give what graphreg.regularize returned."):
        graphreg.report(given)


def test_a_plan_without_its_model() -> None:
    module = graphreg.regularize(Net(), hidden_dropout=0.1)
    with pytest.raises(graphreg.GraphRegError, match="has no traced model with it. Give what graphreg.plan"):
        graphreg.report(module.graphreg_rules.build_record.plan)


# ---- what it gives


def test_plain_values() -> None:
    report = reported(Net(), HiddenL1(lambda site: site.name == "relu", 0.1), hidden_dropout=0.1, example_inputs=X, cost=True)
    read = json.loads(report.to_json())
    assert read == json.loads(json.dumps(report.to_dict())) and read["regularizers"][0]["selector"] == ["<<lambda>>"]
    assert read["sites"][0]["acts"][0]["regularizer"] == "hidden_dropout" and set(read["cost"]["kept"]) >= {"hidden_dropout", "hidden_l1"}
    assert "&lt;&lt;lambda&gt;&gt;" in report._repr_html_() and report._repr_html_().count("<table>") == 3


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    report = reported(Net(), hidden_dropout=0.1)
    plain = str(report)
    assert plain == report.text() == repr(report) and "\x1b" not in plain
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1m" in str(report) and report.text() == plain and len(report.text(80).splitlines()) > len(plain.splitlines())
