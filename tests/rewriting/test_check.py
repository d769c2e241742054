"""The check bites: every kind of damage to a rewritten module is found, at whatever site; what the rewrite made passes."""

from __future__ import annotations

import copy
import itertools
import operator
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
import torch
import torchvision
from hypothesis import given, reject, settings
from torch import Tensor, fx, nn

import graphreg
from graphreg.errors import GraphRegError
from graphreg.passes import BernoulliDropout, GaussianNoise, HiddenL1, WeightL1, WeightL2
from graphreg.planning.plan import Plan
from graphreg.regularizer.base import Penalty, Regularizer
from graphreg.rewriting.invariants import replaced_by
from graphreg.rewriting.rewrite import Penalties
from graphreg.runtime.result import Regularized
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.tracing.trace import Traced
from lowering_check import check


class Spread(Penalty):
    """All sites at once, so that its total reads the values themselves."""

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        return torch.stack([z.square().mean() for z in values.values()]).max()


class Net(nn.Module):
    """A value with two readers, one that is overwritten, a view of one that is, literals, parameters of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.act = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.ones(1, 8))
        self.offset = nn.Parameter(torch.zeros(1, 8))
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = torch.relu(self.first(x))
        b = self.act(self.second(a))
        c = torch.tanh(torch.sub(b, a, alpha=2))
        d = torch.flatten(self.third(c) * self.scale + self.offset + self.shift, 1)
        return {"logits": self.head(d), "kept": torch.sigmoid(c)}


class TwoForms(Net):
    """Another structure in each mode: two graphs."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        answer = super().forward(x)
        return {**answer, "more": answer["logits"] * 3} if self.training else answer


NET = [
    HiddenL1(["relu", "second", "act", "tanh"], 0.1), BernoulliDropout(["relu", "act", "tanh"], 0.1),
    GaussianNoise(["relu", "act", "tanh"], 0.1), HiddenL1(["relu", "act", "tanh"], 0.1, name="before", clean=True),
    WeightL2("*", 0.1), WeightL1(["scale", "third.weight"], 0.1), Spread(["relu", "act", "tanh"], 0.1, name="spread"),
]  # fmt: skip
RESNET = [
    HiddenL1(["*", "**.bn1"], 0.1), BernoulliDropout("*", 0.1), GaussianNoise("*", 0.1),
    HiddenL1("*", 0.1, name="before", clean=True), WeightL2("*", 0.1), Spread("*", 0.1, name="spread"),
]  # fmt: skip
MODELS: dict[str, tuple[Callable[[], nn.Module], list[Regularizer]]] = {
    "net": (Net, NET),
    "two_forms": (TwoForms, NET),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), RESNET),
}


@cache
def planned(name: str) -> tuple[Traced, Plan]:
    make, regularizers = MODELS[name]
    traced = graphreg.trace(make())
    return traced, graphreg.plan(traced, regularizers)


T = TypeVar("T")


class Damage:
    """One graph of a freshly rewritten module, and the dice that choose where to damage it."""

    def __init__(self, module: RewrittenModule, seed: int) -> None:
        self.module, self.dice = module, random.Random(seed)
        self.graph: fx.Graph = self.dice.choice(list(module.graphs.values()))
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}

    def one(self, candidates: Iterator[T] | list[T]) -> T:
        found = list(candidates)
        assert found, "the model offers no place for this damage"
        return self.dice.choice(found)

    def added(self, kind: str, name: str | None = None) -> list[fx.Node]:
        marks = [(node, node.meta.get("graphreg", {})) for node in self.graph.nodes]
        return [node for node, mark in marks if mark.get("kind") == kind and name in (None, mark.get("regularizer"))]

    def own(self) -> list[fx.Node]:
        """The model's own operations, without inputs, reads and the output."""
        return [n for n in self.graph.nodes if "graphreg" not in n.meta and n.op not in ("placeholder", "get_attr", "output")]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if "graphreg" not in user.meta]

    def original(self, node: fx.Node) -> fx.Node:
        """The model's value that a node stands for."""
        while "graphreg" in node.meta and (value := replaced_by(node)) is not None:
            node = value
        return node

    def earlier(self, node: fx.Node, than: fx.Node) -> list[fx.Node]:
        """Other values of the model that ``node`` could have read in place of ``than``."""
        return [n for n in self.own() if self.order[n] < self.order[node] and n is not self.original(than)]

    def total(self, name: str | None = None) -> fx.Node:
        return self.one(n for n in self.added("total", name) if name or self.measurements(n))

    def measurements(self, total: fx.Node) -> list[fx.Node]:
        return [n for n in total.all_input_nodes if n.meta.get("graphreg", {}).get("kind") == "measure"]

    def returns(self, output: object, penalties: dict[str, fx.Node]) -> None:
        self.graph.output_node().args = (Regularized(output, penalties),)

    @property
    def answer(self) -> Regularized:
        answer = self.graph.output_node().args[0]
        assert isinstance(answer, Regularized)
        return answer


