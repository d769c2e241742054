from __future__ import annotations

import math
import re
from typing import NamedTuple

import pytest
import scipy.special
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import ZLoss
from penalties import Classifier, agrees, before_and_after, nothing_else_changes, of, random, refused, same_compiled

LOGITS = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])


def test_before_and_after() -> None:
    expected = """fc = self.fc(x)
fc_z_loss = self.graphreg_rules.fc_z_loss(fc)
z_loss = self.graphreg_rules.z_loss(fc_z_loss)
return graphreg_Regularized(fc, {'z_loss': z_loss})"""
    before_and_after(expected, Classifier(), "fc = self.fc(x)\nreturn fc", z_loss=1.0)


def test_by_hand() -> None:
    """Z = 1 + 3 and 1 + 1."""
    assert of(ZLoss("*", 0.5), Classifier(), LOGITS) == pytest.approx(0.5 * (math.log(4) ** 2 + math.log(2) ** 2) / 2)


def test_against_scipy_and_differences() -> None:
    def theirs(logits: Tensor) -> Tensor:
        return torch.tensor((scipy.special.logsumexp(logits.numpy(), axis=1) ** 2).mean())

    agrees(ZLoss("*", 1.0), theirs, random(5, 3))


def test_compiled() -> None:
    same_compiled(ZLoss("*", 0.5), Classifier(), LOGITS)


def test_what_must_not_change() -> None:
    nothing_else_changes(ZLoss("*", 0.5), Classifier(), LOGITS)


def test_errors() -> None:
    refused("ZLoss at 1: the penalty takes logits, and this comes from a logsoftmax. Select what the logsoftmax reads.",
            lambda: graphreg.regularize(nn.Sequential(nn.Linear(2, 2), nn.LogSoftmax(1)), z_loss=0.1))  # fmt: skip
    refused("ZLoss at 0: axis=2 is out of range for a value of shape (1, 2); give the axis of the units, a whole number from -2 to 1.",
            lambda: graphreg.regularize(nn.Sequential(nn.Linear(2, 2)), ZLoss("*", 0.1, axis=2), example_inputs=LOGITS[:1]))  # fmt: skip


class EncoderAndHead(nn.Module):
    """Returns a state that the head reads, the logits, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.encoder(x)
        logits = self.head(state.tanh())
        return state, logits, nn.functional.cross_entropy(logits, logits.argmax(1))


def test_an_output_that_a_later_layer_reads_is_no_logit() -> None:
    model, x = EncoderAndHead(), torch.randn(5, 4)
    for key in ("z_loss", "confidence"):
        found = graphreg.plan(graphreg.trace(model), graphreg.build(key, weight=0.1)).of(key)
        assert [edit.site.name for edit in found] == ["head"]
    penalty = graphreg.regularize(model, z_loss=1.0)(x).penalties["z_loss"]
    torch.testing.assert_close(penalty, model(x)[1].logsumexp(1).square().mean())


def test_dropout_of_a_loss_is_refused() -> None:
    model, x = EncoderAndHead(), torch.randn(5, 4)
    told = "BernoulliDropout at cross_entropy: the value is a loss or another single number, and no prediction. Leave it out: "
    with pytest.raises(graphreg.RegularizerError, match=re.escape(told + 'dropout={("**#output", "!cross_entropy"): strength}.')):
        graphreg.regularize(model, output_dropout=0.5)
    module = graphreg.regularize(model, dropout={("**#output", "!cross_entropy"): 0.5}, rng=0)
    assert graphreg.report(module).regularizers[0].sites == ("encoder", "head")
    assert (module(x).output[1] == 0).any()


class LanguageModel(nn.Module):
    """Returns logits, the last state, and attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.attend, self.head = nn.GRU(4, 6, batch_first=True), nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, state = self.rnn(x)
        attended, weights = self.attend(h, h, h)
        return self.head(attended), state, weights


@pytest.mark.parametrize("key", ["z_loss", "confidence"])
def test_states_and_attention_weights_are_no_logits(key: str) -> None:
    found = graphreg.plan(graphreg.trace(LanguageModel(), torch.randn(2, 5, 4)), graphreg.build(key, weight=0.1)).of(key)
    assert [edit.site.name for edit in found] == ["head"]


