"""Finds parameters on which a penalty acts, and the weight decay of an optimizer, too."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphreg.errors import listed
from graphreg.planning.plan import Plan
from graphreg.runtime.owned_state import all_optimizers


def decayed_too(plan: Plan, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return a note for each rate of weight decay that an optimizer in this process applies to parameters that are penalized, too.

    Args:
        plan: The plan of a module.
        parameters: The module's parameters by name.
    """
    penalized: dict[int, tuple[str, list[str]]] = {}
    for edit in plan.edits:
        for site in edit.sites if edit.regularizer.on == "parameters" and edit.regularizer.has_penalty() else ():
            if site.name in parameters:
                penalized.setdefault(id(parameters[site.name]), (site.name, []))[1].append(edit.name)
    if not penalized:
        return []

    both: dict[tuple[str, float], dict[int, None]] = {}
    for optimizer in all_optimizers():
        for group in optimizer.param_groups:
            if rate := group.get("weight_decay"):
                ids = (id(parameter) for parameter in group["params"])
                both.setdefault((type(optimizer).__name__, float(rate)), {}).update((each, None) for each in ids if each in penalized)
    notes = []
    for (kind, rate), shared in both.items():
        if shared:
            names = [penalized[each][0] for each in shared]
            penalties = listed(list(dict.fromkeys(name for each in shared for name in penalized[each][1])))
            notes.append(
                f"decayed, too: {kind} has weight_decay={rate:g} for {len(names)} of the parameters that {penalties} penalizes "
                f"({listed(names, 3)}). If one of the two is enough, graphreg.param_groups(module, {{selector: {{'weight_decay': 0}}}}) "
                "leaves these without decay"
            )
    return notes
