"""Under torch.compile(fullgraph=True): the masks of eager, its outputs and gradients, and no compilation too many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config as functorch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

import graphreg
from graphreg import Noise
from graphreg.passes import BernoulliDropout


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, 64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def vit() -> nn.Module:
    return tv.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=10)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "mlp": (MLP, (16, 20), {"hidden_noise": 0.1}),
    "one layer": (OneLayer, (16, 20), {"hidden_noise": 0.1}),
    "vit": (vit, (4, 3, 32, 32), {"hidden_noise": 0.1}),
    "resnet18": (lambda: tv.resnet18(num_classes=10), (8, 3, 64, 64), {}),
    "resnet18 in float64": (lambda: tv.resnet18(num_classes=10).double(), (8, 3, 64, 64), {}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "aggressive": {"aggressive_recomputation": True},
    "budget": {"activation_memory_budget": 0.0},
}
# Inductor compiles a resnet for half a minute, and anything for seconds where its cache is empty; the settings decide what
# the partitioner recomputes, which aot_eager shows as well. All of it under Inductor is in the sweep.
CASES = [
    ("mlp", "default", "inductor"), *[("mlp", s, "aot_eager") for s in ("aggressive", "budget")],
    *[("vit", s, "aot_eager") for s in SETTINGS], ("resnet18", "default", "aot_eager"),
    *(pytest.param("resnet18 in float64", how, "aot_eager_decomp_partition", marks=pytest.mark.sweep) for how in ("aggressive", "budget")),
]  # fmt: skip


@contextmanager
def setting(name: str) -> Iterator[None]:
    with functorch.patch(**SETTINGS[name]) if SETTINGS[name] else copy_of_nothing():
        yield


@contextmanager
def copy_of_nothing() -> Iterator[None]:
    yield


def pair(name: str, **more: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, extra = MODELS[name]
    keywords = {"hidden_dropout": 0.1, "weight_l2": 1e-2, "hidden_l1": 1e-2} | extra | more
    module = graphreg.regularize(make(), rng=7, **keywords)
    x = torch.randn(shape)
    return module, copy.deepcopy(module), x.double() if "float64" in name else x


def step(run: Callable[..., Any], module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    output, penalties = run(x)
    (output.square().mean() + sum(penalties.values())).backward()
    return output, penalties


def five_steps(name: str, how: str, backend: str) -> None:
    with setting(how):
        eager, twin, x = pair(name)
        run = torch.compile(twin, fullgraph=True, backend=backend)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (eager, twin)]
        flips = 0
        for _ in range(5):
            twin.load_state_dict(eager.state_dict())  # a step's rounding is not the next one's difference
            (ours, ours_penalties), (theirs, penalties) = step(run, twin, x), step(eager, eager, x)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=TOLERANCE[name])
            torch.testing.assert_close(ours_penalties, penalties, rtol=1e-5, atol=1e-6)
            try:
                same_gradients(twin, eager, TOLERANCE[name])
            except AssertionError:
                flips += 1
                if flips > FLIPS.get(name, 0):
                    raise
            for optimizer in optimizers:
                optimizer.step()
        assert graphreg.rng_state(twin)["call"] == graphreg.rng_state(eager)["call"] == 5


def same_gradients(twin: nn.Module, eager: nn.Module, tolerance: float) -> None:
    for (label, a), b in zip(twin.named_parameters(), eager.parameters(), strict=True):
        scale = max(1.0, float(b.grad.abs().max()))  # type: ignore[union-attr]
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=tolerance * scale, msg=lambda m, label=label: f"{label}: {m}")


# In float32 the unregularized resnet18, compiled, is up to 5e-6 beyond rtol 1e-5 of its eager self: its batch norms
# divide by small deviations. In float64 it keeps to the tolerance of the others.
# Now and then (one of eight inputs) a ReLU's input within rounding of 0 falls to the other side, and its unit's gradient
# with it: 3e-4 instead of 1e-6. In float64 none did.
FLIPS = {"resnet18": 2}
TOLERANCE = {"mlp": 1e-6, "vit": 1e-6, "resnet18": 1e-4, "resnet18 in float64": 1e-6}


@pytest.mark.parametrize(("name", "how", "backend"), CASES)
def test_five_steps(name: str, how: str, backend: str) -> None:
    five_steps(name, how, backend)


@pytest.mark.sweep
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("how", SETTINGS)
def test_five_steps_inductor(name: str, how: str) -> None:
    five_steps(name, how, "inductor")


class Spy(nn.Module):
    """Returns the masks themselves: the output is the product of ones with them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(64, 128))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w)
        return h.sin()


