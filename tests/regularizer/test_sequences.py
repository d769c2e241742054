"""Penalties on sequences: where time runs, which values are steps, what lengths leave out, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphreg
from graphreg import Penalty, RegularizerError, regularize
from graphreg.passes import HiddenL1, RecurrentNorm, RecurrentState

X = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LENGTHS = torch.tensor([5, 1, 3, 4])


def state(z: Tensor) -> Tensor:
    """RecurrentState of [batch, time, units], step by step."""
    return torch.stack([(z[:, t] - z[:, t - 1]) ** 2 for t in range(1, z.shape[1])]).mean()


def norm(z: Tensor) -> Tensor:
    """RecurrentNorm likewise."""
    return torch.stack([((z[:, t] ** 2).sum(-1) - (z[:, t - 1] ** 2).sum(-1)) ** 2 for t in range(1, z.shape[1])]).mean()


def agree(
    model: nn.Module, selector: Any, args: tuple[Any, ...], by_hand: Callable[[], tuple[Tensor, Tensor]], known: bool | None = None,
    **options: Any,
) -> None:  # fmt: skip
    """Both penalties at the selector equal those by hand, state and norm, with the gradients of all parameters.

    ``known``: whether shapes are known when it is planned; without it both.
    """
    penalties = [RecurrentState(selector, 1.0, **options), RecurrentNorm(selector, 1.0, **options)]
    for examples in {None: (None, args), False: (None,), True: (args,)}[known]:
        found = regularize(model, penalties, example_inputs=examples)(*args).penalties
        for ours, theirs in zip(found.values(), by_hand(), strict=True):
            torch.testing.assert_close(ours, theirs)
            same_gradients(model, ours, theirs)


def same_gradients(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in (ours, theirs)]
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients[1])
    for a, b in zip(*gradients, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b)


# --- recurrent layers ------------------------------------------------------------------------------------------------


class Layered(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 4, dtype=torch.float64, **options)
        width = (options.get("proj_size") or 4) * (1 + bool(options.get("bidirectional")))
        self.head = nn.Linear(width, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out, last = self.rnn(x)
        h = last[0] if isinstance(self.rnn, nn.LSTM) else last
        return self.head(out).sum() + h.sum() + (last[1].sum() if isinstance(self.rnn, nn.LSTM) else 0)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True, "batch_first": True}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_layer_tells_its_axis(kind: Any, options: dict[str, Any]) -> None:
    """The same number from [batch, time, features] and [time, batch, features]: all of the output, last layer, both directions."""
    model, first = Layered(kind, **options), bool(options.get("batch_first"))
    x = X if first else X.transpose(0, 1)

    def by_hand() -> tuple[Tensor, Tensor]:
        z = model.rnn(x)[0]
        z = z if first else z.transpose(0, 1)
        return state(z), norm(z)

    agree(model, "rnn", (x,), by_hand, known=False)
    agree(model, "rnn:out", (x,), by_hand, known=True)


class Dropped(Layered):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__(kind, **options)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.drop(self.rnn(x)[0]), 0.5, self.training))


@pytest.mark.parametrize("selector", ["drop", "dropout"])
def test_behind_dropout_the_axis_is_still_the_layers(selector: str) -> None:
    model = Dropped(nn.GRU).eval()
    agree(model, selector, (X,), lambda: (state(model.rnn(X)[0].transpose(0, 1)), norm(model.rnn(X)[0].transpose(0, 1))), known=False)
    agree(model, selector, (X[0],), lambda: (state(model.rnn(X[0])[0][None]), norm(model.rnn(X[0])[0][None])), known=True)


def test_a_layer_whose_tuple_is_returned() -> None:
    class Bare(Layered):
        def forward(self, x: Tensor) -> Any:
            return self.rnn(x)

    model = Bare(nn.LSTM)
    agree(model, "rnn", (X,), lambda: (state(model.rnn(X)[0].transpose(0, 1)), norm(model.rnn(X)[0].transpose(0, 1))), known=True)
    output = regularize(model, RecurrentState("rnn", 1.0))(X).output
    assert torch.equal(output[1][1], model(X)[1][1])


def test_a_projected_lstm() -> None:
    model = Layered(nn.LSTM, proj_size=2, batch_first=True)
    agree(model, "rnn", (X,), lambda: (state(model.rnn(X)[0]), norm(model.rnn(X)[0])), known=False)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_layer_without_a_batch(kind: Any, batch_first: bool) -> None:
    """[time, features], whatever batch_first says."""
    model = Layered(kind, batch_first=batch_first)
    agree(model, "rnn", (X[0],), lambda: (state(model.rnn(X[0])[0][None]), norm(model.rnn(X[0])[0][None])))


@pytest.mark.parametrize(("kind", "port"), [(nn.RNN, "h_n"), (nn.GRU, "h_n"), (nn.LSTM, "h_n"), (nn.LSTM, "c_n")])
def test_the_last_state_is_no_sequence(kind: Any, port: str) -> None:
    sentence = (
        rf"RecurrentState at rnn:{port}: this is the state of rnn after the last step, no sequence\. Select 'rnn:out'; "
        rf"if a glob matches both, add '!rnn:{port}'\."
    )
    with pytest.raises(RegularizerError, match=sentence):
        regularize(Layered(kind), RecurrentState(f"rnn:{port}", 1.0))
    with pytest.raises(RegularizerError, match="no sequence"):
        regularize(Layered(kind), RecurrentState("rnn:*", 1.0))


def test_the_last_state_is_taken_away_from_a_glob() -> None:
    model = Layered(nn.LSTM)
    everything = ["rnn:*", "!rnn:h_n", "!rnn:c_n"]
    agree(model, everything, (X,), lambda: (state(model.rnn(X)[0].transpose(0, 1)), norm(model.rnn(X)[0].transpose(0, 1))), known=True)


@pytest.mark.parametrize(("batch_first", "axis"), [(True, 0), (True, 2), (False, 2), (False, -1)])
def test_a_layers_axis_is_not_overruled(batch_first: bool, axis: int) -> None:
    own = int(batch_first)
    with pytest.raises(
        RegularizerError,
        match=rf"RecurrentState at rnn: time_axis={axis} is not the axis of time in the output of this layer, which is {own} "
        rf"\(batch_first={batch_first}\)\. Leave time_axis out: graphreg reads it from the layer\.",
    ):
        regularize(Layered(nn.GRU, batch_first=batch_first), RecurrentState("rnn", 1.0, time_axis=axis))


@pytest.mark.parametrize(("batch_first", "axis"), [(True, -2), (True, 1), (False, 0), (False, -3)])
def test_a_layers_axis_may_be_said_again(batch_first: bool, axis: int) -> None:
    model = Layered(nn.GRU, batch_first=batch_first)
    found = [regularize(model, RecurrentState("rnn", 1.0, **o))(X).penalties["recurrent_state"] for o in ({}, {"time_axis": axis})]
    assert torch.equal(*found)


# --- other values ----------------------------------------------------------------------------------------------------


class Valued(nn.Module):
    """``relu`` is the value: of the axes that x has."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(width, width, dtype=torch.float64), nn.Linear(width, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -4])
