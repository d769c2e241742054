"""monai.networks.nets: its networks by rule, flat where they can be, on small pictures of one channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from monai.networks import nets
from torch import Tensor, nn

from zoo.libraries.made import Entry, known, provider
from zoo.providers import Inputs, numbers

SIZE = 32
SMALL: Mapping[str, Any] = {
    "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "n_input_channels": 1, "num_channels": 1, "num_classes": 3, "pretrained": False,
    "channels": (8, 16), "strides": (2, 2), "num_res_units": 1, "img_size": SIZE, "image_size": SIZE, "input_image_size": (SIZE, SIZE),
    "patch_size": 8, "hidden_size": 16, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "feature_size": 8, "init_filters": 8,
    "num_channel_initial": 4, "depth": 2, "num_filters": 8, "latent_size": 4, "features": (8, 8, 8, 8, 8, 8), "norm_num_groups": 4,
    "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": 8, "latent_channels": 3, "num_res_layers": 1,
    "num_res_channels": (8, 8), "downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
    "num_embeddings": 8, "embedding_dim": 4, "num_layers_d": 2, "layers": (1, 1, 1, 1), "psp_block_num": 1,
}  # fmt: skip

OWN: Mapping[str, Mapping[str, Any]] = {
    "AHNet": {"spatial_dims": 3, "psp_block_num": 0},
    "AttentionUnet": {"channels": (8, 16, 16)},
    "Classifier": {"in_shape": (1, SIZE, SIZE), "classes": 3},
    "ControlNet": {"channels": (8, 16), "conditioning_embedding_num_channels": (8, 8)},
    "Critic": {"in_shape": (1, SIZE, SIZE)},
    "DAF3D": {},
    "DecoderOnlyTransformer": {
        "num_tokens": 30, "max_seq_len": 12, "attn_layers_dim": 16, "attn_layers_depth": 2, "attn_layers_heads": 2,
        "embedding_dropout_rate": 0.1,
    },
    "DenseNet": {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)},
    "Discriminator": {"in_shape": (1, SIZE, SIZE)},
    "DynUNet": {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (8, 8, 16), "res_block": True},
    "EfficientNetBN": {"model_name": "efficientnet-b0"},
    "EfficientNetBNFeatures": {"model_name": "efficientnet-b0"},
    "FlexibleUNet": {"backbone": "resnet10", "decoder_channels": (16, 8, 8, 8, 8)},
    "FullyConnectedNet": {"in_channels": 6, "hidden_channels": (8, 8), "dropout": 0.1},
    "Generator": {"latent_shape": (6,), "start_shape": (4, 4, 4)},
    "GlobalNet": {"image_size": [SIZE, SIZE]},
    "HighResNet": {},
    "HoVerNet": {"in_channels": 3},
    "LocalNet": {"extract_levels": (0, 1)},
    "MaskedAutoEncoderViT": {"decoder_hidden_size": 16, "decoder_mlp_dim": 32, "decoder_num_layers": 1, "decoder_num_heads": 2},
    "MedNeXt": {"blocks_down": (1, 1), "blocks_up": (1, 1), "blocks_bottleneck": 1, "kernel_size": 3},
    "MILModel": {"mil_mode": "att", "backbone": "resnet18"},
    "MultiScalePatchDiscriminator": {"num_d": 2, "channels": 8, "minimum_size_im": 64},
    "NaViT": {},
    "PatchDiscriminator": {"channels": 8},
    "Regressor": {"in_shape": (1, SIZE, SIZE), "out_shape": (2,)},
    "ResNet": {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 8, 16, 16]},
    "ResNetFeatures": {"model_name": "resnet10"},
    "SENet": {"block": "se_bottleneck", "groups": 1, "reduction": 4},
    "SegResNet": {"blocks_down": (1, 1), "blocks_up": (1,), "dropout_prob": 0.1},
    "SegResNetDS": {"blocks_down": (1, 1, 1), "dsdepth": 2},
    "SegResNetVAE": {"blocks_down": (1, 1), "blocks_up": (1,), "vae_nz": 8},
    "SPADEAutoencoderKL": {"label_nc": 2, "spade_intermediate_channels": 8},
    "SPADEDiffusionModelUNet": {"label_nc": 2, "spade_intermediate_channels": 8},
    "SPADENet": {"label_nc": 2, "input_shape": (SIZE, SIZE), "z_dim": 4, "spade_intermediate_channels": 8, "channels": [8, 8]},
    "SwinUNETR": {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "feature_size": 12, "window_size": 4, "patch_size": 2},
    "TorchVisionFCModel": {"model_name": "resnet18", "in_channels": 512},
    "UNETR": {"img_size": (SIZE, SIZE)},
    "VarAutoEncoder": {"in_shape": (1, SIZE, SIZE)},
    "VarFullyConnectedNet": {"in_channels": 6, "out_channels": 6, "encode_channels": (8, 8), "decode_channels": (8, 8)},
    "ViT": {"classification": True},
    "ViTAutoEnc": {"patch_size": 4},
    "VNet": {},
    "VoxelMorphUNet": {"in_channels": 2, "unet_out_channels": 8, "channels": (8, 8, 8, 8), "final_conv_channels": (8,)},
    "VQVAE": {"channels": (8, 8)},
}  # fmt: skip

NETWORKS = (  # one spelling of each; what is a deeper form of another, or a part, is left out
    "AHNet", "AttentionUnet", "AutoEncoder", "AutoencoderKL", "BasicUNet", "BasicUNetPlusPlus", "Classifier", "ControlNet", "Critic",
    "DAF3D", "DecoderOnlyTransformer", "DenseNet", "DiffusionModelUNet", "DiNTS", "Discriminator", "DynUNet", "EfficientNetBN",
    "EfficientNetBNFeatures", "FlexibleUNet", "FullyConnectedNet", "Generator", "GlobalNet", "HighResNet", "HoVerNet", "LocalNet",
    "MaskedAutoEncoderViT", "MedNeXt", "MILModel", "MultiScalePatchDiscriminator", "NaViT", "PatchDiscriminator", "Quicknat",
    "Regressor", "RegUNet", "ResNet", "ResNetFeatures", "SegResNet", "SegResNetDS", "SegResNetVAE", "SENet", "SPADEAutoencoderKL",
    "SPADEDiffusionModelUNet", "SPADENet", "SwinUNETR", "TorchVisionFCModel", "UNet", "UNETR", "VarAutoEncoder", "VarFullyConnectedNet",
    "ViT", "ViTAutoEnc", "VNet", "VoxelMorph", "VQVAE",
)  # fmt: skip

LEFT: Mapping[str, str] = {
    "CellSamWrapper, Transchex, HyenaNDUNETR": "they need weights or libraries from elsewhere",
    "Restormer": "its module does not export it",
    "NetAdapter, VISTA3D": "they are built from networks that the user passes in",
}


def picture(size: int = SIZE, channels: int = 1, batch: int = 2) -> Inputs:
    return (numbers(batch, channels, size, size),)


def labels(size: int = SIZE) -> Tensor:
    return torch.nn.functional.one_hot((numbers(2, size, size, seed=1) > 0).long(), 2).movedim(-1, 1).float()


STEPS = torch.tensor([3, 7])
WORDS = torch.tensor([[1, 5, 2, 9, 4, 3], [7, 7, 1, 0, 2, 2]])
INPUTS: Mapping[str, Callable[[], Inputs]] = {
    "AHNet": lambda: (numbers(2, 1, SIZE, SIZE, SIZE),),
    "ControlNet": lambda: (*picture(), STEPS, *picture(4 * SIZE // 2)),
    "DAF3D": lambda: (numbers(1, 1, SIZE, SIZE, SIZE),),
    "DecoderOnlyTransformer": lambda: (WORDS,),
    "DiffusionModelUNet": lambda: (*picture(), STEPS),
    "DiNTS": lambda: picture(64),
    "FullyConnectedNet": lambda: (numbers(2, 6),),
    "Generator": lambda: (numbers(2, 6),),
    "HoVerNet": lambda: picture(256, 3, 1),
    "MILModel": lambda: (numbers(2, 3, 3, SIZE, SIZE),),
    "MultiScalePatchDiscriminator": lambda: picture(64),
    "NaViT": lambda: ([[numbers(1, SIZE, SIZE), numbers(1, 16, SIZE, seed=1)], [numbers(1, SIZE, 16, seed=2)]],),
    "SPADEAutoencoderKL": lambda: (*picture(), labels()),
    "SPADEDiffusionModelUNet": lambda: (*picture(), STEPS, labels()),
    "SPADENet": lambda: (labels(), *picture()),
    "SwinUNETR": lambda: picture(64),
    "TorchVisionFCModel": lambda: picture(224, 3),
    "SENet": lambda: picture(64, 1),
    "VarFullyConnectedNet": lambda: (numbers(2, 6),),
    "VoxelMorph": lambda: (*picture(), numbers(2, 1, SIZE, SIZE, seed=1)),
}


def made(name: str) -> nn.Module:
    kind = getattr(nets, name)
    network: nn.Module = kind(**{**known(kind.__init__, SMALL), **OWN.get(name, {})})
    return network


def searched() -> nn.Module:
    """DiNTS with the topology that its search begins with."""
    space = nets.TopologyInstance(channel_mul=0.1, num_blocks=3, num_depths=2, spatial_dims=2)
    return nets.DiNTS(dints_space=space, in_channels=1, num_classes=2, spatial_dims=2)


def registering() -> nn.Module:
    return nets.VoxelMorph(nets.VoxelMorphUNet(spatial_dims=2, **OWN["VoxelMorphUNet"]), integration_steps=2, spatial_dims=2)


def entries() -> dict[str, Entry]:
    special: dict[str, Callable[[], nn.Module]] = {"DiNTS": searched, "VoxelMorph": registering}
    return {name: Entry(special.get(name) or partial(made, name), INPUTS.get(name, picture)) for name in NETWORKS}


PROVIDER = provider(entries, LEFT)
