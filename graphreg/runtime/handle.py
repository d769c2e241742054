"""What is inside: the rewritten module in its wrappers, the additions in it, its graphs, what of the model's own still draws."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import fx

from graphreg.errors import GraphRegError
from graphreg.ir import RULES, Operations, Own, find, state_of
from graphreg.runtime.leaf import Rules
from graphreg.runtime.module import RewrittenModule
from graphreg.torch_internals import backend_in, function_in, original_of, record_of


def rewritten(module: Any) -> fx.GraphModule:
    """The rewritten module inside compiled and distributed wrappers; GraphRegError for anything else.

    A GraphModule that a pass of torch.fx made of one's graph (``fx.GraphModule(module, graph)``) counts as one.
    """
    inner = module
    while not isinstance(inner, RewrittenModule):
        wrapped = original_of(inner)
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



KNOBS = "graphreg_knobs"  # where what torch.compile makes of a backend's name holds the backend


class Knobs(ABC):
    """What the functions of ``control.py`` and ``report.py`` ask of a backend in the place of a module. ``parts``: its graphs."""

    parts: list[Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Knobs:
        """Itself, whom compiled code knows: once ``lightning`` is imported, ``torch.compile`` copies all that it is given."""
        return self

    @abstractmethod
    def strengths(self) -> dict[str, float]: ...

    @abstractmethod
    def set_strength(self, name: str, value: float) -> None: ...

    @abstractmethod
    def rng_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def set_rng_state(self, state: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def set_ranks(self, ranks: Any) -> None: ...

    @abstractmethod
    def frozen_noise(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def noise_on(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def report(self) -> Any: ...


def knobs_of(given: object) -> Knobs | None:
    """The backend that was given, or that what was given is compiled with; None for anything else."""
    if isinstance(given, Knobs):
        return given
    inner = given if function_in(given) is not None else backend_in(record_of(given))
    for found in (inner, function_in(inner), getattr(inner, KNOBS, None)):
        if isinstance(found, Knobs):
            return found
    return None
