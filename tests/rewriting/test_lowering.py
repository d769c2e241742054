"""What a plan comes to in a traced graph: the list of insertions, as text; and that it is made in one walk as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphreg
from graphreg import Penalty, Regularizer, TraceError
from graphreg.ir.metadata import Kind
from graphreg.ir.operations import nodes_in
from graphreg.passes import BernoulliDropout, Contractive, GaussianNoise, HiddenL1, RecurrentNorm, WeightL2
from graphreg.rewriting.insertions import Insertion, Insertions, Position
from graphreg.rewriting.instantiate import runtime_module_names
from graphreg.rewriting.plan_lowering import lower
from graphreg.rewriting.rewrite import inserted
from graphreg.torch_internals.fx import define_named_tuples

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))  # type: ignore[no-any-return]


class Written(nn.Module):
    """It writes into what its layer gives, after reading it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        y = h * 2
        h.add_(1)
        return h + y  # type: ignore[no-any-return]


class Given(nn.Module):
    """It writes into what it is given, which the caller sees."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return x + y


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, self.cell(x))  # type: ignore[no-any-return]


class Dropped(nn.Module):
    """Its argument has the name that the keys would have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, key: Tensor) -> Tensor:
        return self.drop(self.fc(key).relu())  # type: ignore[no-any-return]


class Together(Penalty, keys=("together_in_a_list",)):
    """It takes all values at once."""

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        return torch.stack([value.abs().mean() for value in values.values()]).mean()


def lowered(model: nn.Module, *regularizers: Regularizer, inputs: tuple[Tensor, ...] = (X,), own: Any = "keep", **more: Any) -> Insertions:
    traced = graphreg.trace(model, inputs)
    plan = graphreg.plan(traced, regularizers, own_dropout=own)
    (graph,) = traced.graphs.values()
    before = graph.python_code("self").src
    found = lower(graph, traced, plan, runtime_module_names(plan), **more)
    assert graph.python_code("self").src == before  # it looks and never touches
    _holds_together(graph, found)
    return found


def _holds_together(graph: fx.Graph, insertions: Insertions) -> None:
    """Names are free; an insertion reads nodes of the traced graph, and insertions that come before it in the list."""
    nodes, seen = {node.name for node in graph.nodes}, set[Insertion]()
    for each in insertions:
        assert each.anchor.graph is graph and all(node.graph is graph for node in nodes_in((each.args, dict(each.kwargs))))
        assert (each.name in nodes) == (each.position is Position.INSTEAD)
        read = [*each.args, *each.kwargs.values()]
        while read:
            arg = read.pop()
            assert not isinstance(arg, Insertion) or arg in seen
            read += arg if isinstance(arg, tuple) else arg.values() if isinstance(arg, dict) else ()
        seen.add(each)
    assert len({each.name for each in insertions}) == len(insertions)


# The lists