class Two(nn.Module):
    """Returns logits and a second output."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.cell, self.lstm_cell, self.head, self.second = nn.GRUCell(4, 6), nn.LSTMCell(4, 6), nn.Linear(6, 3), second

    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        state, pair = self.cell(x), self.lstm_cell(x)
        logits = self.head(state)
        seconds = {
            "new state": self.cell(x, state),
            "a view of a state": pair[1][:, None].float(),
            "pair": pair,
            "detached": logits.detach(),
            "features": state.relu().flatten(1),
            "labels": logits.argmax(1),
            "a variance": logits.exp(),
            "mask": torch.ones_like(logits).gather(1, torch.rand_like(logits).argsort(1)),
            "capped": 30 * torch.tanh(logits / 30),
            "the logits once more": logits.flatten(),
        }
        return logits, seconds[self.second]


SECONDS = [
    "new state", "a view of a state", "pair", "detached", "features", "labels", "a variance", "mask", "capped", "the logits once more",
]  # fmt: skip


@pytest.mark.parametrize("second", SECONDS)
def test_states_features_and_detached_values_are_no_logits(second: str) -> None:
    module = graphreg.regularize(Two(second), z_loss=1.0, example_inputs=(torch.randn(5, 4),))
    assert graphreg.report(module).regularizers[0].sites == (("head", "mul") if second == "capped" else ("head",))


class Ensemble(nn.Module):
    """Its output is made of probabilities alone; with a gate or a logarithm, it is made of logits."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(4, 3), nn.Linear(4, 3), way

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        a, b = self.a(x), self.b(x)
        p, q = a.softmax(-1), b.softmax(-1)
        ways: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "mean": torch.stack([p, q]).mean(0), "clamped": p.clamp(1e-6, 1), "mixture": b.sigmoid() * p + (1 - b.sigmoid()) * q,
            "flat": p.flatten(), "gated": a * b.sigmoid(), "logarithm": (p + q).log(), "beside": (a, q.mean(0, keepdim=True)),
        }  # fmt: skip
        return ways[self.way]


@pytest.mark.parametrize("way", ["mean", "clamped", "mixture", "flat", "gated", "logarithm", "beside"])
@pytest.mark.parametrize("key", ["z_loss", "confidence"])
def test_what_is_computed_from_probabilities_is_no_logit(way: str, key: str) -> None:
    if way in ("mean", "clamped", "mixture", "flat"):
        with pytest.raises(graphreg.RegularizerError, match="the penalty takes logits, and this comes from a s.*Select what the s.* reads"):
            graphreg.regularize(Ensemble(way), example_inputs=(torch.randn(5, 4),), **{key: 1.0})
        return
    sites = graphreg.report(graphreg.regularize(Ensemble(way), **{key: 1.0})).regularizers[0].sites
    assert sites == {"gated": ("mul_2",), "logarithm": ("log",), "beside": ("a",)}[way]


class Parts(nn.Module):
    """The start and the end of a span."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.head(x).split(1, -1)
        return start.squeeze(-1), end.squeeze(-1)


def test_parts_of_a_head_count_each() -> None:
    model, x = Parts(), torch.randn(3, 6, 4)
    for options in ({}, {"example_inputs": x}):
        penalty = graphreg.regularize(model, z_loss=1.0, **options)(x).penalties["z_loss"]
        torch.testing.assert_close(penalty, torch.stack(model(x)).logsumexp(-1).square().mean())


class State(NamedTuple):
    state: Tensor
    more: Tensor


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> State:
        h = self.a(x)
        return State(h.clamp(-1, 1) if not torch.isfinite(h).all() else h, h * 2)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = Opaque(), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.encoder(x)
        return self.head(self.decoder(encoded.state).relu()), encoded.state


def test_a_field_that_is_returned_and_read_by_a_layer_is_no_logit() -> None:
    """Each read is a node of its own."""
    module = graphreg.regularize(EncoderDecoder(), z_loss=1.0, example_inputs=(torch.randn(5, 4),))
    assert graphreg.report(module).regularizers[0].sites == ("head",)


class PolicyAndEmbeddings(nn.Module):
    """Returns a policy's logits, its value, and what a similarity is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value, self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 1), nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = nn.functional.normalize(self.a(x)), self.b(x)
        return {"policy": self.policy(x), "value": self.value(x), "flat": self.value(x).squeeze(-1), "a": a, "b": b, "alike": a @ b.t()}


def test_single_numbers_and_embeddings_are_no_logits() -> None:
    module = graphreg.regularize(PolicyAndEmbeddings(), z_loss=1.0, example_inputs=(torch.randn(5, 4),))
    assert graphreg.report(module).regularizers[0].sites == ("policy", "matmul")
