"""Blocks of ``torch.no_grad`` in a model's own forward are part of the graph: values, gradients and what needs none are the model's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Beta, Normal
from torch.nn import functional as F

import graphreg
from graphreg.errors import RegularizerError, TraceError

X = torch.linspace(-1, 1, 12).view(3, 4)


class Equilibrium(nn.Module):
    """Looks for a fixed point without gradients, and takes one step with them."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(3):
                z = torch.tanh(self.step(z) + x)
        return self.last(torch.tanh(self.step(z) + x))


class Momentum(nn.Module):
    """MoCo: a second encoder that follows the first one, and a queue of what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", torch.linspace(-1, 1, 24).view(3, 8))

    def forward(self, x: Tensor) -> Any:
        query = F.normalize(self.query(x), dim=1)
        with torch.no_grad():
            for ours, theirs in zip(self.query.parameters(), self.key.parameters(), strict=True):
                theirs.mul_(0.9).add_(ours, alpha=0.1)
            key = F.normalize(self.key(x), dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone()], 1)
        with torch.no_grad():
            self.queue[:, :2] = key[:2].T
        return logits


class Averages(Momentum):
    """The same by what is no traced value: a trace has the parameters themselves."""

    def forward(self, x: Tensor) -> Any:
        y = self.query(x)
        with torch.no_grad():
            for ours, theirs in zip(self.query.parameters(), self.key.parameters(), strict=True):
                theirs.data.mul_(0.9).add_(0.1 * ours.detach().data)
            key = self.key(x)
        return y + key


class Actor(nn.Module):
    """Its sample is drawn without gradients, within torch's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.spread = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        found = Normal(self.mean(h), self.spread(h).exp())
        action = found.sample()
        return action, found.log_prob(action).sum(1)


class Same(nn.Module):
    """Some operations return the tensor that they got, which still needs gradients; and writes are not recorded there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        with torch.no_grad():
            same, other = h.float().contiguous(), h.relu()
            with torch.enable_grad():
                inner = h * 2
            h.clamp_(-1, 1)
        h = self.last(h) + same + inner + other
        with torch.no_grad():
            return h, h.argmax(1), self.last(h), other.requires_grad


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            h = self.first(x).relu().view(3, 4)
        return self.last(h)


def life(model: nn.Module, run: Callable[..., Any]) -> list[Any]:
    """Two calls in train mode, one in eval mode and without gradients, and one with other rows."""
    torch.manual_seed(0)
    seen = list[Any]()
    for i in range(4):
        model.train(i != 2)
        x = torch.linspace(-1, 1, 12 if i < 3 else 20).view(-1, 4).requires_grad_()
        with torch.set_grad_enabled(i != 2):
            output = run(x)
            assert torch.is_grad_enabled() == (i != 2)
        output = getattr(output, "output", output)
        parts = output if isinstance(output, tuple) else (output,)
        needs = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
        parameters = [*(p for p in model.parameters() if p.requires_grad), x]
        gradients = torch.autograd.grad(sum(part.square().sum() for part in needs), parameters, allow_unused=True) if needs else None  # type: ignore[arg-type]
        flags = [part.requires_grad for part in parts if isinstance(part, Tensor)]
        seen.append((parts, flags, [] if gradients is None else [g for g in gradients if g is not None]))
    return [*seen, dict(model.state_dict()), torch.rand(1)]


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "regularize": lambda model: graphreg.regularize(model, weight_l2=0.0, hidden_dropout=0.0, missing="ignore", example_inputs=X),
    "in place": lambda model: graphreg.regularize_(model, weight_l2=0.0, hidden_l1=0.0, scale=1, missing="ignore"),
    "pickled": lambda model: pickle.loads(pickle.dumps(graphreg.regularize(model, weight_l2=0.0, example_inputs=X))),
    "stripped": lambda model: graphreg.strip(graphreg.regularize(model, weight_l2=0.0, example_inputs=X)),
}


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("kind", [Equilibrium, Momentum, Averages, Actor, Same])
def test_it_is_the_model(kind: type[nn.Module], how: str) -> None:
    plain = kind()
    ours = KINDS[how](copy.deepcopy(plain))
    torch.testing.assert_close(life(ours, ours), life(plain, plain), rtol=0, atol=0)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", [Equilibrium, Momentum])
def test_compiled(kind: type[nn.Module], in_place: bool) -> None:
    torch._dynamo.reset()
    plain = kind()
    copied = copy.deepcopy(plain)
    ours: Any = graphreg.regularize_(copied, weight_l2=0.0, scale=1) if in_place else graphreg.regularize(copied, weight_l2=0.0)
    run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(life(ours, run), life(plain, plain))


def test_a_penalty_that_gradients_do_not_reach_is_refused() -> None:
    with pytest.raises(RegularizerError, match="^hidden_l1: no parameter that can train reaches its sites"):
        graphreg.regularize(Fails(), hidden_l1={"relu": 0.1})


@pytest.mark.parametrize("in_place", [True, False])
def test_an_error_within_a_block_leaves_gradients_on(in_place: bool) -> None:
    ours: Any = graphreg.regularize_(Fails(), hidden_dropout=0.1) if in_place else graphreg.regularize(Fails(), hidden_dropout=0.1)
    ours(X)
    with pytest.raises(RuntimeError, match="is invalid for input of size 20"):
        ours(torch.ones(5, 4))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("in_place", [True, False])
def test_additions_have_gradients_within_a_block(in_place: bool) -> None:
    """A masked weight is made where it is first read, and is read after the block, too; and a value may be one from outside."""

    def made(kind: type[nn.Module], **options: Any) -> Any:
        torch.manual_seed(0)
        model = kind()
        return graphreg.regularize_(model, rng=0, **options) if in_place else graphreg.regularize(model, rng=0, example_inputs=X, **options)

    module = made(Equilibrium, drop_connect=0.5)
    output = module(X)
    getattr(output, "output", output).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())

    class Clamped(Same):
        def forward(self, x: Tensor) -> Any:
            h = self.first(x)
            with torch.no_grad():
                h.clamp_(-1, 1)
            return self.last(h)

    gradients = []
    for options in ({"weight_l2": 0.0}, {"dropout": {"clamp_": 0.0}, "weight_l2": 0.0}):
        module = made(Clamped, **options, **({"scale": 1} if in_place else {}))
        output = module(X)
        getattr(output, "output", output).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients)
    assert "gradients as outside of torch.no_grad" in str(graphreg.diff(module))
    stripped = graphreg.strip(graphreg.regularize(Clamped(), dropout={"clamp_": 0.5}, example_inputs=X))
    assert stripped.code.count("gradients_switched(") == 2


def test_a_function_with_a_derivative_of_its_own_is_no_such_block() -> None:
    """Its forward runs without gradients, too: torch's own ``_Dirichlet``, by which a Beta distribution is sampled."""

    class Samples(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            v = super().forward(x).exp()
            return Beta(v + 1, v + 2).rsample() + v

    with pytest.raises(TraceError, match="under torch.no_grad"):
        graphreg.regularize(Samples(4, 4), weight_l2=1.0, example_inputs=X)