def test_the_time_axis_of_a_value(axis: int) -> None:
    """What remains after the axis of time is the batch, then units of any number of dims."""
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    model = Valued()

    def by_hand() -> tuple[Tensor, Tensor]:
        z = torch.relu(model.body(x)).movedim(axis, 0)
        z = z.reshape(z.shape[0], z.shape[1], -1).transpose(0, 1)
        return state(z), norm(z)

    agree(model, "relu", (x,), by_hand, time_axis=axis)


def test_sites_are_averaged() -> None:
    model = Valued()
    both = regularize(model, RecurrentState(["body", "relu"], 1.0))(X).penalties["recurrent_state"]
    torch.testing.assert_close(both, (state(model.body(X)) + state(torch.relu(model.body(X)))) / 2)


def test_a_single_step_costs_nothing() -> None:
    for module, x in (
        (regularize(Valued(), RecurrentState("relu", 1.0), RecurrentNorm("relu", 1.0, norm="l2")), X[:, :1]),
        (regularize(Layered(nn.GRU), RecurrentState("rnn", 1.0), RecurrentNorm("rnn", 1.0)), X[:1]),
        (regularize(Cells(nn.GRUCell, 1), RecurrentState("cell", 1.0), RecurrentNorm("cell", 1.0)), X[:, :1]),
    ):
        penalties = module(x).penalties
        assert [value.item() for value in penalties.values()] == [0, 0]
        sum(penalties.values()).backward()
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_an_empty_batch_costs_nothing() -> None:
    assert regularize(Valued(), RecurrentState("relu", 1.0))(X[:0]).penalties["recurrent_state"].item() == 0


@pytest.mark.parametrize("which", ["squared", "l2"])
def test_gradients_are_finite_at_a_zero_state(which: str) -> None:
    model = Valued()
    nn.init.zeros_(model.body.weight), nn.init.zeros_(model.body.bias)
    regularize(model, RecurrentNorm("body", 1.0, norm=which))(X).penalties["recurrent_norm"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.body.parameters())


def test_half_precision_is_measured_in_single() -> None:
    model = Valued().bfloat16()
    module = regularize(model, RecurrentNorm("relu", 1.0))
    z = torch.relu(model.body(X.bfloat16())).float()
    penalty = module(X.bfloat16()).penalties["recurrent_norm"]
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, norm(z))


# --- cells -----------------------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """A cell of torch's, called ``count`` times."""

    def __init__(self, kind: Any, count: int = 5) -> None:
        super().__init__()
        self.cell, self.head, self.count = kind(3, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64), count

    def states(self, x: Tensor) -> list[Tensor]:
        h, steps = None, []
        for t in range(self.count):
            h = self.cell(x[..., t, :], h)
            steps.append(torch.stack(h) if isinstance(h, tuple) else h)
        return steps

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for t in range(self.count):
            h = self.cell(x[..., t, :], h)
        return self.head(h[0] if isinstance(self.cell, nn.LSTMCell) else h)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell])
