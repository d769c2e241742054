"""A selector of attention's weights, where one operation computes attention: the error says how a model has them as values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import graphreg  # noqa: E402
from graphreg import NoMatchError  # noqa: E402

IDS = torch.tensor([[3, 4, 5]])
SIZE: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


def test_the_error_says_what_to_do() -> None:
    model: Any = transformers.BertModel(transformers.BertConfig(**SIZE))
    traced = graphreg.trace(model, IDS)
    for selector in ("**.softmax", "**@softmax", "*attention_probs"):
        with pytest.raises(NoMatchError, match=r"scaled_dot_product_attention.*model\.set_attn_implementation\('eager'\)"):
            graphreg.plan(traced, graphreg.from_kwargs(traced, dropout={selector: 0.1}))
    with pytest.raises(NoMatchError) as caught:
        graphreg.plan(traced, graphreg.from_kwargs(traced, dropout={"**.gelu_9": 0.1}))
    assert "scaled_dot_product_attention" not in str(caught.value)
    model.set_attn_implementation("eager")
    traced = graphreg.trace(model, IDS)
    decided = graphreg.plan(traced, graphreg.from_kwargs(traced, dropout={"**.softmax": 0.1}))
    assert [edit.site.name for edit in decided.edits] == ["encoder.layer.0.attention.self.softmax"]