LISTS: dict[str, tuple[Callable[[], Insertions], str]] = {
    "clean measurements, splices, measurements at a site; totals and reads at the end": (
        lambda: lowered(
            Net(), BernoulliDropout("relu", 0.1), HiddenL1(["relu", "fc"], 0.1), HiddenL1("relu", 0.1, clean=True),
            WeightL2("fc.weight", 0.1),
        ),
        """\
after x: key key = graphreg_rules.key()
after fc: measure fc_hidden_l1 = graphreg_rules.fc_hidden_l1(fc)
after relu: measure relu_hidden_l1_1 = graphreg_rules.relu_hidden_l1_1(relu)
after relu: splice relu_dropout = graphreg_rules.relu_dropout(relu, key), replaces relu
after relu: measure relu_hidden_l1 = graphreg_rules.relu_hidden_l1(relu_dropout)
before output: total hidden_l1 = graphreg_rules.hidden_l1(fc_hidden_l1, relu_hidden_l1)
before output: total hidden_l1_1 = graphreg_rules.hidden_l1_1(relu_hidden_l1_1)
before output: read fc_weight = fc.weight
before output: total weight_l2 = graphreg_rules.weight_l2(fc_weight)""",
    ),
    "penalties that are attached: the output alone reads them": (
        lambda: lowered(Net(), HiddenL1("relu", 0.1), penalties="attach"),
        """\
after relu: measure relu_hidden_l1 = graphreg_rules.relu_hidden_l1(relu)
before output: total hidden_l1 = graphreg_rules.hidden_l1(relu_hidden_l1)
before output: attach attach = graphreg_rules.attach((out,), (hidden_l1,), False)
before output: attached out_attached = getitem(attach, 0), replaces out for output""",
    ),
    "attached to what a splice made of the output": (
        lambda: lowered(Net(), GaussianNoise("out", 0.1), HiddenL1("relu", 0.1), penalties="attach"),
        """\
after x: key key = graphreg_rules.key()
after relu: measure relu_hidden_l1 = graphreg_rules.relu_hidden_l1(relu)
after out: splice out_noise = graphreg_rules.out_noise(out, key), replaces out
before output: total hidden_l1 = graphreg_rules.hidden_l1(relu_hidden_l1)
before output: attach attach = graphreg_rules.attach((out_noise,), (hidden_l1,), False)
before output: attached out_noise_attached = getitem(attach, 0), replaces out for output""",
    ),
    "a penalty on derivatives stands behind the last value that it reads": (
        lambda: lowered(Net(), Contractive("relu", 0.1), GaussianNoise("relu", 0.1)),
        """\
after x: key key = graphreg_rules.key()
after x: track x_wrt = graphreg_rules.x_wrt(x), replaces x
after relu: splice relu_noise = graphreg_rules.relu_noise(relu, key), replaces relu
after relu: total contractive = graphreg_rules.contractive({'relu': relu_noise}, {'x': x_wrt}, key)""",
    ),
    "a penalty on all values at once has one node": (
        lambda: lowered(Net(), Together(["fc", "relu"], 0.1), BernoulliDropout("fc", 0.1)),
        """\
after x: key key = graphreg_rules.key()
after fc: splice fc_dropout = graphreg_rules.fc_dropout(fc, key), replaces fc
before output: total together_in_a_list = graphreg_rules.together_in_a_list({'fc': fc_dropout, 'relu': relu})""",
    ),
    "a value that is written into is copied for what measures it": (
        lambda: lowered(Written(), HiddenL1("fc", 0.1)),
        """\
after fc: copy fc_kept = clone(fc)
after fc: measure fc_hidden_l1 = graphreg_rules.fc_hidden_l1(fc_kept)
before output: total hidden_l1 = graphreg_rules.hidden_l1(fc_hidden_l1)""",
    ),
    "and behind a splice for the model, which writes into its copy": (
        lambda: lowered(Written(), BernoulliDropout("fc", 0.1), HiddenL1("fc", 0.1, clean=True), HiddenL1("fc", 0.1)),
        """\
after x: key key = graphreg_rules.key()
after fc: copy fc_kept = clone(fc)
after fc: measure fc_hidden_l1 = graphreg_rules.fc_hidden_l1(fc_kept)
after fc: splice fc_dropout = graphreg_rules.fc_dropout(fc, key), replaces fc
after fc: measure fc_hidden_l1_1 = graphreg_rules.fc_hidden_l1_1(fc_dropout)
after fc: clone fc_kept_1 = clone(fc_dropout), replaces fc
before output: total hidden_l1 = graphreg_rules.hidden_l1(fc_hidden_l1)
before output: total hidden_l1_1 = graphreg_rules.hidden_l1_1(fc_hidden_l1_1)""",
    ),
    "the model writes into an input: into the caller's, where nothing replaced it; the insertions at inputs stand in reverse": (
        lambda: lowered(Given(), BernoulliDropout(["x", "y"], 0.1), inputs=(X, X)),
        """\
after y: key key = graphreg_rules.key()
after y: splice y_dropout = graphreg_rules.y_dropout(y, key), replaces y
after y: splice x_dropout = graphreg_rules.x_dropout(x, key), replaces x
after y: clone x_kept = apart(x_dropout, x), replaces x""",
    ),
    "the calls of a cell are measured after the last, before what else stands there": (
        lambda: lowered(Cell(), RecurrentNorm("cell", 0.1), BernoulliDropout("cell_1", 0.1), HiddenL1("cell_1", 0.1)),
        """\
after x: key key = graphreg_rules.key()
after cell_1: splice cell_1_dropout = graphreg_rules.cell_1_dropout(cell_1, key), replaces cell_1
after cell_1: measure cell_recurrent_norm = graphreg_rules.cell_recurrent_norm((cell, cell_1_dropout))
after cell_1: measure cell_1_hidden_l1 = graphreg_rules.cell_1_hidden_l1(cell_1_dropout)
before output: total recurrent_norm = graphreg_rules.recurrent_norm(cell_recurrent_norm)
before output: total hidden_l1 = graphreg_rules.hidden_l1(cell_1_hidden_l1)""",
    ),
    "native dropout is called by its runtime module, in its own place": (
        lambda: lowered(Dropped(), BernoulliDropout("relu", 0.1), own="seeded"),
        """\
after key: key key_1 = graphreg_rules.key()
after relu: splice relu_dropout = graphreg_rules.relu_dropout(relu, key_1), replaces relu
instead of drop: own drop = graphreg_rules.drop_own(noise=key_1)""",
    ),
    "native dropout that is off takes no key": (
        lambda: lowered(Dropped(), own="off"),
        "instead of drop: own drop = graphreg_rules.drop_own()",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_the_list(case: str) -> None:
    make, text = LISTS[case]
    assert str(make()) == text


def test_a_plan_of_nothing_inserts_nothing() -> None:
    assert len(lowered(Net())) == 0 and lowered(Net(), penalties="attach").totals == {}


def test_totals_are_in_the_plans_order_and_one_reads_no_site_of_this_graph() -> None:
    class Modes(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return self.out(torch.relu(h) if self.training else torch.tanh(h))  # type: ignore[no-any-return]

    traced = graphreg.trace(Modes(), (X,))
    plan = graphreg.plan(traced, [HiddenL1("tanh", 0.1), HiddenL1("relu", 0.1)])
    train, evaluated = (lower(traced.graphs[mode], traced, plan, runtime_module_names(plan)) for mode in ("train", "eval"))
    assert list(train.totals) == list(evaluated.totals) == ["hidden_l1", "hidden_l1_1"]
    assert train.totals["hidden_l1"].args == () and evaluated.totals["hidden_l1_1"].args == ()


# What it finds out about runtime modules


def test_what_runtime_modules_are_told() -> None:
    found = lowered(Net(), BernoulliDropout(["fc", "relu"], 0.1))
    assert (found.recomputed, found.overwritten, found.apart) == (("relu_dropout",), (), ())
    found = lowered(Written(), BernoulliDropout("fc", 0.1), HiddenL1("fc", 0.1))
    assert (found.recomputed, found.overwritten, found.apart) == ((), ("fc_dropout",), ("fc_dropout",))
    found = lowered(Given(), BernoulliDropout("x", 0.1), inputs=(X, X))
    assert (found.recomputed, found.overwritten, found.apart) == ((), ("x_dropout",), ())


def test_a_splice_behind_a_normalization_is_not_recomputed_unless_another_stands_between() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.norm(x)).relu()  # type: ignore[no-any-return]

    assert lowered(Normed(), BernoulliDropout("relu", 0.1)).recomputed == ()
    assert lowered(Normed(), BernoulliDropout(["norm", "relu"], 0.1)).recomputed == ("relu_dropout",)
    assert lowered(Normed(), BernoulliDropout(["drop", "relu"], 0.1)).recomputed == ("relu_dropout",)


# What cannot be


def test_a_write_under_another_name_is_refused() -> None:
    class Aside(Written):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            y = h.view(-1)
            h.add_(1)
            return y * 2  # type: ignore[no-any-return]

    with pytest.raises(TraceError, match="^dropout cannot replace the value view of Aside: add_ writes into the value's storage"):
        lowered(Aside(), BernoulliDropout("view", 0.1))


# One walk


def copied_code(graph: fx.Graph, insertions: Insertions) -> list[str]:
    made = inserted(graph, insertions)
    define_named_tuples(made)
    lines = made.python_code("self").src.splitlines()
    return [line.strip().partition(";")[0] for line in lines if line.strip() and "def forward" not in line]


def test_the_walk_makes_each_insertion_at_its_place() -> None:
    """Also what no plan makes yet: a parameter that is replaced for one of its readers, before this one."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight) @ self.weight

    graph = fx.symbolic_trace(Tied()).graph
    nodes = {node.name: node for node in graph.nodes}
    weight, first, last, output = nodes["weight"], nodes["matmul"], nodes["matmul_1"], graph.output_node()
    spliced = Insertion(
        "weight_dropout", Kind.SPLICE, Position.BEFORE, first, "call_function", torch.abs, (weight,), {}, "dropout", "weight",
        replaces=weight, readers=frozenset((first,)),
    )  # fmt: skip
    noise = Insertion(
        "noise", Kind.SPLICE, Position.AFTER, nodes["tanh"], "call_function", torch.neg, (nodes["tanh"],), replaces=nodes["tanh"]
    )
    total = Insertion("total", Kind.TOTAL, Position.BEFORE, output, "call_function", torch.add, (spliced, noise), regularizer="total")
    insertions = Insertions((spliced, noise, total), {"total": total})
    assert copied_code(graph, insertions) == [
        "weight = self.weight",
        "weight_dropout = torch.abs(weight)",
        "matmul = x @ weight_dropout",
        "tanh = torch.tanh(matmul)",
        "noise = torch.neg(tanh)",
        "matmul_1 = noise @ weight",
        "total = torch.add(weight_dropout, noise)",
        "return graphreg_Regularized(matmul_1, {'total': total})",
    ]
    copy = {node.name: node for node in inserted(graph, insertions).nodes}
    assert copy["weight_dropout"].meta["graphreg"] == {"kind": "splice", "regularizer": "dropout", "site": "weight"}
    assert copy["noise"].meta["graphreg"] == {"kind": "splice"} and "graphreg" not in copy["matmul"].meta
    assert last.args == (nodes["tanh"], weight)  # the traced graph is as it was


def test_what_the_models_nodes_carry_travels() -> None:
    traced = graphreg.trace(Dropped(), (X,))
    (graph,) = traced.graphs.values()
    for node in graph.nodes:
        node.meta["mine"] = node.name
    module = graphreg.rewrite(traced, graphreg.plan(traced, [HiddenL1("relu", 0.1)], own_dropout="seeded"), rng=0)
    carried = [node for node in module.graph.nodes if "mine" in node.meta]
    assert [node.meta["mine"] for node in carried] == [node.name for node in graph.nodes]
    assert all(node.meta.keys() - {"graphreg"} == twin.meta.keys() for node, twin in zip(carried, graph.nodes, strict=True))
