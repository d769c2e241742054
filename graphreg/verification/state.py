"""Finds the parameters, buffers and tensor attributes of a model, and how those of two models differ."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graphreg.ir import RULES
from graphreg.verification.values import difference


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model, or those of a rewritten module without its strengths, by name; a tied one by all its names."""
    return {name: p for name, p in module.named_parameters(remove_duplicate=False) if not name.startswith(f"{RULES}.")}


def changed(expected: nn.Module, ours: nn.Module, attributes: bool = False) -> str:
    """Describe the first difference in parameters and buffers, with ``attributes`` also in plain tensor attributes; ``""`` if none."""
    theirs, mine = _state(expected, attributes), _state(ours, attributes)
    for name in [*theirs, *mine]:
        if name not in mine or name not in theirs:
            return f"{name} is {'not in the module' if name in theirs else 'not in the model'}"
        if theirs[name] is not mine[name] and not nn.parameter.is_lazy(theirs[name]) and (how := difference(theirs[name], mine[name])):
            return f"{name} {how}"
    return ""


def _state(module: nn.Module, attributes: bool) -> dict[str, Any]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: value for name, value in named.items() if not name.startswith(f"{RULES}.")}
    return state | ({dotted(path, name): value for path, name, value in attributes_of(module)} if attributes else {})


def attributes_of(module: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Return the tensors that modules have in plain attributes, not as buffers, each with the module's path and the attribute's name."""
    return [(path, name, v) for path, m in module.named_modules() for name, v in vars(m).items() if isinstance(v, Tensor)]


def dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def attribute(twin: nn.Module, dotted: str) -> Any:
    path, _, name = dotted.rpartition(".")
    return getattr(twin.get_submodule(path), name, None)


def differing_parameter(expected: dict[str, nn.Parameter], ours: dict[str, nn.Parameter]) -> str:
    """Describe the first of our parameters that differs, as a sentence; ``""`` if none does."""
    for name, parameter in expected.items():
        if name in ours and not nn.parameter.is_lazy(parameter) and (how := difference(parameter, ours[name])):
            return f"the parameter {name} {how}"
    return ""
