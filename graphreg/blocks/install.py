"""Outlines the graphs of a rewritten module, compiles the code of its blocks, and gives the code to the block objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from graphreg.blocks.block import BLOCK, View, block_at
from graphreg.blocks.outline import OUTSIDE, VARIANT, Outliner
from graphreg.compiler import LOWERED
from graphreg.ir import RULES, spelled
from graphreg.torch_internals import define_named_tuples

Sources = Mapping[str, tuple[fx.Graph, fx.Graph | None]]  # by mode: the flat graph, and its copy with lowered recurrent layers, if any


def outlined(root: nn.Module, sources: Sources, blocks: tuple[str, ...]) -> dict[str, tuple[fx.Graph, fx.Graph | None]]:
    """Give the blocks of a module their code, and return the graphs in which the whole module calls them.

    Args:
        root: The rewritten module, with block objects at the paths in ``blocks``.
        sources: The graphs of the rewritten module, by mode.
        blocks: The paths of the blocks.
    """
    outliner, emitter = Outliner(root, blocks), _Emitter()
    variants: dict[str, list[tuple[Callable[..., Any], Callable[..., Any], str]]] = {path: [] for path in blocks}
    graphs = {}
    for mode, (flat, lowered) in sources.items():
        graph, calls = outliner.outline(flat)
        graph_lowered, calls_lowered = outliner.outline(lowered) if lowered is not None else (None, calls)
        for call, compiled in zip(calls, calls_lowered, strict=True):
            code, source = emitter.code(call.graph)
            variant = code, emitter.code(compiled.graph)[0], source
            known = variants[call.path]
            if variant not in known:
                known.append(variant)
            for node in (call.node, compiled.node):
                node.kwargs = {**node.kwargs, VARIANT: known.index(variant)}
        graphs[mode] = graph, graph_lowered
    for path, known in variants.items():
        _install(root, path, known, outliner)
    return graphs


def _install(root: nn.Module, path: str, variants: list[Any], outliner: Outliner) -> None:
    block, names = block_at(root, path), outliner.names[path]
    rules: Any = root._modules.get(RULES)
    eager, compiled, sources = zip(*variants, strict=True) if variants else ((), (), ())
    block.__dict__[BLOCK] = replace(block.__dict__[BLOCK], eager=eager, compiled=compiled, sources=sources)
    block.__dict__[RULES] = View({name: rules._modules[target] for name, target in names.rules.items()})
    block.__dict__[OUTSIDE] = View({name: root.get_submodule(target) for name, target in names.outside.items()})
    block.__dict__[LOWERED] = root.__dict__.get(LOWERED)


class _Emitter:
    """Compiles graphs to functions. Graphs with the same code get the same function, so that Dynamo compiles it once."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Callable[..., Any], str]] = {}

    def code(self, graph: fx.Graph) -> tuple[Callable[..., Any], str]:
        """Return the function of a graph, and the source text of the function."""
        holder = fx.GraphModule(nn.Module(), fx.Graph())
        define_named_tuples(graph)
        holder._graph = spelled(graph)
        python_code = holder.recompile()
        key = holder.code, tuple((name, id(value)) for name, value in python_code.globals.items())
        function: Callable[..., Any] = type(holder).forward
        return self._known.setdefault(key, (function, holder.code))
