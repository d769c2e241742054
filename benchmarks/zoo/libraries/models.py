"""Where the models of other libraries come from: ``python -m zoo --models zoo.libraries.models`` runs them."""

from __future__ import annotations

from collections.abc import Mapping

INTRODUCTION = """
# Models of other libraries

`make zoo-libraries` does with other libraries what `make zoo` does with [torchvision, timm and transformers](models.md), and writes this \
page. The models have random weights, two or three narrow layers where their constructors allow it, and small inputs that they accept in \
both modes. A model that a library only downloads is not here.

| provider | models |
|---|---|
| vit_pytorch | {vit_pytorch}: of each module of the library the model, except those that only train another network |
| x_transformers | {x_transformers}: the wrappers of the library, and the options of its layers that people use, one or two a model |
| monai | {monai} of `monai.networks.nets`, in two dimensions where they can be |
| rtdl | {rtdl}: `rtdl`, `rtdl_revisiting_models`, and a perceptron on each kind of `rtdl_num_embeddings` |
| pyg | {pyg} of `torch_geometric.nn`: two layers of a kind, its models of nodes, and some of whole graphs |
| smp | {smp} of `segmentation_models_pytorch`: each decoder on a ResNet 18, and U-Net on an encoder of each family |
| pytorchcv | {pytorchcv}: one of a family, in its full width and depth |
| diffusers | {diffusers}: networks, transformers and autoencoders of pictures, films and sound |
| speechbrain | {speechbrain}: networks of speakers, recognition, separation, synthesis and language |
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
