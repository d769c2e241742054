"""The form of a splice: chosen by what its value's derivative is found from, and the same function in either."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import Noise, Splice
from graphreg.passes import BernoulliDropout, GaussianNoise
from graphreg.runtime.splice import SpliceRule


class Net(nn.Module):
    """A product, what ``middle`` makes of it, a product."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 32), nn.LayerNorm(32), nn.Linear(32, 3)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        z = self.norm(z) if self.middle in BEHIND_NORM.values() else z
        return self.b(self.middle(z))


class Two(nn.Module):
    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.how = nn.Linear(6, 32), nn.Linear(6, 32), nn.LayerNorm(32), how
        self.c = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.how(self.a(x), self.norm(self.b(x))))


FROM_OUTPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "F.relu": F.relu, "sigmoid": lambda z: z.sigmoid(), "tanh": torch.tanh, "softmax": lambda z: z.softmax(-1),
}  # fmt: skip
FROM_INPUT: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "abs": torch.abs, "nothing": lambda z: z}
BEHIND_NORM: dict[str, Callable[[Tensor], Tensor]] = {"relu": lambda z: z.relu(), "half": lambda z: torch.relu(z * 0.5 + 1)}


def splices(module: nn.Module) -> list[SpliceRule]:
    return [leaf for leaf in module.modules() if isinstance(leaf, SpliceRule)]


@pytest.mark.parametrize("name", FROM_OUTPUT)
def test_recomputed_where_the_derivative_reads_the_output(name: str) -> None:
    module = graphreg.regularize(Net(FROM_OUTPUT[name]), hidden_dropout=0.1, rng=0)
    assert [leaf.recomputed for leaf in splices(module)] == [True]


@pytest.mark.parametrize("name", FROM_INPUT)
def test_kept_where_it_reads_the_input(name: str) -> None:
    module = graphreg.regularize(Net(FROM_INPUT[name]), hidden_dropout=0.1, rng=0)
    assert [leaf.recomputed for leaf in splices(module)] == [False]


@pytest.mark.parametrize("name", BEHIND_NORM)
def test_kept_behind_a_normalization(name: str) -> None:
    module = graphreg.regularize(Net(BEHIND_NORM[name]), hidden_dropout=0.1, rng=0)
    assert [leaf.recomputed for leaf in splices(module)] == [False]


@pytest.mark.parametrize(
    ("how", "recomputed"), [(lambda a, b: torch.relu(a + a), True), (lambda a, b: torch.relu(a + b), False), (lambda a, b: b, False)]
)
def test_a_sum_is_looked_through(how: Callable[[Tensor, Tensor], Tensor], recomputed: bool) -> None:
    module = graphreg.regularize(Two(how), hidden_dropout=0.1, rng=0)
    assert {leaf.recomputed for leaf in splices(module) if leaf.site not in ("norm",)} <= {recomputed, False}
    assert any(leaf.recomputed for leaf in splices(module)) == recomputed


class Every(Splice, keys=("every_draw",)):
    """All kinds of draws, in an order that must be kept, one of them of another shape."""

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        first = noise.uniform(z[:1])
        return (z + first * weight) * noise.keep(z, weight) + noise.normal(z) * z.sigmoid()


def run(module: nn.Module, call: Callable[..., Any], x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    output, penalties = call(x)
    (output.square().sum() + sum(penalties.values())).backward()
    return [output.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]  # type: ignore[list-item]


@pytest.mark.parametrize("settings", [{}, {"aggressive_recomputation": True}, {"activation_memory_budget": 0.0}])
@pytest.mark.parametrize("regularizer", [BernoulliDropout("*", 0.3), GaussianNoise("*", 0.5), Every("*", 0.4)])
def test_recomputed_is_the_same_function(regularizer: Splice, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = graphreg.regularize(Net(torch.relu), regularizer, hidden_l1=0.1, rng=3)
    assert all(leaf.recomputed for leaf in splices(module))
    twin, x = copy.deepcopy(module), torch.randn(8, 6)
    with functorch.patch(**settings):
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager_decomp_partition")
        for _ in range(3):
            for ours, eager in zip(run(twin, compiled, x), run(module, module, x), strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_several_splices_and_a_clean_penalty_at_one_site(backend: str) -> None:
    torch.manual_seed(0)
    passes = [BernoulliDropout("*", 0.3), GaussianNoise("*", 0.5), BernoulliDropout("*", 0.2)]
    module = graphreg.regularize(Net(torch.relu), passes, hidden_l1={"weight": 0.1, "clean": True}, rng=3)
    twin, x = copy.deepcopy(module), torch.randn(8, 6)
    for ours, eager in zip(run(twin, torch.compile(twin, fullgraph=True, backend=backend), x), run(module, module, x), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_what_is_kept_for_backward_is_the_output_and_a_mask_of_bytes() -> None:
    """Not the spliced value beside it, which a partitioner would keep for the product."""
    module = graphreg.regularize(Net(torch.relu), hidden_dropout=0.3, rng=3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled(torch.randn(512, 6))
    large = sum(t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in kept}.values() if t.numel() >= 512 * 32)
    assert large <= 512 * 32 * 5  # a float and a byte an element; by hand it is two floats and a byte, or more


def test_a_splice_that_is_not_recomputed_keeps_a_mask_of_bytes() -> None:
    """What ``nn.Dropout`` written by hand keeps, a bool an element, and a scale; a scaled mask would be four times that."""

    def layers(*between: nn.Module) -> nn.Sequential:
        blocks = [m for c in (3, 8) for m in (nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *between)]
        return nn.Sequential(*blocks, nn.Conv2d(8, 1, 3))

    ours = graphreg.regularize(layers(), BernoulliDropout(["2", "5"], 0.1), rng=3)
    assert not any(leaf.recomputed for leaf in splices(ours))
    assert _kept_bytes(ours) <= _kept_bytes(layers(nn.Dropout(0.1))) + 4 * 2


def _kept_bytes(module: nn.Module) -> int:
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")(torch.randn(4, 3, 16, 16))
        return sum(kept.values())