KINDS: dict[str, Callable[[Damage], None]] = {}


def kind(function: Callable[[Damage], None]) -> Callable[[Damage], None]:
    KINDS[function.__name__] = function
    return function


# --- splices -----------------------------------------------------------------------------------------------------


@kind
def splice_bypassed_by_one_consumer(d: Damage) -> None:
    splice = d.one(n for n in d.added("splice") if d.readers(n))
    d.one(d.readers(splice)).replace_input_with(splice, splice.args[0])


@kind
def splice_bypassed_by_all_consumers(d: Damage) -> None:
    splice = d.one(n for n in d.added("splice") if d.readers(n))
    splice.replace_all_uses_with(splice.args[0])


@kind
def splice_removed(d: Damage) -> None:
    splice = d.one(d.added("splice"))
    splice.replace_all_uses_with(splice.args[0])
    d.graph.erase_node(splice)


@kind
def two_splices_at_a_site_swapped(d: Damage) -> None:
    second = d.one(n for n in d.added("splice") if n.args[0] in d.added("splice"))
    first = second.args[0]
    first.target, second.target = second.target, first.target
    first.meta["graphreg"], second.meta["graphreg"] = second.meta["graphreg"], first.meta["graphreg"]


@kind
def splice_without_the_key(d: Damage) -> None:
    splice = d.one(d.added("splice"))
    splice.args = splice.args[:1]


@kind
def splice_with_another_key(d: Damage) -> None:
    splice, key = d.one(d.added("splice")), d.one(d.added("key"))
    with d.graph.inserting_after(key):
        other = d.graph.node_copy(key)
    splice.args = (splice.args[0], other)


@kind
def splice_with_a_value_as_key(d: Damage) -> None:
    splice = d.one(d.added("splice"))
    splice.args = (splice.args[0], splice.args[0])


@kind
def splice_runs_another_sites_leaf(d: Damage) -> None:
    splice = d.one(d.added("splice"))
    splice.target = d.one(n.target for n in d.added("splice") if n is not splice)


@kind
def key_is_another_leaf(d: Damage) -> None:
    d.one(d.added("key")).target = d.one(d.added("total")).target


# --- penalties ---------------------------------------------------------------------------------------------------


@kind
def measurement_detached_from_its_total(d: Damage) -> None:
    total = d.total()
    gone = d.one(d.measurements(total))
    total.args = tuple(n for n in total.args if n is not gone)


@kind
def measurement_dropped(d: Damage) -> None:
    total = d.total()
    gone = d.one(d.measurements(total))
    total.args = tuple(n for n in total.args if n is not gone)
    d.graph.erase_node(gone)


@kind
def measurement_twice_in_its_total(d: Damage) -> None:
    total = d.total()
    total.args = (*total.args, d.one(d.measurements(total)))


@kind
def measurement_in_the_place_of_another(d: Damage) -> None:
    total = d.total()
    first, second = d.dice.sample(d.measurements(total), 2)
    total.replace_input_with(first, second)


@kind
def measurement_of_another_penalty(d: Damage) -> None:
    total, other = d.total("hidden_l1"), d.total("before")
    total.replace_input_with(d.one(d.measurements(total)), d.one(d.measurements(other)))


@kind
def measurement_moved_to_another_site(d: Damage) -> None:
    measure = d.one(n for n in d.added("measure") if d.earlier(n, n.args[0]))
    measure.args = (d.one(d.earlier(measure, measure.args[0])),)


