"""What is inside: the rewritten module in its wrappers, the additions in it, its graphs, what of the model's own still draws."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphreg.errors import GraphRegError
from graphreg.module import RewrittenModule
from graphreg.operators import Operations
from graphreg.own_dropout import Own, find
from graphreg.rules import Rules
from graphreg.state import RULES, state_of


def rewritten(module: Any) -> fx.GraphModule:
    """The rewritten module inside compiled and distributed wrappers; GraphRegError for anything else.

    A GraphModule that a pass of torch.fx made of one's graph (``fx.GraphModule(module, graph)``) counts as one.
    """
    inner = module
    while not isinstance(inner, RewrittenModule):
        wrapped = getattr(inner, "_orig_mod", None)
        if wrapped is None and type(inner).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            wrapped = inner.module
        if wrapped is None:
            break
        inner = wrapped
    if not isinstance(inner, fx.GraphModule) or getattr(inner, RULES, None) is None:
        within = isinstance(getattr(inner, "module", None), RewrittenModule)
        hint = "There is one in its attribute 'module': give that." if within else "Give what graphreg.regularize returned."
        raise GraphRegError(f"{type(module).__name__} is not a module that graphreg rewrote. {hint}")
    return inner


def rules_of(module: Any) -> Rules:
    """The additions of a rewritten module, also inside compiled and distributed wrappers."""
    rules = getattr(rewritten(module), RULES)
    # a pass that made a GraphModule of its own took the leaves over, one by one
    return rules if isinstance(rules, Rules) else next(leaf.rules[0] for leaf in rules.children())


def graphs_of(module: fx.GraphModule) -> dict[str, fx.Graph]:
    """The graphs by mode, of a module graphreg made or any other."""
    state = state_of(module)
    return state.graphs if state is not None else {"both": module.graph}


def own_draws(module: Any) -> tuple[Own, ...]:
    """The model's own random operations that act and are not on graphreg's streams."""
    inner = rewritten(module)
    owns = find(graphs_of(inner), Operations(inner), rules_of(module).about[1])
    return tuple(own for own in owns if own.when != "never" and own.rate != 0)
