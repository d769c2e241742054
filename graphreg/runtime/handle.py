"""Finds what a user means by a module: the rewritten module inside its wrappers, or the backend that torch.compile was given.

The first half looks into a rewritten module: its runtime modules, its graphs, what torch still draws in it. The second half is
``Knobs``, the interface by which the functions of ``controls.py`` and ``graphreg.report`` drive a backend as they drive a module.
"""
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


def rewritten(module: Any) -> fx.GraphModule:
    """Return the rewritten module inside compiled and distributed wrappers; raises GraphRegError if there is none.

    A GraphModule that a torch.fx pass made of such a module's graph (``fx.GraphModule(module, graph)``) counts as one.
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
    """Return the container of a rewritten module's runtime modules, also through compiled and distributed wrappers."""
    rules = getattr(rewritten(module), RULES)
    # a later pass that made a GraphModule took the runtime modules over one by one, without their container
    return rules if isinstance(rules, Rules) else next(leaf.rules[0] for leaf in rules.children())


def graphs_of(module: fx.GraphModule) -> dict[str, fx.Graph]:
    """Return a module's graphs by mode: ``both``, or ``train`` and ``eval``. A GraphModule that graphreg did not make has ``both``."""
    state = state_of(module)
    return state.graphs if state is not None else {"both": module.graph}


def own_draws(module: Any) -> tuple[Own, ...]:
    """Find the model's random operations that act and still draw from torch's generator, not from graphreg's streams."""
    inner = rewritten(module)
    owns = find(graphs_of(inner), Operations(inner), rules_of(module).about[1])
    return tuple(own for own in owns if own.when != "never" and own.rate != 0)



KNOBS = "graphreg_knobs"  # the attribute under which torch.compile's wrapper of backend="graphreg" holds the backend


class Knobs(ABC):
    """The interface by which the functions of ``controls.py`` and ``graphreg.report`` drive a backend in the place of a module.

    Attributes:
        parts: The subgraphs that the backend has compiled.
    """

    parts: list[Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Knobs:
        """Return itself, which compiled code refers to: once ``lightning`` is imported, ``torch.compile`` copies its arguments."""
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
    """Return the backend that ``given`` is, or was compiled with; None for anything else."""
    if isinstance(given, Knobs):
        return given
    inner = given if hasattr(given, "compiler_fn") else compiler_of(context_of(given))
    for found in (inner, getattr(inner, "compiler_fn", None), getattr(inner, KNOBS, None)):
        if isinstance(found, Knobs):
            return found
    return None


def context_of(compiled: object) -> object:
    """Return torch.compile's context of a compiled module, of a module after ``module.compile()``, or of a compiled function; else None."""
    context = vars(compiled).get("dynamo_ctx") if hasattr(compiled, "__dict__") else None
    if context is not None:
        return context
    wrapper = getattr(compiled, "_compiled_call_impl", None) or compiled
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    cells = getattr(wrapper, "__closure__", None) or ()
    return dict(zip(names, (cell.cell_contents for cell in cells), strict=False)).get("self") if "callback" in names else None


def compiler_of(context: object) -> object:
    """Return the backend as it was passed to torch.compile, without torch's wrappers."""
    inner = getattr(context, "callback", None)
    while (wrapped := getattr(inner, "_torchdynamo_orig_backend", None) or getattr(inner, "__wrapped__", None)) is not None:
        inner = wrapped
    return inner