@kind
def measurement_by_another_leaf(d: Damage) -> None:
    measure = d.one(d.added("measure", "before"))
    measure.target = d.one(d.added("measure", "hidden_l1")).target


@kind
def penalty_reads_the_unspliced_value(d: Damage) -> None:
    measure = d.one(n for n in d.added("measure", "hidden_l1") if n.args[0] in d.added("splice"))
    measure.args = (d.original(measure.args[0]),)


@kind
def clean_penalty_reads_the_spliced_value(d: Damage) -> None:
    measure = d.one(n for n in d.added("measure", "before") if any(u in d.added("splice") for u in n.args[0].users))
    splice = d.one(u for u in measure.args[0].users if u in d.added("splice"))
    splice.append(measure)
    measure.args = (splice,)


@kind
def measurement_after_the_value_is_overwritten(d: Damage) -> None:
    measure = d.one(n for n in d.added("measure") if n.args[0] in d.added("copy"))
    copy = measure.args[0]
    value = copy.args[0]
    copy.replace_all_uses_with(value)
    d.graph.erase_node(copy)
    list(d.readers(value))[-1].append(measure)


@kind
def total_missing_from_the_output(d: Damage) -> None:
    name = d.one(list(d.answer.penalties))
    d.returns(d.answer.output, {n: v for n, v in d.answer.penalties.items() if n != name})


@kind
def totals_swapped_in_the_output(d: Damage) -> None:
    first, second = d.dice.sample(list(d.answer.penalties), 2)
    totals = dict(d.answer.penalties)
    totals[first], totals[second] = totals[second], totals[first]
    d.returns(d.answer.output, totals)


@kind
def total_by_another_leaf(d: Damage) -> None:
    total = d.one(d.added("total"))
    total.target = d.one(n.target for n in d.added("total") if n is not total)


@kind
def penalties_not_returned(d: Damage) -> None:
    d.graph.output_node().args = (d.answer.output,)


@kind
def parameter_read_points_elsewhere(d: Damage) -> None:
    read = d.one(d.added("read"))
    read.target = d.one(n.target for n in d.added("read") if n.target != read.target)


@kind
def parameter_read_dropped(d: Damage) -> None:
    read = d.one(d.added("read", "weight_l2"))
    total = d.total("weight_l2")
    total.args = tuple(n for n in total.args if n is not read)
    d.graph.erase_node(read)


@kind
def penalty_of_all_sites_misses_one(d: Damage) -> None:
    total = d.total("spread")
    gone = d.one(list(total.args[0]))
    total.args = ({site: n for site, n in total.args[0].items() if site != gone},)


@kind
def penalty_of_all_sites_calls_two_by_each_others_name(d: Damage) -> None:
    total = d.total("spread")
    values = dict(total.args[0])
    first, second = d.dice.sample(list(values), 2)
    values[first], values[second] = values[second], values[first]
    total.args = (values,)


@kind
def penalty_of_all_sites_reads_the_unspliced_value(d: Damage) -> None:
    total = d.total("spread")
    value = d.one(n for n in total.all_input_nodes if n in d.added("splice"))
    total.replace_input_with(value, d.original(value))


# --- the model's own ---------------------------------------------------------------------------------------------


@kind
def operation_reads_another_value(d: Damage) -> None:
    node = d.one(n for n in d.own() if n.all_input_nodes and d.earlier(n, n.all_input_nodes[0]))
    value = node.all_input_nodes[0]
    node.replace_input_with(value, d.one(d.earlier(node, value)))


@kind
def operation_dropped(d: Damage) -> None:
    node = d.one(n for n in d.own() if n.all_input_nodes)
    node.replace_all_uses_with(node.all_input_nodes[0])
    d.graph.erase_node(node)


@kind
def operation_added(d: Damage) -> None:
    node = d.one(d.own())
    with d.graph.inserting_after(node):
        more = d.graph.call_function(torch.neg, (node,))
    node.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)


@kind
def operation_replaced(d: Damage) -> None:
    node = d.one(n for n in d.own() if n.op == "call_module")
    node.target = d.one(n.target for n in d.own() if n.op == "call_module" and n.target != node.target)


