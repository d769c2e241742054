"""open_clip: its models of pictures and texts, with towers of two layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

from zoo.libraries.made import Entry, provider
from zoo.providers import Inputs, numbers

WIDTH, WORDS, TOKENS, SIZE = 16, 8, 50, 32
PICTURE: Mapping[str, Any] = {"layers": 2, "width": WIDTH, "head_width": 8, "patch_size": 8, "image_size": SIZE}
TEXT: Mapping[str, Any] = {"context_length": WORDS, "vocab_size": TOKENS, "width": WIDTH, "heads": 2, "layers": 2}


def made(kind: Any, picture: Mapping[str, Any] | None = None, words: Mapping[str, Any] | None = None, **options: Any) -> nn.Module:
    network: nn.Module = kind(WIDTH, {**PICTURE, **(picture or {})}, {**TEXT, **(words or {})}, **options)
    return network


def captioning() -> nn.Module:
    """With a projection that the library leaves as the memory is: ``init_parameters`` of its decoder is not called, and cannot be."""
    picture = {**PICTURE, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    network = CoCa(WIDTH, {**TEXT, "mlp_ratio": 4}, {**TEXT, "embed_cls": True, "output_tokens": True}, picture)
    nn.init.normal_(network.text_decoder.text_projection, std=WIDTH**-0.5)
    return network


def both() -> Inputs:
    return numbers(2, 3, SIZE, SIZE), torch.randint(1, TOKENS, (2, WORDS), generator=torch.Generator().manual_seed(0))


def entries() -> dict[str, Entry]:
    residual = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    return {
        "CLIP": Entry(partial(made, CLIP), both, "two towers"),
        "CLIP with quick GELU": Entry(partial(made, CLIP, quick_gelu=True), both, "two towers"),
        "CLIP on a ResNet": Entry(partial(made, CLIP, residual), both, "two towers"),
        "CLIP with patches dropped": Entry(partial(made, CLIP, {"patch_dropout": 0.5, "ls_init_value": 0.1}), both, "two towers"),
        "CLIP with attentional pool": Entry(
            partial(made, CLIP, {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}), both, "two towers"
        ),
        "CLIP on timm": Entry(
            partial(made, CLIP, {"timm_model_name": "resnet18", "timm_pool": "", "timm_proj": "linear"}), both, "two towers"
        ),
        "CustomTextCLIP": Entry(partial(made, CustomTextCLIP), both, "two towers"),
        "SigLIP": Entry(
            partial(
                made,
                CustomTextCLIP,
                {"no_ln_pre": True, "pool_type": "avg"},
                {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
                init_logit_bias=-10.0,
            ),
            both,
            "two towers",
        ),
        "CoCa": Entry(
            captioning,
            both,
            "captions",
        ),
        "picture tower": Entry(lambda: made(CLIP).visual, lambda: both()[:1], "tower"),  # type: ignore[arg-type, return-value]
        "text tower": Entry(lambda: made(CustomTextCLIP).text, lambda: both()[1:], "tower"),  # type: ignore[arg-type, return-value]
    }


PROVIDER = provider(entries)
