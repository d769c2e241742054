"""``load_by_name``: an optimizer's state goes to the parameters of the same names, where torch goes by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from graphreg.errors import NoMatchError, RegularizerError, listed, shown, suggestions_text, warn

_CURE = "Make the optimizer from graphreg.param_groups(model, ...) or model.named_parameters()"


def load_by_name(optimizer: Optimizer) -> RemovableHandle:
    """Make ``optimizer.load_state_dict`` find the state of each parameter by its name.

    torch goes by position: if the groups of the checkpoint are in another order, one parameter
    gets the moments of another, without an error if their shapes agree. With the hook that this
    function adds, each parameter gets its own moments. If the checkpoint has a group with the same
    parameters, the group gets its saved options, such as the learning rate. Any other group keeps
    its options, with a warning.

    Args:
        optimizer: An optimizer whose groups have ``param_names``, as those of ``param_groups`` do.

    Returns:
        A handle; its ``remove()`` takes the hook away.

    Raises:
        RegularizerError: ``optimizer`` is not an optimizer, its groups have no names, or it is
            ``LBFGS``, which has one state for all parameters together. ``load_state_dict`` raises
            this error for a state without names.
        NoMatchError: Raised by ``load_state_dict`` if only the checkpoint, or only the optimizer, has
            a parameter of some name.
    """
    if not isinstance(optimizer, Optimizer):
        raise RegularizerError(f"optimizer={shown(optimizer)} is not allowed; give an instance of torch.optim.Optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise RegularizerError("the state of LBFGS is that of all parameters together, in their order, so it cannot be loaded by name.")
    if not all("param_names" in group for group in optimizer.param_groups):
        raise RegularizerError(f"the groups of {type(optimizer).__name__} have no param_names, by which to load. {_CURE}.")
    return optimizer.register_load_state_dict_pre_hook(_in_the_order_of_names)


def _in_the_order_of_names(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the groups of the optimizer, and with the numbers of the saved parameters in the order of its names."""
    saved = state["param_groups"]
    if not all("param_names" in group for group in saved):
        raise RegularizerError(
            "the state that is loaded has no param_names: the optimizer that saved it had none. To load it by position, call remove() on "
            f"what load_by_name returned. {_CURE}, so that later states have names."
        )
    number = {name: index for group in saved for name, index in zip(group["param_names"], group["params"], strict=True)}
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    _check_names(names, number)

    by_names = {frozenset(group["param_names"]): group for group in saved}
    groups, kept = list[dict[str, Any]](), list[str]()
    for i, group in enumerate(optimizer.param_groups):
        options = by_names.get(frozenset(group["param_names"]))
        if options is None:
            kept.append(f"{i} ({listed(group['param_names'], 2)})")
            options = group
        groups.append({**options, "param_names": group["param_names"], "params": [number[name] for name in group["param_names"]]})
    if kept:
        warn(
            f"the checkpoint has other groups: group {listed(kept, 3)} has no group with the same parameters there. The state of each "
            "parameter is loaded; such groups keep their own options, such as lr and weight_decay."
        )
    return {**state, "param_groups": groups}


def _check_names(ours: list[str], saved: Mapping[str, int]) -> None:
    if missing := [name for name in ours if name not in saved]:
        raise NoMatchError(
            f"the checkpoint has no state for {listed(missing, 3)}.{suggestions_text(missing[0], saved)} Load it into an optimizer of the "
            "parameters that were trained."
        )
    if more := [name for name in saved if name not in ours]:
        raise NoMatchError(
            f"the checkpoint has a state for {listed(more, 3)}, which the optimizer has not.{suggestions_text(more[0], ours)} Load it into "
            "an optimizer of the parameters that were trained."
        )
