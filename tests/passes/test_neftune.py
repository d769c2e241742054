from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

import graphreg
from graphreg import GraphRegError
from graphreg.passes import NEFTune
from lowering_check import check
from spliced import acts_in_train_mode_alone, formula, refuses, refuses_value, same_compiled, spliced
from two_layers import text

IDS, LENGTHS = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 6]]), torch.tensor([2, 4])


class Tokens(nn.Module):
    """Embeds positions, which are no input, and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.token, self.out = nn.Embedding(4, 8), nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position(torch.arange(ids.shape[1]))
        return self.out(self.token(ids) + positions)


class WithLengths(nn.Module):
    """Returns the embeddings, so that the noise can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(9, 8)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.token(ids) * 1


class ScaledEmbedding(nn.Embedding):
    """As in Gemma and BART."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding_dim**0.5


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_the_noise_is_added_to_what_a_scaled_embedding_returns(front_end: Any) -> None:
    model, ids = nn.Sequential(ScaledEmbedding(9, 16), nn.Linear(16, 9)), torch.arange(8).view(2, 4)
    module = graphreg.regularize(model, neftune=5.0, rng=0, keep="0", example_inputs=ids, front_end=front_end)
    noise = module(ids).values["0"] - model[0](ids)
    assert 0 < noise.abs().max() <= 5.0 / (4 * 16) ** 0.5


def test_before_and_after() -> None:
    module = graphreg.regularize(Tokens(), neftune=5.0, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
getattr_1 = ids.shape
getitem = getattr_1[1]
arange = torch.arange(getitem)
position = self.position(arange)
token = self.token(ids)
token_neftune = self.graphreg_rules.token_neftune(token, key)
add = token_neftune + position
out = self.out(add)
return graphreg_Regularized(out, {})"""
    )
    assert "neftune" not in graphreg.strip(module).code


def test_by_hand() -> None:
    """L d = 2 · 8 = 16 and a weight of 4: draws of 0, ½ and 1 add -4/√16 = -1, 0 and 1; the gradient passes unchanged."""
    z = torch.ones(1, 2, 8, requires_grad=True)
    draw = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.5, 0.5]).expand(1, 2, 8)
    y = formula(NEFTune("0", 4.0), z, draw, lengths=None)
    torch.testing.assert_close(y[0, 1], torch.tensor([0.0, 1.0, 2.0, 2.0, 1.0, 0.0, 1.0, 1.0]))
    y.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_the_formula_is_transformers_given_the_draw() -> None:
    z = torch.linspace(-1, 1, 3 * 5 * 8).view(3, 5, 8)
    torch.manual_seed(0)
    draw = torch.rand_like(z)
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(SimpleNamespace(training=True, neftune_noise_alpha=5.0), None, z)
    torch.testing.assert_close(formula(NEFTune("0", 5.0), z, draw, lengths=None), theirs)


def test_the_noise_is_uniform() -> None:
    """In ±5/√(L d) = ±0.5, mean 0, variance 0.5²/3, one draw an element: its neighbours say nothing of it."""
    noise = spliced(NEFTune("0", 5.0), torch.zeros(200, 10, 10)).double()
    assert 0.499 < float(noise.max()) <= 0.5 and -0.5 <= float(noise.min()) < -0.499
    assert abs(float(noise.mean())) < 5 * (0.25 / 3 / 20_000) ** 0.5 and abs(float(noise.var()) / (0.25 / 3) - 1) < 0.05
    for axis in range(3):
        assert abs(float((noise * noise.roll(1, axis)).mean()) / (0.25 / 3)) < 0.04


def lengths_module(**options: Any) -> Any:
    return graphreg.regularize(WithLengths(), NEFTune("*", 5.0, lengths="lengths"), rng=0, **options)


