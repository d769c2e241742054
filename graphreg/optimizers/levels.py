"""Numbers the parameters of a model by depth, from the embedding to the head, and computes the values of ``by_depth`` for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

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
        block = _block_of(modules, site.module)
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


def _block_of(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Return the path of the block that a module belongs to, or None.

    A block is one of several numbered modules of one class that have submodules, such as
    ``layers.0``. A stage, which has a list of such modules, is not one block: its modules are.
    """
    parts = path.split(".") if path else []
    for end in range(1, len(parts) + 1):
        outer, inner = ".".join(parts[: end - 1]), ".".join(parts[:end])
        module = modules[inner]
        alike = [each for each in _numbered(modules, outer) if type(modules[each]) is type(module)]
        lists = (inner, *(f"{inner}.{name}" for name in module._modules))
        if inner in alike and len(alike) > 1 and _has_parts(module) and not any(_is_list(modules, path) for path in lists):
            return inner
    return None


def _is_list(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Return whether a module consists of blocks: of several numbered modules of one class that have submodules, and of nothing else."""
    if path not in modules:  # None is registered there
        return False
    children = [modules[each] for each in _numbered(modules, path)]
    alone = len(children) > 1 and len(children) == len(list(modules[path].children()))
    return alone and len({*map(type, children)}) == 1 and all(map(_has_parts, children))


def _has_parts(module: nn.Module) -> bool:
    return any(module.children()) and not is_normalization(module)


def _numbered(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Return the paths of a module's submodules whose name ends with a digit."""
    children = (f"{path}.{name}" if path else name for name in modules[path]._modules if name[-1:].isdigit())
    return [child for child in children if child in modules]


def _contains(outer: str, path: str) -> bool:
    return not outer or path.startswith(f"{outer}.")
