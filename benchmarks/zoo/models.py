"""Where the zoo's models come from: each provider lists names and builds one, with random weights and small inputs.

A provider is named by where it stands, so that a process imports the one library that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping

INTRODUCTION = """
# Models of torchvision, timm and transformers

`make zoo` tests graphreg on models that it was not written for, and writes this page; [models of other libraries](models_other.md) have \
one of their own. The models have random weights, and the smallest input that they accept in both modes. They come from these \
providers:

| provider | models |
|---|---|
| torchvision, segmentation, video, flow, detection | every builder in `torchvision.models.list_models()`. Detection gets scenes of \
64 x 64, which SSD resizes; optical flow does two updates instead of twelve |
| quantizable | torchvision's quantizable models in their float form (`quantize=False`), which is the form that is trained |
| timm | {timm} architectures: the first of each family, then the second of each, and so on. A family is a module of `timm.models` \
(`timm.list_modules()`). Families are in alphabetical order, and the architectures of a family in the order in which timm registers \
them. Only the picture is made small |
| transformers | the first {transformers} families (folders of `transformers.models`), in alphabetical order, that can be made tiny and \
whose forward takes text, pictures or sound. A rule on the names of configuration fields makes their values small \
(`benchmarks/zoo/tiny.py`). If the model cannot run like that, only its depth and vocabulary are reduced. It has at most 100 million \
parameters. Of the types of a family, the first whose `AutoModel` runs is used. The second of two texts ends in padding, because with a \
mask of ones transformers builds another graph when it is traced than when it runs |
| transformer, recurrent | torch's own layers, used in common ways |
| control | models whose forward decides by the shapes or the values of its inputs |
"""

PACKAGES = ("torch", "torchvision", "timm", "transformers")  # whose versions the results depend on
PRELOADED = PACKAGES  # imported before the processes of the models are forked

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