@pytest.mark.parametrize("selector", ["cell", "cell:out", "cell*", ["cell_2", "cell"]], ids=str)
@pytest.mark.parametrize("x", [X, X[0]], ids=["batch", "no batch"])
def test_the_calls_of_a_cell_are_steps(kind: Any, selector: Any, x: Tensor) -> None:
    model = Cells(kind)

    def by_hand() -> tuple[Tensor, Tensor]:
        z = torch.stack(model.states(x), -2).reshape(-1, 5, 4)
        return state(z), norm(z)

    agree(model, selector, (x,), by_hand, known=kind is nn.GRUCell, expect=1)


@pytest.mark.parametrize(("selector", "part"), [("cell", 0), ("cell:h", 0), ("cell:0", 0), ("cell:c", 1), ("cell:1", 1)])
def test_an_lstm_cell_has_two_states(selector: str, part: int) -> None:
    model = Cells(nn.LSTMCell)

    def by_hand() -> tuple[Tensor, Tensor]:
        z = torch.stack([step[part] for step in model.states(X)], 1)
        return state(z), norm(z)

    agree(model, selector, (X,), by_hand, known=selector in ("cell", "cell:0", "cell:c"))


class Own(nn.Module):
    """A cell written by hand, that gives its state and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.into(x))
        return torch.tanh(self.back(h) + gate), gate


class Wrapped(nn.Module):
    """Gives the last state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Own()

    def steps(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        h, steps = x.new_zeros(len(x), 4), []
        for t in range(5):
            h, gate = self.cell(x[:, t], h)
            steps.append((h, gate))
        return steps

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0] @ x.new_zeros(3, 4)
        for t in range(5):
            h, _ = self.cell(x[:, t], h)
        return h


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Wrapped(), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


@pytest.mark.parametrize(("selector", "part"), [("encoder.cell", 0), ("**.cell", 0), ("encoder.cell:1", 1)])
def test_a_cell_of_the_users_own(selector: str, part: int) -> None:
    model = Outer()

    def by_hand() -> tuple[Tensor, Tensor]:
        z = torch.stack([step[part] for step in model.encoder.steps(X)], 1)
        return state(z), norm(z)

    agree(model, selector, (X,), by_hand, known=selector != "encoder.cell", expect=1)


def test_layers_within_a_cell_are_sequences_too() -> None:
    model = Outer()

    def by_hand() -> tuple[Tensor, Tensor]:
        z = model.encoder.cell.into(X)
        return state(z), norm(z)

    agree(model, "encoder.cell.into", (X,), by_hand, known=False, expect=1)


def test_what_holds_a_cell_is_not_its_steps() -> None:
    """The last state is the encoder's value, whose name means one value; the error says what means them all."""
    for selector in ("encoder", "enc*"):
        with pytest.raises(
            RegularizerError,
            match=r"the value has shape \(4, 4\) and is no sequence: a sequence is \[batch, time, units\], 3 dims or more\. Neighbouring "
            r"units are not neighbouring steps\. This is one call of 'encoder\.cell': the selector 'encoder\.cell' takes all its calls",
        ):
            regularize(Outer(), RecurrentState(selector, 1.0))(X)


def test_one_call_of_a_cell_is_no_sequence() -> None:
    sentence = "This is one call of 'cell': the selector 'cell' takes all its calls as the steps of one sequence."
    for examples in (None, X):
        for model, selector in ((Cells(nn.GRUCell), "cell_1"), (Cells(nn.GRUCell), lambda site: site.name == "cell")):
            with pytest.raises(RegularizerError, match=sentence):
                regularize(model, RecurrentState(selector, 1.0), example_inputs=examples)(X)
    with pytest.raises(RegularizerError, match="the selector 'cell:c' takes all its calls"):
        regularize(Cells(nn.LSTMCell), RecurrentState("cell_1:c", 1.0))(X)


def test_calls_are_taken_away_by_name() -> None:
    """Without the first call: the pairs that remain."""
    model = Cells(nn.GRUCell)
    agree(
        model, ["cell*", "!cell"], (X,),
        lambda: (state(torch.stack(model.states(X)[1:], 1)), norm(torch.stack(model.states(X)[1:], 1))), known=True,
    )  # fmt: skip


class Shared(nn.Module):
    """A block of tied weights, applied twice to [batch, time, units]."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.tanh(self.block(x)))


def test_calls_that_are_sequences_each_are_chosen_by_a_function() -> None:
    """By name they are two steps; one by one each has steps of its own."""
    model = Shared()
    first = model.block(X)
    second = model.block(torch.tanh(first))
    each = regularize(model, RecurrentState(lambda site: site.op == "Linear", 1.0, expect=2))(X).penalties["recurrent_state"]
    torch.testing.assert_close(each, (state(first) + state(second)) / 2)
    calls = regularize(model, RecurrentState("block", 1.0, expect=1))(X).penalties["recurrent_state"]
    torch.testing.assert_close(calls, ((second - first) ** 2).mean())


class Opaque(nn.Module):
    """A cell that cannot be traced and gives a tuple, which is not only taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor, states: Any) -> Any:
        h = self.linear(x) if bool(x.sum() > 9) else -self.linear(x)
        return h, h


class OpaqueCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = Opaque(), nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        states = self.cell(x[:, 0], None)
        return self.head(states[0]), states


def test_a_tuple_is_no_sequence() -> None:
    with pytest.raises(
        RegularizerError,
        match=r"RecurrentState at cell: the value is a tuple, no tensor\. Select a part of it by its port, as 'cell:0', or",
    ):
        regularize(OpaqueCell(), RecurrentState("cell", 1.0))(X)


def test_time_axis_has_no_meaning_for_calls() -> None:
    with pytest.raises(RegularizerError, match="time_axis=2 has no meaning where the calls of cell are the steps"):
        regularize(Cells(nn.GRUCell), RecurrentState("cell", 1.0, time_axis=2))


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Tanh()
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(self.head(x))
        return self.cell(torch.cat([h, h], 1)).sum() + h.sum()


@pytest.mark.parametrize("examples", [None, torch.ones(2, 1)])
def test_calls_of_several_shapes_are_no_steps(examples: Any) -> None:
    with pytest.raises(
        RegularizerError,
        match=r"RecurrentState at cell: its calls give values of several shapes, \(2, 1\) and \(2, 2\), and are no steps of one sequence\. "
        r"Select the calls one by one, with a function of a site\.",
    ):
        regularize(Growing(), RecurrentState("cell", 1.0), example_inputs=examples)(torch.ones(2, 1))


def test_a_plan_shows_the_calls() -> None:
    plan = graphreg.plan(graphreg.trace(Cells(nn.GRUCell), X), RecurrentState("cell", 0.1))
    assert str(plan).splitlines()[0] == "Cells: 1 edit by 1 regularizer"
    assert str(plan).splitlines()[2].split("  ")[0] == "cell (5 calls)"
    report = graphreg.report(regularize(Cells(nn.GRUCell), RecurrentState("cell", 0.1)))
    assert report.sites[0].calls == 5 and "cell (5 calls)" in report.text() and len(report.regularizers[0].sites) == 5


# --- what the engine does with them ----------------------------------------------------------------------------------


class Both(nn.Module):
    """A cell in a loop and a value with a time axis; another structure in each mode; a state that is written into later."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h, steps = x[:, 0] @ x.new_zeros(3, 4), []
        for t in range(3):
            h = self.cell(x[:, t], h)
            steps.append(torch.relu(h))
        y = self.head(torch.relu(torch.stack(steps, 1)))
        h += 1
        return y * 2 + h.sum() if self.training else y


Y = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(2))
HERE = torch.tensor([3, 2, 1, 3])
RELU = "relu_3"


def both(**options: Any) -> Any:
    penalties = [RecurrentState("cell", 0.1, lengths="lengths"), RecurrentNorm(RELU, 0.1, lengths="lengths"), HiddenL1("cell_1", 0.1)]
    return regularize(Both(), penalties, dropout={"cell_1": 0.5}, rng=0, **options)


def test_the_module_can_be_copied_and_stripped() -> None:
    module = both()
    assert list(module.graphs) == ["train", "eval"]
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for mode in (True, False):
        first = module.train(mode)(Y, HERE)
        for twin in twins:
            again = twin.train(mode)(Y, HERE)
            assert torch.equal(first.output, again.output)
            assert {n: v.item() for n, v in first.penalties.items()} == {n: v.item() for n, v in again.penalties.items()}
    stripped = graphreg.strip(module)
    assert not [node for graph in stripped.graphs.values() for node in graph.nodes if "graphreg" in node.meta]
    original = Both()
    original.load_state_dict(module.state_dict())
    assert torch.equal(stripped.eval()(Y, HERE), original.eval()(Y, HERE))


def test_penalties_attach() -> None:
    returned, attached = both(), both(penalties="attach", scale=1.0)
    attached.load_state_dict(returned.state_dict())
    output, penalties = returned(Y, HERE)
    (output.sum() + sum(penalties.values())).backward()
    attached(Y, HERE).sum().backward()
    assert {name: value.item() for name, value in attached.penalties().items()} == {n: v.item() for n, v in penalties.items()}
    for a, b in zip(returned.parameters(), attached.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_as_a_pass() -> None:
    """torch.fx's own trace of a cell in a loop: the same sites, the same numbers."""
    model = Outer()
    given = fx.symbolic_trace(model)
    found = graphreg.as_pass(RecurrentState("encoder.cell", 1.0, expect=1))(given).graph_module
    ours = regularize(model, RecurrentState("encoder.cell", 1.0))
    assert torch.equal(found(X).penalties["recurrent_state"], ours(X).penalties["recurrent_state"])


