"""Lets the copies of a model and of its rewritten module share one set of parameters, because parameters take most of a copy's memory.

A forward seldom writes into parameters. After each call, the shared parameters are compared with
those of the user's model. If the model has written into one, ``verify`` restores them all, and from
then on each copy gets parameters of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphreg.verification.state import differing_parameter, parameters_of


class SharedParameters:
    """The parameters of one copy of the model, which all copies that ``verify`` runs may share.

    Attributes:
        on: Whether the copies share these parameters. False after ``turn_off``.
    """

    def __init__(self, given: nn.Module, copy: nn.Module, module: nn.Module) -> None:
        """``given``: the user's model; ``copy``: the copy of it that has the parameters; ``module``: the rewritten module."""
        self.given, self.own, self.theirs = parameters_of(given), parameters_of(copy), parameters_of(module)
        self.on = True

    def memo(self) -> dict[int, Any]:
        """Return a memo for ``copy.deepcopy``. With it, a copy of the model or of the module uses the shared parameters.

        The memo is empty if parameters are not shared.
        """
        if not self.on:
            return {}
        return {id(p): own for name, own in self.own.items() for p in (own, self.theirs[name])}

    def written(self) -> str:
        """Describe the first shared parameter that differs from the one in the user's model; ``""`` if none does."""
        return differing_parameter(self.given, self.own)

    def turn_off(self) -> None:
        """Restore the shared parameters from the user's model. Copies that are made from now on have parameters of their own."""
        self.on = False
        with torch.no_grad():
            for name, own in self.own.items():
                own.data.copy_(self.given[name].data)
                own.requires_grad_(self.given[name].requires_grad)
