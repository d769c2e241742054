"""A small module with penalties, ways to distribute it over several processes, and ways to train it, for mesh_ranks.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy

import graphreg
from graphreg import Penalty, passes
from graphreg.passes import GroupLasso, Orthogonality, SpectralPenalty, WeightL2
from graphreg.runtime.penalty import AllSitesTotal, Total

INPUTS = torch.randn(4, 6, 9, dtype=torch.double, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(9), nn.Linear(9, 12), nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = x + self.down(torch.sigmoid(self.up(self.norm(x))))
        return h


class Net(nn.Module):
    """Nine features, so that shards differ in size, and twelve within, for tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


class Norm(Penalty, keys=("all_weights",), on="parameters"):
    """Takes all parameters at once."""

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        return torch.stack([w.square().sum() for w in values.values()]).sum().sqrt()


class Local(Penalty, keys=("local_weights",), on="parameters"):
    """Would be wrong on shards: each rank would see its own."""

    def __call__(self, w: Any) -> Tensor:
        own: Tensor = w.to_local() if isinstance(w, DTensor) else w
        return own.square().sum()


class Vectors(Penalty, keys=("vectors",), on="parameters"):
    """Takes norms and biases, too."""

    min_dims = 1

    def __call__(self, w: Tensor) -> Tensor:
        return w.abs().max() + w.square().mean()


def few() -> list[Any]:
    return [WeightL2("*", 0.1), GroupLasso("*", 0.1), GroupLasso("*", 0.1, axis=1), Orthogonality("*", 0.1), SpectralPenalty("*", 0.1)]


def on_parameters() -> list[Any]:
    """All of them, the mean and the sum, and one on norms and biases."""
    kinds = ["weight_l1", "weight_l2", "elastic_net", "group_lasso", "orthogonality", "max_norm", "l2_sp", "spectral"]
    found: list[Any] = [Norm("*", 0.1), Local("*", 0.1), GroupLasso("*", 0.1, axis=1), Vectors(["**norm.*", "**bias"], 0.1)]
    for kind in kinds:
        more = {"limit": 0.3} if kind == "max_norm" else {}
        found += [graphreg.build(kind, pattern="*", weight=0.1, reduction=reduction, **more) for reduction in ("mean", "sum")]
    return found


def on_values() -> list[Any]:
    sites = ["layers.*", "**.sigmoid", "**.up", "**.norm"]
    kinds = ["HiddenL1", "HiddenL2", "HoyerSquare", "DeCov", "Covariance", "VarianceFloor", "RecurrentNorm", "RecurrentState"]
    found: list[Any] = [getattr(passes, kind)(sites, 0.1) for kind in kinds]
    found += [passes.KLSparsity("**.sigmoid", 0.1), passes.ConfidencePenalty("head", 0.1), passes.ZLoss("head", 0.1)]
    return [*found, WeightL2("*", 0.1), GroupLasso("*", 0.1)]


def model(dtype: torch.dtype = torch.double) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype)


def made(regularizers: Callable[[], list[Any]] = on_parameters, dtype: torch.dtype = torch.double, **options: Any) -> Any:
    return graphreg.regularize(model(dtype), regularizers(), rng=0, **options)


def placed(regularizers: Callable[[], list[Any]] = on_parameters, **options: Any) -> Any:
    """The same in place. It is traced before it is distributed."""
    return graphreg.regularize_(model(), regularizers(), **{"rng": 0, "penalties": "return", "example_inputs": INPUTS, **options})


# Ways to distribute a module


@cache
def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=tuple("ab"[: len(shape) or 1]))


def sharded(module: Any, on: DeviceMesh | None = None, root: bool = True, leaves: bool = False, **options: Any) -> Any:
    for layer in module.layers:
        for inner in (layer.up, layer.down) if leaves else (layer,):
            fully_shard(inner, mesh=on or mesh(), **options)
    return fully_shard(module, mesh=on or mesh(), **options) if root else module


def some(module: Any) -> Any:
    """One layer is sharded; all other parameters are plain."""
    fully_shard(module.layers[0].up, mesh=mesh())
    return module


def parallel(module: Any, on: DeviceMesh | None = None, **options: Any) -> Any:
    plan = {"up": ColwiseParallel(**options), "down": RowwiseParallel(input_layouts=Shard(-1))}
    for i in range(2):
        parallelize_module(module, on or mesh(), {f"layers.{i}.{name}": style for name, style in plan.items()})
    return module


def sequence_parallel(module: Any) -> Any:
    """Every value is a DTensor, most of them sharded along the sequence."""
    up = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    down = RowwiseParallel(input_layouts=Shard(-1), output_layouts=Shard(1), use_local_output=False)
    for i in range(2):
        plan = {f"layers.{i}.norm": SequenceParallel(), f"layers.{i}.up": up, f"layers.{i}.down": down}
        parallelize_module(module, mesh(), plan)
    head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(module, mesh(), {"head": head})
    entry = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False)
    return parallelize_module(module, mesh(), entry)


def partial_sums(module: Any) -> Any:
    """The value of the last layer has summands on the ranks."""
    style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Partial(), use_local_output=False)
    return parallelize_module(module, mesh(), {"head": style})


def compiled(module: Any, **options: Any) -> Any:
    module.compile(**{"backend": "aot_eager", **options})
    return module


def compiled_blocks(module: Any) -> Any:
    for layer in module.layers:
        compiled(layer, fullgraph=True)
    return module