@pytest.mark.parametrize("clean", [False, True])
def test_a_sequence_reads_behind_the_splices(clean: bool) -> None:
    """Or before those at its own sites, where it asks for it: the next step has read what the splice made of it."""
    model, seen = Cells(nn.GRUCell), dict[str, Tensor]()

    class Seen(Penalty):
        def __call__(self, values: dict[str, Tensor]) -> Tensor:
            seen.update(values)
            return torch.zeros(())

    calls = ["cell", *(f"cell_{i}" for i in range(1, 5))]
    module = regularize(model, RecurrentState("cell", 1.0, clean=clean), Seen(calls, 1.0, clean=clean), dropout={"cell*": 0.5}, rng=0)
    penalty = module(X).penalties["recurrent_state"]
    assert any((value == 0).any() for value in seen.values()) != clean
    torch.testing.assert_close(penalty, state(torch.stack([seen[name] for name in calls], 1)))


class Sum(nn.Module):
    """A cell whose backward needs nothing of its value, which may be written into, therefore."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.into(x) + self.back(h)


class Written(nn.Module):
    """Each state is written into after the next step has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = Sum(), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h, out = x[:, 0] @ x.new_zeros(3, 4), []
        for t in range(5):
            new = self.cell(x[:, t], h)
            h = new * 2
            out.append(new.mul_(3))
        return self.head(torch.stack(out, 1)) + self.head(h)[:, None]


def test_a_state_that_is_overwritten_is_measured_as_it_was() -> None:
    model = Written()
    h, steps = X.new_zeros(4, 4), []
    for t in range(5):
        h = model.cell(X[:, t], h)
        steps.append(h)
        h = h * 2
    penalty = regularize(model, RecurrentState("cell", 1.0))(X).penalties["recurrent_state"]
    torch.testing.assert_close(penalty, state(torch.stack(steps, 1)))
    same_gradients(model, penalty, state(torch.stack(steps, 1)))


# --- what are steps, and what is time --------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that reads two inputs, one after the other, and none of its own outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.head = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.tanh(self.p(x))).sum() + self.head(self.p(y)).sum()


@pytest.mark.parametrize("selector", ["p", "p*", ["p_1", "p"], "@Linear"], ids=str)
@pytest.mark.parametrize("options", [{}, {"time_axis": 1}, {"time_axis": 0}], ids=str)
def test_the_calls_of_a_layer_are_sequences_each(selector: Any, options: dict[str, Any]) -> None:
    model, args = Twice(), (X, 3 * X.flip(1)[:2])

    def by_hand() -> tuple[Tensor, Tensor]:
        each = [model.p(x).transpose(0, 1 - options.get("time_axis", 1)) for x in args]
        more = [model.head(torch.tanh(model.p(args[0]))), model.head(model.p(args[1]))] if selector == "@Linear" else []
        each += [z.transpose(0, 1 - options.get("time_axis", 1)) for z in more]
        return torch.stack(list(map(state, each))).mean(), torch.stack(list(map(norm, each))).mean()

    agree(model, selector, args, by_hand, known=bool(options), **options)


def test_one_of_the_calls_may_be_taken_away() -> None:
    model = Twice()
    agree(model, ["p", "!p_1"], (X, X), lambda: (state(model.p(X)), norm(model.p(X))), known=False, expect=1)


def test_the_calls_of_a_layer_on_rows_are_no_steps() -> None:
    """By themselves they are neither: the error says what would be one sequence."""
    with pytest.raises(
        RegularizerError,
        match=r"This is one call of 'p', which reads none of its earlier outputs: each call is a sequence of its own\. If the calls are "
        r"the steps of one sequence, let the model stack their values \(torch\.stack\), and select the stack\.",
    ):
        regularize(Twice(), RecurrentState("p", 1.0))(X[:, 0], X[:, 1])


class TwoRuns(Cells):
    """One cell, over two inputs from their own beginnings; ``mixed``: step by step in turn."""

    def __init__(self, kind: Any, mixed: bool) -> None:
        super().__init__(kind)
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        runs: list[Any] = [None, None]
        for t in range(10):
            which, step = (t % 2, t // 2) if self.mixed else (t // 5, t % 5)
            runs[which] = self.cell((x if which == 0 else 2 * x)[:, step], runs[which])
        return sum(self.head(h[0] if isinstance(h, tuple) else h) for h in runs)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("kind", "selector", "part"), [(nn.GRUCell, "cell", None), (nn.LSTMCell, "cell", 0), (nn.LSTMCell, "cell:c", 1)])
def test_a_sequence_ends_where_a_cell_reads_nothing_of_it(kind: Any, selector: str, part: int | None, mixed: bool) -> None:
    model = TwoRuns(kind, mixed)

    def by_hand() -> tuple[Tensor, Tensor]:
        runs = [torch.stack([h if part is None else h[part] for h in model.states(x)], 1) for x in (X, 2 * X)]
        return torch.stack(list(map(state, runs))).mean(), torch.stack(list(map(norm, runs))).mean()

    agree(model, selector, (X,), by_hand, known=mixed, expect=2)


