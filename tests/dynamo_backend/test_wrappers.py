"""Wrappers around a model or its modules are no part of a name: a backend then has the sites, masks and gradients of the model without."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

import graphreg
from graphreg.dynamo_backend.wrappers import module_itself, unwrapped
from graphreg.torch_internals.modules import modules_in_wrappers

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"hidden_dropout": 0.4, "input_noise": 0.1, "hidden_l1": 0.2, "weight_l2": 0.1, "rng": 3}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(Block() for _ in range(2)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


class Sharded(FullyShardedDataParallel):
    """The wrapper of FSDP1 without its work, which needs an accelerator."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self._fsdp_wrapped_module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._fsdp_wrapped_module(*args, **kwargs)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    hook = sys.excepthook  # which a process group puts its own around
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    dist.destroy_process_group()
    sys.excepthook = hook


def with_layers(wrap: Callable[[nn.Module], Any]) -> Callable[[Net], nn.Module]:
    def wrapped(model: Net) -> nn.Module:
        model.layers[0] = wrap(model.layers[0])
        return model

    return wrapped


def compiled_part(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


AROUND: dict[str, Callable[[Net], Any]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": DataParallel,
    "compiled before": compiled_part,
    "FSDP": Sharded,
    "a compiled layer": with_layers(compiled_part),
    "an FSDP layer": with_layers(Sharded),
    "FSDP of FSDP layers": lambda model: Sharded(with_layers(Sharded)(model)),
    "DistributedDataParallel of a compiled layer": lambda model: DistributedDataParallel(with_layers(compiled_part)(model)),
}


# Dynamo asks each input of a graph after a break, which is no leaf, and hides the warning.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def trained(model: nn.Module, run: Any, backend: Any) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Of two calls the outputs and penalties; the gradients; and the names of the sites where something acts."""
    values, parameters = list[Tensor](), list(model.parameters())
    for _ in range(2):
        output = run(X)
        penalties = backend.penalties()
        (output.square().mean() + sum(penalties.values())).backward()
        values += [output.detach(), *(penalty.detach() for penalty in penalties.values())]
    acted = [site.name for site in graphreg.report(backend).sites]
    return values, [p.grad for p in parameters if p.grad is not None], acted


@pytest.mark.parametrize("way", AROUND)
def test_a_wrapper_changes_nothing(way: str) -> None:
    model, twin = net(), net()
    backends = [graphreg.backend(inner="eager", **OPTIONS) for _ in range(2)]
    wrapped = AROUND[way](model)
    ours, theirs = (
        trained(each, torch.compile(run, backend=backend), backend)
        for each, run, backend in zip((model, twin), (wrapped, twin), backends, strict=True)
    )
    torch.testing.assert_close(ours[:2], theirs[:2])
    weights = {"layers.0.linear.weight", "layers.1.linear.weight", "out.weight"}
    assert ours[2] == theirs[2] and {*ours[2]} == {"x", "layers.0.add", "layers.1.add"} | weights
    assert [graphreg.report(backend).title for backend in backends] == ["Net", "Net"]
    assert graphreg.rng_state(backends[0]) == graphreg.rng_state(backends[1])


def test_checkpointed_layers() -> None:
    """A checkpointed region is one operation, and has the name of the module in the wrapper."""
    model = with_layers(checkpoint_wrapper)(net())
    backend = graphreg.backend(BERNOULLI("layers.0", 0.4), weight_l2=0.1, rng=3, inner="eager")
    torch.compile(model, backend=backend)(X)
    (entry, weights) = graphreg.report(backend).regularizers
    assert entry.sites == ("layers.0.getitem",) and weights.sites[0] == "layers.0.linear.weight"


def test_the_mode_of_a_module_with_wrapped_submodules() -> None:
    """It stands for the module, and follows it."""
    model, twin = with_layers(compiled_part)(net()), net()
    backends = [graphreg.backend(BERNOULLI("**", 0.4), rng=3, inner="eager") for _ in range(2)]
    runs = [torch.compile(each, backend=backend) for each, backend in zip((model, twin), backends, strict=True)]
    for mode in ("train", "eval", "train"):
        for each in (model, twin):
            each.train(mode == "train")
            each.layers.train()  # type: ignore[union-attr]
        torch.testing.assert_close(runs[0](X), runs[1](X))


def test_one_backend_for_a_model_with_and_without_wrapper() -> None:
    model = net()
    backend = graphreg.backend(hidden_l1=0.2, inner="eager")
    first = torch.compile(model, backend=backend)(X)
    torch.testing.assert_close(torch.compile(DistributedDataParallel(model), backend=backend)(X), first)
    with pytest.raises(graphreg.GraphRegError, match="this backend regularizes Net already"):
        torch.compile(DistributedDataParallel(net()), backend=backend)(X)


def test_a_rewritten_module_in_a_wrapper_is_refused() -> None:
    wrapped = DistributedDataParallel(graphreg.regularize(net(), hidden_dropout=0.1, rng=0))
    backend = graphreg.backend(hidden_l1=0.2, inner="eager")
    with pytest.raises(graphreg.TraceError, match="this model is rewritten already"):
        torch.compile(wrapped, backend=backend)(X)


def test_a_function_that_calls_wrapped_models() -> None:
    """Each has the name of its variable, and no more."""
    first, second = DistributedDataParallel(net()), compiled_part(net())

    def step(x: Tensor) -> Tensor:
        return first(x) + second(x)  # type: ignore[no-any-return]

    backend = graphreg.backend(hidden_l1=0.2, weight_l2=0.1, inner="eager", missing="ignore")
    torch.compile(step, backend=backend)(X)
    sites = {site.name for site in graphreg.report(backend).sites}
    assert {"first.layers.0.add", "second.layers.0.add", "first.out.weight", "second.out.weight"} <= sites


def test_what_is_unwrapped() -> None:
    """A module without wrappers is itself. One that is registered twice stays one module."""
    model = net()
    assert unwrapped(model) is model and not any(wrappers for _, _, wrappers in modules_in_wrappers(model))
    model.layers.append(model.layers[0])
    inner: Any = model.layers[0].linear
    model.layers[0].linear = Sharded(inner)
    seen: Any = unwrapped(Sharded(model))
    layers = [seen.get_submodule(f"layers.{i}") for i in range(3)]
    assert type(seen).__name__ == "Net" and module_itself(seen) is model and layers[0] is layers[2] is not model.layers[0]
    assert layers[0].linear is inner and module_itself(inner) is inner
    assert [name for name, _ in seen.named_parameters()] == [name for name, _ in net().named_parameters()]
    around = [path for path, _, wrappers in modules_in_wrappers(Sharded(model)) for _ in wrappers]
    assert around == ["", "layers.0.linear", "layers.2.linear"]
    model.eval()
    assert not seen.training and not seen.layers.training
    seen.training = True
    assert not model.training


BERNOULLI: Any = graphreg.registered()["dropout"]
