"""What a submodule does with its parameters beside writing into them, and with an optimizer, is put back after each trace and proof."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphreg

X = torch.arange(12.0).view(4, 3) / 10


class Sub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.q, self.done = nn.Linear(3, 3), nn.Linear(3, 3), False


class Momentum(Sub):
    """As MoCo updates its second encoder."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for a, b in zip(self.q.parameters(), self.k.parameters(), strict=True):
                b.data = b.data * 0.5 + a.data * 0.5
        out: Tensor = self.k(x) + self.q(x)
        return out


class Binarized(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self.weight, "org"):
            self.weight.org = self.weight.data.clone()  # type: ignore[assignment]
        self.weight.data = self.weight.org.sign()  # type: ignore[operator]
        return super().forward(x)


class Turned(Sub):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.k.weight.mul_(0.5).t_()
        self.k.weight.data = self.k.weight.data * 0.5
        out: Tensor = self.k(x)
        return out


class Greedy(Sub):
    """Backpropagates a loss of its own at once."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.k(x.detach()).relu()
        if self.training and torch.is_grad_enabled():
            h.pow(2).mean().backward()  # type: ignore[no-untyped-call]
        return h.detach()


class Decays(Sub):
    """Its backward pass is of parameters alone, which a trace runs."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            sum(p.pow(2).sum() for p in self.q.parameters()).backward()  # type: ignore[union-attr]
        return self.k(x) * (1.0 if x.sum() > 0 else 2.0)  # type: ignore[no-any-return]


class Zeroed(Sub):
    def forward(self, x: Tensor) -> Tensor:
        self.k.zero_grad()
        self.q.zero_grad(set_to_none=False)
        out: Tensor = self.k(x) + self.q(x)
        return out


class Hooks(Sub):
    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.k.weight.register_hook(lambda gradient: gradient * 0.5)  # type: ignore[no-untyped-call]
            self.q.weight.register_post_accumulate_grad_hook(lambda parameter: None)
            self.done = True
        out: Tensor = self.k(x) + self.q(x)
        return out


class Freezes(Sub):
    def forward(self, x: Tensor) -> Tensor:
        self.k.requires_grad_(self.done)
        self.done = True
        out: Tensor = self.k(x)
        return out


class Recorded(Sub):
    """Writes into a parameter without no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.k.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.k.bias.add_(self.q.bias)
        return self.k(x).detach()  # type: ignore[no-any-return]


class Statistics(Sub):
    """Its running statistics are parameters, into which a batch norm writes: its schema does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.var = (nn.Parameter(start, requires_grad=False) for start in (torch.zeros(3), torch.ones(3)))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.k(x), self.mean, self.var, training=self.training)


class Steps(Sub):
    """Trains a part of itself, as test-time training does."""

    make: Callable[..., torch.optim.Optimizer] = torch.optim.Adam

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = type(self).make(self.k.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self.optimizer.zero_grad()
            (self.k(x.detach()) - x.detach()).pow(2).mean().backward()
            self.optimizer.step()
            self.schedule.step()
        out: Tensor = self.k(x)
        return out


class StepsBySgd(Steps):
    make = staticmethod(lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9))


KINDS = [Momentum, Binarized, Turned, Greedy, Decays, Zeroed, Hooks, Freezes, Recorded, Statistics, Steps, StepsBySgd]


def made(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), kind(), nn.Linear(3, 2))


def state(model: nn.Module) -> dict[str, Any]:
    """All that the state of parameters consists of."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        held: Any = parameter
        attributes = {key: value.clone() if isinstance(value, Tensor) else value for key, value in vars(held).items()}
        hooks = [len(hooks or ()) for hooks in (held._backward_hooks, held._post_accumulate_grad_hooks)]
        gradient = held.grad.clone() if held.is_leaf and held.grad is not None else None
        found[name] = held.detach().clone(), gradient, held.requires_grad, held.is_leaf, attributes, hooks
    for optimizer in [module.optimizer for module in model.modules() if isinstance(module, Steps)]:
        found["optimizer"] = copy.deepcopy(optimizer.state_dict())
    return found


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", ["regularize", "example_inputs", "in_place", "names"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_it_is_put_back(kind: type[nn.Module], way: str, mode: bool) -> None:
    plain, model = made(kind), made(kind)
    for each in (plain, model):  # a second step of each; and gradients that the user has accumulated
        if issubclass(kind, Steps):
            each[1](X)
        for parameter in each.parameters():
            parameter.grad = torch.ones_like(parameter) if mode else parameter.grad
    plain.train(mode)
    model.train(mode)

    module: Any = model
    if way == "names":
        graphreg.names(model, example_inputs=X)
    elif way == "in_place":
        module = graphreg.regularize_(model, hidden_dropout={"strength": 0}, missing="ignore")
    else:
        example = {"example_inputs": X} if way == "example_inputs" else {}
        module = graphreg.regularize(model, hidden_dropout={"strength": 0}, penalties="attach", scale=1, missing="ignore", **example)
    torch.testing.assert_close(state(model), state(plain), rtol=0, atol=0)
    for _ in range(2):
        torch.testing.assert_close(module(X), plain(X), rtol=0, atol=0)
        torch.testing.assert_close(state(model), state(plain), rtol=0, atol=0)


class Itself(nn.Module):
    """A model whose own forward does so, for its next call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.k, self.how = nn.Linear(3, 3), how

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.k(x)
        for parameter in self.k.parameters():
            if self.how == "data":
                parameter.data = parameter.data * 0.5
            elif self.how == "gradient":
                parameter.grad = None
            else:
                parameter.register_hook(lambda gradient: gradient * 0.5)  # type: ignore[no-untyped-call]
        return out