def selective(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = (torch.ops.aten.mm.default, torch.ops.aten.mul.Tensor, torch.ops.aten.sum.default)
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(module: Any, **options: Any) -> Any:
    wrapper = partial(checkpoint_wrapper, **options)
    apply_activation_checkpointing(module, checkpoint_wrapper_fn=wrapper, check_fn=lambda inner: isinstance(inner, Block))
    return module


# What is computed


def plain(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(module: nn.Module) -> list[Tensor]:
    for p in module.parameters():
        if isinstance(p, DTensor) and p.grad is not None and not any(placement.is_partial() for placement in p.grad.placements):
            assert p.grad.placements == p.placements
    return [plain(p.grad) for p in module.parameters() if p.grad is not None]


def step(result: Any, module: Any) -> list[Any]:
    """Go back from the loss and the penalties. The loss is a DTensor if the output is one."""
    attached = not isinstance(result, graphreg.Regularized)
    output, penalties = (result, module.penalties()) if attached else result
    assert all(type(total) is Tensor for total in penalties.values())
    loss = output.square().mean()
    (loss if attached else loss + sum(penalties.values())).backward()
    return [plain(output.detach()), {name: total.detach() for name, total in penalties.items()}, gradients(module)]


def train(module: Any) -> list[Any]:
    optimizer, steps = torch.optim.SGD(module.parameters(), 0.05), []
    dtype = next(module.parameters()).dtype
    for _ in range(2):
        optimizer.zero_grad()
        steps.append(step(module(INPUTS.to(dtype)), module))
        optimizer.step()
    return steps


def two_forwards(module: Any) -> list[Any]:
    """Two calls, then one backward pass through both. An evaluation comes first."""
    with torch.no_grad():
        module.eval()(INPUTS)
    first, second = module.train()(INPUTS), module(2 * INPUTS)
    sum([*first.penalties.values(), *second.penalties.values(), first.output.square().mean(), second.output.square().mean()]).backward()
    return [first.output.detach(), [total.detach() for total in second.penalties.values()], gradients(module)]


def penalties_alone(module: Any) -> list[Any]:
    penalties = module(INPUTS.to(next(module.parameters()).dtype)).penalties
    sum(penalties.values()).backward()
    return [[total.detach() for total in penalties.values()], [g for g in gradients(module) if g.dim() > 1]]


def twice(module: Any) -> list[Any]:
    """Gradients of the gradients of penalties."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    first = torch.autograd.grad(sum(module(INPUTS).penalties.values()), weights, create_graph=True)
    sum(plain(g).square().sum() for g in first).backward()
    return gradients(module)


def without_gradients(module: Any) -> list[Any]:
    found = []
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found.append({name: total.clone() for name, total in module(INPUTS).penalties.items()})
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    return [*found, *step(module(INPUTS), module)]


def whole_step(module: Any, **options: Any) -> list[Any]:
    """The module, the loss and the sum are one compiled function."""

    def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output, penalties = module(x)
        return output.square().mean() + sum(penalties.values()), {name: total.detach() for name, total in penalties.items()}

    loss, penalties = torch.compile(run, fullgraph=True, **options)(INPUTS)
    loss.backward()
    return [plain(loss.detach()), penalties, gradients(module)]


def reset(module: Any) -> list[Any]:
    """The state is made anew from distributed parameters."""
    train(module)
    graphreg.reset_state(module)
    return train(module)


def by_backend(net: Any, regularizers: list[Any], **options: Any) -> list[Any]:
    backend = graphreg.backend(*regularizers, inner="aot_eager", rng=0, **options)
    run, steps = torch.compile(net, backend=backend), []
    for _ in range(2):
        net.zero_grad()
        output = run(INPUTS)
        loss = output.square().mean()
        (loss if options else loss + sum(backend.penalties().values())).backward()
        steps.append([plain(output.detach()), {name: total.detach() for name, total in backend.penalties().items()}, gradients(net)])
    return steps


def formulas() -> tuple[list[Any], list[Any]]:
    """Each formula on parameters of several shapes, in all placements; of two ranks, on the tall one along one axis."""
    ours, theirs = [], []
    axes = [Shard(0), Shard(1), Replicate()]
    grids = [(mesh(), (one,)) for one in axes] + [(mesh(2, 2), (one, two)) for one in axes for two in axes if dist.get_world_size() == 4]
    for on, placements in grids:
        tall = [(70, 2)] if placements == (Shard(0),) or len(placements) == 2 else []
        for shape in [(5, 7), (1, 4), *tall]:
            for regularizer in on_parameters():
                if regularizer.keys[0] not in ("l2_sp", "spectral"):
                    weight = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
                    spread = distribute_tensor(weight, on, placements)
                    ours.append(measured(regularizer, spread.requires_grad_()))
                    theirs.append(measured(regularizer, weight.requires_grad_()))
    return ours, theirs


def measured(regularizer: Any, weight: Tensor) -> list[Tensor]:
    all_at_once = "values" in regularizer.takes
    total = (AllSitesTotal if all_at_once else Total)(regularizer, "it", torch.tensor([0.5], dtype=torch.double))
    value = total({"w": weight} if all_at_once else weight)
    value.backward()
    assert type(value) is Tensor and (not isinstance(weight, DTensor) or weight.grad.placements == weight.placements)
    return [value.detach(), plain(weight.grad)]
