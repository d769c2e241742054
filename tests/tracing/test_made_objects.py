"""Objects that a forward makes and returns: the graph makes them anew, with all that they hold, or the model is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import graphreg
from graphreg import TraceError
from graphreg.ir.made_objects import making

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Result:
    step = 1

    def __init__(self, h: Any, more: Any = None) -> None:
        self.h, self.more = h, more


class Slots(Result):
    __slots__ = ("extra",)


class Net(nn.Module):
    def __init__(self, result: Any) -> None:
        super().__init__()
        self.layer, self.held, self.result = nn.Linear(3, 3), Result(None), result

    def forward(self, x: Tensor) -> Any:
        return self.result(self, self.layer(x).relu())


def cyclic(net: Any, h: Tensor) -> Any:
    made = Result(h, [1, 0.5, "a", torch.float32, Result, (h, None)])
    made.more.append(made)
    return made, {"again": made}


def written(net: Any, h: Tensor) -> Any:
    return Result(h, torch.zeros(2))


def kept(net: Any, h: Tensor) -> Any:
    net.held.h = h
    return h, net.held


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_an_object_is_made_anew(front_end: Any) -> None:
    torch.manual_seed(0)  # under some seeds, relu leaves nothing
    net = Net(cyclic)
    module = graphreg.regularize(net, dropout={"relu": 0.5}, example_inputs=X, front_end=front_end, rng=0)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        (made, others), (theirs, _) = each.eval()(X).output, net(X)
        assert type(made) is Result and others["again"] is made and made.more[-1] is made
        assert torch.equal(made.h, theirs.h) and made.more[:5] == theirs.more[:5] and made.more[5][0] is made.h
    (one, _), (other, _) = module.train()(X).output, module(X).output
    assert one is not other and one.more is not other.more and not torch.equal(one.h, other.h)  # the dropped value is in it
    names = {site.name: site.role for site in graphreg.trace(net, X, front_end).values}
    assert names["relu"] == ""  # what an object in a container holds is no output

    if front_end == "symbolic":
        compiled = torch.compile(module, backend="eager", fullgraph=True)(X).output[0]
        assert type(compiled) is Result and compiled.more[-1] is compiled

    alone = graphreg.regularize(Net(written), output_dropout=0.5, example_inputs=X, front_end=front_end)
    alone(X).output.more.add_(1)
    assert torch.equal(alone(X).output.more, torch.zeros(2))


REFUSED = {
    "held by the model": kept,
    "holds one": lambda net, h: Result(h, net.held),
    "slots": lambda net, h: Slots(h),
    "a set": lambda net, h: Result(h, {1, 2}),
    "a function": lambda net, h: Result(h, net.relu),
}


@pytest.mark.parametrize(
    ("name", "front_end"), [*((name, "symbolic") for name in REFUSED), ("held by the model", "export"), ("slots", "export")]
)
def test_what_is_refused(name: str, front_end: Any) -> None:
    """An object that was there before would be another one; others hold what no graph can make."""
    net = Net(REFUSED[name])
    net.relu = copy.copy  # type: ignore[assignment]
    with pytest.raises(TraceError, match="Result|Slots"):
        graphreg.regularize(net, dropout={"relu": 0.5}, example_inputs=X, front_end=front_end)


def test_equal_functions_are_one() -> None:
    """So graphs can be compared by them; 1, 1.0 and True are told apart, and so are 0.0 and -0.0."""
    made = [making(Result(X, more), lambda value: isinstance(value, Tensor), ()) for more in (1, 1, 1.0, True, 0.0, -0.0)]
    functions = [call[0] for call in made if call is not None]
    assert functions[0] is functions[1] and len(set(map(id, functions))) == 5
    assert copy.deepcopy(functions[0]) is functions[0] and pickle.loads(pickle.dumps(functions[0])) is functions[0]
    assert making(Result(1), lambda value: isinstance(value, Tensor), ()) is None  # nothing in it is traced


class Actor(nn.Module):
    """Asks distributions for what torch checks by ``isinstance``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 4), kind

    def forward(self, x: Tensor, action: Any = None) -> Any:
        h = self.layer(x)
        if self.kind == "categorical":
            found: Any = Categorical(logits=h)
            action = found.sample() if action is None else action
        elif self.kind == "squashed":
            found = TransformedDistribution(Independent(Normal(h, torch.exp(h.clamp(-5, 2))), 1), [TanhTransform()])
            action = found.rsample() * 0.9
            return action, found.log_prob(action), Normal(h.mean(), 1.0).sample((x.shape[0],)) + h.sum()
        else:
            found = Normal(h, torch.exp(h.clamp(-5, 2)))
            action = found.rsample()
        more = kl_divergence(found, Normal(0.0, 1.0)) if self.kind == "normal" else found.entropy()
        return action, found.log_prob(action), more


class Policy(nn.Module):
    """Makes its distribution twice, once in one mode alone: what is asked of the second has the names of the first's in the other graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        action = Categorical(logits=h).sample() if self.training else h.argmax(-1)
        return Categorical(logits=h).log_prob(action)


@pytest.mark.parametrize("training", [True, False])
def test_a_distribution_that_is_made_in_one_mode(training: bool) -> None:
    model = Policy().train(training)
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=X).train(training)
    for rows in (2, 5):
        results = []
        for each in (model, module):
            torch.manual_seed(rows)
            result = each(torch.linspace(0, 1, 3 * rows).view(rows, 3))
            results.append(getattr(result, "output", result))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["categorical", "normal", "squashed"])
def test_an_actor_of_reinforcement_learning(kind: str, in_place: bool) -> None:
    plain = Actor(kind)
    theirs = copy.deepcopy(plain)
    ours = graphreg.regularize_(plain, weight_l2=0.0, scale=1) if in_place else graphreg.regularize(plain, weight_l2=0.0, example_inputs=X)
    for rows in (2, 5):
        given = []
        for model in (ours, theirs):
            torch.manual_seed(rows)
            output = model(torch.linspace(0, 1, 3 * rows).view(rows, 3))
            output = getattr(output, "output", output)
            gradients = torch.autograd.grad(output[1].sum() + output[2].sum(), list(model.parameters()))
            given.append((output, gradients, torch.rand(1)))
        torch.testing.assert_close(*given, rtol=0, atol=0)
