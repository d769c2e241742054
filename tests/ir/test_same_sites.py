"""One rule says which values are hidden, whoever captured the graph: a trace, torch.export or Dynamo."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

import graphreg
from graphreg.tracing.trace import FrontEnd

IDS = {"input_ids": torch.tensor([[3, 5, 7, 9, 2], [4, 4, 8, 1, 0]])}
SIZES: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16,
}  # fmt: skip


def transformers() -> Any:
    """Imported where a model of it is made: it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def deberta() -> nn.Module:
    relative = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_biased_input": False, "position_buckets": 4}
    return transformers().DebertaV2Model(transformers().DebertaV2Config(**SIZES, **relative))


def t5() -> nn.Module:
    return transformers().T5EncoderModel(transformers().T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2))


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return transformers().GPT2Model(transformers().GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16, **ends))


class Positions(nn.Module):
    """A product with what is made of parameters and sizes alone, as attention by relative positions has it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out, self.table = nn.Linear(6, 4), nn.Linear(5, 3), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        table = F.dropout(self.table, 0.0, self.training).unsqueeze(0).repeat(x.shape[0], 1, 1)
        return self.out(torch.bmm(self.query(x), table.transpose(-1, -2)) * (x.shape[1] // 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "positions": (Positions, (torch.randn(2, 7, 6),)),
    "deberta": (deberta, IDS),
    "bert": (lambda: transformers().BertModel(transformers().BertConfig(**SIZES)), IDS),
    "llama": (lambda: transformers().LlamaModel(transformers().LlamaConfig(**SIZES)), IDS),
    "gpt2": (gpt2, IDS),
    "t5": (t5, IDS),
    "resnet": (tv.resnet18, (torch.randn(2, 3, 32, 32),)),
    "vit": (lambda: tv.VisionTransformer(16, 8, 1, 2, 8, 12), (torch.randn(2, 3, 16, 16),)),
}
QUICK = ("positions", "vit")


def hidden(sites: Any) -> list[tuple[str, bool]]:
    return sorted((site.name, site.norm) for site in sites if site.role == "hidden")


def branches(sites: Any) -> list[str]:
    return sorted(site.name for site in sites if site.branch)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in MODELS])
def test_the_backend_and_a_trace(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make().eval()
    given = inputs if isinstance(inputs, dict) else {"x": inputs[0]}
    traced = graphreg.trace(model, inputs)
    backend = graphreg.backend(inner="eager", hidden_l1=0.1)
    run = torch.compile(model, backend=backend)
    run(**given) if isinstance(inputs, dict) else run(*inputs)
    found = hidden(site for part in backend.subgraphs for site in part.traced.values)
    assert found == hidden(traced.values) != []
    assert branches(site for part in backend.subgraphs for site in part.traced.values) == branches(traced.values)
    module = graphreg.rewrite(traced, graphreg.plan(traced, graphreg.from_kwargs(traced, hidden_l1=0.1)), rng=0)
    penalties = (module(**given) if isinstance(inputs, dict) else module(*inputs)).penalties
    torch.testing.assert_close(backend.penalties(), penalties)


def decorated(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    """Its forward is inside a decorator's function, as those of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.inner(x).relu())
        return y


def test_outputs_of_a_decorated_forward_through_the_backend() -> None:
    torch.compiler.reset()
    backend = graphreg.backend(inner="eager", output_dropout=0.5)
    torch.compile(Decorated(), backend=backend)(torch.ones(2, 4))
    assert [site.name for part in backend.subgraphs for site in part.traced.values if site.role == "output"] == ["head"]


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_a_product_with_what_is_made_of_sizes_and_parameters(front_end: FrontEnd) -> None:
    traced = graphreg.trace(Positions(), torch.randn(2, 7, 6), front_end)
    assert [name for name, _ in hidden(traced.values)] == ["mul", "query"]
