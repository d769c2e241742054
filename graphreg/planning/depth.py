"""Numbers the blocks of a model in the order in which they run, and gives each site the strength of its depth, for ``by_depth``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from graphreg.errors import RegularizerError
from graphreg.ir import Site
from graphreg.regularizer import ByDepth, Regularizer
from graphreg.tracing import Traced


def strengths_by_depth(traced: Traced, regularizer: Regularizer, sites: Sequence[Site]) -> dict[Site, float]:
    """Return the strength at each site of a regularizer whose ``weight`` is a ``by_depth``; for any other regularizer nothing.

    Raises:
        RegularizerError: All sites are in one block.
    """
    ramp = regularizer.weight
    if not isinstance(ramp, ByDepth) or not sites:
        return {}
    order = _order(traced)
    of_site = {site: block_of(traced, site) for site in sites}
    blocks = sorted(dict.fromkeys(of_site.values()), key=lambda block: order.get(block, len(order)))
    if len(blocks) < 2:
        raise RegularizerError(
            f"{type(regularizer).__name__}: weight={ramp!r} needs sites in two blocks or more, and all that {regularizer.pattern!r} "
            f"selects are in {blocks[0]!r}. Give a number."
        )
    return {site: ramp.at(blocks.index(block), len(blocks)) for site, block in of_site.items()}


def block_of(traced: Traced, site: Site) -> str:
    """Return the path of the block that a site is in; its own name if it is in none.

    A block is a module with submodules that stands beside another module of its class; the innermost one counts.
    """
    modules = traced.operations.modules
    path = site.module
    while path:
        module, outer = modules.get(path), modules.get(path.rpartition(".")[0])
        if module is not None and outer is not None and any(module.children()) and _is_repeated(module, outer):
            return path
        path = path.rpartition(".")[0]
    return site.name


def _is_repeated(module: nn.Module, outer: nn.Module) -> bool:
    return sum(type(beside) is type(module) for beside in outer.children()) > 1


def _order(traced: Traced) -> dict[str, int]:
    """Return the place of each module and each value, by path or name, in the order in which the model first computes something there."""
    order: dict[str, int] = {}
    for site in traced.values:
        path = site.module
        while path:
            order.setdefault(path, len(order))
            path = path.rpartition(".")[0]
        order.setdefault(site.name, len(order))
    return order