@kind
def arguments_swapped(d: Damage) -> None:
    node = d.one(n for n in d.own() if len(n.args) > 1 and all(isinstance(a, fx.Node) for a in n.args[:2]))
    node.args = (node.args[1], node.args[0], *node.args[2:])


@kind
def literal_changed(d: Damage) -> None:
    node = d.one(n for n in d.own() if any(type(a) is int for a in (*n.args, *n.kwargs.values())))
    node.args = tuple(a + 1 if type(a) is int else a for a in node.args)
    node.kwargs = {k: a + 1 if type(a) is int else a for k, a in node.kwargs.items()}


@kind
def literal_of_another_type(d: Damage) -> None:
    node = d.one(n for n in d.own() if any(type(a) is int for a in (*n.args, *n.kwargs.values())))
    node.args = tuple(float(a) if type(a) is int else a for a in node.args)
    node.kwargs = {k: float(a) if type(a) is int else a for k, a in node.kwargs.items()}


@kind
def argument_given_by_keyword(d: Damage) -> None:
    """The same leaves in the same order, and another call."""
    node = d.one(n for n in d.own() if len(n.args) > 1 and not n.kwargs)
    node.args, node.kwargs = node.args[:-1], {"unheard_of": node.args[-1]}


@kind
def clone_removed(d: Damage) -> None:
    clone = d.one([*d.added("clone"), *d.added("copy")])
    clone.replace_all_uses_with(clone.args[0])
    d.graph.erase_node(clone)


@kind
def clone_computes_something(d: Damage) -> None:
    d.one([*d.added("clone"), *d.added("copy")]).target = torch.neg


@kind
def output_wrapped(d: Damage) -> None:
    d.returns((d.answer.output,), d.answer.penalties)


@kind
def output_has_a_part_more(d: Damage) -> None:
    d.returns((d.answer.output, d.one(d.own())), d.answer.penalties)


@kind
def output_is_another_value(d: Damage) -> None:
    output = d.graph.output_node()
    value = d.answer.output if isinstance(d.answer.output, fx.Node) else d.one(list(d.answer.output.values()))
    output.replace_input_with(value, d.one(d.earlier(output, value)))


@kind
def submodule_replaced(d: Damage) -> None:
    name = d.one(n for n in d.module._modules if n != "graphreg_rules")
    setattr(d.module, name, copy.deepcopy(getattr(d.module, name)))


@kind
def submodule_lost(d: Damage) -> None:
    del d.module._modules[d.one(n for n in d.module._modules if n != "graphreg_rules")]


@kind
def parameter_added(d: Damage) -> None:
    d.module.__dict__["_parameters"] = {**d.module._parameters, "strange": nn.Parameter(torch.zeros(2))}


@kind
def node_name_doubled(d: Damage) -> None:
    first, second = d.dice.sample([*d.graph.nodes], 2)
    second.name = first.name


# --- additions that nobody planned -------------------------------------------------------------------------------


@kind
def splice_copied_to_another_value(d: Damage) -> None:
    splice = d.one(d.added("splice"))
    planned_there = {d.original(n) for n in d.added("splice")}
    value = d.one(n for n in d.own() if n not in planned_there and d.order[n] > d.order[splice] and d.readers(n))
    with d.graph.inserting_after(value):
        more = d.graph.create_node("call_module", splice.target, (value, splice.args[1]))
    more.meta["graphreg"] = {**splice.meta["graphreg"], "site": value.name}
    value.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)


@kind
def splice_done_twice(d: Damage) -> None:
    splice = d.one(d.added("splice"))
    with d.graph.inserting_after(splice):
        more = d.graph.node_copy(splice)
    splice.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
    more.args = (splice, splice.args[1])


@kind
def penalty_that_nobody_asked_for(d: Damage) -> None:
    total = d.total()
    with d.graph.inserting_after(total):
        more = d.graph.node_copy(total)
    more.meta["graphreg"] = {"kind": "total", "regularizer": "unasked"}
    d.returns(d.answer.output, {**d.answer.penalties, "unasked": more})


@kind
def clone_that_nobody_needs(d: Damage) -> None:
    value = d.one(n for n in d.own() if d.readers(n) and not any(u in d.added("clone") for u in n.users))
    with d.graph.inserting_after(value):
        more = d.graph.call_function(torch.clone, (value,))
    more.meta["graphreg"] = {"kind": "clone", "site": value.name}
    d.one(d.readers(value)).replace_input_with(value, more)


