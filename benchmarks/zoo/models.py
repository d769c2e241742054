"""Where the zoo's models come from: each provider lists names and builds one, with random weights and small inputs.

A provider is named by where it stands, so that a process imports the one library that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping

PACKAGES = ("torch", "torchvision", "timm", "transformers")  # whose versions the results depend on

PROVIDERS: Mapping[str, str] = {
    "torchvision": "zoo.vision:CLASSIFICATION",
    "quantizable": "zoo.vision:QUANTIZABLE",
    "segmentation": "zoo.vision:SEGMENTATION",
    "video": "zoo.vision:VIDEO",
    "flow": "zoo.vision:FLOW",
    "detection": "zoo.vision:DETECTION",
    "timm": "zoo.architectures:PROVIDER",
    "transformers": "zoo.families:PROVIDER",
    "transformer": "zoo.recurrent:TRANSFORMER_PROVIDER",
    "recurrent": "zoo.recurrent:RECURRENT_PROVIDER",
    "control": "zoo.control:PROVIDER",
}

INDUCTOR = (  # compiled by Inductor as well: the smallest of each kind, for each takes minutes
    "torchvision/resnet18", "torchvision/mobilenet_v3_small", "segmentation/lraspp_mobilenet_v3_large", "video/r3d_18",
    "timm/vit_tiny_patch16_224", "transformers/albert", "transformers/bart", "transformers/beit", "transformers/apertus",
    "transformer/transformer", "recurrent/lstm", "recurrent/gru_cell", "control/loop_over_steps", "control/sign_of_sum",
)  # fmt: skip
