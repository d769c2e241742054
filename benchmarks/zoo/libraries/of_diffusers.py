"""diffusers: its networks on pictures, films and sound, in the shape that its own tests give them: two levels, one layer each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from zoo.libraries.made import Entry, provider
from zoo.providers import Inputs, numbers

SIZE, TEXT, WORDS = 16, 16, 5
STEPS = torch.tensor([3, 7])
TWO: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}


def picture(channels: int = 3, size: int = SIZE) -> Tensor:
    return numbers(2, channels, size, size)


def film(channels: int = 4, frames: int = 2, size: int = 8) -> Tensor:
    return numbers(2, channels, frames, size, size)


def text(width: int = TEXT) -> Tensor:
    return numbers(2, WORDS, width, seed=1)


def of(kind: str, inputs: Callable[[], dict[str, Any]], family: str, **options: Any) -> Entry:
    """Outputs come as tuples, which is what ``return_dict=False`` asks for."""

    def make() -> nn.Module:
        network: nn.Module = getattr(diffusers, kind)(**options)
        return network

    def given() -> Inputs:
        return inputs() | {"return_dict": False}

    return Entry(make, given, family)


def seen() -> dict[str, Any]:
    return {"sample": picture()}


def noisy() -> dict[str, Any]:
    return {"sample": picture(4), "timestep": STEPS, "encoder_hidden_states": text()}


def attended(dimensions: str) -> dict[str, Any]:
    return TWO | {
        "down_block_types": (f"CrossAttnDownBlock{dimensions}", f"DownBlock{dimensions}"),
        "up_block_types": (f"UpBlock{dimensions}", f"CrossAttnUpBlock{dimensions}"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 4,
        "sample_size": SIZE,
    }


def coded() -> dict[str, Any]:
    return TWO | {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "sample_size": SIZE,
    }


def entries() -> dict[str, Entry]:
    control = {k: v for k, v in attended("2D").items() if k not in ("up_block_types", "sample_size")}
    asymmetric = {
        "down_block_out_channels": (8, 16),
        "up_block_out_channels": (8, 16),
        "layers_per_down_block": 1,
        "layers_per_up_block": 1,
    }
    films: Callable[[], dict[str, Any]] = lambda: {"hidden_states": film(), "timestep": STEPS, "encoder_hidden_states": text()}  # noqa: E731
    return {
        "UNet2DModel": of(
            "UNet2DModel",
            lambda: {"sample": picture(), "timestep": STEPS},
            "unet",
            sample_size=SIZE,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **TWO,
        ),
        "UNet2DConditionModel": of("UNet2DConditionModel", noisy, "unet", **attended("2D")),
        "UNet1DModel": of(
            "UNet1DModel",
            lambda: {"sample": numbers(2, 2, 32), "timestep": STEPS},
            "unet",
            sample_size=32,
            block_out_channels=(32, 32, 64),
            extra_in_channels=64,
            norm_num_groups=8,
            down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D", "AttnDownBlock1D"),
            up_block_types=("AttnUpBlock1D", "AttnUpBlock1D", "UpBlock1DNoSkip"),
        ),
        "UNet3DConditionModel": of(
            "UNet3DConditionModel",
            lambda: noisy() | {"sample": film(4, 2, SIZE)},
            "unet",
            **attended("3D") | {"block_out_channels": (32, 64), "norm_num_groups": 32, "attention_head_dim": 8},
        ),
        "ControlNetModel": of(
            "ControlNetModel",
            lambda: noisy() | {"controlnet_cond": picture(3, 2 * SIZE)},
            "control",
            conditioning_embedding_out_channels=(4, 8),
            **control,
        ),
        "AutoencoderKL": of("AutoencoderKL", seen, "autoencoder", **coded()),
        "AutoencoderTiny": of(
            "AutoencoderTiny",
            seen,
            "autoencoder",
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        "VQModel": of("VQModel", seen, "autoencoder", num_vq_embeddings=16, **coded()),
        "AsymmetricAutoencoderKL": of(
            "AsymmetricAutoencoderKL",
            seen,
            "autoencoder",
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=SIZE,
            **asymmetric,
        ),
        "AutoencoderDC": of(
            "AutoencoderDC",
            seen,
            "autoencoder",
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
        ),
        "AutoencoderOobleck": of(
            "AutoencoderOobleck",
            lambda: {"sample": numbers(2, 2, 64)},
            "autoencoder",
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=8,
            decoder_input_channels=4,
        ),
        "DiTTransformer2DModel": of(
            "DiTTransformer2DModel",
            lambda: {"hidden_states": picture(4, 8), "timestep": STEPS, "class_labels": torch.tensor([0, 1])},
            "transformer",
            in_channels=4,
            sample_size=8,
            num_embeds_ada_norm=8,
            norm_num_groups=4,
            **HEADS,
        ),
        "PixArtTransformer2DModel": of(
            "PixArtTransformer2DModel",
            lambda: {
                "hidden_states": picture(4, 8),
                "timestep": STEPS,
                "encoder_hidden_states": text(),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
            "transformer",
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=TEXT,
            use_additional_conditions=False,
            **HEADS,
        ),
        "SD3Transformer2DModel": of(
            "SD3Transformer2DModel",
            lambda: {
                "hidden_states": picture(4, 8),
                "timestep": STEPS,
                "encoder_hidden_states": text(),
                "pooled_projections": numbers(2, 8),
            },
            "transformer",
            sample_size=8,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=TEXT,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
            **HEADS,
        ),
        "FluxTransformer2DModel": of(
            "FluxTransformer2DModel",
            lambda: {
                "hidden_states": numbers(2, 16, 4),
                "timestep": STEPS,
                "encoder_hidden_states": text(),
                "pooled_projections": numbers(2, 8),
                "img_ids": torch.ones(16, 3),
                "txt_ids": torch.zeros(WORDS, 3),
            },
            "transformer",
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 2, 2),
        ),
        "PriorTransformer": of(
            "PriorTransformer",
            lambda: {"hidden_states": numbers(2, 8), "timestep": STEPS, "proj_embedding": numbers(2, 8), "encoder_hidden_states": text(8)},
            "transformer",
            embedding_dim=8,
            num_embeddings=WORDS,
            **HEADS,
        ),
        "SanaTransformer2DModel": of(
            "SanaTransformer2DModel",
            lambda: {"hidden_states": picture(4, 8), "timestep": STEPS, "encoder_hidden_states": text()},
            "transformer",
            in_channels=4,
            out_channels=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT,
            sample_size=8,
            **HEADS,
        ),
        "CogVideoXTransformer3DModel": of(
            "CogVideoXTransformer3DModel",
            lambda: films() | {"hidden_states": film(4, 2).transpose(1, 2).contiguous()},
            "transformer",
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=TEXT,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=WORDS,
            **HEADS,
        ),
        "WanTransformer3DModel": of(
            "WanTransformer3DModel",
            films,
            "transformer",
            in_channels=4,
            out_channels=4,
            text_dim=TEXT,
            freq_dim=16,
            ffn_dim=16,
            rope_max_seq_len=16,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
        ),
        "LTXVideoTransformer3DModel": of(
            "LTXVideoTransformer3DModel",
            lambda: {
                "hidden_states": numbers(2, 32, 4),
                "timestep": STEPS,
                "encoder_hidden_states": text(),
                "encoder_attention_mask": torch.ones(2, WORDS, dtype=torch.bool),
                "num_frames": 2,
                "height": 4,
                "width": 4,
            },
            "transformer",
            in_channels=4,
            out_channels=4,
            cross_attention_dim=16,
            caption_channels=TEXT,
            **HEADS,
        ),
        "AuraFlowTransformer2DModel": of(
            "AuraFlowTransformer2DModel",
            lambda: {"hidden_states": picture(4, 8), "timestep": STEPS.float(), "encoder_hidden_states": text()},
            "transformer",
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            caption_projection_dim=16,
            pos_embed_max_size=16,
        ),
        "LatteTransformer3DModel": of(
            "LatteTransformer3DModel",
            films,
            "transformer",
            in_channels=4,
            out_channels=4,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=TEXT,
            video_length=2,
            num_embeds_ada_norm=8,
            **HEADS,
        ),
    }


PROVIDER = provider(entries)
