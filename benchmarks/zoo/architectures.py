"""timm: of each family the first architecture, then of each the second, and so on, until there are 200.

A family is a module of ``timm.models`` (``timm.list_modules()``), in alphabetical order; its architectures are in the order in which
the module defines them, which is the order in which it registers them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

import timm
from torch import nn

from zoo.providers import Attempt, Inputs, Provider, images, in_turn, smallest

COUNT = 200
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 331, 384, 512)


def architectures() -> dict[str, str]:
    """Each architecture by its name, and its family."""
    return in_turn({module: registered(module) for module in sorted(timm.list_modules())}, COUNT)


def registered(module: str) -> list[str]:
    """In the order of the file; a deprecated name, which a file registers too, is another's."""
    known = set(timm.list_models(module=module))
    return [name for name in vars(importlib.import_module(f"timm.models.{module}")) if name in known]


def architecture(name: str) -> tuple[nn.Module, Inputs]:
    """Nothing shrunk but the picture: of the sizes the smallest that it takes, told to the constructor where that wants to know."""
    known = timm.get_pretrained_cfg(name)
    assert known is not None
    channels, size, _ = known.input_size
    build = partial(timm.create_model, name, pretrained=False)

    def attempts() -> Iterator[Attempt]:
        for option in ("img_size", None):
            for each in SIZES:
                yield {option: each} if option else {}, images(each, channels)
        yield {}, images(size, channels)

    return smallest(build, attempts())


PROVIDER = Provider(architectures, architecture)
