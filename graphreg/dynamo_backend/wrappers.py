"""Looks through the wrappers of a model, so that their attributes (``module``, ``_orig_mod``) are no part of any name.

A model that is trained on several devices, or compiled in parts, has wrappers around itself or around some of its modules. Names, streams
and selectors are those of the model without wrappers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from graphreg.torch_internals.modules import wrapped_module


class Unwrapped(nn.Module):
    """Stands for a module in which submodules are wrapped: it has these without their wrappers, and shares the module's tensors and mode.

    Attributes:
        module_itself: The module, in a tuple, so that it does not become a submodule.
    """

    def __init__(self, module: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
        self.__dict__["module_itself"] = (module,)
        super().__init__()
        # The dicts themselves: what is moved or registered later is so in both.
        self.__dict__["_parameters"], self.__dict__["_buffers"] = module._parameters, module._buffers
        self.__dict__["_modules"] = dict(children)

    @property
    def training(self) -> bool:
        """The mode of the module."""
        module: nn.Module = self.__dict__["module_itself"][0]
        return module.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Do nothing: ``nn.Module.__init__`` assigns True, and the mode must stay that of the module."""


def innermost_module(module: nn.Module) -> nn.Module:
    """Return the module inside its wrappers; the module itself if it has none."""
    while (inner := wrapped_module(module)) is not None:
        module = inner
    return module


def unwrapped(module: nn.Module, known: dict[int, nn.Module] | None = None) -> nn.Module:
    """Return a module without its wrappers, and without those inside it: the module itself if there are none.

    ``known``: a dict from the id of each module that was met before to the result for it, so that a module with two paths stays one module.
    """
    module, known = innermost_module(module), {} if known is None else known
    if id(module) not in known:
        children = {name: child if child is None else unwrapped(child, known) for name, child in module._modules.items()}
        same = all(children[name] is child for name, child in module._modules.items())
        # The new class has the name of the module's class, which messages and reports show.
        known[id(module)] = module if same else type(type(module).__name__, (Unwrapped,), {})(module, children)
    return known[id(module)]


def module_itself(module: nn.Module) -> nn.Module:
    """Return the module that a module in the result of ``unwrapped`` stands for."""
    own: tuple[Any, ...] = vars(module).get("module_itself", (module,))
    inner: nn.Module = own[0]
    return inner
