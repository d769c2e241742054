"""nn.Transformer, encoder and decoder, through the export front end, which sees into it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.tracing.trace import Traced

WIDTH = 8


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.core = nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True)
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.core(
            self.embed(source), self.embed(target), tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding
        )
        return self.head(hidden)


def inputs(batch: int = 2, source: int = 6, target: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(batch)
    padding = torch.arange(source) >= torch.arange(batch)[:, None] % 3 + source - 2
    return torch.randint(20, (batch, source), generator=draw), torch.randint(20, (batch, target), generator=draw), padding


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Translator()


@pytest.fixture(scope="module")
def traced(model: nn.Module) -> Traced:
    return graphreg.trace(model, inputs(), front_end="export")


def test_the_names_of_the_inner_sites(traced: Traced) -> None:
    assert list(traced.graphs) == ["both"] and traced.opaque_modules == {}
    names = [site.name.removeprefix("core.") for site in traced.values if site.name.startswith("core.") and site.selectable]
    assert [name.removeprefix("encoder.layers.0.") for name in names if name.startswith("encoder.layers")] == [
        "self_attn", "dropout1", "add", "norm1", "linear1", "relu", "dropout", "linear2", "dropout2", "add_1", "norm2",
    ]  # fmt: skip
    assert [name.removeprefix("decoder.layers.0.") for name in names if name.startswith("decoder.layers")] == [
        "self_attn", "dropout1", "add", "norm1", "multihead_attn", "dropout2", "add_1", "norm2",
        "linear1", "relu", "dropout", "linear2", "dropout3", "add_2", "norm3",
    ]  # fmt: skip
    outputs = {label.name: site.name for site in traced.values for label in site.labels if label.name.startswith("core")}
    assert outputs["core"] == outputs["core.decoder"] == "core.decoder.norm" and outputs["core.encoder"] == "core.encoder.norm"
    assert outputs["core.decoder.layers.0"] == "core.decoder.layers.0.norm3"
    assert [own.site.name for own in traced.native_dropout if own.kind == "heads" and not own.why_not] == [
        "core.encoder.layers.0.self_attn", "core.decoder.layers.0.self_attn", "core.decoder.layers.0.multihead_attn",
    ]  # fmt: skip


def test_training_compiled(model: nn.Module, traced: Traced) -> None:
    regularizers = graphreg.from_kwargs(traced, hidden_dropout=0.1, hidden_l1={"weight": 1e-3, "pattern": "*.relu"})
    edits = graphreg.plan(traced, regularizers)
    assert len(edits.of("hidden_dropout")) == 9 and len(edits.of("hidden_l1")) == 2
    module = graphreg.rewrite(traced, edits, rng=0)
    step = torch.compile(module, fullgraph=True, backend="eager")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        output, penalties = step(*inputs())
        loss = nn.functional.cross_entropy(output.flatten(0, 1), inputs()[1].flatten()) + penalties["hidden_l1"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_stripped_it_is_the_model(model: nn.Module, traced: Traced) -> None:
    edits = graphreg.plan(traced, [graphreg.build("dropout", weight=0.5), graphreg.build("hidden_l1", weight=1.0)])
    module = graphreg.strip(graphreg.rewrite(traced, edits, rng=0))
    for sizes in ((2, 6, 5), (3, 4, 7), (1, 5, 1)):  # other sizes than the example's
        for training in (True, False):
            found = []
            for each in (module.train(training), model.train(training)):
                model.zero_grad()
                torch.manual_seed(1)  # the model's own dropout draws
                output = each(*inputs(*sizes))
                output.square().mean().backward()
                found.append((output, [p.grad for p in model.parameters()]))
            (ours, our_grads), (theirs, their_grads) = found
            assert torch.allclose(ours, theirs, atol=1e-6)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(our_grads, their_grads, strict=True))
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():  # torch goes another way then: one operator a layer, on nested tensors
        warnings.simplefilter("ignore")
        assert torch.allclose(module.eval()(*inputs()), model(*inputs()), atol=1e-5)
    model.train()


def test_a_causal_mask_acts_and_is_nobodys_hint(model: nn.Module, traced: Traced) -> None:
    module = graphreg.strip(graphreg.rewrite(traced, graphreg.plan(traced, []))).eval()
    source, target, padding = inputs()
    other = target.clone()
    other[:, 3:] = (other[:, 3:] + 1) % 20
    a, b = module(source, target, padding), module(source, other, padding)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.allclose(a[:, 3:], b[:, 3:])
