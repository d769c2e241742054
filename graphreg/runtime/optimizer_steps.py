"""The steps that optimizers have made, as ``prox_`` needs them: the learning rates of a step, and whether a GradScaler skipped it.

A hook of torch's for the steps of all optimizers records them (``register_optimizer_step_post_hook``). It is there from the first module
on that has a penalty with ``by="prox"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from graphreg.errors import listed, warn
from graphreg.torch_internals.dynamo_marks import disable


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """One step of an optimizer.

    Attributes:
        rates: The learning rate of each of its groups; None if a group has none.
        skipped: For an optimizer that a GradScaler tells to skip a step (``fused=True``), a tensor that is not 0 if it did; else None.
    """

    rates: tuple[float | Tensor | None, ...]
    skipped: Tensor | None


_last: WeakKeyDictionary[Optimizer, OptimizerStep] = WeakKeyDictionary()
# by session: of each optimizer, the step after which ``prox_`` was called
_followed: WeakKeyDictionary[Any, WeakKeyDictionary[Optimizer, OptimizerStep]] = WeakKeyDictionary()
_warned: WeakSet[Any] = WeakSet()  # the sessions that have warned
_handles: list[Any] = []


@disable()
def _record(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # a scheduler may change the rate before ``prox_`` reads it, and a tensor in place
    rates = [group.get("lr") for group in optimizer.param_groups]
    kept = tuple(rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates)
    _last[optimizer] = OptimizerStep(kept, getattr(optimizer, "found_inf", None))


def watch_steps(session: Any) -> None:
    """Record the steps of optimizers from now on. Steps that were made already are none that a session waits for."""
    if not _handles:
        _handles.append(register_optimizer_step_post_hook(_record))
    _followed[session] = WeakKeyDictionary(_last)


def step_to_follow(session: Any, optimizer: Optimizer) -> OptimizerStep | None:
    """Return the last step of an optimizer, once for each session; None if it made no step since."""
    step, followed = _last.get(optimizer), _followed.setdefault(session, WeakKeyDictionary())
    if step is None or followed.get(optimizer) is step:
        return None
    followed[optimizer] = step
    return step


def warn_of_missed_prox(module: nn.Module, rules: Any) -> None:
    """Warn, once, if an optimizer has made a step with parameters that ``prox_`` should have changed then.

    Args:
        module: The module whose call begins.
        rules: The container of its runtime modules.
    """
    if rules.session in _warned:
        return
    followed = _followed.setdefault(rules.session, WeakKeyDictionary(_last))
    missed = [optimizer for optimizer, step in tuple(_last.items()) if followed.get(optimizer) is not step]
    if not missed:
        return
    ids = {id(p) for optimizer in missed for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in module.named_parameters(remove_duplicate=False) if name in rules.proxed and id(p) in ids]
    if not names:  # another model's optimizers, until their next steps
        followed.update({optimizer: _last[optimizer] for optimizer in missed})
        return
    _warned.add(rules.session)
    warn(
        f"the optimizer has made a step, and graphreg.prox_ was not called after it: penalties with by='prox' at {listed(names, 3)} did "
        "nothing. Call graphreg.prox_(module, optimizer) after each optimizer.step()."
    )
