"""One of two ranks (gloo) that train with DistributedDataParallel, which test_distributed.py starts.

``main`` returns what the rank drew, and what gradients it ended with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import graphreg
from graphreg.passes import BernoulliDropout, GaussianNoise, WeightL2

STEPS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


REGULARIZERS = [BernoulliDropout("tanh", 0.5), GaussianNoise("tanh_1", 0.2), WeightL2("*", 0.1, reduction="sum")]


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def regularized() -> Any:
    """The same on every rank: parameters, seed, regularizers."""
    return graphreg.regularize(plain(), REGULARIZERS, rng=5)


def data(rank: int, step: int) -> Tensor:
    return torch.randn(6, 8, dtype=torch.double, generator=torch.Generator().manual_seed(100 * rank + step))


def loss_of(result: Any) -> Tensor:
    output, penalties = result
    loss: Tensor = output.square().mean() + sum(penalties.values())
    return loss


def train(module: Any, run: Any, rank: int, trained: nn.Module | None = None) -> list[dict[str, Any]]:
    """Three steps; of each the output, the gradients and the state of the noise. ``trained``: whose parameters, the module's own."""
    parameters = list((trained or module).parameters())
    optimizer, told = torch.optim.SGD(parameters, 0.1), []
    for step in range(STEPS):
        optimizer.zero_grad()
        result = run(data(rank, step))
        loss_of(result).backward()
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        told.append({"output": result[0].detach(), "gradients": gradients, "state": graphreg.rng_state(module)})
        optimizer.step()
    return told


def whole_module(rank: int) -> Any:
    """Compiled with fullgraph=True inside the wrapper: what was trained, and in how many graphs."""
    counter, module = CompileCounterWithBackend("eager"), regularized()
    module.compile(backend=counter, fullgraph=True)
    wrapped = DistributedDataParallel(module)
    return train(module, wrapped, rank), counter.frame_count


def whole_backend(rank: int) -> Any:
    """The same by graphreg's backend."""
    model = plain()
    backend = graphreg.backend(REGULARIZERS, rng=5, inner="aot_eager")
    model.compile(backend=backend, fullgraph=True)
    compiled = DistributedDataParallel(model)
    return train(backend, lambda x: (compiled(x), backend.penalties()), rank, model), len(backend.subgraphs)


def backend_around(rank: int) -> Any:
    """graphreg's backend, of the wrapper itself: its prefix ``module.`` is in no name."""
    model = plain()
    backend = graphreg.backend(REGULARIZERS, rng=5, inner="aot_eager")
    compiled = torch.compile(DistributedDataParallel(model), backend=backend)
    return train(backend, lambda x: (compiled(x), backend.penalties()), rank, model), len(backend.subgraphs)


def main(backend: str) -> dict[str, Any]:
    """Train in each way with a backend of torch.compile; ``"eager"``: without torch.compile."""
    rank, told = dist.get_rank(), dict[str, Any]()
    for ranks in ("differ", "same"):
        module = regularized()
        graphreg.set_ranks(module, ranks)
        wrapped = DistributedDataParallel(module)
        run = torch.compile(wrapped, backend=backend) if backend != "eager" else wrapped
        told[ranks] = train(wrapped, run, rank)
        key = module.graphreg_rules.key
        key.seek(0)
        told[f"{ranks} keys"] = key()
        with graphreg.frozen_noise(wrapped):
            frozen = [run(data(0, 0))[0].detach() for _ in range(2)]
        told[f"{ranks} frozen"] = frozen
        told[f"{ranks} samples"] = graphreg.sample(module, data(0, 0), 3).outputs
    told["whole"] = whole_module(rank) if backend == "eager" else whole_backend(rank)
    torch.compiler.reset()
    told["around"] = backend_around(rank)
    return told
