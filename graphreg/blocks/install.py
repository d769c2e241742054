"""Generates the code of a rewritten module's blocks from its flat graphs, and gives each block its code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from graphreg.blocks.block import BLOCK, Block, View, block_at, twin_of
from graphreg.blocks.outline import OUTSIDE, Outliner
from graphreg.blocks.placed_block import PlacedCall, add_call, unwrapped_block
from graphreg.blocks.shown_call import VARIANT, BlockCode, hooked
from graphreg.compiler.recurrent_lowering import LOWERED
from graphreg.ir.codegen_fixes import spelled
from graphreg.ir.module_record import RULES
from graphreg.torch_internals.emitted_code import generate_forward
from graphreg.torch_internals.fx import define_named_tuples

Sources = Mapping[str, tuple[fx.Graph, fx.Graph | None]]  # by mode: the flat graph, and its copy with lowered recurrent layers


Variant = tuple[BlockCode, BlockCode, str]  # code for eager mode, code for Dynamo, source of the former


def outlined(
    root: nn.Module, sources: Sources, blocks: tuple[str, ...], owner: str = "", checkpoints: Mapping[str, bool] = MappingProxyType({})
) -> dict[str, tuple[fx.Graph, fx.Graph | None]]:
    """Give the blocks of a rewritten module their code, and return the graphs in which the whole module calls the blocks.

    Args:
        root: The rewritten module. At the paths in ``blocks`` it has block objects, or, in place, the model's own modules.
        sources: By mode, the flat graph, and its copy with lowered recurrent layers (None if the model has no recurrent layers).
        blocks: The paths of the blocks.
        checkpoints: The blocks whose code runs with a checkpoint, by path, and whether it is reentrant.
        owner: ``""`` if the blocks are block objects. In place, the name that ``new_owner`` returned for the rewritten module.

    Returns:
        Graphs in the form of ``sources``, with calls of the blocks.
    """
    outliner, emitter = Outliner(root, blocks), _FunctionMaker()
    variants: dict[str, list[Variant]] = {path: [] for path in blocks}
    prefixes = _prefixes(root, blocks, owner) if owner else {}
    with_checkpoint = functools.cache(checkpointed)  # equal blocks keep equal code
    graphs = {}
    for mode, (flat, lowered) in sources.items():
        graph, calls = outliner.outline(flat)
        graph_lowered, calls_lowered = outliner.outline(lowered) if lowered is not None else (None, calls)
        for call, compiled in zip(calls, calls_lowered, strict=True):
            functions, source = [emitter.code(each.graph)[0] for each in (call, compiled)], emitter.code(call.graph)[1]
            if call.path in checkpoints:
                functions = [with_checkpoint(function, checkpoints[call.path]) for function in functions]
            variant = (functions[0], call.shown), (functions[1], compiled.shown), source
            known = variants[call.path]
            # Calls of one block differ, for example, if a splice acts in only one of them.
            if variant not in known:
                known.append(variant)
            number = known.index(variant)
            for node in (call.node, compiled.node):
                node.kwargs = {**node.kwargs, VARIANT: f"{prefixes[call.path]}{number}" if owner else number}
        graphs[mode] = graph, graph_lowered
    for path, known in variants.items():
        if owner:
            _install_in_place(root, path, known, outliner, prefixes[path])
        else:
            _install(root, path, known, outliner)
    return graphs


def _prefixes(root: nn.Module, blocks: tuple[str, ...], owner: str) -> dict[str, str]:
    """Return, for the path of each block, the beginning of the names of the block's variants.

    Different blocks have the same beginning, so that equal blocks have equal code. If one block has several paths, the beginnings differ.
    """
    paths: dict[nn.Module, list[str]] = {}
    for path in blocks:
        paths.setdefault(unwrapped_block(root.get_submodule(path)), []).append(path)
    return {path: f"{owner}_" + f"{i}_" * bool(i) for each in paths.values() for i, path in enumerate(each)}


def _install(root: nn.Module, path: str, variants: list[Variant], outliner: Outliner) -> None:
    block = block_at(root, path)
    eager, compiled, sources = zip(*variants, strict=True) if variants else ((), (), ())
    block.__dict__[BLOCK] = replace(block.__dict__[BLOCK], eager=eager, compiled=compiled, sources=sources)
    _show_outside(block, root, path, outliner)


def _install_in_place(root: nn.Module, path: str, variants: list[Variant], outliner: Outliner, prefix: str) -> None:
    block = unwrapped_block(root.get_submodule(path))
    twin = twin_of(block, path)
    twin.__dict__[BLOCK] = replace(twin.__dict__[BLOCK], called=(block,))
    twin.__dict__["_modules"] = block._modules  # the same dict, so that the code calls wrappers that are put around inner blocks later
    _show_outside(twin, root, path, outliner)
    for number, variant in enumerate(variants):
        add_call(block, f"{prefix}{number}", PlacedCall(twin, *variant))


def _show_outside(block: Block, root: nn.Module, path: str, outliner: Outliner) -> None:
    """Give a block object views of all outside modules that its code calls, such as runtime modules."""
    names, rules = outliner.names[path], root._modules.get(RULES)
    runtime: Any = rules._modules if rules is not None else {}
    block.__dict__[RULES] = View({name: runtime[target] for name, target in names.rules.items()})
    block.__dict__[OUTSIDE] = View({name: root.get_submodule(target) for name, target in names.outside.items()})
    block.__dict__[LOWERED] = root.__dict__.get(LOWERED)


def checkpointed(code: Callable[..., Any], use_reentrant: bool) -> Callable[..., Any]:
    """Return a function that runs the code of a block with a checkpoint, as the model's own forward calls the block."""

    def run(block: Any, shown: Any, *values: Any) -> Any:
        # Without a backward pass, there is nothing to recompute.
        if not torch.is_grad_enabled():
            return code(block, shown, *values)
        return checkpoint(functools.partial(code, block, shown), *values, use_reentrant=use_reentrant)

    return run


class _FunctionMaker:
    """Makes functions from graphs. Graphs with equal code get the same function, so that Dynamo compiles the function once."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Callable[..., Any], str]] = {}

    def code(self, graph: fx.Graph) -> tuple[Callable[..., Any], str]:
        """Return the function that runs a graph, with hooks around it (``hooked``), and the source text of what the graph does."""
        holder = fx.GraphModule(nn.Module(), fx.Graph())
        define_named_tuples(graph)
        holder._graph = spelled(graph)
        python_code = generate_forward(holder)
        # Equal text is not enough: a name in it may refer to another object.
        key = holder.code, tuple((name, id(value)) for name, value in python_code.globals.items())
        if key not in self._known:
            self._known[key] = hooked(type(holder).forward), holder.code
        return self._known[key]
