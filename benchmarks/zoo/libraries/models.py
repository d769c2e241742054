"""Where the models of other libraries come from: ``python -m zoo --models zoo.libraries.models`` runs them."""

from __future__ import annotations

from collections.abc import Mapping

INTRODUCTION = """
# Models of other libraries

`make zoo-libraries` does with other libraries what `make zoo` does with [torchvision, timm and transformers](models.md), and writes this \
page. The models have random weights, two or three narrow layers where their constructors allow it, and small inputs that they accept in \
train and eval mode. Models that a library offers only as downloads are left out.

| provider | models |
|---|---|
| vit_pytorch | {vit_pytorch}: the model of each Python file of the library, but for files that only train another network |
| x_transformers | {x_transformers}: the wrappers of the library, and commonly used options of its layers, one or two in each model |
| monai | {monai} of `monai.networks.nets`, in two dimensions where they can be |
| rtdl | {rtdl}: `rtdl`, `rtdl_revisiting_models`, and a perceptron on each kind of `rtdl_num_embeddings` |
| pyg | {pyg} of `torch_geometric.nn`: nets of two layers of one kind, the library's models for nodes, and some for whole graphs |
| smp | {smp} of `segmentation_models_pytorch`: each decoder on a ResNet 18, and U-Net on an encoder of each family |
| pytorchcv | {pytorchcv}: one of a family, in its full width and depth |
| diffusers | {diffusers}: U-Nets, transformers and autoencoders for images, video and audio |
| speechbrain | {speechbrain}: networks for speaker recognition, speech recognition, separation, speech synthesis and language modelling |
| stable_baselines3 | {stable_baselines3}: the networks of the policies of PPO, DQN, SAC and TD3 |
| open_clip | {open_clip}: CLIP and what came after it, with towers of two layers |
"""

PACKAGES = (  # whose versions the results depend on
    "torch", "einops", "vit-pytorch", "x-transformers", "monai", "rtdl", "rtdl-revisiting-models", "rtdl-num-embeddings", "torch-geometric",
    "segmentation-models-pytorch", "pytorchcv", "diffusers", "speechbrain", "stable-baselines3", "open-clip-torch",
)  # fmt: skip
PRELOADED = ("torch",)  # no library is there while another's model runs

PROVIDERS: Mapping[str, str] = {
    "vit_pytorch": "zoo.libraries.of_vit_pytorch:PROVIDER",
    "x_transformers": "zoo.libraries.of_x_transformers:PROVIDER",
    "monai": "zoo.libraries.of_monai:PROVIDER",
    "rtdl": "zoo.libraries.of_tables:PROVIDER",
    "pyg": "zoo.libraries.of_geometric:PROVIDER",
    "smp": "zoo.libraries.of_smp:PROVIDER",
    "pytorchcv": "zoo.libraries.of_pytorchcv:PROVIDER",
    "diffusers": "zoo.libraries.of_diffusers:PROVIDER",
    "speechbrain": "zoo.libraries.of_speechbrain:PROVIDER",
    "stable_baselines3": "zoo.libraries.of_policies:PROVIDER",
    "open_clip": "zoo.libraries.of_open_clip:PROVIDER",
}

INDUCTOR = (  # compiled by Inductor as well: the smallest of each kind, for each takes minutes
    "vit_pytorch/simple_vit", "x_transformers/decoder", "monai/UNet", "rtdl/FTTransformer", "pyg/GCN", "diffusers/UNet2DModel",
    "stable_baselines3/q_net",
)  # fmt: skip
