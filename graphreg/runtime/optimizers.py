"""Warns if no optimizer has the parameters that regularizers own, as when the optimizer was made from ``model.parameters()``."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from graphreg.errors import listed, warn
from graphreg.runtime.owned_state import states_in


def watch_optimizers(module: nn.Module) -> None:
    """Call ``warn_of_missed`` when a backward pass first reaches one of the parameters that regularizers own."""
    owned = [parameter for state in states_in(module) for parameter in state.parameters() if parameter.requires_grad]
    handles = list[Callable[[], None]]()
    root = weakref.ref(module)

    def reached(parameter: Tensor) -> None:
        while handles:
            handles.pop()()
        if (present := root()) is not None:
            warn_of_missed(present)

    for parameter in owned if all(parameter.is_leaf for parameter in owned) else ():
        handles.append(parameter.register_post_accumulate_grad_hook(reached).remove)  # type: ignore[no-untyped-call]


def warn_of_missed(module: nn.Module) -> None:
    """Warn of the regularizers' parameters that no optimizer has, if some optimizer has a parameter of the model."""
    owned = {id(parameter) for state in states_in(module) for parameter in state.parameters()}
    named = dict(module.named_parameters())
    theirs = {id(parameter) for parameter in named.values()} - owned
    # by type(): isinstance reads an attribute of every object in the process, which may have side effects
    groups = [{id(p) for g in each.param_groups for p in g["params"]} for each in gc.get_objects() if issubclass(type(each), Optimizer)]
    trained = set[int]().union(*groups)
    missed = [name for name, parameter in named.items() if id(parameter) in owned and id(parameter) not in trained]
    if missed and not theirs.isdisjoint(trained):
        warn(
            f"the optimizer has the model's parameters, and not those that regularizers learn ({listed(missed, 3)}), which stay as they "
            "are. Make it from the parameters of the rewritten module: torch.optim.SGD(module.parameters(), ...)."
        )
