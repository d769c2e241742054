"""Finds the blocks of a model by its list of modules: several numbered modules of one class, such as ``layers.0``, ``layers.1``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graphreg.ir.operations import is_normalization


def numbered_block(modules: Mapping[str, nn.Module], path: str) -> str | None:
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
    """Return whether a module consists of blocks: of several numbered modules of one class that have submodules, and of nothing else.

    One more module with submodules may come first, which makes the size smaller for the blocks after it.
    """
    if path not in modules:  # None is registered there
        return False
    children = [modules[each] for each in _numbered(modules, path)]
    kinds = [*map(type, children)]
    blocks = kinds[1:] if len(kinds) > 2 and kinds[0] is not kinds[1] else kinds
    alone = len(blocks) > 1 and len(children) == len(list(modules[path].children()))
    return alone and len({*blocks}) == 1 and all(map(_has_parts, children))


def _has_parts(module: nn.Module) -> bool:
    return any(module.children()) and not is_normalization(module)


def _numbered(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Return the paths of a module's submodules whose name ends with a digit."""
    children = (f"{path}.{name}" if path else name for name in modules[path]._modules if name[-1:].isdigit())
    return [child for child in children if child in modules]
