"""Run in the environment of a pair: the names of twenty models, the known answers of the streams, and the versions, as JSON."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphreg
from zoo.providers import one_line, provider

PACKAGES = ("torch", "torchvision", "timm", "transformers")
# By their names in the zoo: each kind of layer, and both front ends.
TWENTY = (
    "torchvision/resnet18", "torchvision/densenet121", "torchvision/mobilenet_v3_small", "torchvision/googlenet",
    "torchvision/efficientnet_b0", "torchvision/convnext_tiny", "torchvision/swin_t", "torchvision/vit_b_32",
    "segmentation/lraspp_mobilenet_v3_large", "video/r3d_18", "timm/vit_tiny_patch16_224", "timm/mixer_s32_224", "timm/regnetx_002",
    "transformers/bert", "transformers/gpt2", "transformers/llama", "transformers/t5", "transformer/transformer", "recurrent/lstm",
    "recurrent/gru_cell",
)  # fmt: skip
# What the streams give for seed 0: the masks of three calls of dropout at rate 0.5 on 16 elements. They hold for all releases.
KNOWN = ["1111111111100000", "0001101000100111", "1001100101111111"]


class Masked(nn.Module):
    """One dropout; what its output is not 0 at is its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(x)
        return y


def names_of(model: str) -> list[str]:
    """The sites of one of the zoo's models, each with its labels and its role."""
    source, _, name = model.partition("/")
    module, inputs = provider("zoo.models", source).build(name)
    return [" ".join([*(label.text for label in site.labels), site.role]) for site in graphreg.trace(module, inputs).sites]


def digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def masks(call: Callable[[Tensor], Tensor]) -> list[str]:
    """The masks of three calls, element by element."""
    found = []
    for _ in range(3):
        x = torch.ones(16, requires_grad=True)
        y = call(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        found.append("".join(str(int(kept)) for kept in (y != 0) & (gradient != 0)))
    return found


def seeded() -> Any:
    return graphreg.regularize(Masked(), own_dropout="seeded", rng=0)


def in_eager() -> list[str]:
    module = seeded()
    return masks(lambda x: module(x).output)


def compiled(backend: str) -> list[str]:
    function = torch.compile(seeded(), fullgraph=True, backend=backend)
    return masks(lambda x: function(x).output)


def through_backend() -> list[str]:
    backend = graphreg.backend(own_dropout="seeded", rng=0, inner="aot_eager")
    return masks(torch.compile(Masked(), backend=backend))


WAYS: dict[str, Callable[[], list[str]]] = {
    "eager": in_eager,
    "aot_eager": partial(compiled, "aot_eager"),
    "inductor": partial(compiled, "inductor"),
    "the backend": through_backend,
}


def tried(ask: Callable[[], Any]) -> Any:
    """What a question gives, or the error as text."""
    try:
        return ask()
    except Exception as error:  # a torch that it fails with is what is looked for
        return one_line(error)


def found() -> dict[str, Any]:
    listed = {model: tried(partial(names_of, model)) for model in TWENTY}
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "names": {model: [len(names), digest(names)] if isinstance(names, list) else names for model, names in listed.items()},
        "answers": {way: drawn == KNOWN or str(drawn) for way, ask in WAYS.items() for drawn in [tried(ask)]},
    }


def main(out: str) -> None:
    warnings.simplefilter("ignore")
    Path(out).write_text(json.dumps(found(), indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
