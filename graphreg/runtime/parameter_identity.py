"""Checks that the parameters that regularizers act on are still those of the model, and tied as they were when it was regularized."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from graphreg.errors import GraphRegError
from graphreg.torch_internals.dynamo_marks import disable
from graphreg.torch_internals.modules import CALL_HOOKS

_KNOWN = "_known_parameters"


class _Known:
    """The registries of a module's modules, and what was in them at the last check. Copies and pickles start without them."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.registries = [registry for inner in modules for registry in (inner._modules, inner._parameters)]
        self.sizes = list(map(len, self.registries))
        self.registries_filled = [registry for registry in self.registries if registry]
        self.values = self._values()

    def _values(self) -> list[Any]:
        return [*itertools.chain.from_iterable([each.values() for each in self.registries_filled])]

    def holds(self, module: nn.Module) -> bool:
        # Sizes first: what is put into an empty registry is not among the values.
        if module._modules is not self.registries[0] or list(map(len, self.registries)) != self.sizes:
            return False
        return all(map(operator.is_, self._values(), self.values))

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    """Return what a copy has in place of a ``_Known``."""


@disable()
def require_same_parameters(module: nn.Module, rules: Any) -> None:
    """Raise GraphRegError if parameters that regularizers act on were tied, untied or removed since the module was made.

    A penalty would count such a parameter twice, or not at all.

    Args:
        module: The rewritten module.
        rules: The container of its runtime modules.
    """
    known: _Known | None = vars(rules).get(_KNOWN)
    if known is not None and known.holds(module):
        return
    owner: dict[int, str] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    for names in vars(rules)["regularized"]:
        found = {name: _present(modules, name, name in rules.replaced) for name in names}
        ids = {id(value) for value in found.values() if value is not None}
        if len(ids) > 1:
            raise GraphRegError(
                f"{' and '.join(names)} were one tied parameter when the model was regularized, and are {len(ids)} parameters now, "
                f"of which regularizers would act on {names[0]} alone. Tie them again, or regularize the model once more."
            )
        for each in ids:
            if owner.get(each, names[0]) != names[0]:  # several regularizers may act on one parameter
                raise GraphRegError(
                    f"{owner[each]} and {names[0]} are one tied parameter now, and were two when the model was regularized: penalties "
                    "would count it twice. Tie parameters before graphreg.regularize, or regularize the model once more."
                )
            owner[each] = names[0]
    vars(rules)[_KNOWN] = _Known(module)


def _present(modules: dict[str, nn.Module], name: str, is_replaced: bool) -> Any:
    """Return the parameter of a name now; None if it is parametrized, or if a later pass has left out the module that had it.

    ``is_replaced``: whether a splice replaces it when a layer is called.
    """
    path, _, own = name.rpartition(".")
    if (inner := modules.get(path)) is None:
        return None
    if (parameter := inner._parameters.get(own)) is not None:
        return parameter
    attribute = vars(inner).get(own)
    if isinstance(attribute, torch.Tensor) and not attribute.is_leaf and any(getattr(inner, hooks) for hooks in CALL_HOOKS):
        raise GraphRegError(
            f"{name} is no parameter any more: a hook computes it before each call of the layer (as torch.nn.utils.prune does), and "
            "regularizers would act on its value of the call before. Prune first and regularize then, or regularize once more."
        )
    if is_parametrized(inner, own):
        stages: Any = inner.parametrizations
        if next(stages[own].buffers(), None) is not None:
            raise GraphRegError(
                f"{name} is no parameter any more: a parametrization with buffers computes it (as spectral_norm does), and would run once "
                "more in each call for the regularizers that act on it. Parametrize first and regularize then, or regularize once more."
            )
        if is_replaced:
            raise GraphRegError(
                f"{name} is no parameter any more: a parametrization computes it, and a call of the layer cannot use another tensor in its "
                "place. Parametrize first and regularize then, or regularize once more."
            )
    elif path and type(inner) is not nn.Module and not isinstance(getattr(inner, own, None), torch.Tensor):  # a later pass has plain ones
        raise GraphRegError(
            f"{name} is no parameter any more: {type(inner).__name__}, which is now at {path}, has none of that name, and "
            "regularizers act on it. Change the model first and regularize then, or regularize once more."
        )
    return None