SMALL = ("net", "two_forms")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("model", SMALL)
def test_damage_is_found(model: str, name: str, seed: int) -> None:
    finds(model, KINDS[name], seed)


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_found_in_resnet18(name: str) -> None:
    finds("resnet18", KINDS[name], 0)


def finds(model: str, damage: Callable[[Damage], None], seed: int) -> None:
    traced, plan = planned(model)
    module = graphreg.rewrite(traced, plan, rng=1)
    damage(Damage(module, seed))
    with pytest.raises(GraphRegError, match=r"^a rewritten graph failed its check: "):
        check(module, traced, plan)


# --- damage that needs a model or a form of its own --------------------------------------------------------------


def net() -> tuple[RewrittenModule, Traced, Plan]:
    traced, plan = planned("net")
    return graphreg.rewrite(traced, plan, rng=1), traced, plan


@pytest.mark.parametrize("name", ["scale", "offset"])
def test_a_replaced_parameter_is_found(name: str) -> None:
    module, traced, plan = net()
    module.__dict__["_parameters"] = {**module._parameters, name: nn.Parameter(module._parameters[name].detach().clone())}
    with pytest.raises(GraphRegError, match="parameter"):
        check(module, traced, plan)


def test_a_replaced_buffer_is_found() -> None:
    module, traced, plan = net()
    module.__dict__["_buffers"] = {"shift": module._buffers["shift"].clone()}
    with pytest.raises(GraphRegError, match="buffer"):
        check(module, traced, plan)


def test_a_renamed_key_of_the_output_is_found() -> None:
    module, traced, plan = net()
    d = Damage(module, 0)
    d.returns({"renamed": d.answer.output["logits"], "kept": d.answer.output["kept"]}, d.answer.penalties)
    with pytest.raises(GraphRegError, match="failed its check"):
        check(module, traced, plan)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.a(x), self.b(x)), x


@pytest.mark.parametrize(
    "form", [lambda a, b, x: (a, (b, x)), lambda a, b, x: ([a, b], x), lambda a, b, x: (a, b, x), lambda a, b, x: {"0": (a, b), "1": x}],
    ids=["nested elsewhere", "list for tuple", "flat", "dict"],
)  # fmt: skip
def test_another_structure_of_the_output_is_found(form: Callable[..., object]) -> None:
    traced = graphreg.trace(Nested())
    plan = graphreg.plan(traced, WeightL2("*", 0.1))
    module = graphreg.rewrite(traced, plan)
    d = Damage(module, 0)
    (a, b), x = d.answer.output
    d.returns(form(a, b, x), d.answer.penalties)
    with pytest.raises(GraphRegError, match="failed its check"):
        check(module, traced, plan)