class Kept(nn.Module):
    """A cell of the user's own that keeps its states in a tensor, and one of torch's that is given none."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cell = nn.Linear(3, 3, dtype=torch.float64), nn.GRUCell(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        states = 0 * x
        for t in range(3):
            before = states[:, t - 1] if t else states[:, 0]
            states[:, t] = self.own(x[:, t] + before)
        return states.sum() + self.cell(x[:, 0]).sum() + self.cell(x[:, 1]).sum()


def test_states_in_a_tensor_and_a_cell_without_a_state() -> None:
    model = Kept()

    def own() -> Tensor:
        steps = [model.own(X[:, 0])]
        for t in (1, 2):
            steps.append(model.own(X[:, t] + steps[-1]))
        return torch.stack(steps, 1)

    agree(model, "own", (X,), lambda: (state(own()), norm(own())), known=True, expect=1)
    calls = torch.stack([model.cell(X[:, 0]), model.cell(X[:, 1])], 1).detach()
    found = regularize(model, RecurrentState("cell", 1.0, expect=1))(X).penalties["recurrent_state"]
    torch.testing.assert_close(found.detach(), state(calls))


class Convolved(nn.Module):
    """``value`` is [batch, channels, time], behind a convolution and what leaves its axes alone."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 32, 3, padding=1, dtype=torch.float64)
        self.norm, self.act = nn.BatchNorm1d(32, dtype=torch.float64), nn.ReLU()
        self.way, self.value = way, nn.Identity()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.value(self.way(self.act(self.norm(self.conv(x))))).sum()


def through(way: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    x = torch.randn(4, 3, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    module = regularize(Convolved(way).eval(), RecurrentNorm("value", 1.0, lengths="lengths", **options))
    return module(x, torch.tensor([30, 20, 3, 5])).penalties["recurrent_norm"]


def plain(z: Tensor) -> Tensor:
    return z


@pytest.mark.parametrize("way", [
    plain, torch.tanh, nn.functional.gelu, lambda z: z * 2 + z, lambda z: z[..., :-2], lambda z: nn.functional.max_pool1d(z, 2),
    lambda z: torch.cat([z, z], -1), lambda z: nn.functional.dropout(z, 0.1), lambda z: nn.functional.layer_norm(z, z.shape[-1:]),
], ids=lambda way: getattr(way, "__name__", ""))  # fmt: skip
def test_the_channels_of_a_convolution_are_no_steps(way: Any) -> None:
    for options in ({}, {"time_axis": 1}):
        with pytest.raises(
            RegularizerError,
            match=r"RecurrentNorm at .*value: the value comes from a convolution \(conv\), so its axis 1 is channels, and time_axis=1 "
            r"would take them for steps\. Give time_axis=2; if axis 1 is time nevertheless, give time_axis=-2\.",
        ):
            through(way, **options)


class Steps(nn.Module):
    """A loop over the steps of [time, batch, units]; ``join`` makes one value of the states."""

    def __init__(self, join: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.cell, self.out, self.join = nn.GRUCell(4, 3), nn.Linear(3, 2), join

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[1], 3)]
        for t in range(5):
            states.append(self.cell(x[t], states[-1]))
        return self.out(self.join(states).tanh())


def written(states: list[Tensor]) -> Tensor:
    outputs = torch.zeros(len(states), 3, 3)
    for t, h in enumerate(states):
        outputs[t] = h
    return outputs


JOINS: dict[str, tuple[Callable[[list[Tensor]], Tensor], int]] = {
    "written": (written, 0), "stack": (lambda states: torch.stack(states[1:]), 0),
    "with the first state": (lambda states: torch.stack(states, dim=0), 0),
    "cat": (lambda states: torch.cat([h.unsqueeze(0) for h in states[1:]]), 0), "batch first": (lambda states: torch.stack(states, 1), 1),
    "transposed": (lambda states: torch.stack(states).transpose(0, 1), 1),
    "cat, batch first": (lambda states: torch.cat([h.unsqueeze(1) for h in states], dim=1), 1),
}  # fmt: skip


@pytest.mark.parametrize("join", JOINS)
def test_the_axis_of_a_stack_of_steps_is_time(join: str) -> None:
    torch.manual_seed(0)
    made, axis = JOINS[join]
    model, x = Steps(made), torch.randn(5, 3, 4)
    for selector in ("tanh", "out"):
        module = regularize(model, recurrent_state={"weight": 1.0, "pattern": selector}, keep=selector)
        output, penalties, values = module(x)
        torch.testing.assert_close(penalties["recurrent_state"], values[selector].diff(dim=axis).square().mean())
    shared = {"weight": 0.5, "pattern": "tanh", "share_axes": "time"}
    masks = regularize(model, dropout=shared, keep={"tanh": "spliced"}, rng=0)(x).values["tanh"]
    assert (masks == 0).all(axis).any() and ((masks == 0).all(axis) == (masks == 0).select(axis, -1)).all()


def test_a_stack_of_different_things_is_no_stack_of_steps() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.a(x), self.a(self.a(x)), self.b(x)]).tanh()

    x = torch.randn(4, 3)
    output, penalties = regularize(Two(), recurrent_state={"weight": 1.0, "pattern": "tanh"})(x)
    torch.testing.assert_close(penalties["recurrent_state"], output.diff(dim=1).square().mean())


