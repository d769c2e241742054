"""Adapters of PEFT: a model that has them is regularized, and a regularized model is given them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg

peft = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks, self.head = nn.Embedding(11, 8), nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


REGULARIZED: dict[str, Any] = {"rng": 3, "hidden_dropout": 0.1, "hidden_l1": 0.1}
LORA: dict[str, Any] = {"weight": 0.1, "pattern": "**lora_*"}
TOKENS = torch.arange(10).view(2, 5)


def adapted(model: nn.Module) -> Any:
    """With adapters on the queries and values, none of whose factors is zero."""
    given = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q", "v"]))
    torch.manual_seed(1)
    for name, parameter in sorted(given.named_parameters(), key=lambda item: str(item[0])):
        if "lora_" in name:
            nn.init.normal_(parameter)
    return given


def trained(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.grad is not None]


def test_adapters_first_the_insides_of_adapters_are_sites() -> None:
    torch.manual_seed(0)
    with_adapters = adapted(Reader())
    model = with_adapters.base_model.model  # the user's own, with the adapters in it
    expected = with_adapters(TOKENS)
    module = graphreg.regularize(model, example_inputs=TOKENS, weight_l2=LORA, **REGULARIZED)
    names = graphreg.names(model, TOKENS)
    assert {"blocks.0.q", "blocks.0.q.base_layer", "blocks.0.q.lora_A.default", "blocks.0.q.lora_B.default"} <= set(names)
    output, penalties = module(TOKENS)
    (output.sum() + sum(penalties.values())).backward()
    assert trained(module) == [name for name, p in module.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained(module)) and len(trained(module)) == 8
    assert torch.equal(graphreg.strip(module)(TOKENS), expected)
    squares = [w.square().mean() for name, w in model.named_parameters() if "lora_" in name]
    torch.testing.assert_close(penalties["weight_l2"], 0.1 * torch.stack(squares).mean())


def test_adapters_first_the_graph_goes_the_way_that_the_adapters_were_in() -> None:
    torch.manual_seed(0)
    with_adapters = adapted(Reader())
    module = graphreg.regularize(with_adapters.base_model.model, example_inputs=TOKENS, **REGULARIZED).eval()
    before = module(TOKENS).output
    with with_adapters.disable_adapter():
        assert not torch.allclose(with_adapters(TOKENS), before)
        assert torch.equal(module(TOKENS).output, before)
        off = graphreg.regularize(with_adapters.base_model.model, example_inputs=TOKENS, hidden_dropout=0.1).eval()
        torch.testing.assert_close(off(TOKENS).output, with_adapters(TOKENS))


def test_regularized_first_the_adapters_are_layers_of_the_graph() -> None:
    torch.manual_seed(0)
    model = Reader()
    reference = adapted(copy.deepcopy(model)).eval()
    module = graphreg.regularize(model, example_inputs=TOKENS, **REGULARIZED)
    sites = [edit.site.name for edit in module.graphreg_rules.build_record.plan.edits]
    with_adapters = adapted(module)
    output, penalties = with_adapters(TOKENS)
    (output.sum() + sum(penalties.values())).backward()
    assert len(trained(with_adapters)) == 8 and all("lora_" in name for name in trained(with_adapters))
    assert [edit.site.name for edit in module.graphreg_rules.build_record.plan.edits] == sites
    with_adapters.eval()
    torch.testing.assert_close(with_adapters(TOKENS).output, reference(TOKENS))
    torch.testing.assert_close(graphreg.strip(module)(TOKENS), reference(TOKENS))
    with with_adapters.disable_adapter(), reference.disable_adapter():
        torch.testing.assert_close(with_adapters(TOKENS).output, reference(TOKENS))
    merged = with_adapters.merge_and_unload()
    assert merged is module
    torch.testing.assert_close(merged(TOKENS).output, reference(TOKENS), rtol=1e-4, atol=1e-5)


def test_the_wrapper_of_peft_goes_through_the_backend() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    with_adapters = adapted(Reader())
    module = graphreg.regularize(copy.deepcopy(with_adapters.base_model.model), example_inputs=TOKENS, weight_l2=LORA, **REGULARIZED)
    backend = graphreg.backend(inner="eager", weight_l2=LORA, **REGULARIZED)
    run = torch.compile(with_adapters, backend=backend)
    run.eval(), module.eval()
    torch.testing.assert_close(run(TOKENS), module(TOKENS).output)
    torch.testing.assert_close(backend.penalties(), module(TOKENS).penalties)
    with with_adapters.disable_adapter():
        torch.testing.assert_close(run(TOKENS), with_adapters(TOKENS))
    run.train()
    (run(TOKENS).sum() + sum(backend.penalties().values())).backward()
    assert len(trained(with_adapters)) == 8
    torch.compiler.reset()
