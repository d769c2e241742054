"""Lengths: padded steps count for nothing, in value and gradient; what is no lengths is refused."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import graphreg
from graphreg import NoMatchError, Penalty, RegularizerError, TraceError, regularize
from graphreg.passes import ConfidencePenalty, HiddenL1, HiddenL2, KLSparsity, NEFTune, RecurrentNorm, RecurrentState, ZLoss
from graphreg.runtime.rewritten_module import RewrittenModule

fx.wrap("pack_padded_sequence")
fx.wrap("pad_packed_sequence")
X = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LENGTHS = torch.tensor([5, 1, 3, 4])
PENALTIES = [
    RecurrentState("relu", 1.0, lengths="lengths"), RecurrentNorm("relu", 1.0, lengths="lengths"),
    RecurrentNorm("relu", 1.0, lengths="lengths", norm="l2"),
]  # fmt: skip


def mask_of(lengths: Tensor, steps: int = 5) -> Tensor:
    return torch.arange(steps) < lengths[:, None]


class Valued(nn.Module):
    """``relu`` is the value, [batch, time, units]."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


class Layered(nn.Module):
    """``relu`` of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(torch.relu(self.rnn(x)[0]))


class Packed(Layered):
    """Both directions, which padding would get into were it not packed."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 2, batch_first=True, bidirectional=True, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(torch.relu(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]))


def pooled(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    """The penalties of sequences given one by one, without padding; a mean over all pairs of all of them."""
    squares: list[list[Tensor]] = [[], [], []]
    for row in rows:
        z = torch.relu(model.rnn(row[None])[0] if hasattr(model, "rnn") else model.body(row[None]))[0]
        for a, b in itertools.pairwise(z):
            squares[0].extend((b - a) ** 2)
            squares[1].append((b @ b - a @ a) ** 2)
            squares[2].append((torch.linalg.vector_norm(b) - torch.linalg.vector_norm(a)) ** 2)
    return [torch.stack(each).mean() if each else torch.zeros((), dtype=torch.float64) for each in squares]


def same(model: nn.Module, ours: dict[str, Tensor], theirs: list[Tensor]) -> None:
    parameters = list(model.parameters())
    for a, b in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(a, b)
        found = [
            torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
            if v.requires_grad else [torch.zeros_like(p) for p in parameters]
            for v in (a, b)
        ]  # fmt: skip
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [Valued, Layered, Packed])
def test_padded_is_unpadded(kind: Any) -> None:
    model = kind()
    found = regularize(model, PENALTIES)(X, LENGTHS).penalties
    same(model, found, pooled(model, [row[:n] for row, n in zip(X, LENGTHS, strict=True)]))
    assert all(value.item() > 0 for value in found.values())


@cache
def once() -> tuple[Valued, RewrittenModule]:
    model = Valued()
    return model, regularize(model, PENALTIES)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.sampled_from([torch.int64, torch.int32, torch.uint8]), st.booleans())
def test_any_lengths(lengths: list[int], dtype: torch.dtype, mask: bool) -> None:
    """Of any whole dtype, or as a mask; sequences of no or of one step among them, or nothing else."""
    model, module = once()
    x = torch.randn(len(lengths), 5, 3, dtype=torch.float64)
    given = torch.tensor(lengths, dtype=dtype)
    found = module(x, mask_of(given) if mask else given).penalties
    same(model, found, pooled(model, [row[:n] for row, n in zip(x, lengths, strict=True)]))


@settings(max_examples=15)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_any_mask(rows: list[list[bool]]) -> None:
    """Padding in front, behind or between: the steps that do not count are as if they were not there."""
    (model, module), mask = once(), torch.tensor(rows)
    x = torch.randn(len(rows), 5, 3, dtype=torch.float64)
    same(model, module(x, mask).penalties, pooled(model, [row[keep] for row, keep in zip(x, mask, strict=True)]))


class TimeFirst(Valued):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1), lengths)


@pytest.mark.parametrize("given", [LENGTHS, mask_of(LENGTHS)], ids=["lengths", "mask"])
def test_time_first(given: Tensor) -> None:
    """A mask is [batch, time] whatever the value's axes are."""
    model = TimeFirst()
    penalties = [RecurrentState("relu", 1.0, lengths="lengths", time_axis=0), RecurrentNorm("relu", 1.0, lengths="lengths", time_axis=0)]
    found = regularize(model, penalties, example_inputs=(X, given))(X, given).penalties
    same(model, found, pooled(model, [row[:n] for row, n in zip(X, LENGTHS, strict=True)])[:2])


