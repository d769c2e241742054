"""Lets the copies of a model and of its rewritten module share their parameters, which are most of the memory that a copy takes.

A forward seldom writes into parameters. After each call they are compared with the user's; if one was written into, ``verify`` stops
sharing and makes separate copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphreg.verification.state import differing_parameter, parameters_of


class SharedParameters:
    """The parameters of a copy of the model, for the further copies that ``verify`` runs.

    Attributes:
        on: Whether the copies share them; False once the model has written into one.
    """

    def __init__(self, given: nn.Module, copy: nn.Module, module: nn.Module) -> None:
        """``given``: the user's model, to compare with; ``copy``: its copy; ``module``: the rewritten module, with equal parameters."""
        self.given, self.own, self.theirs = parameters_of(given), parameters_of(copy), parameters_of(module)
        self.on = not any(map(nn.parameter.is_lazy, self.own.values()))

    def memo(self) -> dict[int, Any]:
        """Return what ``copy.deepcopy`` needs so that a copy of the model or of the module has these parameters."""
        if not self.on:
            return {}
        return {id(p): own for name, own in self.own.items() for p in (own, self.theirs[name])}

    def written(self) -> str:
        """Describe the first parameter that is not as the user's; ``""`` if there is none."""
        return differing_parameter(self.given, self.own)

    def turn_off(self) -> None:
        """Give the parameters the user's values again; copies that are made from now on have parameters of their own."""
        self.on = False
        with torch.no_grad():
            for name, own in self.own.items():
                own.data.copy_(self.given[name].data)
                own.requires_grad_(self.given[name].requires_grad)