class Recognizer(nn.Module):
    """As CRNN reads text: rows of a map are merged into channels, and a layer of [time, batch, ...] is followed by views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn, self.head = nn.Conv2d(1, 2, 1), nn.LSTM(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        batch, channels, height, width = maps.shape
        states = self.rnn(maps.view(batch, channels * height, width).permute(2, 0, 1))[0]
        time, batch, units = states.shape
        return self.head(states.view(time * batch, units)).view(time, batch, -1).relu()


def test_a_view_between_a_value_and_a_layer_of_time_first_leaves_the_axis_open() -> None:
    torch.manual_seed(0)
    model, x = Recognizer(), torch.randn(3, 1, 4, 7)
    near = "at relu: a layer of [time, batch, ...] or a stack is near this value, and operations between them may change the "
    near += "axes, so it is not known which axis is time. Give its number: {} if axis 0 is, {} if axis 1 is."
    for example in (None, x):
        with pytest.raises(RegularizerError, match=re.escape("RecurrentState " + near.format("time_axis=0", "time_axis=-2"))):
            regularize(model, recurrent_state={"weight": 1.0, "pattern": "relu"}, example_inputs=example)
        with pytest.raises(RegularizerError, match=re.escape("GaussianNoise " + near.format("share_axes=0", "share_axes=1"))):
            regularize(model, noise={"weight": 0.1, "pattern": "relu", "share_axes": "batch"}, example_inputs=example)
    output = model(x)
    for axis, steps in ((0, output.transpose(0, 1)), (-2, output)):
        module = regularize(model, recurrent_state={"weight": 1.0, "pattern": "relu", "time_axis": axis})
        torch.testing.assert_close(module(x).penalties["recurrent_state"], state(steps))
    for site, axis in (("permute", 0), ("view", 2)):  # of [batch, rows and channels, time]
        dropped = regularize(model, locked_dropout={"weight": 0.5, "pattern": site}, keep={site: "spliced"}, rng=0)(x).values[site] == 0
        assert dropped.all(axis).any() and (dropped.all(axis) == dropped.select(axis, 0)).all()


class MixOfLayers(nn.Module):
    """As in ELMo: a weighted sum of the outputs of layers of [batch, time, units]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.GRU(4, 4, batch_first=True), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)[0]
        layers = torch.stack([h, self.second(h)[0]]) * 0.5
        return self.head(layers.sum(0))


@pytest.mark.parametrize("example", [None, torch.randn(3, 5, 4)])
def test_a_stack_of_sequences_leaves_the_axis_open(example: Tensor | None) -> None:
    model, x = MixOfLayers(), torch.randn(3, 5, 4)
    for site in ("stack", "mul"):
        with pytest.raises(RegularizerError, match="a layer of .time, batch, .... or a stack is near this value"):
            regularize(model, locked_dropout={"weight": 0.5, "pattern": site}, example_inputs=example)
        options = {"weight": 0.5, "pattern": site, "time_axis": 2}
        dropped = regularize(model, locked_dropout=options, keep={site: "spliced"}, rng=0, example_inputs=example)(x).values[site] == 0
        assert dropped.any() and (dropped == dropped[:, :, :1]).all() and not (dropped == dropped[:, :1]).all()
    regularize(model, locked_dropout={"weight": 0.5, "pattern": ["sum", "head"]}, example_inputs=example)


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], int | None]] = {  # None: it is asked for
    "nothing": (lambda h: h, 0), "contiguous": (lambda h: h.contiguous().double(), 0), "flipped": (lambda h: h.flip(0), 0),
    "transposed": (lambda h: h.transpose(0, 1), 1), "permuted": (lambda h: h.permute(1, 2, 0), 2),
    "there and back": (lambda h: h.transpose(1, 0).tanh().transpose(0, 1), 0), "a sum": (lambda h: (h + h.tanh()) * 0.5, 0),
    "indexed": (lambda h: h[:, torch.tensor([1, 0])], None), "a product": (lambda h: torch.einsum("tbd,de->tbe", h, torch.eye(4)), None),
    "viewed": (lambda h: h.reshape(-1, 4).view(4, 2, 4), None), "sorted": (lambda h: h.sort(0).values, None),
}  # fmt: skip