def test_lengths() -> None:
    """With lengths L is that of each example: two tokens of four scale the noise by √2. A mask says the same, and so does compiled code."""
    plain = graphreg.regularize(WithLengths(), NEFTune("*", 5.0), rng=0)
    counted = lengths_module()
    assert "token_neftune = self.graphreg_rules.token_neftune(token, key, lengths = lengths)" in text(counted.code)
    with torch.no_grad():
        counted.token.weight.copy_(plain.token.weight)
    z = plain.eval()(IDS, LENGTHS).output
    noises = [module.train()(IDS, LENGTHS).output - z for module in (plain, counted)]
    torch.testing.assert_close(noises[1], noises[0] * torch.tensor([2**0.5, 1.0])[:, None, None], rtol=0, atol=1e-6)
    mask = torch.arange(4) < LENGTHS[:, None]
    for lengths, run in ((mask, lengths_module()), (LENGTHS, torch.compile(lengths_module(), backend="aot_eager", fullgraph=True))):
        with torch.no_grad():
            run.token.weight.copy_(plain.token.weight)
        torch.testing.assert_close(run(IDS, lengths).output - z, noises[1], rtol=0, atol=1e-6)


def test_by_a_backend() -> None:
    run = torch.compile(WithLengths(), backend=graphreg.backend(neftune=5.0, rng=0, inner="aot_eager"))
    with torch.no_grad():
        run.token.weight.zero_()
    noise = run(IDS, LENGTHS).detach()
    assert 0 < float(noise.abs().max()) <= 5 / 32**0.5


def test_of_several_inputs_the_first() -> None:
    class Segments(Tokens):
        def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:  # type: ignore[override]
            return self.out(self.token(ids.view(-1, 4)) + self.position(kinds))

    plan = graphreg.plan(graphreg.trace(Segments()), NEFTune("*", 5.0))
    assert [edit.site.name for edit in plan.edits] == ["token"]


class Items(nn.Module):
    """A recommender: the table of items gets a history and the next item, joined; that of users one index an example."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.out = nn.Embedding(5, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, user: Tensor, history: Tensor, item: Tensor) -> Tensor:
        ids = torch.cat([history, item[:, None]], 1)
        return self.out(self.user(user) + self.item(ids).mean(1))


def test_joined_indices_and_an_index_an_example() -> None:
    traced = graphreg.trace(Items(), (torch.tensor([1, 2]), IDS, torch.tensor([3, 4])))
    assert [edit.site.name for edit in graphreg.plan(traced, NEFTune("*", 5.0)).edits] == ["item"]
    assert {site.name: site.reads for site in traced.values if site.reads} == {"user": "user", "item": "history"}


def test_modes_and_strength_0() -> None:
    acts_in_train_mode_alone(NEFTune("0", 5.0), torch.randn(2, 3, 4))


def test_compiled() -> None:
    same_compiled(NEFTune("0", 5.0), torch.randn(2, 3, 4))


def test_the_check_finds_lengths_that_are_not_read() -> None:
    model = WithLengths()
    traced = graphreg.trace(model)
    plan = graphreg.plan(traced, NEFTune("*", 5.0, lengths="lengths"))
    module = graphreg.rewrite(traced, plan, rng=0)
    node = next(n for n in module.graph.nodes if n.name == "token_neftune")
    node.kwargs = {}
    with pytest.raises(GraphRegError, match="failed its check: "):
        check(module, traced, plan)


def test_errors() -> None:
    refuses(r"NEFTune: weight=-1.0 is not allowed; weight must be 0 or more", NEFTune, "0", -1)
    refuses(r"NEFTune: lengths=int is not allowed; give the name of the input that carries the lengths", NEFTune, "0", 1, lengths=3)
    sentence = r"NEFTune at 0: the value has shape \(4, 3\); the splice takes the embeddings of sequences, \[batch, length, features\]"
    refuses_value(sentence, NEFTune("0", 5.0), torch.ones(4, 3))
    with pytest.raises(graphreg.NoMatchError, match=r"lengths='length': no input of the model has that name\. Near names: lengths"):
        graphreg.regularize(WithLengths(), NEFTune("*", 5.0, lengths="length"))
    wrong = {
        r"is \(2,\) float32; for 2 sequences of 4 steps it must be whole numbers": torch.tensor([1.0, 2.0]),
        r"has 5 for a sequence of 4 steps; a length is a whole number from 0 to 4": torch.tensor([5, 1]),
    }
    for message, lengths in wrong.items():
        with pytest.raises(graphreg.RegularizerError, match=rf"NEFTune at token: lengths='lengths' {message}"):
            lengths_module()(IDS, lengths)
    with pytest.raises(graphreg.NoMatchError, match=r"\(the Embedding that reads token ids\)"):
        graphreg.regularize(nn.Linear(2, 2), neftune=5.0)
