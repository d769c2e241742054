"""Finds out what ``parallelize_module`` did to a module: how ranks share the tensors that it takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from graphreg.torch_internals.modules import forward_hooks


@dataclass(frozen=True)
class Layout:
    """How ranks share the arguments of a module, or what it returns.

    Attributes:
        placements: The placement of each tensor, in order, then of keyword arguments. None stands for a tensor that is left as it is. The
            tuple is empty if the module's parallel style is unknown.
        is_local: Whether the tensors are plain tensors, not DTensors.
    """

    placements: tuple[Any, ...]
    is_local: bool

    @property
    def has_parts(self) -> bool:
        """Whether there is a plain tensor of which each rank has a part, or a summand."""
        return self.is_local and any(placement is not None and not placement.is_replicate() for placement in self.placements)


UNKNOWN_STYLE = Layout((), is_local=True)


def has_parallel_hooks(module: nn.Module) -> bool:
    """Return whether ``parallelize_module`` put hooks on a module: they convert its arguments or its result to or from DTensors."""
    return any(map(_is_parallel, forward_hooks(module)))


def output_layout(module: nn.Module) -> Layout | None:
    """Return the layout of what a module returns; None if no hook of ``parallelize_module`` converts it.

    The layout is an argument of the module's style, such as ``ColwiseParallel(output_layouts=...)``. torch keeps the argument only in the
    closure of a lambda that it registers as a forward hook, and for ``SequenceParallel`` as a forward pre-hook.
    """
    layout = None
    # hooks run in this order, so the last one decides
    for hook in filter(_is_parallel, module._forward_hooks.values()):
        captured = _captured(hook)
        layout = _prepared(captured, "output") or _distributed(captured, module) or UNKNOWN_STYLE
    return layout


def input_layout(module: nn.Module) -> Layout | None:
    """Return the layout of a module's arguments; None if no hook of ``parallelize_module`` converts them."""
    layout = None
    for hook in filter(_is_parallel, module._forward_pre_hooks.values()):
        layout = _prepared(_captured(hook), "input") or UNKNOWN_STYLE
    return layout


def returns_shard(module: nn.Module) -> bool | None:
    """Return whether ``parallelize_module`` has a module return a plain tensor of which each rank has a part. None: not known."""
    layout = output_layout(module)
    return layout.has_parts if layout is not None and layout.placements else None


def shards_passed(module: nn.Module) -> tuple[tuple[bool, ...], frozenset[str]]:
    """Return which arguments ``PrepareModuleInput`` makes plain tensors of which each rank has a part: by position, and by keyword."""
    style: Any
    for hook in map(_captured, module._forward_pre_hooks.values()):
        style = hook.get("self")
        if hasattr(style, "desired_input_layouts") and style.use_local_output:
            placements, named = _converted(style, "input")
            positions = tuple(Layout((placement,), is_local=True).has_parts for placement in placements)
            return positions, frozenset(name for name, placement in named.items() if Layout((placement,), is_local=True).has_parts)
    return (), frozenset()


def _is_parallel(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor")


def _prepared(captured: dict[str, Any], which: str) -> Layout | None:
    """Return the layout that ``PrepareModuleInput`` or ``PrepareModuleOutput`` makes; None if the hook is of another style.

    ``which``: ``"input"`` or ``"output"``.
    """
    style: Any = captured.get("self")
    if not hasattr(style, f"desired_{which}_layouts"):
        return None
    placements, named = _converted(style, which)
    return Layout((*placements, *named.values()), bool(style.use_local_output))


def _converted(style: Any, which: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the placement of each tensor that a style converts, by position and by keyword; None for one that it leaves as it is."""
    given, desired = getattr(style, f"{which}_layouts") or (), getattr(style, f"desired_{which}_layouts") or ()
    named = getattr(style, f"{which}_kwarg_layouts", None) or {}
    desired_named = getattr(style, f"desired_{which}_kwarg_layouts", None) or {}
    placements = [None if layout is None else wanted or layout for layout, wanted in zip(given, desired, strict=True)]
    return placements, {name: desired_named.get(name) or layout for name, layout in named.items() if layout is not None}


def _distributed(captured: dict[str, Any], module: nn.Module) -> Layout | None:
    """Return the layout of the result of ``ColwiseParallel``, ``RowwiseParallel`` or ``SequenceParallel``; None for another style."""
    after = _arguments(captured, "output_fn")
    before = [each for hook in module._forward_pre_hooks.values() for each in _arguments(_captured(hook), "input_fn")]
    placements = [value for value in (*after, *before) if isinstance(value, tuple) and value and all(map(_is_placement, value))]
    is_local = [value for value in after if isinstance(value, bool)]
    return Layout(placements[0], is_local[0]) if placements and len(placements[0]) == 1 and len(is_local) == 1 else None


def _arguments(captured: dict[str, Any], name: str) -> tuple[Any, ...]:
    """Return the arguments of the ``partial`` that a hook has captured under a name; () if there is none."""
    function = captured.get(name)
    return function.args if isinstance(function, partial) else ()


def _captured(hook: Any) -> dict[str, Any]:
    """Return the variables that the code of a hook has captured, by name."""
    cells, code = getattr(hook, "__closure__", None) or (), getattr(hook, "__code__", None)
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)} if code is not None else {}


def _is_placement(value: object) -> bool:
    return all(hasattr(value, name) for name in ("is_shard", "is_replicate", "is_partial"))
