"""One of several ranks (gloo) that train with DTensors, which test_penalties_on_meshes.py starts.

``main`` returns, for each way to distribute a module and to train it, what the distributed module computed, and what the whole one did.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import mesh_nets as nets
import torch
from mesh_nets import (
    INPUTS,
    checkpointed,
    compiled,
    compiled_blocks,
    few,
    made,
    mesh,
    on_values,
    parallel,
    placed,
    sequence_parallel,
    sharded,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import graphreg
from graphreg.passes import Contractive, DeCov, HiddenL1, WeightL2

Way = tuple[Callable[[], Any], Callable[[], Any]]  # what the distributed module computes, and what the whole module computes

BLOCKS: dict[str, Any] = {"blocks": "layers.*"}
EXPORT: dict[str, Any] = {"front_end": "export", "example_inputs": INPUTS}
ATTACH: dict[str, Any] = {"penalties": "attach", "scale": 1.0}
VALUES: dict[str, Any] = {"regularizers": on_values}
FEW: dict[str, Any] = {"regularizers": few}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SELECTIVE = partial(create_selective_checkpoint_contexts, nets.selective)


def way(distribute: Callable[[Any], Any], run: Callable[[Any], Any] = nets.train, whole: Any = None, **options: Any) -> Way:
    """``whole``: computes what the whole module computes, if it is not ``run``."""
    return lambda: run(distribute(made(**options))), lambda: (whole or run)(made(**options))


def in_place(distribute: Callable[[Any], Any], **options: Any) -> Way:
    return lambda: nets.train(distribute(placed(**options))), lambda: nets.train(made(**options))


def backend(distribute: Callable[[Any], Any], regularizers: Callable[[], list[Any]], **options: Any) -> Way:
    run = nets.by_backend
    return lambda: run(distribute(nets.model()), regularizers(), **options), lambda: run(nets.model(), regularizers(), **options)


def stateless() -> list[Any]:
    return [*few()[:4], HiddenL1("layers.*", 0.1)]


def tensor_parallel(module: Any) -> Any:
    return parallel(module)


def whole_root(module: Any) -> Any:
    return fully_shard(module, mesh=mesh())


def fsdp_over_parallel(module: Any) -> Any:
    return sharded(parallel(module, mesh(2, 2)["b"]), mesh(2, 2)["a"])


WAYS: dict[str, Way] = {
    "FSDP2": way(sharded, **BLOCKS),
    "FSDP2, leaves": way(partial(sharded, leaves=True)),
    "FSDP2, one leaf": way(nets.some),
    "FSDP2, two forwards": way(partial(sharded, reshard_after_forward=False), nets.two_forwards, **BLOCKS),
    "FSDP2, mixed precision": way(partial(sharded, mp_policy=BFLOAT16), nets.penalties_alone, dtype=torch.float32, **BLOCKS),
    "FSDP2, compiled": way(lambda module: compiled(sharded(module)), **BLOCKS, **FEW),
    "tensor parallel": way(tensor_parallel),
    "tensor parallel, attached": way(tensor_parallel, **ATTACH),
    "tensor parallel, compiled": way(lambda module: compiled(parallel(module), fullgraph=True), **FEW),
    "tensor parallel, without gradients": way(tensor_parallel, nets.without_gradients),
    "tensor parallel, twice": way(tensor_parallel, nets.twice, **FEW),
    "sequence parallel": way(sequence_parallel, **VALUES),
    "sequence parallel, attached": way(sequence_parallel, **VALUES, **ATTACH),
    "partial sums": way(nets.partial_sums, regularizers=lambda: [HiddenL1("head", 0.1), DeCov("head", 0.1)]),
    "in place, tensor parallel": in_place(tensor_parallel, **FEW),
    "tensor parallel, exported": way(tensor_parallel, **EXPORT),
    "backend, tensor parallel": backend(tensor_parallel, stateless),
    "formulas": (lambda: None, lambda: None),  # main replaces them
    # the sweep
    "FSDP2, exported": way(sharded, **BLOCKS, **EXPORT),
    "FSDP2, float32": way(sharded, dtype=torch.float32, **BLOCKS),
    "FSDP2, compiled blocks": way(lambda module: compiled_blocks(sharded(module)), **BLOCKS, **FEW),
    "FSDP2, compiled, two forwards": way(
        lambda module: compiled(sharded(module, reshard_after_forward=False)), nets.two_forwards, **BLOCKS, **FEW
    ),
    "FSDP2, compiled, attached": way(lambda module: compiled(sharded(module)), **BLOCKS, **FEW, **ATTACH),
    "FSDP2, leaves, attached": way(partial(sharded, leaves=True), **ATTACH),
    "FSDP2, leaves, no root": way(partial(sharded, leaves=True, root=False)),
    "FSDP2, leaves, compiled": way(lambda module: compiled(sharded(module, leaves=True)), **FEW),
    "FSDP2, one leaf, compiled": way(lambda module: compiled(nets.some(module)), **FEW),
    "FSDP2, root alone": way(whole_root),
    "FSDP2, root alone, compiled": way(lambda module: compiled(whole_root(module), fullgraph=True), **FEW),
    "tensor parallel, state made anew": way(tensor_parallel, nets.reset),
    "tensor parallel, compiled blocks": way(lambda module: compiled_blocks(parallel(module)), **BLOCKS, **FEW),
    "tensor parallel, Inductor": way(lambda module: compiled(parallel(module), fullgraph=True, backend="inductor"), **FEW),
    "sequence parallel, exported": way(sequence_parallel, **VALUES, **EXPORT),
    "sequence parallel, checkpointed": way(lambda module: checkpointed(sequence_parallel(module)), **VALUES, **BLOCKS),
    "sequence parallel, selective": way(lambda module: checkpointed(sequence_parallel(module), context_fn=SELECTIVE), **VALUES, **BLOCKS),
    "sequence parallel, compiled": way(lambda module: compiled(sequence_parallel(module), fullgraph=True), **VALUES),
    "sequence parallel, compiled blocks": way(lambda module: compiled_blocks(sequence_parallel(module)), **VALUES, **BLOCKS),
    "sequence parallel, whole step": way(sequence_parallel, partial(nets.whole_step, backend="aot_eager"), **VALUES),
    "sequence parallel, whole step, Inductor": way(sequence_parallel, nets.whole_step, **FEW),
    "in place, FSDP2": in_place(sharded, **BLOCKS),
    "in place, FSDP2, leaves": in_place(partial(sharded, leaves=True)),
    "in place, tensor parallel, compiled": in_place(lambda model: compiled(parallel(model)), **FEW),
    "in place, sequence parallel": in_place(sequence_parallel, **VALUES),
    "backend, FSDP2": backend(sharded, stateless),
    "backend, FSDP2, leaves": backend(partial(sharded, leaves=True), lambda: few()[:4], **ATTACH),
    "backend, FSDP2, root alone": backend(whole_root, stateless, **ATTACH),
    "backend, sequence parallel": backend(sequence_parallel, on_values),
    "backend, sequence parallel, attached": backend(sequence_parallel, on_values, **ATTACH),
    # four processes
    "hybrid": way(lambda module: sharded(module, mesh(2, 2)), **BLOCKS),
    "hybrid, leaves": way(lambda module: sharded(module, mesh(2, 2), leaves=True), **ATTACH),
    "hybrid, compiled": way(lambda module: compiled(sharded(module, mesh(2, 2))), **BLOCKS, **FEW),
    "FSDP2 over tensor parallel": way(fsdp_over_parallel, **BLOCKS),
    "FSDP2 over tensor parallel, compiled": way(lambda module: compiled(fsdp_over_parallel(module)), **BLOCKS, **FEW),
    "another mesh after the forward": way(partial(sharded, reshard_after_forward=2), **BLOCKS),
    "another mesh after the forward, compiled": way(lambda m: compiled(sharded(m, reshard_after_forward=2)), **BLOCKS, **FEW),
}


def error_of(module: Any) -> str:
    try:
        module(INPUTS)
    except graphreg.GraphRegError as error:
        return str(error)
    return ""


def errors() -> dict[str, str]:
    """What is refused under tensor parallelism. All is called twice: the second call must raise, too."""
    cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
    gather = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True)

    def prepared(style: Any, path: str = "", **options: Any) -> Any:
        module = parallel(made(**options))
        return parallelize_module(module, mesh(), {path: style} if path else style)

    hidden, norm, weights = (lambda: [HiddenL1("*", 0.1)]), (lambda: [HiddenL1("layers.0.norm", 0.1)]), (lambda: [WeightL2("*", 0.1)])
    modules = {
        "local shard": parallel(made(hidden)),
        "local shard in a block": parallel(made(hidden, **BLOCKS)),
        "local shard, compiled": compiled(parallel(made(hidden)), fullgraph=True),
        "local shard in place": parallel(placed(hidden)),
        "local input": prepared(cut, regularizers=norm),
        "local input of a block": prepared(cut, "layers.0", regularizers=norm, **BLOCKS),
        "opened": prepared(cut, "layers.0", regularizers=weights),
        "contractive": parallel(made(lambda: [Contractive("layers.*", 0.1)])),
        "whole value": parallel(made(lambda: [HiddenL1("layers.*", 0.1)])),
        "whole in a block": parallelize_module(prepared(cut, regularizers=norm, **BLOCKS), mesh(), {"layers.0": gather}),
    }
    found = {name: error_of(module) for name, module in modules.items()}
    assert found == {name: error_of(module) for name, module in modules.items()}
    run = torch.compile(parallel(nets.model()), backend=graphreg.backend(HiddenL1("**.sigmoid", 0.1), inner="eager", rng=0))
    return found | {"backend": error_of(run)}


def main(*ways: str) -> dict[str, Any]:
    """Compute in these ways; ``errors``: find what is refused, too."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    found: dict[str, Any] = {}
    for name in ways:
        torch.compiler.reset()
        if name == "errors":
            found[name] = errors()
        elif name == "formulas":
            found[name] = nets.formulas()
        else:
            found[name] = tuple(compute() for compute in WAYS[name])
    return found
