"""Finds the parameters, buffers and tensor attributes of a model, and how those of two models differ."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graphreg.ir.module_record import RULES
from graphreg.torch_internals.modules import buffers_by_name, parameters_by_name
from graphreg.tracing.proof.values import difference


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by name, a tied one under each of its names. Those under ``graphreg_rules`` are left out."""
    return {name: p for name, p in parameters_by_name(module).items() if not name.startswith(f"{RULES}.")}


def first_change(expected: nn.Module, ours: nn.Module, attributes: bool = False) -> str:
    """Describe the first difference between the parameters and buffers of two models; ``""`` if there is none.

    ``attributes``: whether to compare tensors in plain attributes, too.
    """
    theirs, mine = _state(expected, attributes), _state(ours, attributes)
    for name in [*theirs, *mine]:
        if name not in mine or name not in theirs:
            return f"{name} is {'not in the module' if name in theirs else 'not in the model'}"
        # A rewritten module has the model's own tensors, and equal objects need no comparison.
        if theirs[name] is not mine[name] and (how := difference(theirs[name], mine[name])):
            return f"{name} {how}"
    return ""


def _state(module: nn.Module, attributes: bool) -> dict[str, Any]:
    named = {**parameters_by_name(module, once=True), **buffers_by_name(module, once=True)}
    state = {name: value for name, value in named.items() if not name.startswith(f"{RULES}.")}
    return state | ({dotted(path, name): value for path, name, value in attributes_of(module)} if attributes else {})


def attributes_of(module: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Return the tensors in plain attributes of modules (neither parameters nor buffers): the module's path, the attribute, the tensor."""
    return [(path, name, v) for path, m in module.named_modules() for name, v in vars(m).items() if isinstance(v, Tensor)]


def dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def attribute(twin: nn.Module, dotted: str) -> Any:
    path, _, name = dotted.rpartition(".")
    return getattr(twin.get_submodule(path), name, None)


def differing_parameter(expected: dict[str, nn.Parameter], ours: dict[str, nn.Parameter]) -> str:
    """Describe the first parameter in ``ours`` that differs from the parameter of the same name in ``expected``; ``""`` if none does."""
    for name, parameter in expected.items():
        if name in ours and (how := difference(parameter, ours[name])):
            return f"the parameter {name} {how}"
    return ""
