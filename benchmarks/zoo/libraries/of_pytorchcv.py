"""pytorchcv: of each family that is not torchvision's or timm's too the smallest member, with the smallest picture that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from pytorchcv.model_provider import get_model
from torch import nn

from zoo.providers import Attempt, Inputs, Provider, images, smallest

FAMILIES: Mapping[str, str] = {
    "airnet": "airnet50_1x64d_r16", "bagnet": "bagnet9", "bamresnet": "bam_resnet18", "bisenet": "bisenet_resnet18_celebamaskhq",
    "bninception": "bninception", "cbamresnet": "cbam_resnet18", "cgnet": "cgnet_cityscapes", "channelnet": "channelnet", "condensenet":
    "condensenet74_c4_g4", "darknet": "darknet_tiny", "darts": "darts", "diaresnet": "diaresnet18", "dicenet": "dicenet_wd5",
    "diracnetv2": "diracnet18v2", "dla": "dla34", "dpn": "dpn68", "drn": "drnc26", "erfnet": "erfnet_cityscapes", "espnetv2":
    "espnetv2_wd2", "fbnet": "fbnet_cb", "fishnet": "fishnet99", "ghostnet": "ghostnet", "hardnet": "hardnet39ds", "hrnet":
    "hrnet_w18_small_v1", "ibnresnet": "ibn_resnet50", "igcv3": "igcv3_wd4", "inceptionv4": "inceptionv4", "irevnet": "irevnet301",
    "lednet": "lednet_cityscapes", "menet": "menet108_8x1_g3", "mixnet": "mixnet_s", "mnasnet": "mnasnet_b1", "mobilenetv3":
    "mobilenetv3_small_wd2", "msdnet": "msdnet22", "nasnet": "nasnet_4a1056", "nin": "nin_cifar10", "octresnet": "octresnet10_ad2",
    "peleenet": "peleenet", "pnasnet": "pnasnet5large", "polynet": "polynet", "preresnet": "preresnet10", "proxylessnas":
    "proxylessnas_cpu", "pyramidnet": "pyramidnet101_a360", "regnet": "regnetx002", "resattnet": "resattnet56", "resnesta":
    "resnestabc14", "revnet": "revnet38", "scnet": "scnet50", "selecsls": "selecsls42", "senet": "senet16", "seresnet": "seresnet10",
    "shakeshakeresnet": "shakeshakeresnet20_2x16d_cifar10", "shufflenet": "shufflenet_g1_wd4", "shufflenetv2": "shufflenetv2_wd2",
    "sinet": "sinet_cityscapes", "sknet": "sknet50", "sparsenet": "sparsenet121", "squeezenext": "sqnxt23_w1", "vovnet": "vovnet27s",
    "wrn1bit": "wrn20_10_1bit_cifar10", "xception": "xception", "xdensenet": "xdensenet121_2", "zfnet": "zfnet", "resdropresnet":
    "resdropresnet20_cifar10", "unet": "unet_cityscapes", "fastscnn": "fastscnn_cityscapes", "centernet": "centernet_resnet18_voc",
    "pspnet": "pspnet_resnetd50b_voc", "superpointnet": "superpointnet", "fractalnet": "fractalnet_cifar10",
}  # fmt: skip
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 331, 512)


def build(family: str) -> tuple[nn.Module, Inputs]:
    make = partial(get_model, FAMILIES[family], pretrained=False)

    def attempts() -> Iterator[Attempt]:
        for option in ("in_size", None):
            for size in SIZES:
                yield {option: (size, size)} if option else {}, images(size, CHANNELS.get(family, 3))

    return smallest(make, attempts())


CHANNELS: Mapping[str, Any] = {"superpointnet": 1}
PROVIDER = Provider(lambda: dict.fromkeys(FAMILIES, ""), build)