class Overwritten(nn.Module):
    """A view, whose base is written into before the view is read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        seen = torch.tanh(h)
        view = h.view(-1, 4)
        h.add_(1)
        return self.head(view + seen)


def test_a_measurement_after_a_write_through_the_base_is_found() -> None:
    traced = graphreg.trace(Overwritten())
    plan = graphreg.plan(traced, HiddenL1("view", 0.1))
    module = graphreg.rewrite(traced, plan)
    copy = next(n for n in module.graph.nodes if n.name == "view_kept")
    next(n for n in module.graph.nodes if n.name == "add_").append(copy)
    copy.append(next(n for n in module.graph.nodes if n.name == "view_hidden_l1"))
    with pytest.raises(GraphRegError, match="overwritten"):
        check(module, traced, plan)


def attached() -> tuple[RewrittenModule, Traced, Plan]:
    traced, plan = planned("net")
    return graphreg.rewrite(traced, plan, rng=1, penalties="attach", scale=1.0), traced, plan


def mix_attached(graph: fx.Graph) -> None:
    first, second = [n for n in graph.nodes if n.meta.get("graphreg", {}).get("kind") == "attached"]
    first.args, second.args = second.args, first.args


def pass_attached_by(graph: fx.Graph) -> None:
    item = next(n for n in graph.nodes if n.meta.get("graphreg", {}).get("kind") == "attached")
    item.replace_all_uses_with(replaced_by(item))


def leave_a_total_out(graph: fx.Graph) -> None:
    attach = next(n for n in graph.nodes if n.meta.get("graphreg", {}).get("kind") == "attach")
    attach.args = (attach.args[0], attach.args[1][1:])


def swap_attached_totals(graph: fx.Graph) -> None:
    attach = next(n for n in graph.nodes if n.meta.get("graphreg", {}).get("kind") == "attach")
    attach.args = (attach.args[0], attach.args[1][::-1])


def attach_a_total_twice(graph: fx.Graph) -> None:
    attach = next(n for n in graph.nodes if n.meta.get("graphreg", {}).get("kind") == "attach")
    attach.args = (attach.args[0], (*attach.args[1], attach.args[1][0]))


@pytest.mark.parametrize("damage", [mix_attached, pass_attached_by, leave_a_total_out, swap_attached_totals, attach_a_total_twice])
def test_damage_to_attached_penalties_is_found(damage: Callable[[fx.Graph], None]) -> None:
    module, traced, plan = attached()
    check(module, traced, plan)
    damage(module.graph)
    with pytest.raises(GraphRegError, match="failed its check"):
        check(module, traced, plan)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_damage_to_one_of_two_graphs_is_found(mode: str) -> None:
    traced, plan = planned("two_forms")
    module = graphreg.rewrite(traced, plan, rng=1)
    assert list(module.graphs) == ["train", "eval"]
    node = next(n for n in module.graphs[mode].nodes if n.target is operator.mul)
    node.args = (node.args[1], node.args[0])
    with pytest.raises(GraphRegError, match="does not read what it read"):
        check(module, traced, plan)


def test_a_plan_for_another_set_of_sites_is_found() -> None:
    traced, plan = planned("net")
    less = graphreg.plan(traced, NET[1:])
    with pytest.raises(GraphRegError, match="failed its check"):
        check(graphreg.rewrite(traced, plan), traced, less)
    with pytest.raises(GraphRegError, match="failed its check"):
        check(graphreg.rewrite(traced, less), traced, plan)


# --- and what the rewrite made passes ----------------------------------------------------------------------------


@pytest.mark.parametrize("penalties", ["return", "attach"])
@pytest.mark.parametrize("model", MODELS)
def test_an_undamaged_module_passes(model: str, penalties: Penalties) -> None:
    traced, plan = planned(model)
    before = {mode: str(graph) for mode, graph in traced.graphs.items()}
    module = graphreg.rewrite(traced, plan, rng=1, penalties=penalties, scale=1.0 if penalties == "attach" else None)
    after = {mode: str(graph) for mode, graph in module.graphs.items()}
    check(module, traced, plan)
    assert {mode: str(graph) for mode, graph in module.graphs.items()} == after  # it looks and never touches
    assert {mode: str(graph) for mode, graph in traced.graphs.items()} == before
    assert {mode: str(graph) for mode, graph in graphreg.strip(module).graphs.items()} == before


def test_regularizers_at_overlapping_sites_in_any_order() -> None:
    """The sites of the first regularizer are not the first sites of the second."""
    traced = graphreg.trace(Net())
    for names in itertools.permutations(["relu", "second", "act"], 2):
        plan = graphreg.plan(traced, [BernoulliDropout(list(names), 0.1), HiddenL1(["relu", "second", "act"], 0.1)])
        check(graphreg.rewrite(traced, plan), traced, plan)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 5), "relu": nn.ReLU, "relu_in_place": lambda: nn.ReLU(inplace=True), "tanh": nn.Tanh,
    "norm": lambda: nn.LayerNorm(5), "batch_norm": lambda: nn.BatchNorm1d(5), "dropout": lambda: nn.Dropout(0.3),
    "identity": nn.Identity,
}  # fmt: skip


class Random(nn.Module):
    """Layers in a row; with some of them, a sum with an earlier value or a write in place."""

    def __init__(self, rows: list[tuple[str, str]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[name]() for name, _ in rows)
        self.then = [then for _, then in rows]
        self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = x = self.body(x)
        for layer, then in zip(self.layers, self.then, strict=True):
            x = layer(x)
            if then == "add":
                x = x + kept
            elif then == "write":
                x = x * 1.5
                x += 0.25
            elif then == "keep":
                kept = torch.tanh(x)
        return self.head(x), kept


rows = st.lists(st.tuples(st.sampled_from(sorted(LAYERS)), st.sampled_from(["", "", "add", "write", "keep"])), min_size=2, max_size=6)
kinds = st.lists(
    st.tuples(
        st.sampled_from([BernoulliDropout, GaussianNoise, HiddenL1, WeightL2, WeightL1, Spread]),
        st.lists(st.integers(0, 12), min_size=1, max_size=4), st.booleans(), st.floats(0, 0.9),
    ),
    min_size=2, max_size=5,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* (in a row|one after another) on one value:UserWarning")
@settings(max_examples=12)
@given(rows, kinds)
def test_contraction_gives_the_model_back(rows: list[tuple[str, str]], kinds: list[Any]) -> None:
    torch.manual_seed(0)
    model = Random(rows)
    traced = graphreg.trace(model, torch.zeros(4, 5))
    plan = graphreg.plan(traced, [chosen(traced, *each) for each in kinds])
    try:
        module = graphreg.rewrite(traced, plan, rng=0)  # checks itself
    except GraphRegError as error:  # a splice into a value that is written by another name may be refused
        assert "failed its check" not in str(error)
        reject()
    assert contracted(module.graph) == contracted(traced.graphs["both"])
    assert str(graphreg.strip(module).graph) == str(traced.graphs["both"])
    original, x = copy.deepcopy(model).eval(), torch.randn(4, 5)
    for ours, theirs in zip(module.eval()(x).output, original(x), strict=True):
        assert torch.equal(ours, theirs)
    names = [name for name, r in plan.regularizers.items() if isinstance(r, Penalty)]
    assert list(module.train()(x).penalties) == names


def chosen(traced: Traced, cls: type[Regularizer], places: list[int], clean: bool, weight: float) -> Regularizer:
    """A regularizer at some of the sites it may act on; a penalty not at the input, where it would train nothing."""
    if cls.on == "parameters":
        sites = [site.name for site in traced.parameters if len(site.shape or ()) >= 2]
    else:
        sites = [site.name for site in traced.values if site.selectable and (site.used or issubclass(cls, Penalty))]
        sites = sites[1:] if issubclass(cls, Penalty) else sites
    return cls(
        [sites[i % len(sites)] for i in places], weight, **({"clean": clean} if issubclass(cls, Penalty) and cls.on == "values" else {})
    )


def contracted(graph: fx.Graph) -> list[tuple[object, ...]]:
    """The graph without its additions, each operation as text, each argument by the place of what it stands for."""
    place: dict[fx.Node, int] = {}
    rows: list[tuple[object, ...]] = []
    for node in graph.nodes:
        if "graphreg" in node.meta:
            if node.meta["graphreg"]["kind"] in ("splice", "clone"):
                place[node] = place[node.args[0]]
            continue
        place[node] = len(rows)
        answer = node.args[0] if node.op == "output" else None
        args = (answer.output,) if isinstance(answer, Regularized) else node.args
        placed = fx.node.map_arg((args, node.kwargs), lambda n: f"%{place[n]}")
        rows.append((node.op, node.target, *placed))
    return rows


class Times(nn.Module):
    def __init__(self, number: complex) -> None:
        super().__init__()
        self.lin, self.number = nn.Linear(3, 3), number

    def forward(self, x: Tensor) -> Tensor:
        return (self.lin(x) * self.number).abs()


@pytest.mark.parametrize("number", [float("nan"), complex("nan")])
def test_a_constant_that_is_nan_equals_itself(number: complex) -> None:
    assert graphreg.regularize(Times(number), dropout={"lin": 0.5})(torch.ones(2, 3)).output.isnan().all()


@pytest.mark.parametrize("part", ["nan", "inf"])
def test_a_number_that_code_cannot_write_is_refused(part: str) -> None:
    with pytest.raises(graphreg.TraceError, match=rf"cannot have the number \(1\+{part}j\); make it a tensor, in a buffer"):
        graphreg.regularize(Times(complex(1, float(part))), dropout={"lin": 0.5})
