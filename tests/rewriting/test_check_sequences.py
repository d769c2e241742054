"""The check bites at sequences, too: damage to the measurement of a cell's calls, of a value, and to their lengths is found."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

import graphreg
from graphreg.errors import GraphRegError
from graphreg.passes import BernoulliDropout, HiddenL1, RecurrentNorm, RecurrentState
from graphreg.planning.plan import Plan
from graphreg.tracing.trace import Traced
from lowering_check import check
from test_check import Damage


class Net(nn.Module):
    """A cell called four times, each state with two readers and then written into; a value with a time axis; two inputs of lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor, others: Tensor) -> Tensor:
        h, steps = None, []
        for t in range(4):
            h = self.cell(x[:, t], h)
            steps.append(torch.tanh(h))
            if t == 2:
                h += 1
        return self.head(torch.relu(torch.stack(steps, 1)))


class TwoForms(Net):
    """In eval mode the last call is not made."""

    def forward(self, x: Tensor, lengths: Tensor, others: Tensor) -> Tensor:
        h, steps = None, []
        for t in range(4 if self.training else 3):
            h = self.cell(x[:, t], h)
            steps.append(torch.tanh(h))
            if t == 2:
                h += 1
        return self.head(torch.relu(torch.stack(steps, 1)))


REGULARIZERS = [
    HiddenL1("cell_2", 0.1), RecurrentState("cell", 0.1, lengths="lengths"), BernoulliDropout(["cell", "cell_1"], 0.1),
    RecurrentNorm("cell", 0.1, name="before", clean=True), RecurrentNorm("relu", 0.1, lengths="others"),
    RecurrentState("relu", 0.1, name="plain"),
]  # fmt: skip


@cache
def planned(kind: type[nn.Module]) -> tuple[Traced, Plan]:
    traced = graphreg.trace(kind())
    return traced, graphreg.plan(traced, REGULARIZERS)


KINDS: list[Callable[[Damage], None]] = []


def kind(function: Callable[[Damage], None]) -> Callable[[Damage], None]:
    KINDS.append(function)
    return function


def calls(d: Damage) -> fx.Node:
    """The measurement of a cell's calls."""
    return d.one(n for n in d.added("measure") if isinstance(n.args[0], tuple))


def input_called(d: Damage, name: str) -> fx.Node:
    return next(n for n in d.graph.nodes if n.op == "placeholder" and n.target == name)


def with_lengths(d: Damage) -> fx.Node:
    return d.one(n for n in d.added("measure") if n.kwargs)


@kind
def a_call_left_out(d: Damage) -> None:
    node = calls(d)
    gone = d.one(list(node.args[0]))
    node.args = (tuple(n for n in node.args[0] if n is not gone), *node.args[1:])


@kind
def two_calls_swapped(d: Damage) -> None:
    node = calls(d)
    steps = list(node.args[0])
    i, j = d.dice.sample(range(len(steps)), 2)
    steps[i], steps[j] = steps[j], steps[i]
    node.args = (tuple(steps), *node.args[1:])


@kind
def a_call_twice(d: Damage) -> None:
    node = calls(d)
    node.args = ((*node.args[0], d.one(list(node.args[0]))), *node.args[1:])


@kind
def another_value_in_the_place_of_a_call(d: Damage) -> None:
    node = calls(d)
    gone = d.one(list(node.args[0]))
    node.replace_input_with(gone, d.one(d.earlier(node, gone)))


@kind
def one_call_alone(d: Damage) -> None:
    node = calls(d)
    node.args = (node.args[0][0], *node.args[1:])


@kind
def the_calls_of_no_cell(d: Damage) -> None:
    node = calls(d)
    node.args = ((), *node.args[1:])


@kind
def the_value_as_a_tuple_of_one(d: Damage) -> None:
    node = d.one(n for n in d.added("measure") if isinstance(n.args[0], fx.Node) and "hidden" not in n.name)
    node.args = ((node.args[0],), *node.args[1:])


@kind
def a_spliced_step_read_clean(d: Damage) -> None:
    node = d.one(d.added("measure", "recurrent_state"))
    splice = d.one(n for n in node.args[0] if n in d.added("splice"))
    node.replace_input_with(splice, splice.args[0])