class Around(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor], before: bool) -> None:
        super().__init__()
        self.rnn, self.way, self.before = nn.LSTM(4, 4), way, before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            return self.rnn(self.way(x.sigmoid()).float())[0]
        return self.way(self.rnn(x)[0]).sigmoid()


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_axis_behind_a_padded_sequence(batch_first: bool) -> None:
    """A packed sequence has no order of axes, so that of the padded one counts and not the layer's."""

    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first)[0].sigmoid()

    torch.manual_seed(0)
    x, axis = torch.randn(4, 5, 3), int(batch_first)
    model, lengths = Packs(), torch.tensor([5, 1, 3, 4] if batch_first else [4, 1, 3, 4, 2])
    module = regularize(model, locked_dropout={"weight": 0.5, "pattern": "sigmoid"}, keep={"sigmoid": "spliced"}, rng=0)
    dropped = module(x, lengths).values["sigmoid"] == 0
    assert dropped.all(axis).any() and (dropped.all(axis) == dropped.select(axis, 0)).all()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_axis_of_time_is_followed_or_asked_for(way: str, before: bool) -> None:
    """Behind a layer of [time, batch, ...], and before one."""
    torch.manual_seed(0)
    made, axis = WAYS[way]
    if before and way in ("transposed", "permuted"):  # the other way around: axis 1 goes to 0
        made, axis = (lambda h: h.transpose(0, 1), 1) if way == "transposed" else (lambda h: h.permute(1, 0, 2), 1)
    x = torch.randn(4, 2, 4)
    options = {"weight": 0.5, "pattern": "sigmoid"}
    for example in (None, x):
        if axis is None:
            with pytest.raises(RegularizerError, match="so it is not known which axis is time"):
                regularize(Around(made, before), locked_dropout=options, example_inputs=example)
            continue
        module = regularize(Around(made, before), locked_dropout=options, keep={"sigmoid": "spliced"}, rng=0, example_inputs=example)
        dropped = module(x).values["sigmoid"] == 0
        assert dropped.all(axis).any() and (dropped.all(axis) == dropped.select(axis, 0)).all()


def test_the_axes_that_the_error_names_are_taken() -> None:
    """With axis 2 the channels are the units; -2 insists on axis 1."""
    assert through(plain, time_axis=2) != through(plain, time_axis=-2)
    turned = through(lambda z: z.transpose(1, 2))  # what other operations make of a convolution has axes of its own
    torch.testing.assert_close(through(plain, time_axis=2), turned)


@pytest.mark.parametrize(("conv", "axes", "same"), [
    (nn.Conv2d(3, 4, 1), "2 or 3", -3), (nn.ConvTranspose1d(3, 32, 1), "2", -2), (nn.Conv3d(3, 4, 1), "2 or 3 or 4", -4),
], ids=["2d", "transposed", "3d"])  # fmt: skip
def test_convolutions_of_more_dims(conv: nn.Module, axes: str, same: int) -> None:
    with pytest.raises(RegularizerError, match=rf"Give time_axis={axes}; if axis 1 is time nevertheless, give time_axis={same}\."):
        regularize(nn.Sequential(conv, nn.Tanh()), RecurrentState("1", 1.0))


class Measured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(30, 30, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.body(x).sum()


@pytest.mark.parametrize(("lengths", "hint"), [
    (torch.tensor([28, 20]), r"has 28 for a sequence of 8 steps; .* The value has shape \(2, 8, 30\); if time is another of its "
                             r"axes, give time_axis=2\.$"),
    (torch.ones(2, 30, dtype=torch.bool), r"True or 1 where a step counts\. The value has shape \(2, 8, 30\); .* give time_axis=2\.$"),
    (torch.tensor([31, 20]), r"a length is a whole number from 0 to 8\.$"), (torch.ones(2, 9, dtype=torch.bool), r"where a step counts\.$"),
])  # fmt: skip
def test_lengths_that_fit_another_axis(lengths: Tensor, hint: str) -> None:
    x = torch.randn(2, 8, 30, dtype=torch.float64)
    with pytest.raises(RegularizerError, match=hint):
        regularize(Measured(), RecurrentState("body", 1.0, lengths="lengths"))(x, lengths)
    if "time_axis" in hint:
        regularize(Measured(), RecurrentState("body", 1.0, lengths="lengths", time_axis=2))(x, lengths)


@pytest.mark.parametrize(
    ("make", "args", "selector"), [(lambda: TwoRuns(nn.GRUCell, True), (X,), "cell"), (Twice, (X, 2 * X), "p")], ids=["runs", "twice"]
)
def test_sequences_of_calls_are_the_same_compiled(make: Callable[[], nn.Module], args: tuple[Tensor, ...], selector: str) -> None:
    """Several sequences of one cell, and calls that are sequences each: the penalties and their gradients."""
    model = make()
    module = regularize(model, RecurrentState(selector, 1.0), RecurrentNorm(selector, 1.0), rng=0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*args).penalties.values(), module(*args).penalties.values(), strict=True):
        torch.testing.assert_close(ours, theirs)
        same_gradients(model, ours, theirs)


class PoolsOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 7, batch_first=True), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.rnn(x)[0].transpose(1, 2)).amax(2))  # type: ignore[no-any-return]


def test_the_axis_of_time_behind_a_layer_of_batch_first_is_followed() -> None:
    model, x = PoolsOverTime(), torch.randn(3, 5, 4)
    for options in ({"example_inputs": x}, {}):
        module = graphreg.regularize(model, locked_dropout={"strength": 0.5, "pattern": "tanh"}, keep={"tanh": "spliced"}, rng=0, **options)
        dropped = module(x).values["tanh"] == 0
        assert torch.equal(dropped, dropped[..., :1].expand_as(dropped)) and 0 < float(dropped.double().mean()) < 1
        slow = graphreg.regularize(model, recurrent_state={"strength": 1.0, "pattern": "tanh"}, **options)
        expected = torch.tanh(model.rnn(x)[0].transpose(1, 2)).diff(dim=2).square().mean()
        torch.testing.assert_close(slow(x).penalties["recurrent_state"], expected)
