"""Copies models for ``verify``, which runs only copies."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

from graphreg.errors import GraphRegError, first_line, shown
from graphreg.ir.module_record import ORIGINAL, PLACED
from graphreg.torch_internals.modules import CALL_HOOKS, parameters_by_name

M = TypeVar("M", bound=nn.Module)


def title(model: object) -> str:
    return type(model).__name__.removesuffix("Impl") if isinstance(model, nn.Module) else shown(model)


def copied_model(model: M, memo: dict[int, Any] | None = None) -> M:
    """Return a copy of a model without its gradients. ``memo``: the memo for ``copy.deepcopy``."""
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise GraphRegError(
            f"{title(model)} cannot be copied ({first_line(error)}), and verify runs only copies, so that your model stays unchanged. "
            "Make copy.deepcopy(model) work, or regularize without verify."
        ) from error
    for parameter in parameters_by_name(twin, once=True).values():
        parameter.grad = None
    return twin


def own_forward(model: nn.Module) -> nn.Module:
    """Return a copy of a model that calls the model's own forward, even if the model is regularized in place.

    The copy of such a model has no hooks of its own, and nothing that has wrapped its forward: calls run
    them around the graph, which does not contain them.
    """
    twin = copied_model(model)
    if PLACED in vars(twin):
        # The model's class was replaced by one whose calls run the graph.
        object.__setattr__(twin, "__class__", getattr(type(twin), ORIGINAL))
        del vars(twin)[PLACED]
        vars(twin).pop("forward", None)
        vars(twin).update({name: OrderedDict() for name in CALL_HOOKS})
    return twin
