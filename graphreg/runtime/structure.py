"""Describes what a compiled graph of a module depends on besides its code, so that only modules that agree in both share a class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graphreg.regularizer.base import Regularizer
from graphreg.runtime.runtime_module import Rules
from graphreg.torch_internals.modules import modules_by_path
from graphreg.tracing.symbolic.tracer import PLAIN

_PLAIN = (*PLAIN, Regularizer)
_COMMON = frozenset(PLAIN)  # to look up exact types, which is quick
_OWN = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))  # what every module has


def structure(module: nn.Module) -> list[Any]:
    """Describe what a compiled graph of a module depends on, besides its code: shapes, layers and their options."""
    structure: list[Any] = []
    regularizers: dict[str, int] = {}  # a number for each text: a regularizer's text may list many sites, and it is at each of them
    texts: dict[int, str] = {}  # by id of a regularizer

    def text(value: Regularizer) -> str:
        if id(value) not in texts:
            texts[id(value)] = f"regularizer {regularizers.setdefault(repr(value), len(regularizers))}"
        return texts[id(value)]

    for path, inner in modules_by_path(module).items():
        attributes = {} if inner is module or isinstance(inner, Rules) else vars(inner)  # the code reads only their tensors
        plain = [
            (name, value) for name, value in attributes.items()
            if (type(value) in _COMMON or (name not in _OWN and _is_plain(value))) and name != "training"
        ]  # fmt: skip
        options = sorted((name, repr(text(value) if isinstance(value, Regularizer) else value)) for name, value in plain)
        named = (*inner._parameters.items(), *inner._buffers.items())
        tensors = [(name, *_tensor_metadata(tensor)) for name, tensor in named if tensor is not None]
        structure.append((path, type(inner) if inner is not module else None, options, tensors))
    return [*structure, list(regularizers)]


def _tensor_metadata(tensor: Tensor) -> tuple[Any, ...]:
    lazy = nn.parameter.is_lazy(tensor)
    return (None if lazy else tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)