@pytest.mark.parametrize("how", SETTINGS)
def test_masks_are_bit_equal_and_backward_sees_the_forwards(how: str) -> None:
    """d out / d h of dropout alone is the mask over 1 - p: the backward's mask, compared with the forward's."""
    torch.manual_seed(0)
    with setting(how):
        module = graphreg.regularize(Spy(), BernoulliDropout("linear", 0.3), rng=5)
        twin = copy.deepcopy(module)
        run = torch.compile(twin, fullgraph=True)
        for _ in range(3):
            x = torch.randn(32, 128, requires_grad=True)
            a, b = module(x).output, run(x).output
            assert torch.equal(a == 0, b == 0)
            torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (a, b)), rtol=1e-5, atol=1e-5)
        key = twin.graphreg_rules.key  # type: ignore[union-attr]
        assert torch.equal(key.keys, module.graphreg_rules.key.keys)  # type: ignore[union-attr]
        drawn = torch.compile(lambda k: Noise(k).keep(torch.empty(1000, 77), 0.3), fullgraph=True)(key.keys[0])
        assert torch.equal(drawn.bool(), Noise(key.keys[0]).keep(torch.empty(1000, 77), 0.3).bool())


def test_no_compilation_too_many() -> None:
    module, _, x = pair("one layer")
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(module, fullgraph=True, backend=counter)
    for value in (0.1, 0.2, 0.3, 0.0, 0.5):
        for name in graphreg.strengths(module):
            graphreg.set_strength(module, name, value)
        output, penalties = step(run, module, x)
        assert penalties["hidden_l1"] == 0 if value == 0 else penalties["hidden_l1"] > 0
    assert counter.frame_count == 1
    for _ in range(5):
        run(x) if module.eval() else None
        run(x) if module.train() else None
    assert counter.frame_count == 2


def test_two_graphs_switch_without_a_third() -> None:
    """googlenet has another structure in each mode: both forwards are made once."""
    torch.manual_seed(0)
    module = graphreg.regularize(tv.googlenet(num_classes=4, init_weights=False), hidden_dropout=0.1, hidden_l1=1e-3, rng=0)
    assert list(module.graphs) == ["train", "eval"]
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for mode in [True, False] * 5:
            module.train(mode)
            kind = type(run(x).output)
            assert (kind is Tensor) != mode
    assert counter.frame_count == 2


def test_more_modules_than_dynamos_limit() -> None:
    """Each module has a forward of its own: Dynamo gives up at so many compilations of one code object."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in range(1, 4):
            module = graphreg.regularize(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)), hidden_l1=1.0)
            torch.compile(module, fullgraph=True, backend="eager")(torch.randn(3, 4))


def test_compile_in_place_stays_a_graph_module() -> None:
    torch.manual_seed(0)
    module = graphreg.regularize(OneLayer(), hidden_dropout=0.1, rng=3, compile={"backend": "aot_eager"})
    plain = graphreg.regularize(OneLayer(), hidden_dropout=0.1, rng=3)
    plain.load_state_dict(module.state_dict())
    assert isinstance(module, torch.fx.GraphModule)
    x = torch.randn(16, 20)
    torch.testing.assert_close(module(x).output, plain(x).output)
    assert copy.deepcopy(module)(x).output.shape == (16, 5)


def test_dynamic_batch_sizes_draw_the_same_masks() -> None:
    module, twin, _ = pair("one layer")
    run = torch.compile(twin, fullgraph=True, backend="eager", dynamic=True)
    for batch in (3, 16, 7):
        x = torch.randn(batch, 20)
        torch.testing.assert_close(run(x).output, module(x).output, rtol=1e-5, atol=1e-6)
