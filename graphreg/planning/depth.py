"""Numbers the blocks of a model in the order in which they run, and computes the strength at each site, for ``by_depth``."""

from __future__ import annotations

from collections.abc import Sequence

from graphreg.errors import RegularizerError
from graphreg.ir.metadata import own_name
from graphreg.ir.numbered_blocks import numbered_block
from graphreg.ir.site import Site
from graphreg.regularizer.base import Regularizer
from graphreg.regularizer.by_depth import ByDepth
from graphreg.tracing.trace import Traced


def strengths_by_depth(traced: Traced, regularizer: Regularizer, sites: Sequence[Site]) -> dict[Site, float]:
    """Return the strength at each site of a regularizer whose ``weight`` is a ``ByDepth``.

    Raises:
        RegularizerError: All sites are in one block.
    """
    ramp = regularizer.weight
    assert isinstance(ramp, ByDepth)
    if not sites:
        return {}
    order = _order(traced)
    of_site = {site: block_of(traced, site) for site in sites}
    reads = _first_reads(traced, order)
    # A parameter outside of all blocks computes no value: it stands where it is first read.
    blocks = sorted(dict.fromkeys(of_site.values()), key=lambda block: order.get(block, reads.get(block, len(order))))
    if len(blocks) < 2:
        raise RegularizerError(
            f"{type(regularizer).__name__}: {regularizer.strength_option}={ramp!r} needs sites in two blocks or more, but all sites that "
            f"{regularizer.pattern!r} selects are in {blocks[0]!r}. Give a number."
        )
    return {site: ramp.at(blocks.index(block), len(blocks)) for site, block in of_site.items()}


def block_of(traced: Traced, site: Site) -> str:
    """Return the path of the block around a site; the site's own name if no block is around it.

    A block is one of several numbered modules of one class that have submodules, such as
    ``layers.0``. Where none is around the site, it is the innermost module that has submodules and a sibling of the same class.
    """
    modules = traced.operations.modules
    if (block := numbered_block(modules, site.module)) is not None:
        return block
    path = site.module
    while path:
        module, outer = modules.get(path), modules.get(path.rpartition(".")[0])
        siblings = outer.children() if module is not None and outer is not None and any(module.children()) else ()
        # the module itself is one of them
        if sum(type(sibling) is type(module) for sibling in siblings) > 1:
            return path
        path = path.rpartition(".")[0]
    return site.name


def _order(traced: Traced) -> dict[str, int]:
    """Return the position of each module (by path) and each value (by name) in the order in which the model computes values.

    The position of a module is that of the first value inside it.
    """
    order: dict[str, int] = {}
    for site in traced.values:
        path = site.module
        while path:
            order.setdefault(path, len(order))
            path = path.rpartition(".")[0]
        order.setdefault(site.name, len(order))
    return order


def _first_reads(traced: Traced, order: dict[str, int]) -> dict[str, int]:
    """Return, for each parameter that the forward reads, the position in ``order`` of the first value that is computed from it.

    A parameter outside of all blocks is a block of its own, and this is its position.
    """
    first: dict[str, int] = {}
    for reads in traced.parameter_reads.values():
        for name, found in reads.items():
            places = [order[value] for read in found if (value := own_name(read.node)) in order]
            first[name] = min([*places, first.get(name, len(order))])
    return first
