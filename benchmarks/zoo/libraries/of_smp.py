"""segmentation_models_pytorch: each of its decoders on a small encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
from torch import nn

from zoo.libraries.made import Entry, provider
from zoo.providers import images

ENCODERS: Mapping[str, str] = {"DPT": "tu-vit_tiny_patch16_224.augreg_in21k"}
OWN: Mapping[str, Mapping[str, Any]] = {"DPT": {"dynamic_img_size": True}, "Unet": {"decoder_attention_type": "scse"}}
PICTURES: Mapping[str, int] = {"PAN": 256}
WITH: Mapping[str, str] = {  # other encoders, with the decoder that most people take
    "mobilenet_v2": "mobilenet_v2", "efficientnet": "efficientnet-b0", "densenet": "densenet121", "mix_vision_transformer": "mit_b0",
    "mobileone": "mobileone_s0", "timm": "tu-mobilenetv3_small_050", "vgg": "vgg11_bn", "se_resnet": "se_resnet50", "dpn": "dpn68",
    "inception": "inceptionv4", "xception": "xception", "resnext": "resnext50_32x4d",
}  # fmt: skip


def decoders() -> list[str]:
    return sorted({kind.__name__ for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()})


def made(decoder: str, encoder: str, **options: Any) -> nn.Module:
    kind = getattr(smp, decoder)
    return kind(encoder_name=encoder, encoder_weights=None, in_channels=3, classes=2, **options)


def entries() -> dict[str, Entry]:
    found = {
        name: Entry(
            partial(made, name, ENCODERS.get(name, "resnet18"), **OWN.get(name, {})), partial(images, PICTURES.get(name, 64)), "decoder"
        )
        for name in decoders()
    }
    encoders = {f"Unet on {name}": Entry(partial(made, "Unet", encoder), partial(images, 64), "encoder") for name, encoder in WITH.items()}
    two = {"aux_params": {"classes": 4, "dropout": 0.1}}
    return found | encoders | {"Unet and a label": Entry(partial(made, "Unet", "resnet18", **two), partial(images, 64), "decoder")}


PROVIDER = provider(entries)
