"""x_transformers: its wrappers and the options of its layers that people use, a model each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import (
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    MultiInputTransformerWrapper,
    NeoMLP,
    PrefixDecoder,
    TransformerWrapper,
    ViTransformerWrapper,
    XTransformer,
    XValTransformerWrapper,
)
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper

from zoo.libraries.made import Entry, provider
from zoo.providers import Inputs, images, numbers

WORDS, TOKENS, WIDTH = 12, 40, 16
LAYERS: Mapping[str, Any] = {"dim": WIDTH, "depth": 2, "heads": 2, "attn_dim_head": 8}


def words(seed: int = 0, steps: int = WORDS) -> Tensor:
    return torch.randint(3, TOKENS, (2, steps), generator=torch.Generator().manual_seed(seed))


def text(kind: Any = Decoder, outer: Mapping[str, Any] | None = None, **options: Any) -> nn.Module:
    return TransformerWrapper(num_tokens=TOKENS, max_seq_len=2 * WORDS, attn_layers=kind(**{**LAYERS, **options}), **(outer or {}))


def of_text(kind: Any = Decoder, outer: Mapping[str, Any] | None = None, **options: Any) -> Entry:
    return Entry(partial(text, kind, outer, **options), lambda: (words(),), "encoder" if kind is Encoder else "decoder")


def both() -> nn.Module:
    sizes = {"num_tokens": TOKENS, "depth": 2, "heads": 2, "max_seq_len": 2 * WORDS, "attn_dim_head": 8}
    return XTransformer(dim=WIDTH, **{f"{part}_{name}": value for part in ("enc", "dec") for name, value in sizes.items()})


def continuous(**outer: Any) -> nn.Module:
    return ContinuousTransformerWrapper(dim_in=6, dim_out=5, max_seq_len=2 * WORDS, attn_layers=Encoder(**LAYERS), **outer)


def vision() -> nn.Module:
    return ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=Encoder(**LAYERS))


class Attending(nn.Module):
    """Two stacks, of which the second reads the first, as the library's manual has it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cross = Encoder(**LAYERS), CrossAttender(**LAYERS)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        found: Tensor = self.cross(x, context=self.encoder(context))
        return found


def valued() -> Inputs:
    return words(), numbers(2, WORDS)


def continuous_input() -> Inputs:
    return (numbers(2, WORDS, 6),)


def entries() -> dict[str, Entry]:
    return {
        "decoder": of_text(),
        "encoder": of_text(Encoder),
        "prefix_decoder": of_text(PrefixDecoder),
        "rotary": of_text(rotary_pos_emb=True),
        "alibi": of_text(alibi_pos_bias=True, alibi_num_heads=1),
        "relative": of_text(rel_pos_bias=True),
        "dynamic_relative": of_text(dynamic_pos_bias=True, dynamic_pos_bias_log_distance=False),
        "memory_tokens": of_text(Encoder, {"num_memory_tokens": 4}),
        "sinusoidal": of_text(Encoder, {"scaled_sinu_pos_emb": True, "emb_dropout": 0.1}),
        "rms_norm_glu": of_text(use_rmsnorm=True, ff_glu=True, ff_swish=True, ff_no_bias=True),
        "flash": of_text(attn_flash=True, attn_sublayer_dropout=0.1, attn_dropout=0.1, ff_dropout=0.1),
        "grouped_heads": of_text(attn_kv_heads=1, attn_qk_norm=True),
        "talking_heads": of_text(Encoder, attn_pre_talking_heads=True, attn_post_talking_heads=True),
        "gated_residual": of_text(gate_residual=True, sandwich_norm=True),
        "residual_attention": of_text(Encoder, residual_attn=True, pre_norm=False),
        "macaron": of_text(Encoder, macaron=True, shift_tokens=1),
        "sparse_top_k": of_text(attn_sparse_topk=4),
        "relu_squared": of_text(Encoder, ff_relu_squared=True, attn_on_attn=True),
        "hyper_connections": of_text(num_residual_streams=2),
        "value_residual": of_text(add_value_residual=True),
        "one_key_value_head": of_text(attn_one_kv_head=True, use_scalenorm=True),
        "autoregressive": Entry(lambda: AutoregressiveWrapper(text()), lambda: (words(),), "decoder and its loss"),
        "xtransformer": Entry(both, lambda: (words(), words(1)), "encoder-decoder"),
        "cross_attender": Entry(Attending, lambda: (numbers(2, WORDS, WIDTH), numbers(2, 8, WIDTH, seed=1)), "encoder-decoder"),
        "continuous": Entry(continuous, continuous_input, "encoder"),
        "continuous_memory": Entry(partial(continuous, num_memory_tokens=2, post_emb_norm=True), continuous_input, "encoder"),
        "vision": Entry(vision, partial(images, 32), "encoder"),
        "multi_input": Entry(
            lambda: MultiInputTransformerWrapper(
                num_tokens={"note": TOKENS, "pitch": TOKENS}, max_seq_len=2 * WORDS, attn_layers=Decoder(**LAYERS)
            ),
            lambda: ({"note": words(), "pitch": words(1)},),
            "decoder",
        ),
        "xval": Entry(
            lambda: XValTransformerWrapper(num_tokens=TOKENS, numerical_token_id=3, max_seq_len=2 * WORDS, attn_layers=Decoder(**LAYERS)),
            valued,
            "decoder",
        ),
        "neo_mlp": Entry(
            lambda: NeoMLP(dim_in=5, dim_hidden=7, dim_out=3, dim_model=WIDTH, depth=2, encoder_kwargs={"attn_dim_head": 8, "heads": 2}),
            lambda: (numbers(2, 5),),
            "encoder",
        ),
    }


LEFT: Mapping[str, str] = {
    "layer_dropout": "Python's random numbers decide which layers a call skips, so in some calls a parameter of the plain model gets no "
    "gradient; only the backend takes it"
}
PROVIDER = provider(entries, LEFT)
