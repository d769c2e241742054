"""All of torchvision: classification, segmentation, video, optical flow, detection, and the float form of the quantizable ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn

from zoo.providers import Inputs, Provider, clips, images, numbers, smallest, try_out

SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299)
CLIPS = ((2, 32), (4, 32), (4, 64), (8, 64), (16, 64), (16, 112), (16, 224))  # frames, size
SCENE = 64  # pixels a side of a scene for detection


def listed(module: Any) -> Mapping[str, str]:
    return dict.fromkeys(tv.list_models(module), "")


def classifier(name: str) -> tuple[nn.Module, Inputs]:
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    build = partial(tv.get_model, name, weights=None, num_classes=10, **options)
    if name.startswith("vit_"):
        return smallest(build, (({"image_size": size}, images(size)) for size in SIZES if size % 32 == 0))
    if name.startswith("maxvit"):
        return smallest(build, (({"input_size": (size, size)}, images(size)) for size in SIZES))
    return smallest(build, (({}, images(size)) for size in SIZES))


def quantizable(name: str) -> tuple[nn.Module, Inputs]:
    options: dict[str, Any] = {"init_weights": False} if name in ("quantized_googlenet", "quantized_inception_v3") else {}
    build = partial(tv.get_model, name, weights=None, quantize=False, num_classes=10, **options)
    return smallest(build, (({}, images(size)) for size in SIZES))


def segmenter(name: str) -> tuple[nn.Module, Inputs]:
    build = partial(tv.get_model, name, weights=None, weights_backbone=None, num_classes=5)
    return smallest(build, (({}, images(size)) for size in SIZES))


def video(name: str) -> tuple[nn.Module, Inputs]:
    build = partial(tv.get_model, name, weights=None, num_classes=10)
    if name.startswith("mvit"):  # its builders fix the size: one clip is enough of that
        return smallest(build, iter([({}, clips(16, 224, batch=1))]))
    return smallest(build, (({}, clips(*clip)) for clip in CLIPS))


def flow(name: str) -> tuple[nn.Module, Inputs]:
    """RAFT from two frames, the smallest that it takes, with two updates in place of twelve."""
    frames = {"image1": numbers(1, 3, 128, 128, seed=0), "image2": numbers(1, 3, 128, 128, seed=1), "num_flow_updates": 2}
    return smallest(partial(tv.get_model, name, weights=None), iter([({}, frames)]))


def detector(name: str) -> tuple[nn.Module, Inputs]:
    """A detector of three classes on two scenes with what is in them; training wants the second, evaluation passes it over."""
    sized = {} if name.startswith("ssd") else {"min_size": SCENE, "max_size": SCENE}  # SSD's is fixed
    torch.manual_seed(0)
    model = tv.get_model(name, weights=None, weights_backbone=None, num_classes=3, **sized)
    inputs = ([numbers(3, SCENE, SCENE, seed=seed).sigmoid() for seed in (0, 1)], [scene(name, first) for first in (4.0, 12.0)])
    try_out(model, inputs)
    return model.train(), inputs


def scene(name: str, first: float) -> dict[str, Tensor]:
    """Two boxes with their classes, and masks or key points where the model is trained with these."""
    boxes = torch.tensor([[first, 6.0, first + 20, 30.0], [20.0, first + 10, 56.0, 58.0]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    if name.startswith("maskrcnn"):
        found["masks"] = torch.ones(2, SCENE, SCENE, dtype=torch.uint8)
    if name.startswith("keypointrcnn"):
        middle = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        found["keypoints"] = torch.cat([middle.expand(2, 17, 2), torch.ones(2, 17, 1)], dim=-1)
    return found


CLASSIFICATION = Provider(partial(listed, tv), classifier)
QUANTIZABLE = Provider(partial(listed, tv.quantization), quantizable)
SEGMENTATION = Provider(partial(listed, tv.segmentation), segmenter)
VIDEO = Provider(partial(listed, tv.video), video)
FLOW = Provider(partial(listed, tv.optical_flow), flow)
DETECTION = Provider(partial(listed, tv.detection), detector)