PADDING = [(lengths, padding) for lengths in (LENGTHS, mask_of(LENGTHS)) for padding in (torch.nan, torch.inf, 1e300)]


def test_whatever_stands_in_the_padding() -> None:
    model, module = once()
    expected = pooled(model, [row[:n] for row, n in zip(X, LENGTHS, strict=True)])
    for lengths, padding in PADDING:
        x = X.masked_fill(~mask_of(LENGTHS)[..., None], padding)
        torch.testing.assert_close(list(module(x, lengths).penalties.values()), expected)


class Added(nn.Module):
    """``add`` is the value, whose gradient is that of z."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(4, 5, 3, dtype=torch.float64))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return (x + self.z).sum(-1)


@pytest.mark.parametrize("penalty", [RecurrentState, RecurrentNorm, HiddenL1, HiddenL2, ZLoss, ConfidencePenalty])
def test_the_gradient_knows_nothing_of_the_padding(penalty: Any) -> None:
    model = Added()
    module = regularize(model, penalty("add", 1.0, lengths="lengths"))
    for lengths, padding in PADDING:
        found = [module(x, lengths).penalties[penalty.keys[0]] for x in (X, X.masked_fill(~mask_of(LENGTHS)[..., None], padding))]
        gradients = [torch.autograd.grad(each, model.z)[0] for each in found]
        assert torch.equal(*gradients)
        assert not gradients[0][~mask_of(LENGTHS)].any() and gradients[0][mask_of(LENGTHS)].any()


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        states = None
        for t in range(5):
            states = self.cell(x[..., t, :], states)
        return self.head(states[0])


@pytest.mark.parametrize("given", [LENGTHS, mask_of(LENGTHS)], ids=["lengths", "mask"])
def test_the_calls_of_a_cell(given: Tensor) -> None:
    """Each sequence alone, as far as it goes."""
    model = Cells()
    for port, part in (("cell", 0), ("cell:c", 1)):
        squares = []
        for row, n in zip(X, LENGTHS, strict=True):
            states, steps = None, []
            for x in row[:n]:
                states = model.cell(x[None], states)
                steps.append(states[part][0])
            squares += [(b - a) ** 2 for a, b in itertools.pairwise(steps)]
        found = regularize(model, RecurrentState(port, 1.0, lengths="lengths"), example_inputs=(X, given))(X, given).penalties
        same(model, found, [torch.stack(squares).mean()])


@pytest.mark.parametrize("lengths", [torch.tensor(3), torch.tensor([3]), mask_of(torch.tensor([3])), mask_of(torch.tensor([3]))[0]])
def test_a_sequence_without_a_batch(lengths: Tensor) -> None:
    """Its lengths are one number or one row, or of a batch of one."""
    model = Cells()
    for examples in (None, (X[0], lengths)):
        found = regularize(model, RecurrentState("cell", 1.0, lengths="lengths"), example_inputs=examples)(X[0], lengths).penalties
        states, steps = None, []
        for x in X[0, :3]:
            states = model.cell(x, states)
            steps.append(states[0])
        same(model, found, [torch.stack([(b - a) ** 2 for a, b in itertools.pairwise(steps)]).mean()])


# --- masks of other dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_of_any_dtype(dtype: torch.dtype) -> None:
    """Tokenizers make masks of int64."""
    model, module = once()
    mask = mask_of(LENGTHS).flip(1)
    assert torch.equal(torch.stack([*module(X, mask.to(dtype)).penalties.values()]), torch.stack([*module(X, mask).penalties.values()]))
    noisy = regularize(model, NEFTune("body", 5.0, lengths="lengths"), rng=0)
    state = graphreg.rng_state(noisy)
    found = noisy(X, mask.to(dtype)).output
    graphreg.set_rng_state(noisy, state)
    assert torch.equal(found, noisy(X, LENGTHS).output)


@pytest.mark.parametrize("wrong", [torch.full((4, 5), 2), torch.full((4, 5), -torch.inf), torch.full((4, 5), torch.nan), -torch.ones(4, 5)])
def test_a_mask_has_zeros_and_ones(wrong: Tensor) -> None:
    for penalty in (PENALTIES[0], HiddenL2("relu", 1.0, lengths="lengths"), NEFTune("body", 1.0, lengths="lengths")):
        with pytest.raises(RegularizerError, match=rf"lengths='lengths' has {wrong[0, 0].item():g}; a mask of steps is 1 or True where a"):
            regularize(Valued(), penalty)(X, wrong)


# --- values of which only some steps count ---------------------------------------------------------------------------


def counted(lengths: str | None = "lengths") -> list[Penalty]:
    return [
        HiddenL1("relu", 1.0, lengths=lengths), HiddenL2("relu", 1.0, lengths=lengths), KLSparsity("sigmoid", 1.0, lengths=lengths),
        ZLoss("head", 1.0, lengths=lengths), ConfidencePenalty("head", 1.0, lengths=lengths),
    ]  # fmt: skip


class Probable(Valued):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        z = torch.relu(self.body(x))
        return self.head(z) + torch.sigmoid(z)[..., :2]


FORMS = [LENGTHS, mask_of(LENGTHS), mask_of(LENGTHS).long()]


@pytest.mark.parametrize("given", FORMS, ids=["lengths", "mask", "int64"])
def test_padding_is_neither_penalized_nor_averaged(given: Tensor) -> None:
    model = Probable()
    x = X.masked_fill(~mask_of(LENGTHS)[..., None], 0.5)
    expected = regularize(model, counted(None))(X[mask_of(LENGTHS)][None], given).penalties  # one sequence without padding
    for made in (regularize(model, counted()), regularize(model, counted(), example_inputs=(x, given))):
        same(model, made(x, given).penalties, list(expected.values()))
    whole = regularize(model, counted(None))(X, given).penalties
    assert all(not torch.equal(whole[name], value) for name, value in expected.items())


def test_no_step_counts() -> None:
    model = Probable()
    found = regularize(model, counted())(X, torch.zeros_like(LENGTHS)).penalties
    assert all(value == 0 for value in found.values())
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_outputs_of_a_recurrent_layer() -> None:
    """Activation regularization, by hand: the layer says which axis is time."""
    for batch_first, x in ((True, X), (False, X.transpose(0, 1))):
        model = Layered()
        model.rnn = nn.LSTM(3, 4, batch_first=batch_first, dtype=torch.float64)
        found = regularize(model, [HiddenL2("rnn", 1.0, lengths="lengths")])(x, LENGTHS).penalties["hidden_l2"]
        states = model.rnn(x)[0]
        valid = (states if batch_first else states.transpose(0, 1))[mask_of(LENGTHS)]
        torch.testing.assert_close(found, valid.square().mean())
        assert found.item() != pytest.approx(states.square().mean().item())


@pytest.mark.parametrize("given", FORMS, ids=["lengths", "mask", "int64"])
def test_values_at_the_calls_of_a_cell(given: Tensor) -> None:
    model = Cells()
    states, steps = None, []
    for t in range(5):
        states = model.cell(X[:, t], states)
        steps.append(states[0])
    valid = torch.stack(steps, 1)[mask_of(LENGTHS)]
    penalties = [HiddenL1("cell", 1.0, lengths="lengths"), ZLoss("cell", 1.0, lengths="lengths", axis=1)]
    found = regularize(model, penalties, example_inputs=(X, given))(X, given).penalties
    same(model, found, [valid.abs().mean(), valid.logsumexp(1).square().mean()])


def test_channels_and_another_axis_of_time() -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 1, dtype=torch.float64)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.conv(x.transpose(1, 2))

    model = Convolved()
    penalties = [HiddenL2("conv", 1.0, lengths="lengths", time_axis=2), ZLoss("conv", 1.0, lengths="lengths", time_axis=-1)]
    found = regularize(model, penalties, example_inputs=(X, LENGTHS))(X, LENGTHS).penalties
    valid = model.conv(X.transpose(1, 2)).transpose(1, 2)[mask_of(LENGTHS)]
    same(model, found, [valid.square().mean(), valid.logsumexp(1).square().mean()])
    with pytest.raises(RegularizerError, match="^HiddenL2: time_axis=2 without lengths= would do nothing. Give lengths=, the name of"):
        HiddenL2("conv", 1.0, time_axis=2)
    with pytest.raises(RegularizerError, match=r"comes from a convolution .* Give time_axis=2; if axis 1 is time nevertheless"):
        regularize(model, HiddenL2("conv", 1.0, lengths="lengths"))
    with pytest.raises(
        RegularizerError, match=r"units are axis 2 of a value of shape \(4, 4, 5\), which is the axis of time or of the batch"
    ):
        regularize(model, ZLoss("conv", 1.0, lengths="lengths", time_axis=2, axis=2))(X, LENGTHS)


def test_a_value_without_steps() -> None:
    class Pools(Valued):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(x)).mean(1))

    with pytest.raises(RegularizerError, match=r"HiddenL2 at mean: the value has shape \(4, 4\) and is no sequence"):
        regularize(Pools(), HiddenL2("mean", 1.0, lengths="lengths"), example_inputs=(X, LENGTHS))


def test_compiled_as_a_whole() -> None:
    model, given = Probable(), FORMS[2]
    module = regularize(model, counted())
    expected = module(X, given).penalties
    torch.compiler.reset()
    same(model, torch.compile(module, backend="eager", fullgraph=True)(X, given).penalties, list(expected.values()))


def test_in_place_and_under_autocast() -> None:
    """Penalties are computed in float32, and the mask that a tokenizer makes arrives as it is."""
    model = graphreg.regularize_(Valued().to(torch.float32), [HiddenL2("relu", 1.0, lengths="lengths")], scale=1.0)
    x = X.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model(x, FORMS[2])
        expected = torch.relu(model.body(x)).float()[mask_of(LENGTHS)].square().mean()
    assert model.penalties()["hidden_l2"].dtype == torch.float32
    torch.testing.assert_close(model.penalties()["hidden_l2"], expected)


# --- a regularizer of the user's own ---------------------------------------------------------------------------------


def test_a_formula_of_ones_own() -> None:
    """It gets [time, batch, units] and, where it asks, lengths or None; its options are those that it declares."""

    class Last(Penalty):
        lengths: str | None = None

        def __call__(self, steps: Tensor, lengths: Tensor | None) -> Tensor:
            assert steps.shape == (5, 4, 4)
            last = steps[-1] if lengths is None else steps[lengths - 1, torch.arange(4)]
            return last.square().mean()

    model = Valued()
    z = torch.relu(model.body(X))
    assert torch.equal(regularize(model, Last("relu", 1.0))(X, LENGTHS).penalties["last"], z[:, -1].square().mean())
    ours = regularize(model, Last("relu", 1.0, lengths="lengths"))(X, LENGTHS).penalties["last"]
    assert torch.equal(ours, z[torch.arange(4), LENGTHS - 1].square().mean())


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ("steps, z", {}, "Wrong.__call__ asks for steps and for z; it gets either a sequence or a value. Leave one out."),
        ("steps, values", {}, "Wrong.__call__ asks for steps and for values; it gets either a sequence or a value. Leave one out."),
        ("z, lengths", {}, "Wrong.__call__ asks for lengths, but not for the steps that have these lengths. Ask for steps, too."),
        ("z, counted", {}, "Wrong.__call__ asks for counted, which says which steps of z or units count, as the option lengths says. Ask"),
        ("steps, counted", {"lengths": None}, "Wrong.__call__ asks for counted, which says which steps of z or units count, as the option"),
        ("steps", {"lengths": None}, "Wrong has the option lengths, but its __call__ does not take lengths: the option would do nothing."),
    ],
)
def test_a_formula_that_makes_no_sense(arguments: str, options: dict[str, Any], sentence: str) -> None:
    formula = eval(f"lambda self, {arguments}: 0")
    with pytest.raises(RegularizerError, match=re.escape(sentence)):
        type("Wrong", (Penalty,), {"__call__": formula, "__annotations__": dict.fromkeys(options, "str | None"), **options})


# --- what is refused -------------------------------------------------------------------------------------------------

MUST = "for 4 sequences of 5 steps it must be whole numbers of shape (4,), or a mask of shape (4, 5), True or 1 where a step counts."
WRONG = [
    (torch.ones(3, dtype=torch.int64), f"lengths='lengths' is (3,) int64; {MUST}"),
    (torch.ones(4, 6, dtype=torch.int64), f"lengths='lengths' is (4, 6) int64; {MUST}"),
    (torch.ones(5, 4, dtype=torch.bool), f"lengths='lengths' is (5, 4) bool; {MUST}"),
    (torch.ones(4, dtype=torch.bool), f"lengths='lengths' is (4,) bool; {MUST}"),
    (torch.ones(4), f"lengths='lengths' is (4,) float32; {MUST}"),
    (torch.tensor(3), f"lengths='lengths' is () int64; {MUST}"),
]


@pytest.mark.parametrize(("lengths", "sentence"), WRONG, ids=[sentence[:32] for _, sentence in WRONG])
@pytest.mark.parametrize("planned", [True, False])
def test_lengths_of_a_wrong_shape(lengths: Tensor, sentence: str, planned: bool) -> None:
    """When it is planned, if the examples show it; at the call otherwise."""
    with pytest.raises(RegularizerError, match=re.escape(f"RecurrentState at relu: {sentence}")):
        regularize(Valued(), PENALTIES[0], example_inputs=(X, lengths) if planned else None)(X, lengths)


@pytest.mark.parametrize(("value", "text"), [(6, "6"), (-1, "-1")])
def test_lengths_that_no_sequence_has(value: int, text: str) -> None:
    sentence = rf"RecurrentState at relu: lengths='lengths' has {text} for a sequence of 5 steps; a length is a whole number from 0 to 5\."
    with pytest.raises(RegularizerError, match=sentence):
        regularize(Valued(), PENALTIES[0])(X, torch.tensor([5, value, 1, 1]))


@pytest.mark.parametrize("value", [None, [5, 1, 3, 4], 5])
def test_lengths_that_are_no_tensor_in_a_call(value: Any) -> None:
    with pytest.raises(RegularizerError, match=re.escape(f"lengths='lengths' is {value!r} in this call; it must be a tensor.")):
        regularize(Valued(), PENALTIES[0])(X, value)


class Optional(Valued):
    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(x, lengths)


def test_lengths_name_an_input() -> None:
    sentence = r"RecurrentState: lengths='length': no input of the model has that name\. Near names: lengths\. Inputs: x, lengths\."
    with pytest.raises(NoMatchError, match=sentence):
        regularize(Valued(), RecurrentState("relu", 1.0, lengths="length"))
    sentence = r"lengths='lengths': 'lengths' is an argument that is specialized to None: give example_inputs that carry a tensor for it\."
    with pytest.raises(NoMatchError, match=sentence):
        regularize(Optional(), PENALTIES[0])
    with pytest.raises(NoMatchError, match=re.escape("specialized to [5, 1, 3, 4]: give example_inputs that carry a tensor for it.")):
        regularize(Optional(), PENALTIES[0], example_inputs=(X, [5, 1, 3, 4]))
    model = Optional()
    found = regularize(model, PENALTIES, example_inputs=(X, LENGTHS))(X, LENGTHS).penalties
    same(model, found, pooled(model, [row[:n] for row, n in zip(X, LENGTHS, strict=True)]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lengths": LENGTHS}, "RecurrentState: lengths=Tensor is not allowed; give the name of the input that carries the lengths."),
        ({"lengths": 5}, "RecurrentState: lengths=int is not allowed; give the name of the input that carries the lengths."),
        ({"time_axis": "1"}, "RecurrentState: time_axis='1' is not allowed; give the axis of time in the value, a whole number: "),
        ({"time_axis": 1.0}, "RecurrentState: time_axis=1.0 is not allowed; give the axis of time in the value, a whole number: "),
        ({"time_axis": True}, "RecurrentState: time_axis=True is not allowed; give the axis of time in the value, a whole number: "),
    ],
)
def test_options_that_are_no_name_and_no_axis(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RegularizerError, match=re.escape(sentence)):
        RecurrentState("relu", 1.0, **options)


@pytest.mark.parametrize("axis", [3, -4])
@pytest.mark.parametrize("planned", [True, False])
def test_an_axis_out_of_range(axis: int, planned: bool) -> None:
    sentence = (
        rf"RecurrentState at relu: time_axis={axis} is out of range for a value of shape \(4, 5, 4\); give the axis of time: "
        r"1 for \[batch, time, \.\.\.\], 0 for \[time, batch, \.\.\.\]\."
    )
    with pytest.raises(RegularizerError, match=sentence):
        regularize(Valued(), RecurrentState("relu", 1.0, time_axis=axis), example_inputs=(X, LENGTHS) if planned else None)(X, LENGTHS)


@pytest.mark.parametrize("planned", [True, False])
def test_a_value_that_is_no_sequence(planned: bool) -> None:
    sentence = (
        r"RecurrentNorm at relu: the value has shape \(4, 4\) and is no sequence: a sequence is \[batch, time, units\], 3 dims or more\. "
        r"Neighbouring units are not neighbouring steps\."
    )
    with pytest.raises(RegularizerError, match=sentence):
        regularize(Valued(), RecurrentNorm("relu", 1.0), example_inputs=(X[:, 0], LENGTHS) if planned else None)(X[:, 0], LENGTHS)


def test_a_packed_sequence() -> None:
    """The value of the layer is packed, and no site; what is padded again behind it is a sequence."""
    model = Packed()
    with pytest.raises(graphreg.NoMatchError, match=r"It finds only what cannot be regularized: rnn \(a packed sequence\)"):
        regularize(model, RecurrentState("rnn", 1.0, lengths="lengths"))
    module = regularize(model, RecurrentState("pad_packed_sequence:0", 1.0, lengths="lengths"))
    assert module(X, LENGTHS).penalties["recurrent_state"].item() > 0


class Spoiled(Valued):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        lengths.add_(1)
        return super().forward(x, lengths)


def test_lengths_that_the_model_overwrites() -> None:
    with pytest.raises(TraceError, match="recurrent_state: the model writes into its input 'lengths', which lengths= names"):
        regularize(Spoiled(), PENALTIES[0])


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = Valued()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = regularize(model, PENALTIES)
    for _ in range(2):
        with pytest.raises(RegularizerError):
            module(X, LENGTHS + 9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(graphreg.strengths(module)) == ["recurrent_state", "recurrent_norm", "recurrent_norm_1"]
    module(X, LENGTHS)


class Attention(nn.Module):
    """Its attention computes [batch, heads, time, size]: as many heads as steps, so that either could be meant."""

    def __init__(self, attend: Any = nn.functional.scaled_dot_product_attention) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 30, dtype=torch.float64), nn.Linear(10, 2, dtype=torch.float64)
        self.attend = attend

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 5, 2)).permute(2, 0, 3, 1, 4)
        heads = torch.tanh(self.attend(q, k, v))
        return self.out(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("site", ["scaled_dot_product_attention", "tanh"])
@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_the_steps_of_attention_are_its_axis_before_the_last(front_end: Any, site: str) -> None:
    options: dict[str, Any] = {"front_end": front_end, "example_inputs": (X, LENGTHS), "keep": site}
    found = regularize(Attention(), HiddenL2(site, 1.0, lengths="lengths"), **options)(X, LENGTHS)
    steps = found.values[site].transpose(1, 2)[mask_of(LENGTHS)]
    torch.testing.assert_close(found.penalties["hidden_l2"], steps.square().mean())
    heads = regularize(Attention(), HiddenL2(site, 1.0, lengths="lengths", time_axis=-3), **options)(X, LENGTHS)
    torch.testing.assert_close(heads.penalties["hidden_l2"], heads.values[site][mask_of(LENGTHS)].square().mean())


@pytest.mark.parametrize("attend", [
    lambda q, k, v: nn.functional.dropout((q @ k.mT).softmax(-1), 0.0) @ v,
    lambda q, k, v: torch.matmul(torch.softmax(q @ k.mT, -1).to(v.dtype), v),
    lambda q, k, v: torch.einsum("bhqk, bhkd -> bhqd", (q @ k.mT).softmax(-1), v),
])  # fmt: skip
def test_the_steps_of_an_attention_that_is_written_out(attend: Any) -> None:
    module = regularize(Attention(attend), HiddenL2("tanh", 1.0, lengths="lengths"), example_inputs=(X, LENGTHS), keep="tanh")
    found = module(X, LENGTHS)
    torch.testing.assert_close(found.penalties["hidden_l2"], found.values["tanh"].transpose(1, 2)[mask_of(LENGTHS)].square().mean())


def test_locked_dropout_locks_the_steps_of_attention() -> None:
    module = regularize(Attention(), locked_dropout=0.5, rng=0, keep="tanh")
    mask = module(X, LENGTHS).values["tanh"] == 0
    assert (mask == mask[:, :, :1]).all() and not (mask == mask[:, :1]).all()
