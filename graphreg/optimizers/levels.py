"""Numbers the parameters of a model by depth, from the embedding to the head, and computes the values of ``by_depth`` for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from graphreg.ir.numbered_blocks import numbered_block
from graphreg.ir.operations import is_normalization
from graphreg.ir.site import Site


def levels(modules: Mapping[str, nn.Module], sites: Iterable[Site]) -> dict[Site, int]:
    """Return the level of each parameter, from 0 on: what comes before the first block, then the blocks, then what comes after the last.

    The order is that in which the model registers its parameters. What stands between two blocks,
    as a downsampling does, is of the level of the second. Norms that follow a block directly and
    stand beside the blocks' container, as the last norm of a transformer does, are of the block's
    level. On timm's ViT, Swin and ConvNeXt, these are the levels of timm's ``layer_decay``.

    Args:
        modules: The model's modules by path.
        sites: Parameters, in the model's order.
    """
    found, of_block = dict[Site, int](), dict[str, int]()
    waiting, last = list[Site](), ""
    for site in sites:
        block = numbered_block(modules, site.module)
        if block is not None:
            level = of_block.setdefault(block, len(of_block) + 1)
            # Before the first block stands level 0.
            found.update(dict.fromkeys(waiting, level if last else 0))
            found[site], waiting, last = level, [], block
        elif last and not waiting and is_normalization(modules[site.module]) and _contains(site.module.rpartition(".")[0], last):
            found[site] = of_block[last]
        else:
            waiting.append(site)
    found.update(dict.fromkeys(waiting, len(of_block) + 1))
    rank = {level: i for i, level in enumerate(sorted(set(found.values())))}
    return {site: rank[level] for site, level in found.items()}


def _contains(outer: str, path: str) -> bool:
    return not outer or path.startswith(f"{outer}.")
