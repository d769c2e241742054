"""Where the zoo's models come from: each provider lists names and builds one, with random weights and small inputs.

A family of timm is a module of ``timm.models`` (``timm.list_modules()``); the sixty are the first in alphabetical order.
Its architecture is the one that the module defines first, which is the one it registers first.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import timm
import torchvision.models as tv
from timm.models import is_model_in_modules
from torch import nn

from zoo.providers import Attempt, Inputs, Provider, clips, images, smallest

PACKAGES = ("torch", "torchvision", "timm")  # whose versions the results depend on

FAMILIES = 60
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 331, 384, 512)
CLIPS = ((2, 32), (4, 32), (4, 64), (8, 64), (16, 64), (16, 112), (16, 224))  # frames, size


def _torchvision(module: Any) -> Mapping[str, str]:
    return dict.fromkeys(tv.list_models(module), "")


def _classifier(name: str) -> tuple[nn.Module, Inputs]:
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    build = partial(tv.get_model, name, weights=None, num_classes=10, **options)
    if name.startswith("vit_"):
        return smallest(build, (({"image_size": size}, images(size)) for size in SIZES if size % 32 == 0))
    if name.startswith("maxvit"):
        return smallest(build, (({"input_size": (size, size)}, images(size)) for size in SIZES))
    return smallest(build, (({}, images(size)) for size in SIZES))


def _segmenter(name: str) -> tuple[nn.Module, Inputs]:
    build = partial(tv.get_model, name, weights=None, weights_backbone=None, num_classes=5)
    return smallest(build, (({}, images(size)) for size in SIZES))


def _video(name: str) -> tuple[nn.Module, Inputs]:
    build = partial(tv.get_model, name, weights=None, num_classes=10)
    if name.startswith("mvit"):  # its builders fix the size: one clip is enough of that
        return smallest(build, iter([({}, clips(16, 224, batch=1))]))
    return smallest(build, (({}, clips(*clip)) for clip in CLIPS))


def families() -> dict[str, str]:
    """The first architecture of each of the first families, by its name, and the family."""
    return {first_registered(module): module for module in sorted(timm.list_modules())[:FAMILIES]}


def first_registered(module: str) -> str:
    defined = vars(importlib.import_module(f"timm.models.{module}"))  # in the order of the file
    return next(name for name in defined if is_model_in_modules(name, {module}))


def _timm(name: str) -> tuple[nn.Module, Inputs]:
    channels, size, _ = timm.get_pretrained_cfg(name).input_size
    build = partial(timm.create_model, name, pretrained=False)

    def attempts() -> Iterator[Attempt]:
        for option in ("img_size", None):
            for each in SIZES:
                yield {option: each} if option else {}, images(each, channels)
        yield {}, images(size, channels)

    return smallest(build, attempts())


PROVIDERS: Mapping[str, Provider] = {
    "torchvision": Provider(partial(_torchvision, tv), _classifier),
    "segmentation": Provider(partial(_torchvision, tv.segmentation), _segmenter),
    "video": Provider(partial(_torchvision, tv.video), _video),
    "timm": Provider(families, _timm),
}
