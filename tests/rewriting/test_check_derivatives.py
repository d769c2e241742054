"""The check bites at derivatives, too: damage to what is tracked, to the copy behind it and to the penalty is found."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

import graphreg
from graphreg.errors import GraphRegError
from graphreg.passes import BernoulliDropout, Contractive, HiddenL1
from graphreg.planning.plan import Plan
from graphreg.tracing.trace import Traced
from lowering_check import check
from test_check import Damage


class Net(nn.Module):
    """A value that is tracked, spliced and then written into, one that is tracked and written into, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        h = torch.tanh(self.a(x) + other)
        h += 1
        k = self.b(h)
        k.mul_(2)
        return self.head(torch.sigmoid(k))


class TwoForms(Net):
    """In eval mode the last site is another."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        h = torch.tanh(self.a(x) + other)
        h += 1
        k = self.b(h)
        k.mul_(2)
        return self.head(torch.sigmoid(k) if self.training else k)


REGULARIZERS = [
    BernoulliDropout(["tanh", "sigmoid"], 0.1), Contractive(["tanh", "sigmoid", "head"], 0.1), HiddenL1("b", 0.1),
    Contractive("head", 0.1, wrt=["tanh", "b"], name="hidden"), Contractive("tanh", 0.1, wrt=["x", "tanh"], clean=True, name="clean"),
]  # fmt: skip


@cache
def planned(kind: type[nn.Module]) -> tuple[Traced, Plan]:
    traced = graphreg.trace(kind())
    return traced, graphreg.plan(traced, REGULARIZERS)


KINDS: list[Callable[[Damage], None]] = []


def kind(function: Callable[[Damage], None]) -> Callable[[Damage], None]:
    KINDS.append(function)
    return function


def penalty(d: Damage) -> fx.Node:
    return d.one(n for n in d.added("total") if len(n.args) == 3)


def put(node: fx.Node, place: int, value: object) -> None:
    node.args = (*node.args[:place], value, *node.args[place + 1 :])


@kind
def nothing_tracked(d: Damage) -> None:
    track = d.one(d.added("track"))
    track.replace_all_uses_with(track.args[0])
    d.graph.erase_node(track)


@kind
def a_penalty_that_differentiates_by_the_value_itself(d: Damage) -> None:
    node = penalty(d)
    name, track = d.one(list(node.args[1].items()))
    put(node, 1, {**node.args[1], name: track.args[0]})


@kind
def a_model_that_reads_past_what_is_tracked(d: Damage) -> None:
    track = d.one(d.added("track"))
    d.one(user for user in track.users if user not in d.added("total")).replace_input_with(track, track.args[0])


@kind
def another_value_tracked(d: Damage) -> None:
    track, other = d.dice.sample(d.added("track"), 2)
    track.args = (
        (other,)
        if d.order[other] < d.order[track]
        else (d.one(n for n in other.graph.nodes if n.op == "placeholder" and n is not track.args[0]),)
    )


@kind
def the_leaf_of_another(d: Damage) -> None:
    one, other = d.dice.sample(d.added("track"), 2)
    one.target = other.target


@kind
def tracked_twice(d: Damage) -> None:
    track = d.one(d.added("track"))
    with d.graph.inserting_after(track):
        more = d.graph.node_copy(track, lambda node: track if node is track.args[0] else node)
    track.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)


@kind
def a_site_left_out(d: Damage) -> None:
    node = penalty(d)
    put(node, 0, {name: value for name, value in node.args[0].items() if name != d.one(list(node.args[0]))})


@kind
def a_value_to_differentiate_by_left_out(d: Damage) -> None:
    node = penalty(d)
    gone = d.one(list(node.args[1]))
    put(node, 1, {name: value for name, value in node.args[1].items() if name != gone})


@kind
def another_value_at_a_site(d: Damage) -> None:
    node = penalty(d)
    name, value = d.one(list(node.args[0].items()))
    put(node, 0, {**node.args[0], name: d.one(n for n in d.graph.nodes if n is not value and d.order.get(n, 0) < d.order[node])})


@kind
def no_key(d: Damage) -> None:
    put(penalty(d), 2, None)


@kind
def the_penalty_of_another(d: Damage) -> None:
    one, other = d.dice.sample([n for n in d.added("total") if len(n.args) == 3], 2)
    one.target = other.target


@kind
def no_copy_before_a_write(d: Damage) -> None:
    kept = d.one(d.added("clone"))
    kept.replace_all_uses_with(kept.args[0])
    d.graph.erase_node(kept)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damage", KINDS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("model", [Net, TwoForms])
def test_damage_is_found(model: type[nn.Module], damage: Callable[[Damage], None], seed: int) -> None:
    traced, plan = planned(model)
    module = graphreg.rewrite(traced, plan, rng=1)
    damage(Damage(module, seed))
    with pytest.raises(GraphRegError, match=r"^a rewritten graph failed its check: "):
        check(module, traced, plan)


@pytest.mark.parametrize("model", [Net, TwoForms])
def test_an_undamaged_module_passes_and_is_stripped(model: type[nn.Module]) -> None:
    traced, plan = planned(model)
    before = {mode: str(graph) for mode, graph in traced.graphs.items()}
    module = graphreg.rewrite(traced, plan, rng=1)
    check(module, traced, plan)
    assert {mode: str(graph) for mode, graph in graphreg.strip(module).graphs.items()} == before
    module(torch.randn(2, 3), torch.randn(2, 4))
