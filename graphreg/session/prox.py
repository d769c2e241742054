"""``graphreg.prox_``: the proximal step of penalties with ``by="prox"``, after the optimizer's own step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphreg.errors import GraphRegError, RegularizerError, listed, shown
from graphreg.regularizer.base import Penalty
from graphreg.runtime.distributed_values import whole
from graphreg.runtime.optimizer_steps import step_to_follow
from graphreg.runtime.runtime_module import accumulation
from graphreg.session.hosts import record_of, regularized, session_of
from graphreg.session.strengths import number
from graphreg.torch_internals.distributed import is_distributed, replicated
from graphreg.torch_internals.dynamo_marks import disable
from graphreg.torch_internals.modules import parameters_by_name


@disable()
def prox_(module: nn.Module, optimizer: Optimizer) -> None:
    """Apply the penalties with ``by="prox"``, in place: each parameter w becomes the proximal map of lr · strength · penalty at w.

    Call it after each ``optimizer.step()``. For plain SGD, the two together are proximal gradient descent. The penalty is the same as with
    ``by="gradient"``: with the mean over elements and parameters, the present strengths by site, and schedules. Each parameter takes the
    learning rate that its group had in the step, even if a scheduler has changed it since. As AdamW does for weight decay, ``prox_`` takes
    the plain learning rate: it is not divided by Adam's second moments. With a momentum m, the gradients of the loss add up to 1 / (1 - m)
    times as much, but the proximal steps do not.

    Several penalties on one parameter act in the order in which they were given. Parameters that the optimizer does not have, or that are
    frozen, stay as they are. Nothing happens if the optimizer made no step since the last call, for instance because a GradScaler skipped
    it, or in a block of ``penalties_off``. Where parameters are DTensors, all ranks must call the function.

    Args:
        module: A rewritten module, also compiled or wrapped, or a model that is regularized in place.
        optimizer: The optimizer that made the step, also within a wrapper of accelerate or Lightning.

    Raises:
        RegularizerError: ``optimizer`` is not an optimizer of torch, has none of the parameters, or has a group without a learning rate.
        GraphRegError: No penalty of the module has ``by="prox"``, or a parameter is gone.

    Source: Parikh & Boyd, Proximal algorithms, Foundations and Trends in Optimization 1 (2014), section 4.2.
    """
    inner: Any = optimizer
    while isinstance(wrapped := getattr(inner, "optimizer", None), Optimizer):
        inner = wrapped
    if not isinstance(inner, Optimizer):
        raise RegularizerError(f"optimizer={shown(optimizer)} is not allowed; give the torch.optim.Optimizer that made the step.")
    session, plan = session_of(module), record_of(module).plan
    if not session.has_prox:
        raise GraphRegError(
            "no penalty of this module has by='prox', so prox_ has nothing to do. Give the option when you regularize: "
            "weight_l1={'strength': 1e-4, 'by': 'prox'}."
        )

    groups = {id(p): i for i, group in enumerate(inner.param_groups) for p in group["params"]}
    found = _targets(module)
    targets = [(penalty, p, groups[id(p)], factor) for _, penalty, p, factor in found if id(p) in groups]
    if found and not targets:
        names = [name for name, regularizer in plan.regularizers.items() if regularizer.by_prox]
        raise RegularizerError(
            f"the optimizer has no parameter at which {listed(names)} acts. Give the optimizer that has the module's parameters: "
            "torch.optim.SGD(module.parameters(), ...)."
        )

    step = step_to_follow(session, inner)
    if step is None or session.penalties.state is False:
        return
    for penalty, p, group, factor in targets:
        # A group that was added after the step has taken no step.
        rate = step.rates[group] if group < len(step.rates) else 0.0
        if rate is None:
            raise RegularizerError(f"group {group} of the optimizer has no learning rate (lr), by which prox_ measures its step.")
        if p.requires_grad and factor:
            _apply(penalty, p, rate, factor, step.skipped)


def prox_penalty(module: Any, name: str) -> Tensor:
    """Return a penalty with ``by="prox"`` as ``by="gradient"`` would have added it to the loss in the last call."""
    targets = _targets(module)
    values = [factor * penalty(p.to(accumulation(p.dtype))) for its_name, penalty, p, factor in targets if its_name == name]
    return torch.stack(values).sum()


def _targets(module: Any) -> list[tuple[str, Any, nn.Parameter, float]]:
    """Return each penalty, with its name in the plan, at each of its parameters, with the factor of its formula in the sum of all."""
    session, plan = session_of(module), record_of(module).plan
    parameters = parameters_by_name(regularized(module))
    found = list[tuple[str, Any, nn.Parameter, float]]()
    # The strengths of a schedule are those of the call before the step.
    call = 0 if session.clock is None else max(session.clock.call() - 1, 0)
    for name, penalty in plan.regularizers.items():
        if not isinstance(penalty, Penalty) or not penalty.by_prox:
            continue
        edits, row = plan.of(name), session.strengths[name]
        count = 1 if penalty.engine_options.reduction == "sum" else plan.whole(name) or len(edits)
        for edit in edits:
            parameter = parameters.get(edit.site.name)
            if parameter is None:
                raise GraphRegError(f"{name}: the module has no parameter {edit.site.name} any more. Regularize the model again.")
            found.append((name, penalty, parameter, number(row.at(edit.site.name, edit.weight), call) / count))
    return found


@torch.no_grad()
def _apply(penalty: Penalty, parameter: Any, rate: float | Tensor, factor: float, skipped: Tensor | None) -> None:
    # A formula may be wrong on shards, so it gets the whole tensor.
    w = whole(parameter).to(accumulation(parameter.dtype))
    if isinstance(rate, Tensor):
        step = rate.to(w.device, w.dtype) * factor
    else:
        step = torch.full((), rate * factor, dtype=w.dtype, device=w.device)
    if skipped is not None:
        step = step * (skipped.to(w.device) == 0)
    new = penalty.prox(w, step)
    parameter.copy_(replicated(new, parameter).redistribute(placements=parameter.placements) if is_distributed(parameter) else new)
