"""Language models of transformers in tiny configurations, with random weights."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graphreg

WORDS = 50
_SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": WORDS,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=WORDS, n_positions=32, bos_token_id=1, eos_token_id=2)
_T5 = T5Config(num_layers=2, num_heads=2, d_model=16, d_kv=8, d_ff=32, vocab_size=WORDS, decoder_start_token_id=0)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(_GPT2),
    "bert": lambda: BertForMaskedLM(BertConfig(**_SMALL)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, num_key_value_heads=1)),
    "t5": lambda: T5ForConditionalGeneration(_T5),
}
# the blocks of the MLPs, which each family calls by a name of its own; the hidden states, [batch, time, units]
MLPS = {"gpt2": "*.mlp", "bert": "*.intermediate", "llama": "*.mlp*", "t5": "*.DenseReluDense"}
STATES = {"gpt2": "transformer.h.*", "bert": "bert.encoder.layer.*", "llama": "model.layers.*", "t5": "encoder.block.*"}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


@functools.cache
def _traced(name: str) -> graphreg.Traced:
    model: Any = build(name).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    return graphreg.trace(model, batch())


def traced(name: str) -> graphreg.Traced:
    """A trace of a new model. One trace, of a model that checkpoints its blocks, serves all models of a kind, because it takes seconds."""
    return dataclasses.replace(_traced(name), model=build(name))


def batch(rows: int = 3, words: int = 7, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, WORDS, (rows, words), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}
