"""Writes the structure of a call's arguments as a text, by which a model that is regularized in place chooses the graph for the call.

Two calls have the same structure if they pass arguments for the same parameters of the forward, with equal classes, dtypes and numbers of
dims of tensors, and equal contents of all other arguments, and if the same ones among them are one object.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError
from graphreg.ir.contents import contents_of, detached, may_change, number_kind
from graphreg.torch_internals import pytree
from graphreg.tracing.fake_inputs import GivenCall

# Stands for a dot in the text. The text is also the name of an attribute of ``Graphs`` (placed.py), and Dynamo cannot read an attribute
# that has a dot in its name.
_DOT = "·"


class CallForm:
    """Turns the arguments of a call into the text of their structure. The method ``key`` uses only simple Python, because Dynamo traces it.

    Attributes:
        names: The names of the forward's parameters that may be given by position.
        order: The names of all parameters of the forward, except those like ``*args`` and ``**kwargs``.
        defaults: A dict. Each key is the name of a parameter that has a default; the value is the default.
        changing: The names of the parameters whose default may change in place, such as a list.
    """

    def __init__(self, signature: inspect.Signature) -> None:
        """``signature``: the signature of the forward, without ``self``."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = tuple(name for name, p in signature.parameters.items() if p.kind in kinds)
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self.order = tuple(name for name, p in signature.parameters.items() if p.kind not in variadic)
        self.defaults = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
        self.changing = tuple(name for name, default in self.defaults.items() if may_change(default))

    def key(self, args: Sequence[Any], kwargs: Mapping[str, Any], loosened: Sequence[str] = ()) -> str:
        """Return the text: the name of each argument, with the dtype and number of dims of a tensor, or the contents of any other value.

        Arguments that ``**kwargs`` takes are in the order of the call, in which the forward gets them. Otherwise the text is the same
        whether an argument is given by position or by name. The text is also the same whether an argument that equals its default is given
        or left out, if the default is None, a bool, a number, a str or an object that may change in place.

        ``loosened``: the names of arguments of which, if they are numbers, the text has only the type.
        """
        seen: Any = [] if torch.compiler.is_dynamo_compiling() else {}
        parts, rest = [], []
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        for name in self.order:
            if name in loosened and (kind := number_kind(given[name] if name in given else self.defaults.get(name))):
                parts.append(f"{name}={kind}")
            elif name in given and not self._is_default(name, given[name]):
                parts.append(f"{name}={contents_of(given[name], (), True, seen)}")
            elif name in self.changing and name not in given:
                parts.append(f"{name}={contents_of(self.defaults[name], (), True, seen)}")
        for i in range(len(self.names), len(args)):
            rest.append(f"*{i}={contents_of(args[i], (), True, seen)}")
        for name, value in kwargs.items():
            if name not in self.order:
                kind = number_kind(value) if name in loosened else ""
                rest.append(f"{name}={kind or contents_of(value, (), True, seen)}")
        # A dot-like sign of the text itself is doubled, so that different texts stay different.
        return ", ".join([*parts, *rest]).replace(_DOT, f"{_DOT}{_DOT}").replace(".", f"{_DOT} ")

    def numbers(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that are numbers, by name, defaults included; without those that ``*args`` takes."""
        given = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        return {name: value for name, value in given.items() if number_kind(value)}

    def _is_default(self, name: str, value: Any) -> bool:
        if name not in self.defaults:
            return False
        default = self.defaults[name]
        if default is None or value is None:
            return default is None and value is None
        if isinstance(default, (bool, int, float, str)) and type(default) is type(value):
            return contents_of(default) == contents_of(value)
        return False


def structure_text(key: str) -> str:
    """Return the text of a structure (``key``) as messages show it: in parentheses, with dots."""
    return f"({key.replace(f'{_DOT} ', '.').replace(f'{_DOT}{_DOT}', _DOT).replace('torch.', '')})"


def example_of(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return a call's arguments as example inputs: a tuple; a dict if some are given by name; a ``GivenCall`` if not all can be."""
    args, kwargs = detached(args, kwargs)
    if not kwargs:
        return tuple(args)
    if not args:
        return dict(kwargs)
    bound = signature.bind(*args, **kwargs)
    example: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            example.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            return GivenCall(tuple(args), dict(kwargs))
        else:
            example[name] = value
    return example


def shapes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a graph may assert of the tensors among the arguments, the numbers, in order, and the autocast that is on."""
    leaves = pytree.tree_leaves((tuple(args), sorted(kwargs.items(), key=lambda item: item[0])))
    casts = tuple((device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device))
    return (*(_layout(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves if isinstance(leaf, (Tensor, int, float))), *casts)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    lies = tensor.stride() if tensor.layout is torch.strided and not tensor.is_nested else tensor.layout
    return tensor.shape, tensor.dtype, lies, tensor.requires_grad


def not_traced(key: str, title: str) -> GraphRegError:
    """Return the error for a call that Dynamo or another tracer traces, or that is within a transform of torch.func.

    It is for a structure ``key`` of arguments that has no graph, or only a stale graph. ``title``: the name of the model's class.
    """
    return GraphRegError(
        f"{title} is called with arguments of the structure {structure_text(key)}, for which it has no graph, or only a graph from before "
        "a change of the model. The model cannot be traced here: the call is within code that torch.compile compiles, within a tracer "
        "(torch.export, torch.jit.trace, fake tensors) or within a transform of torch.func. Call the model with such arguments once "
        "before, outside of these, or give regularize_ example_inputs of this structure."
    )