@kind
def a_clean_step_read_spliced(d: Damage) -> None:
    node = d.one(d.added("measure", "before"))
    splice = d.one(n for n in d.added("splice") if n.args[0] in node.args[0])
    node.replace_input_with(splice.args[0], splice)


@kind
def a_written_step_without_its_copy(d: Damage) -> None:
    node = calls(d)
    kept = d.one(n for n in node.args[0] if n in d.added("copy"))
    node.replace_input_with(kept, kept.args[0])


@kind
def no_copy_of_a_written_step(d: Damage) -> None:
    kept = d.one(d.added("copy"))
    kept.replace_all_uses_with(kept.args[0])
    d.graph.erase_node(kept)


@kind
def the_lengths_left_out(d: Damage) -> None:
    node = with_lengths(d)
    node.kwargs = {}


@kind
def the_lengths_of_another(d: Damage) -> None:
    node = with_lengths(d)
    node.kwargs = {"lengths": input_called(d, "others" if node.kwargs["lengths"].target == "lengths" else "lengths")}


@kind
def a_value_for_the_lengths(d: Damage) -> None:
    node = with_lengths(d)
    node.kwargs = {"lengths": node.args[0][0] if isinstance(node.args[0], tuple) else node.args[0]}


@kind
def lengths_that_nobody_asked_for(d: Damage) -> None:
    node = d.one(n for n in d.added("measure") if not n.kwargs)
    node.kwargs = {"lengths": input_called(d, "lengths")}


@kind
def none_for_the_lengths(d: Damage) -> None:
    node = with_lengths(d)
    node.kwargs = {"lengths": None}


@kind
def lengths_by_position(d: Damage) -> None:
    node = with_lengths(d)
    node.args, node.kwargs = (*node.args, node.kwargs["lengths"]), {}


@kind
def an_input_that_a_total_does_not_take(d: Damage) -> None:
    node = d.one(d.added("total"))
    node.kwargs = {**node.kwargs, "lengths": input_called(d, "lengths")}


@kind
def the_leaf_of_another_sequence(d: Damage) -> None:
    node = calls(d)
    node.target = d.one(n.target for n in d.added("measure") if n is not node)


@kind
def a_sequence_that_is_measured_twice(d: Damage) -> None:
    node = calls(d)
    with d.graph.inserting_after(node):
        more = d.graph.node_copy(node)
    total = next(iter(node.users))
    total.args = (*total.args, more)


@kind
def a_sequence_that_is_not_measured(d: Damage) -> None:
    node = calls(d)
    total = next(iter(node.users))
    total.args = ()
    d.graph.erase_node(node)


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
    counts = [len(n.args[0]) for graph in module.graphs.values() for n in graph.nodes if n.name == "cell_recurrent_state"]
    assert counts == ([4] if model is Net else [4, 3])


def test_a_later_measurement_than_the_write_is_found() -> None:
    """The measurement of a value is moved behind the write into it."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            y = h * 2
            return y + h.add_(1)

    traced = graphreg.trace(Late())
    plan = graphreg.plan(traced, RecurrentState("body", 0.1))
    module = graphreg.rewrite(traced, plan)
    kept, write = (next(n for n in module.graph.nodes if n.name == name) for name in ("body_kept", "add_"))
    write.append(kept)
    kept.append(next(n for n in module.graph.nodes if n.name == "body_recurrent_state"))
    with pytest.raises(GraphRegError, match="overwritten"):
        check(module, traced, plan)


def test_a_plan_for_another_model_is_refused() -> None:
    """Also where the first call is there, and a later one is not."""
    _, plan = planned(Net)

    class Shorter(Net):
        def forward(self, x: Tensor, lengths: Tensor, others: Tensor) -> Tensor:
            return self.head(torch.relu(self.cell(x[:, 1], torch.tanh(self.cell(x[:, 0])))))

    with pytest.raises(GraphRegError, match=r"the plan is for Net and names 'cell_\d', which Shorter does not have"):
        graphreg.rewrite(graphreg.trace(Shorter()), plan)
