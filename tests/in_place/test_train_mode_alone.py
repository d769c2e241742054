"""Models of which only train mode can be traced, such as a tagger that decodes in eval mode: they work in place, beside the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphreg
from graphreg import TraceError


class Drop(nn.Module):
    """A dropout that a trace sees into."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class Tagger(nn.Module):
    """Returns a loss in train mode, and in eval mode the best tag of each step, found by Python code on values."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.drop, self.hidden, self.norm = nn.Embedding(20, 8), Drop(), nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.tags = nn.Linear(16, 5)

    def forward(self, words: Tensor, tags: Tensor | None = None) -> Any:
        h = torch.relu(self.hidden(self.drop(self.embedding(words))))
        h = F.dropout(self.norm(h.transpose(1, 2)).transpose(1, 2), 0.2, self.training)
        scores = self.tags(h)
        if self.training:
            return F.cross_entropy(scores.flatten(0, 1), tags.flatten())  # type: ignore[union-attr]
        return self.decode(scores)

    def decode(self, scores: Tensor) -> list[list[int]]:
        return [[max(range(5), key=step.__getitem__) for step in row] for row in scores.tolist()]


class Unfinished(Tagger):
    """Raises in eval mode."""

    def decode(self, scores: Tensor) -> list[list[int]]:
        raise NotImplementedError("decoding is not made yet")


class Remembers(Tagger):
    """Adds, in eval mode, what its last call has left behind."""

    last: Any = 0

    def decode(self, scores: Tensor) -> Any:
        self.last = self.last + scores.mean()
        return self.last + scores


def _batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 20, (rows, 6), generator=generator), torch.randint(0, 5, (rows, 6), generator=generator)


def _one_in_eval(model: Any, i: int) -> None:
    model.train()
    (model.drop if i % 2 else model.norm).eval()


def _frozen(model: Any, i: int) -> None:
    model.train()
    model.embedding.requires_grad_(False).eval()
    model.drop.train(i > 2)


@pytest.mark.parametrize("turn", [lambda model, i: model.train(i != 2), _one_in_eval, _frozen], ids=["eval between", "a part", "frozen"])
@pytest.mark.parametrize("kind", [Tagger, Remembers])
def test_training_is_that_of_the_plain_model(kind: type[nn.Module], turn: Callable[[Any, int], Any]) -> None:
    """Loss by loss, answer by answer, with the modes of submodules changed between the steps."""
    plain = kind()
    ours = graphreg.regularize_(copy.deepcopy(plain), hidden_dropout=0.0, weight_l2=0.0, scale=1)

    def run(model: nn.Module) -> list[Any]:
        torch.manual_seed(0)
        optimizer, given = torch.optim.SGD(model.parameters(), 0.1), list[Any]()
        for i in range(5):
            turn(model, i)
            words, tags = _batch(3 + i % 2)
            if model.training:
                loss = model(words, tags)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                given.append(loss.detach())
            else:
                given += [model(words), model(words)]
        return [*given, torch.rand(2), dict(model.state_dict())]

    torch.testing.assert_close(run(ours), run(plain), rtol=0, atol=0)


def test_it_adds_noise_in_train_mode_and_says_that_there_is_no_graph_of_eval_mode() -> None:
    model = graphreg.regularize_(Tagger(), hidden_dropout=0.5, hidden_l1=1e-2, rng=0, scale=1)
    words, tags = _batch(3)
    first, second = model(words, tags), model(words, tags)
    assert not torch.equal(first, second)
    assert model.eval()(words) == graphreg.strip_(copy.deepcopy(model))(words)
    noted = [line for line in str(graphreg.report(model.train())).splitlines() if line.startswith("train mode alone: ")]
    assert len(noted) == 1 and "Tagger cannot be traced symbolically at " in noted[0] and "scores.tolist()" in noted[0]
    graphreg.verify(model, model, words, tags)
    losses = []
    for each in (copy.deepcopy(model), model):
        torch.manual_seed(0)  # for the model's own dropout
        losses.append(each(words, tags))
    assert torch.equal(*losses)


@pytest.mark.parametrize("kind", [Tagger, Unfinished])
def test_with_example_inputs_in_eval_mode(kind: type[nn.Module]) -> None:
    """A pretrained model comes in eval mode."""
    model = graphreg.regularize_(kind().eval(), hidden_dropout=0.5, rng=0, example_inputs=_batch(3)).train()
    model(*_batch(3)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [Tagger, Unfinished, Remembers])
def test_refused_where_eval_mode_runs_the_graph(kind: type[nn.Module]) -> None:
    """``regularize``; in place with ``eval_penalties``; noise in eval mode."""
    cure = r"That is in eval mode; in train mode it can be traced. Regularize it in place.*regularize_, without eval_penalties=True"
    model = kind()
    with pytest.raises(TraceError, match=cure):
        graphreg.regularize(model, hidden_dropout=0.5, example_inputs=_batch(3))
    with pytest.raises(TraceError, match=cure):
        graphreg.regularize_(copy.deepcopy(model), hidden_dropout=0.5, eval_penalties=True)(*_batch(3))
    placed = graphreg.regularize_(model, hidden_dropout=0.5)
    placed(*_batch(3))
    with (
        pytest.raises(TraceError, match=rf"{kind.__name__}(\.forward changes self\.last for| cannot be traced symbolically at) "),
        graphreg.noise_on(placed.eval()),
    ):
        placed(*_batch(3))
