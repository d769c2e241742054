"""Strengths by site through the backend: in several graphs, set before and after they are captured, and without another capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphreg
from graphreg import NoMatchError, RegularizerError, schedules
from graphreg.passes import BernoulliDropout, GroupLasso, HiddenL1, WeightL1, WeightNoise
from lacking import needs_result


class Net(nn.Module):
    """Three blocks, a break after the first where it is asked for, and one more layer in train mode."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.more, self.breaks = *(nn.Linear(4, 4) for _ in range(4)), breaks  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.a(x))
        if self.breaks:
            torch._dynamo.graph_break()
        h = torch.tanh(self.b(h))
        if self.training:
            h = torch.cos(self.more(h))
        return torch.exp(self.c(h))


class Counted:
    """An inner backend that counts the graphs which it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return gm.forward


SITES = ["sigmoid", "tanh", "cos", "exp"]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same_as_module(backend: Any, run: Any, model: Net, module: Any, attached: bool = False) -> None:
    """The compiled model has outputs, penalties and gradients of ``module``, which is the model that ``regularize`` has rewritten."""
    expected = module(X)
    found = run(X)
    torch.testing.assert_close(found, expected.output)
    for name, value in expected.penalties.items():
        torch.testing.assert_close(backend.penalties()[name], value)
    theirs = gradients(model, expected.output.sum() + sum(expected.penalties.values()))
    ours = gradients(model, found.sum() + (0 if attached else sum(backend.penalties().values())))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own, behind a break
@pytest.mark.parametrize(("breaks", "penalties"), [
    (True, "return"), pytest.param(False, "attach", marks=needs_result), pytest.param(True, "attach", marks=needs_result),
])  # fmt: skip
def test_they_are_those_of_regularize(breaks: bool, penalties: Any) -> None:
    """Penalties on values and parameters, with a mean and a sum, and splices; in train and eval mode; nothing is captured again."""
    regularizers = [
        HiddenL1(SITES, 0.5), WeightL1("*", 0.1), WeightL1("*", 0.2, reduction="sum", name="added"), BernoulliDropout(SITES, 0.3),
        WeightNoise(["a.weight", "b.weight"], 0.1),
    ]  # fmt: skip
    model, inner = Net(breaks), Counted()
    attached = penalties == "attach"
    backend = graphreg.backend(*regularizers, inner=inner, rng=1, penalties=penalties, scale=1 if attached else None)
    run = torch.compile(model, backend=backend)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    module = graphreg.regularize(plain, *regularizers, rng=1)
    for each, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(each, other)
    for mode in (True, False):  # the first call of each mode captures
        model.train(mode), run(X)
        module.train(mode)(X)
    graphs = inner.count
    given: dict[str, Any] = {
        "hidden_l1": {"sigmoid": 0.3, "exp": 0.0, "cos": 2.0}, "weight_l1": {"a.*": 1.0, "c.weight": 0.0}, "added": {"[bc].weight": 0.4},
        "dropout": {"sigmoid": 0.0, "tanh": 0.6}, "weight_noise": {"b.weight": 0.0},
    }  # fmt: skip
    for name, value in given.items():
        graphreg.set_strength(backend, name, value)
        graphreg.set_strength(module, name, value)
    assert graphreg.site_strengths(backend) == graphreg.site_strengths(module)
    assert graphreg.strengths(backend) == graphreg.strengths(module)
    for mode in (True, False):
        model.train(mode), module.train(mode)
        loss = _with(plain, model)
        same_as_module(backend, run, model, loss(module), attached)
    for name in given:
        graphreg.set_strength(backend, name, 0.25)
        graphreg.set_strength(module, name, 0.25)
    same_as_module(backend, run, model, _with(plain, model)(module), attached)
    assert inner.count == graphs


def _with(plain: nn.Module, model: nn.Module) -> Callable[[Any], Callable[[Tensor], Any]]:
    """Return a function that makes a rewritten module of ``plain`` compute with the parameters of ``model``."""

    def using(module: Any) -> Callable[[Tensor], Any]:
        parameters = dict(model.named_parameters())
        assert parameters.keys() == dict(plain.named_parameters()).keys()
        return lambda x: torch.func.functional_call(module, parameters, (x,))

    return using


def test_equal_strengths_change_no_bit() -> None:
    """Also those that were set by site and are equal: the total is a factor times a mean."""
    backend = graphreg.backend(HiddenL1(SITES, 0.3), WeightL1("*", 0.1), inner="aot_eager")
    model = Net()
    run = torch.compile(model, backend=backend)
    run(X)
    first = backend.penalties()
    graphreg.set_strength(backend, "hidden_l1", {"**": 0.3})
    graphreg.set_strength(backend, "weight_l1", {"**": 0.1})
    run(X)
    assert all(torch.equal(value, first[name]) for name, value in backend.penalties().items())


def test_selectors_hold_for_graphs_to_come() -> None:
    """Before the first call and after it; the last selector that matches counts, and a number ends them all."""
    backend = graphreg.backend(HiddenL1(SITES, 0.5), inner="eager", missing="ignore")
    graphreg.set_strength(backend, "hidden_l1", {"**": 0.1, "tanh": 0.2})
    assert graphreg.site_strengths(backend) == {} and graphreg.strengths(backend) == {"hidden_l1": 0.1}
    model = Net().eval()
    run = torch.compile(model, backend=backend)
    run(X)
    assert graphreg.site_strengths(backend) == {"hidden_l1": {"sigmoid": 0.1, "tanh": 0.2, "exp": 0.1}}
    sigmoid = torch.sigmoid(model.a(X))
    tanh = torch.tanh(model.b(sigmoid))
    expected = (0.1 * sigmoid.mean() + 0.2 * tanh.abs().mean() + 0.1 * torch.exp(model.c(tanh)).mean()) / 3
    torch.testing.assert_close(backend.penalties()["hidden_l1"], expected)
    graphreg.set_strength(backend, "hidden_l1", {"**@exp": 0.4})
    model.train()
    run(X)
    assert graphreg.site_strengths(backend)["hidden_l1"] == {"sigmoid": 0.1, "tanh": 0.2, "exp": 0.4, "cos": 0.1}
    assert graphreg.strengths(backend) == {"hidden_l1": 0.4}
    graphreg.set_strength(backend, "hidden_l1", 0.7)
    torch.compiler.reset()
    run(X)
    assert set(graphreg.site_strengths(backend)["hidden_l1"].values()) == {0.7}


def test_a_recipe_has_selectors_that_wait_for_their_sites() -> None:
    backend = graphreg.backend(HiddenL1(SITES, 0.5), inner="eager", rng=0)
    graphreg.set_strength(backend, "hidden_l1", {"sigmoid": 0.3, "**": 0.1, "tanh": 0.2})
    saved = graphreg.recipe(backend)
    assert saved["strengths"] == {"hidden_l1": {"**": 0.1, "tanh": 0.2}}
    again = graphreg.backend(recipe=saved, inner="eager")
    assert graphreg.recipe(again) == saved
    torch.compile(Net(), backend=again)(X)
    assert graphreg.site_strengths(again) == {"hidden_l1": {"sigmoid": 0.1, "tanh": 0.2, "cos": 0.1, "exp": 0.1}}


def test_a_schedule_at_a_site() -> None:
    backend = graphreg.backend(WeightL1("*", 1.0), inner="eager")
    model = Net()
    run = torch.compile(model, backend=backend)
    run(X)
    graphreg.set_strength(backend, "weight_l1", {"**": 0.0, "a.weight": schedules.linear(0.0, 1.0, 4)})
    size = model.a.weight.abs().mean() / 4
    for step in range(1, 5):
        run(X)
        torch.testing.assert_close(backend.penalties()["weight_l1"], step / 4 * size)


def test_recipe_and_report_have_them() -> None:
    backend = graphreg.backend(HiddenL1(SITES, 0.5), inner="eager", rng=0)
    model = Net()
    torch.compile(model, backend=backend)(X)
    graphreg.set_strength(backend, "hidden_l1", {"sigmoid": 0.1, "exp": 0.0})
    saved = graphreg.recipe(backend)
    assert saved["strengths"] == {"hidden_l1": {"sigmoid": 0.1, "exp": 0.0}}
    torch.compiler.reset()
    again = graphreg.backend(recipe=saved, inner="eager")
    torch.compile(model, backend=again)(X)
    assert graphreg.site_strengths(again) == graphreg.site_strengths(backend)
    assert torch.equal(again.penalties()["hidden_l1"], (torch.compile(model, backend=backend)(X), backend.penalties()["hidden_l1"])[1])
    report = graphreg.report(backend)
    assert "strength 0 to 0.5 by site" in " ".join(str(report).split())
    assert {site.name: act.strength for site in report.sites for act in site.acts}["sigmoid"] == 0.1
    third = graphreg.backend(HiddenL1(SITES, 0.5), inner="eager", rng=0)
    third.session.restore_strengths(backend.session.changed_strengths())
    assert third.session.changed_strengths() == backend.session.changed_strengths() == {"hidden_l1": {"sigmoid": 0.1, "exp": 0.0}}
    third.session.restore_strengths({})
    assert third.session.changed_strengths() == {}


def test_errors() -> None:
    class Together(WeightL1):
        def __call__(self, values: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return torch.stack([w.abs().mean() for w in values.values()]).amax()

    backend = graphreg.backend(HiddenL1(SITES, 0.5), Together("*", 0.1, name="together"), GroupLasso("*", 0.1), inner="eager")
    run = torch.compile(Net(), backend=backend)
    run(X)
    before = graphreg.site_strengths(backend)
    assert list(before) == ["hidden_l1", "group_lasso"]
    for name, value, error, message in (
        ("hidden_l1", {"relu": 0.1}, NoMatchError, r"'relu' matches no site of hidden_l1\..*Its sites: sigmoid, tanh, cos, exp\."),
        ("hidden_l1", {"tanh": 0.3, "exp": -1}, RegularizerError, r"HiddenL1: weight=-1\.0 is not allowed; weight must be 0"),
        ("hidden_l1", {"tanh": graphreg.by_depth(0, 1)}, RegularizerError, "only a plan can have a strength by depth"),
        ("together", {"a.weight": 0.1}, RegularizerError, r"together takes all its sites at once \(Together\), so they have one strength"),
        ("other", {"tanh": 0.1}, NoMatchError, r"no regularizer is named 'other'"),
    ):
        with pytest.raises(error, match=message):
            graphreg.set_strength(backend, name, value)  # type: ignore[arg-type]
    assert graphreg.site_strengths(backend) == before


@pytest.mark.parametrize("missing", ["error", "warn", "ignore"])
def test_a_selector_that_the_first_call_does_not_know(missing: Any) -> None:
    backend = graphreg.backend(HiddenL1(SITES, 0.5), inner="eager", missing=missing)
    graphreg.set_strength(backend, "hidden_l1", {"tnah": 0.1})
    run, message = torch.compile(Net(), backend=backend), r"set_strength: 'tnah' matches no site of hidden_l1\. Near names: tanh"
    if missing == "error":
        with pytest.raises(NoMatchError, match=message):
            run(X)
    elif missing == "warn":
        with pytest.warns(UserWarning, match=message):
            run(X)
    else:
        run(X)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("breaks", "penalties", "weight"), [
    (False, "return", 0.2),
    (True, "return", schedules.linear(0.2, 2.0, 10)),
    pytest.param(False, "attach", schedules.linear(0.2, 2.0, 10), marks=needs_result),
    pytest.param(True, "attach", 0.2, marks=needs_result),
])  # fmt: skip
def test_backward_has_the_strengths_of_its_call(breaks: bool, penalties: Any, weight: Any) -> None:
    """Those that are set after the forward are for the next one, whose backward is in the same pass."""
    model, attached = Net(breaks), penalties == "attach"
    backend = graphreg.backend(
        HiddenL1(SITES, weight), BernoulliDropout(SITES, 0.3), inner="eager", rng=1, penalties=penalties, scale=1 if attached else None
    )
    run = torch.compile(model, backend=backend)
    run(X)
    state, found = graphreg.rng_state(backend), list[list[Tensor | None]]()
    for change in (None, 0.0, 7.0, {"sigmoid": 3.0}, schedules.linear(1.0, 0.0, 4)):
        graphreg.set_strength(backend, "hidden_l1", weight)
        graphreg.set_strength(backend, "dropout", 0.3)
        graphreg.set_rng_state(backend, state)
        loss = run(X).sum() + (0 if attached else sum(backend.penalties().values()))
        if change is not None:
            graphreg.set_strength(backend, "hidden_l1", change)
            graphreg.set_strength(backend, "dropout", 0.6)
            with torch.no_grad():
                run(X)
        found.append(gradients(model, loss))
        torch.testing.assert_close(found[-1], found[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_strengths_that_are_set_within_a_call_are_for_the_next() -> None:
    """Also at the sites of a graph that the call captures only after that."""
    backend = graphreg.backend(HiddenL1(SITES, 0.5), inner="eager")
    model = Net(breaks=True)
    model.b.register_forward_pre_hook(torch.compiler.disable(lambda *_: graphreg.set_strength(backend, "hidden_l1", {"**": 0.1})))
    run = torch.compile(model, backend=backend)
    for strength in (0.5, 0.1):
        run(X)
        sigmoid = torch.sigmoid(model.a(X))
        tanh = torch.tanh(sigmoid @ model.b.weight.T + model.b.bias)
        cos = torch.cos(model.more(tanh))
        measured = [each.abs().mean() for each in (sigmoid, tanh, cos, torch.exp(model.c(cos)))]
        torch.testing.assert_close(backend.penalties()["hidden_l1"], strength * torch.stack(measured).mean())
