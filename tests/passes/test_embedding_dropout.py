from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import NoMatchError, RegularizerError
from graphreg.passes import EmbeddingDropout
from parameter_splices import same_compiled_weights
from two_layers import text

IDS = torch.tensor([[1, 2, 0], [3, 1, 1]])


class Language(nn.Module):
    """Words and positions; the head shares the table of words, and so does what the root reads."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position, self.head = nn.Embedding(6, 4, padding_idx=0), nn.Embedding(3, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.word.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.word(ids) + self.position(torch.arange(3))
        return self.head(h) + F.linear(h, self.word.weight)  # type: ignore[no-any-return]


def test_before_and_after() -> None:
    """The table of words alone, and where the Embedding reads it alone."""
    model = Language()
    before = text(graphreg.strip(graphreg.regularize(model, weight_l2=0.1)).code)
    module = graphreg.regularize(model, embedding_dropout=0.5, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
word_weight_1 = self.word.weight
word_weight_embedding_dropout = self.graphreg_rules.word_weight_embedding_dropout(word_weight_1, key)
word_layer = self.word
word = graphreg_ir_layer_calls_call_with(ids, graphreg_layer = word_layer, graphreg_parameters = {'weight': word_weight_embedding_dropout})
_tensor_constant0 = self._tensor_constant0
position = self.position(_tensor_constant0)
add = word + position
head = self.head(add)
word_weight = self.word.weight
linear = torch._C._nn.linear(add, word_weight)
add_1 = head + linear
return graphreg_Regularized(add_1, {})"""
    )
    assert text(graphreg.strip(module).code) == before
    assert "embedding_dropout: word.weight is not replaced when read by Language, head" in str(graphreg.report(module, cost=False))


def test_merity() -> None:
    """``embedded_dropout`` of AWD-LSTM: a mask [words, 1] of 1/(1-p) and 0, times the table, into ``F.embedding``; with its gradient."""
    torch.manual_seed(0)
    table, ids, seen = nn.Embedding(50, 4, padding_idx=3), torch.arange(50).view(10, 5) % 20, list[Tensor]()
    module = graphreg.regularize(nn.Sequential(table), embedding_dropout=0.4, rng=1)
    module.graphreg_rules._0_weight_embedding_dropout.register_forward_hook(lambda m, args, out: seen.append(out))
    out = module(ids).output
    mask = (seen[0].detach()[:, :1] != 0).float() / 0.6
    mask[3] = 1.0  # its row is zero
    out.square().sum().backward()
    gradient = table.weight.grad
    table.weight.grad = None
    expected = F.embedding(ids, table.weight * mask, padding_idx=3)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, table.weight.grad)
    assert 5 < int((mask == 0).sum()) < 35


def test_the_rate() -> None:
    p, table = 0.3, nn.Embedding(10_000, 2)
    with torch.no_grad():
        table.weight.fill_(1.0)
    out = graphreg.regularize(nn.Sequential(table), embedding_dropout=p, rng=1)(torch.arange(10_000)).output
    assert torch.equal(out[:, 0], out[:, 1])
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert abs(float((out[:, 0] == 0).double().mean()) - p) < 4 * (p * (1 - p) / 1e4) ** 0.5


def test_the_classes_own_code_and_bags() -> None:
    """A subclass of nn.Embedding with a forward of its own is one; so is an EmbeddingBag."""

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 2

    table = Scaled(6, 4)
    out = graphreg.regularize(nn.Sequential(table), embedding_dropout=0.5, rng=0)(torch.arange(6)).output
    kept = out.abs().sum(1) != 0
    torch.testing.assert_close(out[kept], table.weight[kept] * 4)
    assert 0 < int(kept.sum()) < 6
    bag = nn.EmbeddingBag(6, 4, mode="sum")
    out = graphreg.regularize(nn.Sequential(bag), EmbeddingDropout("0.weight", 0.5), rng=0)(torch.arange(6).view(6, 1)).output
    assert 0 < int((out.abs().sum(1) == 0).sum()) < 6


def test_what_must_not_change() -> None:
    model = Language()
    module = graphreg.regularize(model, embedding_dropout=0.5, rng=0)
    assert not torch.equal(module(IDS).output, model(IDS))
    assert list(module.state_dict()) == list(model.state_dict()) and module.head.weight is model.word.weight
    assert torch.equal(module.eval()(IDS).output, model(IDS))


def test_compiled_it_is_eager() -> None:
    same_compiled_weights(EmbeddingDropout("**", 0.5), nn.Embedding(6, 4), IDS)


def test_errors() -> None:
    with pytest.raises(RegularizerError, match=r"EmbeddingDropout: weight=1\.0 is not allowed; weight must be in \[0, 1\)"):
        EmbeddingDropout("*", 1.0)
    with pytest.raises(
        NoMatchError, match=r"none of the default sites of EmbeddingDropout \(the table of the Embedding that reads token ids\)"
    ):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2)), embedding_dropout=0.5)
    with pytest.raises(NoMatchError, match=r"0\.weight \(of a Linear, not of Embedding or EmbeddingBag\)"):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2)), EmbeddingDropout("0.weight", 0.5))
