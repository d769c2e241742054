"""A language model in the form of transformers' own, which traces in a fifth of GPT-2's time: tied weights, a loss, generate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput


class TiedConfig(transformers.PretrainedConfig):
    model_type = "graphreg_tied_words"

    def __init__(self, words: int = 50, units: int = 8, **more: Any) -> None:
        self.words, self.units, self.num_hidden_layers, self.use_cache = words, units, 1, False
        super().__init__(**{"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, **more})


class TiedWords(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Predicts each word from itself; words are read and written by one matrix."""

    config_class = TiedConfig
    _tied_weights_keys = {"lm_head.weight": "embed.weight"}

    def __init__(self, config: TiedConfig) -> None:
        super().__init__(config)
        self.embed, self.mlp = nn.Embedding(config.words, config.units), nn.Linear(config.units, config.units)
        self.lm_head = nn.Linear(config.units, config.words, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own, which learn in a few steps."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any) -> CausalLMOutput:
        logits = self.lm_head(F.dropout(torch.relu(self.mlp(self.embed(input_ids))), 0.1, self.training))
        if labels is None:
            return CausalLMOutput(logits=logits)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return CausalLMOutput(loss=total / (labels.numel() if num_items_in_batch is None else num_items_in_batch), logits=logits)


def tied_words() -> TiedWords:
    torch.manual_seed(0)
    return TiedWords(TiedConfig())
