"""What Inductor is told: sums of a product and an elementwise value stay apart on a CPU, and nothing else changes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel

import graphreg
from graphreg.compiler import inductor_passes
from graphreg.compiler.inductor_passes import JOINT_GRAPH_SLOT, SLOT, unfuse, with_our_passes
from graphreg.torch_internals.inductor import graph_pass

aten = torch.ops.aten


def graph_of(function: Any, *inputs: Tensor) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def targets(module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


A, B, C = torch.randn(4, 5), torch.randn(5, 6), torch.randn(4, 6)


def test_a_sum_with_an_elementwise_value_is_taken_apart() -> None:
    module = graph_of(lambda a, b, c: aten.addmm(c * 2, a, b), A, B, C)
    before = module(A, B, C)
    assert targets(module) == ["aten.mul.Tensor", "aten.addmm.default"]
    assert unfuse(module.graph) == 1
    module.recompile()
    assert targets(module) == ["aten.mul.Tensor", "aten.mm.default", "aten.add.Tensor"]
    assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(module(A, B, C), before)
    module.graph.lint()


def read_twice(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    x = c * 2  # written to memory anyway
    return aten.addmm(x, a, b) + x


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c: aten.addmm(c, a, b),  # an input: in memory already
        lambda a, b, c: aten.addmm((c * 2)[0], a, b),  # a bias: addmm's own kernel broadcasts it
        lambda a, b, c: aten.addmm(c * 2, a, b, beta=0.5),
        read_twice,
        lambda a, b, c: aten.addmm(aten.mm(a, b), a, b),
    ],
)
def test_what_stays(function: Any) -> None:
    module = graph_of(function, A, B, C)
    before = targets(module)
    assert unfuse(module.graph) == 0
    assert targets(module) == before


def test_the_options_of_a_backend() -> None:
    assert list(with_our_passes({"max_autotune": False})) == ["max_autotune", SLOT]
    for slot in (SLOT, JOINT_GRAPH_SLOT):
        assert with_our_passes({slot: None}) == {slot: None}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many ``addmm`` the pass splits, in each graph that Inductor compiles with it."""
    counts: list[int] = []
    monkeypatch.setattr(inductor_passes, "unfuse", lambda graph: counts.append(unfuse(graph)))
    torch.compiler.reset()
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield counts
    torch.compiler.reset()


def regularized(**more: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    return graphreg.regularize(model, **{"hidden_dropout": 0.2, "hidden_l1": 0.1, "weight_l2": 0.1, "rng": 1, **more})


def in_group(module: nn.Module) -> nn.Module:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return DistributedDataParallel(module)


def in_place(module: Any) -> Any:
    module.compile(fullgraph=True)
    return module


WAYS: dict[str, Callable[[Any], Any]] = {
    "module.compile()": in_place,
    "torch.compile(module)": lambda module: torch.compile(module, fullgraph=True),
    "a mode": lambda module: torch.compile(module, mode="max-autotune-no-cudagraphs"),
    "other options": lambda module: torch.compile(module, options={"max_autotune": False}),
    "a function around": lambda module: torch.compile(lambda x: tuple(module(x))),
    "a model around": lambda module: torch.compile(Outer(module)),
    "DistributedDataParallel": lambda module: torch.compile(in_group(module)),
}


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        print(end="")  # a graph break
        return self.inner(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*frame skipped")
def test_however_it_is_compiled_the_pass_is_there(counted: list[int], way: str) -> None:
    module, hook = regularized(), sys.excepthook
    twin, x = copy.deepcopy(module), torch.randn(32, 16)
    run = WAYS[way](twin)
    try:
        for _ in range(2):
            grads = []
            for owner, form in ((module, module), (twin, run)):
                owner.zero_grad()
                output, penalties = form(x)
                (output.square().mean() + sum(penalties.values())).backward()
                grads.append([output, *penalties.values(), *(p.grad for p in owner.parameters())])
            for eager, compiled in zip(*grads, strict=True):
                torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            sys.excepthook = hook  # which the group put its own around
    assert sum(counted) >= 4  # the gradients of three weights and of a hidden value


def test_no_other_graph_has_it(counted: list[int]) -> None:
    before = inductor_config.get_config_copy()
    torch.compile(regularized())(torch.randn(32, 16))
    assert counted and inductor_config.get_config_copy() == before
    counted.clear()
    product = torch.compile(lambda a, b, c: torch.addmm(c * 2, a, b))(A, B, C)
    torch.testing.assert_close(product, C * 2 + A @ B)
    torch.compile(graphreg.strip(regularized()))(torch.randn(32, 16))
    assert not counted


@pytest.mark.parametrize("slot", [SLOT, JOINT_GRAPH_SLOT])
def test_a_pass_of_the_users_stays(counted: list[int], slot: str) -> None:
    seen: list[int] = []
    own = graph_pass(lambda graph: seen.append(1), __file__)
    module = regularized(contractive={"weight": 0.1, "pattern": "1"})
    torch.compile(module, options={slot: own})(torch.randn(32, 16))
    assert seen and bool(counted) == (slot != SLOT)
    counted.clear()
    seen.clear()
    torch.compiler.reset()
    with inductor_config.patch({slot: own}):
        torch.compile(module)(torch.randn(32, 16))
    assert seen and bool(counted) == (slot != SLOT)


def test_another_backend_is_left_alone(counted: list[int]) -> None:
    torch.compile(regularized(), backend="aot_eager")(torch.randn(32, 16))
    assert not counted


def test_regularize_compiles_with_it() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    module = graphreg.regularize(model, hidden_dropout=0.2, weight_l2=0.1, rng=1, compile=True)
    plain = graphreg.regularize(model, hidden_dropout=0.2, weight_l2=0.1, rng=1)
    x = torch.randn(5, 8)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-6)
