"""The masks of models of transformers are those that graphreg 0.2 drew for a seed, though another front end traces the models now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import graphreg

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "masks_of_0_2.json").read_text())
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
WORDS: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {**SIZES, **WORDS, "max_position_embeddings": 32, "pad_token_id": 0}
IDS = {"input_ids": (torch.arange(16) * 7 % 43 + 5).view(2, 8)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**TEXT)), IDS),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, **WORDS)), IDS),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1)), IDS),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3)), IMAGES),
}


@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_0_2(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # whatever an initialization draws
            parameter.copy_(torch.cos(torch.arange(parameter.numel(), dtype=torch.float64)).view(parameter.shape) * 0.3)
    module: Any = graphreg.regularize(model, hidden_dropout=0.3, own_dropout="off", rng=5, example_inputs=inputs)
    assert sorted(graphreg.site_strengths(module)["hidden_dropout"]) == RECORDED[name]["sites"]
    sums = [module(**inputs).output.logits.double().square().sum().item() for _ in range(2)]
    assert sums == pytest.approx(RECORDED[name]["sums"], rel=1e-4) and sums[1] != pytest.approx(sums[0], rel=1e-2)
