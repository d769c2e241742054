"""to_networkx: what nodes and edges carry, the three formats there and back, modules as one node, what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

import graphreg
from drawn_nets import GPT, Tagger, TwoForwards
from graphreg import GraphRegError
from graphreg.passes import BernoulliDropout, Contractive, HiddenL1, WeightL2

IDS = torch.zeros(2, 7, dtype=torch.long)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x))


def net(**keywords: Any) -> nn.Module:
    return graphreg.regularize(Net(), example_inputs=torch.ones(5, 3), rng=0, **keywords)


def test_the_whole_of_a_small_graph() -> None:
    graph = graphreg.to_networkx(net(hidden_dropout=0.1, hidden_l1=1e-3, weight_l2={"weight": 1e-4, "pattern": "out.*"}))
    assert {key: (about["kind"], about["op"], about["box"]) for key, about in graph.nodes(data=True)} == {
        "x": ("site", "input", ""),
        "$key": ("addition", "key", ""),
        "body.0": ("site", "Linear", "body"),
        "body.1": ("site", "ReLU", "body"),
        "$body_1_hidden_dropout": ("addition", "BernoulliDropout", "body"),
        "$body_1_hidden_l1": ("addition", "HiddenL1", "body"),
        "out": ("site", "Linear", ""),
        "$hidden_l1": ("addition", "HiddenL1", ""),
        "$out_weight": ("addition", "WeightL2", ""),
        "$weight_l2": ("addition", "WeightL2", ""),
        "$output": ("output", "output", ""),
    }
    assert sorted(graph.edges) == sorted([
        ("x", "body.0"), ("body.0", "body.1"), ("body.1", "$body_1_hidden_dropout"), ("$key", "$body_1_hidden_dropout"),
        ("$body_1_hidden_dropout", "$body_1_hidden_l1"), ("$body_1_hidden_dropout", "out"), ("$body_1_hidden_l1", "$hidden_l1"),
        ("out", "$output"), ("$out_weight", "$weight_l2"), ("$hidden_l1", "$output"), ("$weight_l2", "$output"),
    ])  # fmt: skip
    site = dict(graph.nodes["body.1"])
    assert site.pop("source").startswith("torch/") is False
    assert site == {
        "name": "body.1", "kind": "site", "op": "ReLU", "call": "call_module", "target": "body.1", "module": "body.1", "box": "body",
        "names": "body.1, body", "role": "hidden", "branch": False, "trunk": False, "normed": False, "selectable": True, "why_not": "",
        "module_output": "body.1, body", "acts": "hidden_dropout, hidden_l1", "shape": "5x4", "dtype": "float32",
    }  # fmt: skip
    assert graph.nodes["$body_1_hidden_dropout"] == {
        "name": "body_1_hidden_dropout", "kind": "addition", "added": "splice", "regularizer": "hidden_dropout", "site": "body.1",
        "call": "call_module", "target": "graphreg_rules.body_1_hidden_dropout", "module": "body.1", "box": "body",
        "op": "BernoulliDropout", "strength": 0.1, "shape": "5x4", "dtype": "float32",
    }  # fmt: skip
    assert graph.edges["$body_1_hidden_dropout", "out"] == {
        "argument": "0", "value": "body_1_hidden_dropout", "regularizer": "hidden_dropout", "shape": "5x4", "dtype": "float32",
    }  # fmt: skip
    assert graph.graph == {
        "model": "Net", "forward": "both", "regularizers": "hidden_dropout, hidden_l1, weight_l2", "modules": "body\tSequential",
    }  # fmt: skip


def test_sources_are_lines_of_the_model() -> None:
    graph = graphreg.to_networkx(Net())
    assert "source" not in graph.nodes["$output"]
    with open(__file__) as text:
        lines = text.read().splitlines()
    for key, code in (("x", "def forward(self"), ("out", "self.out(self.body(x))")):
        file, _, line = graph.nodes[key]["source"].rpartition(":")
        assert file.endswith("test_graph.py") and not file.startswith("/") and code in lines[int(line) - 1]


def test_sources_of_an_exported_graph() -> None:
    traced = graphreg.trace(Net(), torch.ones(5, 3), "export")
    assert graphreg.to_networkx(traced).nodes["out"]["source"] == graphreg.to_networkx(Net()).nodes["out"]["source"]


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_no_source_is_the_line_that_asked_for_the_trace(front_end: Any) -> None:
    graph = graphreg.to_networkx(graphreg.trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(2, 3), front_end))
    assert "0" in graph and [about for about in graph.nodes.values() if "source" in about] == []


# There and back


def graphml(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    text = io.BytesIO()
    nx.write_graphml(graph, text)
    return nx.read_graphml(io.BytesIO(text.getvalue()))


def gexf(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    text = io.BytesIO()
    nx.write_gexf(graph, text)
    return nx.read_gexf(io.BytesIO(text.getvalue()))


def node_link(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    return nx.node_link_graph(json.loads(json.dumps(nx.node_link_data(graph, edges="edges"))), edges="edges")


SEEN: dict[str, Callable[[], Any]] = {
    "tagger": lambda: graphreg.regularize(
        Tagger(), BernoulliDropout("*", 0.1), HiddenL1("rnn", 0.1), WeightL2("*", 0.1), example_inputs=IDS, own_dropout="keep"
    ),
    "contractive": lambda: net(contractive={"weight": 0.1, "pattern": "body"}, hidden_dropout=0.2),
    "own": lambda: graphreg.regularize(GPT(1), example_inputs=IDS, own_dropout="seeded"),
    "attached": lambda: net(penalties="attach", scale=1.0, hidden_l1=0.1),
    "plain": lambda: GPT(1),
}


@cache
def seen(name: str, level: int | None) -> nx.DiGraph[str]:
    return graphreg.to_networkx(SEEN[name](), level=level)


@pytest.mark.parametrize("through", [graphml, gexf, node_link])
@pytest.mark.parametrize("name", SEEN)
def test_there_and_back(name: str, through: Callable[[nx.DiGraph[str]], nx.DiGraph[str]]) -> None:
    for level in (None, 1):
        graph = seen(name, level)
        back = through(graph)
        assert len(graph) > 4 and isinstance(back, nx.DiGraph)
        own = {key: {n: v for n, v in about.items() if n != "label"} for key, about in back.nodes(data=True)}  # GEXF's own
        assert own == dict(graph.nodes(data=True))
        edges = {(a, b): {n: v for n, v in about.items() if n != "id"} for a, b, about in back.edges(data=True)}
        assert edges == {(a, b): about for a, b, about in graph.edges(data=True)}


# What is looked at


def test_a_plan_before_it_is_applied() -> None:
    model, draws = Net(), torch.random.get_rng_state()
    traced = graphreg.trace(model, torch.ones(5, 3))
    plan = graphreg.plan(traced, [BernoulliDropout("*", 0.1), Contractive("body", 0.1)])
    before = str(traced.graphs["both"])
    told = graphreg.to_networkx(traced, plan=plan)
    applied = graphreg.to_networkx(graphreg.rewrite(traced, plan, rng=1))
    assert dict(told.nodes(data=True)) == dict(applied.nodes(data=True)) and list(told.edges) == list(applied.edges)
    assert str(traced.graphs["both"]) == before and not hasattr(model, "graphreg_rules")
    assert torch.equal(torch.random.get_rng_state(), draws)


def test_without_additions_it_is_the_models() -> None:
    model = Net()
    bare = graphreg.to_networkx(model, example_inputs=torch.ones(5, 3))
    module = graphreg.regularize(model, example_inputs=torch.ones(5, 3), hidden_dropout=0.1)
    assert dict(graphreg.to_networkx(graphreg.strip(module)).nodes(data=True)) == dict(bare.nodes(data=True))
    assert set(bare) == {key for key, about in graphreg.to_networkx(module).nodes(data=True) if about["kind"] != "addition"}


def test_the_forward_of_each_mode() -> None:
    module = graphreg.regularize(TwoForwards(), hidden_dropout=0.1)
    train, evaluation = graphreg.to_networkx(module), graphreg.to_networkx(module, mode="eval")
    assert (train.graph["forward"], evaluation.graph["forward"]) == ("train", "eval")
    assert "tanh" in train and "tanh" not in evaluation


def test_inside_a_compiled_wrapper() -> None:
    module = net(hidden_dropout=0.1)
    assert set(graphreg.to_networkx(torch.compile(module, backend="eager"))) == set(graphreg.to_networkx(module))


def test_strengths_are_the_present_ones() -> None:
    module = net(hidden_dropout=0.1)
    graphreg.set_strength(module, "hidden_dropout", 0.3)
    assert graphreg.to_networkx(module).nodes["$body_1_hidden_dropout"]["strength"] == 0.3


# Modules as one node


def test_level() -> None:
    module = graphreg.regularize(GPT(3, 4), example_inputs=IDS, rng=0, hidden_dropout=0.1)
    whole, first, second = (graphreg.to_networkx(module, level=level) for level in (None, 1, 2))
    assert set(first) == {"ids", "$key", "wte", "getattr", "getitem", "getattr_1", "arange", "wpe", "add", "h/", "ln_f",
                          "$ln_f_hidden_dropout", "head", "$output"}  # fmt: skip
    inside = [about for about in whole.nodes.values() if f"{about['box']}.".startswith("h.")]
    assert first.nodes["h/"] == {
        "name": "h", "kind": "module", "op": "ModuleList", "module": "h", "box": "", "nodes": len(inside), "acts": "hidden_dropout (12)"
    }  # fmt: skip
    assert [key for key in second if key.endswith("/")] == ["h.0/", "h.1/", "h.2/"]
    block = second.nodes["h.1/"]
    assert (block["op"], block["shape"], block["dtype"]) == ("Block", "2x7x4", "float32")
    assert [edge for edge in second.edges if edge[0].endswith("/")] == [("h.0/", "h.1/"), ("h.1/", "h.2/"), ("h.2/", "ln_f")]
    assert set(graphreg.to_networkx(module, level=9)) == set(whole)


# What is refused

PLAN = graphreg.plan(graphreg.trace(Net()), BernoulliDropout("*", 0.1))


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [
        (3, {}, "int has no graph. Give a model, what graphreg.trace gives, or what regularize returned."),
        ("model.pt", {}, "str has no graph."),
        (Net(), {"level": 0}, "level=0 is not a depth of modules; give a whole number, 1 (the model's own children) or more, or None."),
        (Net(), {"level": -2}, "level=-2 is not a depth"),
        (Net(), {"level": 1.5}, "level=1.5 is not a depth"),
        (Net(), {"level": True}, "level=True is not a depth"),
        (Net(), {"mode": "both"}, "mode='both' is unknown; give 'train' or 'eval'"),
        (Net(), {"plan": "dropout"}, "plan= takes what graphreg.plan gives, not str."),
        (graphreg.trace(Net()), {"example_inputs": 3}, "example_inputs= is for a model that is not traced yet; a trace knows"),
        (PLAN, {"plan": PLAN}, "two plans are given."),
        (replace(PLAN, traced=None), {}, "this plan for Net has no traced model with it."),
        (graphreg.backend(hidden_dropout=0.1), {}, "a backend has several graphs, and they belong to torch.compile."),
    ],
)
def test_refused(given: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GraphRegError) as caught:
        graphreg.to_networkx(given, **options)
    assert str(caught.value).startswith(sentence)


def test_a_plan_is_looked_at_by_itself() -> None:
    assert PLAN.traced is not None
    assert nx.utils.graphs_equal(graphreg.to_networkx(PLAN), graphreg.to_networkx(PLAN.traced, plan=PLAN))


def test_a_plan_on_what_is_rewritten_or_of_another_model() -> None:
    plan = graphreg.plan(graphreg.trace(Net()), BernoulliDropout("*", 0.1))
    with pytest.raises(GraphRegError, match="this module is rewritten already, and plan= goes with a model or a trace"):
        graphreg.to_networkx(net(hidden_dropout=0.1), plan=plan)
    with pytest.raises(GraphRegError, match="the plan is for Net and names 'body.1', which Tagger does not have"):
        graphreg.to_networkx(Tagger(), plan=plan)