@pytest.mark.parametrize("how", ["data", "gradient", "hook"])
def test_in_the_models_own_forward_it_is_refused(how: str) -> None:
    model = Itself(how)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state(model)
    with pytest.raises(graphreg.GraphRegError):
        graphreg.regularize(model, weight_l2=0.1, example_inputs=X)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)


class Clips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-3)
        return self.linear(x)


@pytest.mark.parametrize("how", ["names", "bare", "inputs", "in place"])
def test_gradients_that_a_submodule_clips_are_put_back(how: str) -> None:
    """The probes of a trace run it below autograd, which then counts no write."""
    model, x = nn.Sequential(Clips(), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    if how == "names":
        graphreg.names(model, x)
    elif how == "in place":
        graphreg.regularize_(model, weight_l2=0.1, penalties="attach", scale=1, example_inputs=x)
    else:
        graphreg.regularize(model, weight_l2=0.1, example_inputs=x if how == "inputs" else None)
    assert all(bool((parameter.grad == 0.5).all()) for parameter in model.parameters())


@pytest.mark.parametrize("warm", [False, True])
def test_within_cached_parametrizations(warm: bool) -> None:
    """A trace and a proof leave torch's cache of weights alone, in which there would be fake tensors."""

    def run(wrap: Callable[[nn.Module], Any]) -> Any:
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 2)))
        if warm:
            model(X)
        with nn.utils.parametrize.cached():
            (model(X).mean() + model(X * 2).mean()).backward()
        return [parameter.grad for parameter in model.parameters()]

    theirs = run(lambda model: model)
    torch.testing.assert_close(run(lambda model: graphreg.regularize_(model, weight_l2=0.0, scale=1)), theirs)
    torch.testing.assert_close(run(lambda model: graphreg.regularize(model, weight_l2=0.0, penalties="attach", scale=1)), theirs)


class Forces(nn.Module):
    """Switches gradients on for itself, so it runs under no_grad, and its graph does not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, place: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            place = place.detach().requires_grad_()
            energy = self.other(torch.tanh(self.one(place))).sum()
            return energy, -torch.autograd.grad(energy, place, create_graph=True)[0]


def test_a_forward_that_switches_gradients_on() -> None:
    plain = Forces()
    ours = graphreg.regularize(copy.deepcopy(plain), hidden_l1=0.0, penalties="attach", scale=1, example_inputs=X)
    given = []
    for model in (plain, ours):
        energy, forces = model(X)
        (energy + forces.square().sum()).backward()
        given.append((energy, forces, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*given)


@pytest.mark.parametrize("how", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_parametrization_that_is_removed(how: Callable[[nn.Module], nn.Module]) -> None:
    """As before inference."""
    model = nn.Sequential(how(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    module = graphreg.regularize(model, weight_l2=1.0)
    module(X)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    for mode in (True, False):
        with pytest.raises(
            graphreg.GraphRegError, match="^the graph of Sequential computes a parametrization that was removed from its layer"
        ):
            module.train(mode)(X)


class MakesTarget(nn.Module):
    """Makes its second network at the first call, as in implementations of BYOL."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = nn.Linear(3, 3), None

    def forward(self, x: Tensor) -> Tensor:
        if self.target is None:
            self.target = copy.deepcopy(self.online).requires_grad_(False)  # type: ignore[assignment]
        with torch.no_grad():
            target = self.target(x)  # type: ignore[misc]
        out: Tensor = (self.online(x) - target).square()
        return out


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # the model's own, where a trace runs it on fake tensors
@pytest.mark.parametrize("in_place", [True, False])
def test_a_submodule_that_makes_a_layer_at_its_first_call(in_place: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), MakesTarget())
    ours: Any = copy.deepcopy(plain)
    ours = graphreg.regularize_(ours, weight_l2=0.0, scale=1) if in_place else graphreg.regularize(ours, weight_l2=0.0, example_inputs=X)
    for model in (plain, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(3):
            output = model(X)
            getattr(output, "output", output).mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()))
