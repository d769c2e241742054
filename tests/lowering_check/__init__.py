"""Checks of the lowering: that a rewritten module has the additions that its plan says, each at its place.

``graphreg/rewriting/invariants.py`` checks after every rewrite that the model is still the model. What is added follows from the plan by
the lowering alone, so a fault there would be one of graphreg's. The tests and the fuzzer look for it: they check each of their rewrites.
"""

from __future__ import annotations

from graphreg.planning.plan import Plan
from graphreg.rewriting import invariants, rewrite
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.tracing.trace import Traced
from lowering_check.additions import check_additions


def check(module: RewrittenModule, traced: Traced, plan: Plan) -> None:
    """Raise GraphRegError unless the module is the traced model with the plan's additions and nothing else."""
    invariants.check(module, traced)
    _check_rest(module, traced, plan)


def _check_rest(module: RewrittenModule, traced: Traced, plan: Plan) -> None:
    check_additions(module, traced, plan)
    invariants.require_trained(module, traced, plan)


def check_each_rewrite() -> None:
    """Let each rewrite of this process check all of its result."""
    vars(rewrite)["require_trained"] = _check_rest
