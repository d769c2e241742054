"""Refuses what cannot be done with a rewritten module whose parameters are DTensors, and says what can be done instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from torch import fx, nn

from graphreg.blocks.block import is_sharded
from graphreg.blocks.placed_block import is_block
from graphreg.errors import GraphRegError
from graphreg.ir.local_shards import measured_shard
from graphreg.ir.metadata import addition_of, calls_of
from graphreg.ir.module_record import RULES, state_of
from graphreg.torch_internals.checkpointing import WRAPPED_MODULE
from graphreg.torch_internals.distributed import has_process_group, is_distributed
from graphreg.torch_internals.dynamo_marks import assume_constant_result
from graphreg.torch_internals.modules import COMPILED_MODULE
from graphreg.torch_internals.tensor_parallel import has_parallel_hooks, returns_shard, shards_passed

# Rewritten modules by number. Dynamo of torch 2.10 passes numbers, but not modules, to functions whose result it takes as a constant.
_numbered: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_numbers = count()
_examined: WeakSet[nn.Module] = WeakSet()  # the containers of the modules that ``refuse_parallelized`` has found right


def numbered(module: nn.Module) -> int:
    """Give a rewritten module a number by which the functions of this file find it, and return the number."""
    number = next(_numbers)
    _numbered[number] = module
    return number


def module_of(number: int) -> nn.Module | None:
    """Return the rewritten module that has a number; None if the module is gone."""
    return _numbered.get(number)


def refuse_sharded_derivatives(rules: Any, names: list[str]) -> None:
    """Raise GraphRegError if penalties on derivatives act in a module that is sharded, or that has a sharded submodule or parameter.

    ``rules``: the container of the module's runtime modules.
    """
    if has_process_group() and (why := _not_differentiated(rules.number)):
        raise GraphRegError(f"{', '.join(names)} differentiates the model within its forward, and {why}")


@assume_constant_result
def _not_differentiated(number: int) -> str:
    module = _numbered[number]
    if any(map(is_sharded, module.modules())):
        return (
            "FSDP2 would free parameters and average gradients during that. "
            "Leave this penalty out, or train without fully_shard, for instance with DistributedDataParallel."
        )
    if _has_distributed_parameters(module):
        return (
            "with tensor parallelism (DTensor parameters) torch does "
            "not differentiate twice what ranks send each other. Leave this penalty out, or train without parallelize_module."
        )
    return ""


def _has_distributed_parameters(module: nn.Module) -> bool:
    return any(map(is_distributed, module.parameters()))


def refuse_parallelized(rules: Any) -> None:
    """Raise GraphRegError if tensor parallelism would be ignored in a module that the graph opens, or if a penalty measures a local shard.

    ``rules``: the container of the module's runtime modules.
    """
    if why := _parallelized_wrongly(rules.number):
        raise GraphRegError(why)


@assume_constant_result
def _parallelized_wrongly(number: int) -> str:
    module = _numbered[number]
    rules, state = module._modules.get(RULES), state_of(module)
    if rules is None or rules in _examined or state is None or not _has_distributed_parameters(module):
        return ""
    if uncalled := parallelized_uncalled(module):
        return uncalled
    for graph in state.graphs.values():
        if (found := measured_shard(graph, _returns_shard(module, graph), _crosses(module, state.blocks))) is not None:
            return shard_measured(*found)
    # The search takes long, and the graphs stay.
    _examined.add(rules)
    return ""


def parallelized_uncalled(module: nn.Module) -> str:
    """Say, for the error, which module has hooks of ``parallelize_module`` that no graph calls; ``""`` if none has.

    ``module``: the rewritten module.
    """
    state = state_of(module)
    called = _called(state.graphs) if state is not None else set()
    for path, inner in named_modules(module):
        if has_parallel_hooks(inner) and not is_block(inner) and not _within(path, called):
            return (
                f"parallelize_module was applied to {path!r}, and the emitted code runs the operations inside that module without calling "
                f"it, so its arguments and result are not distributed. Make it a block that is called: graphreg.regularize(model, ..., "
                f"blocks={path!r}), with a selector of all such modules."
            )
    return ""


def shard_measured(penalty: str, site: str, source: str) -> str:
    """Say, for the error, that a penalty would measure a local shard. ``source``: what returns it."""
    return (
        f"{penalty} would measure {site}, of which each rank has a part as a plain tensor: {source} returns it so. Each rank would have a "
        "penalty of its own. Give the parallel style use_local_output=False, so that the value is a DTensor, or select a value that all "
        "ranks have whole."
    )


def _returns_shard(module: nn.Module, graph: fx.Graph) -> Callable[[fx.Node], bool | None]:
    """Return a function that tells whether a node of the graph returns a local shard."""
    positions, names = shards_passed(module)
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    passed = {node for node, is_part in zip(arguments, positions, strict=False) if is_part}
    passed |= {node for node in arguments if str(node.target) in names}

    def is_shard(node: fx.Node) -> bool | None:
        added = addition_of(node)
        # A call that graphreg has replaced is still the call of its layer.
        op, target = added.was if added is not None and added.was is not None else (node.op, node.target)
        if op == "call_module" and (added is None or added.was is not None):
            return returns_shard(module.get_submodule(str(target)))
        return node in passed if op == "placeholder" else None

    return is_shard


def _crosses(module: nn.Module, blocks: Sequence[str]) -> Callable[[fx.Node, fx.Node], bool | None]:
    """Return a function that tells whether a value that enters or leaves a block is made a local shard there; None if it stays as it is."""
    objects = {path: module.get_submodule(path) for path in blocks}
    passed = {path: shards_passed(block) for path, block in objects.items()}
    entering = {path: any(positions) or bool(names) for path, (positions, names) in passed.items() if positions or names}
    leaving = {path: returned for path, block in objects.items() if (returned := returns_shard(block)) is not None}

    def crosses(source: fx.Node, reader: fx.Node) -> bool | None:
        outside, inside = calls_of(source) or (), calls_of(reader) or ()
        for call in outside:
            if call[0] in leaving and call not in inside:
                return leaving[call[0]]
        for call in inside:
            if call[0] in entering and call not in outside and source.op != "get_attr":
                return entering[call[0]]
        return None

    return crosses


def _called(graphs: Mapping[str, fx.Graph]) -> set[str]:
    """Return the paths of the modules that the graphs call."""
    # A layer whose parameters are replaced is called by another node, which knows the call.
    was = [added.was for graph in graphs.values() for node in graph.nodes if (added := addition_of(node)) is not None and added.was]
    calls = [(node.op, node.target) for graph in graphs.values() for node in graph.nodes]
    return {str(target) for op, target in (*calls, *was) if op == "call_module"}


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the submodules by path. Wrappers for checkpoints and of torch.compile do not count in paths."""
    for path, inner in module.named_modules():
        names = [name for name in path.split(".") if name not in (WRAPPED_MODULE, COMPILED_MODULE)]
        if path:
            yield ".".join(names), inner


def _within(path: str, called: set[str]) -> bool:
    return any(path == target or path.startswith(f"{target}.") for target in called)


def explained(module: nn.Module) -> str:
    """Explain an error about DTensor, and say what to do; return ``""`` if the cause is not a sharded submodule that the graph opens.

    Call this function only after a call has failed, because it searches all submodules, which takes long.
    """
    state = state_of(module)
    if state is None:
        return ""
    called = _called(state.graphs)
    for path, inner in named_modules(module):
        if is_sharded(inner) and not is_block(inner) and not _within(path, called):
            return (
                f"fully_shard was applied to {path!r}, and the emitted code runs the operations inside that module without calling it, so "
                f"FSDP2 does not gather its parameters. Make it a block that is called: graphreg.regularize(model, ..., blocks={path!r}), "
                "with a selector of all modules that are sharded."
            )
    return ""
