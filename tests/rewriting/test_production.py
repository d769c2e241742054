"""A site names the value at the moment it is produced: a penalty there equals a hook that clones, value and gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import graphreg
from graphreg.passes import HiddenL1

SITES = [site for site in graphreg.trace(resnet18(num_classes=4)).values if site.selectable]


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return resnet18(num_classes=4).double(), torch.randn(2, 3, 32, 32, dtype=torch.double)


def hooked(model: nn.Module, site: graphreg.Site, x: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: the value cloned by a forward hook before anybody can write into it."""
    taken: list[Tensor] = []
    path, call = split(site, model)
    calls = iter(range(99))
    model.get_submodule(path).register_forward_hook(lambda m, a, out: taken.append(out.clone()) if next(calls) == call else None)
    output = model(x)
    return output, taken[0].abs().mean()


def split(site: graphreg.Site, model: nn.Module) -> tuple[str, int]:
    """The module whose call gives the site's value, and which of its calls."""
    base, _, count = site.name.rpartition("_")
    paths = {p for p, _ in model.named_modules()}
    return (site.name, 0) if site.name in paths else (base, int(count))


def hooked_add(model: nn.Module, site: graphreg.Site, x: Tensor) -> tuple[Tensor, Tensor]:
    """``out += identity`` has no module to hook: the block's last ReLU sees it, before it overwrites it."""
    taken: list[Tensor] = []
    block = model.get_submodule(site.name.rpartition(".")[0])
    calls = iter(range(99))
    block.relu.register_forward_pre_hook(lambda m, a: taken.append(a[0].clone()) if next(calls) == 1 else None)  # type: ignore[union-attr,operator]
    output = model(x)
    return output, taken[0].abs().mean()


def oracle(site: graphreg.Site) -> Callable[[nn.Module, graphreg.Site, Tensor], tuple[Tensor, Tensor]]:
    return hooked_add if site.op == "add" else hooked_flatten if site.op == "flatten" else hooked


def hooked_flatten(model: nn.Module, site: graphreg.Site, x: Tensor) -> tuple[Tensor, Tensor]:
    taken: list[Tensor] = []
    model.fc.register_forward_pre_hook(lambda m, a: taken.append(a[0].clone()))  # type: ignore[union-attr,operator]
    output = model(x)
    return output, taken[0].abs().mean()


def gradients(model: nn.Module, output: Tensor, penalty: Tensor, task: float = 1) -> list[Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(task * output.square().sum() + 3 * penalty, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def equal(ours: graphreg.Regularized, penalty: Tensor, model: nn.Module, site: graphreg.Site, task: float = 1) -> None:
    reference, x = small()
    output, value = oracle(site)(reference, site, x)
    torch.testing.assert_close(penalty, value, rtol=1e-10, atol=0)
    # Of the largest: a sum of thousands of products rounds by its terms, not by itself, and Inductor's convolutions order the
    # sum by the machine's registers (an EPYC: 9e-12 where the output is 0.01).
    torch.testing.assert_close(ours.output, output, rtol=1e-10, atol=1e-10 * float(output.detach().abs().max()))
    theirs = gradients(reference, output, value, task)
    for a, b in zip(gradients(model, ours.output, penalty, task), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * float(b.abs().max()))


@pytest.mark.parametrize("site", SITES[1:], ids=lambda site: site.name)
def test_eager_one_at_a_time(site: graphreg.Site) -> None:
    model, x = small()
    module = graphreg.regularize(model, HiddenL1(site.name, 1.0, expect=1))
    ours = module(x)
    equal(ours, ours.penalties["hidden_l1"], model, site)


@pytest.mark.sweep
@pytest.mark.parametrize("site", SITES[1:], ids=lambda site: site.name)
def test_compiled_one_at_a_time(site: graphreg.Site) -> None:
    model, x = small()
    module = graphreg.regularize(model, HiddenL1(site.name, 1.0, expect=1))
    ours = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    equal(ours, ours.penalties["hidden_l1"], model, site)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.sweep)])
def test_compiled_each_of_all(every: int) -> None:
    """One compilation with a penalty of its own at every site; each is asked for alone (here some, in the sweep all)."""
    model, x = small()
    module = graphreg.regularize(model, [HiddenL1(site.name, 1.0, expect=1) for site in SITES if site.role != "input"])
    run = torch.compile(module, fullgraph=True)
    for site, name in list(zip(SITES[1:], run(x).penalties, strict=True))[::every]:
        fresh, _ = small()
        module.load_state_dict(fresh.state_dict())  # the batch norms' statistics of before
        ours = run(x)
        # Without the task's gradient, which is a million times the penalty's here and would hide it: Inductor's
        # convolutions and batch norms agree with eager ones to 1e-9 of the largest only.
        equal(ours, ours.penalties[name], model, site, task=0)


def test_at_the_input() -> None:
    """No parameter reaches an input: a penalty there alone is refused, beside another site it counts."""
    model, x = small()
    with pytest.raises(graphreg.RegularizerError, match="no parameter that can train"):
        graphreg.regularize(model, HiddenL1("x", 1.0))
    module = graphreg.regularize(model, HiddenL1(["x", "conv1"], 2.0))
    torch.testing.assert_close(module(x).penalties["hidden_l1"], x.abs().mean() + model.conv1(x).abs().mean())  # type: ignore[operator]


class Writers(nn.Module):
    """Every way torch has to write into a value that was named before."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear, self.relu = how, nn.Linear(6, 6), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if self.how == "module":
            return self.relu(h) * h
        if self.how == "method":
            h.mul_(2)
            return h + 1
        if self.how == "view":
            h.view(-1).add_(3)
            return h.sin()
        if self.how == "function":
            torch.nn.functional.relu(h, inplace=True)
            return h.exp()
        if self.how == "chain":
            return h.view(3, -1).mul_(2).view(-1).add_(1) * 2
        torch.relu_(h)
        return h * h


@pytest.mark.parametrize("how", ["module", "method", "view", "function", "chain", "builtin"])
@pytest.mark.parametrize("splice", [False, True])
def test_every_writer_gets_a_clone(how: str, splice: bool) -> None:
    torch.manual_seed(0)
    model, x = Writers(how).double(), torch.randn(4, 6, dtype=torch.double)
    reference = copy.deepcopy(model)
    taken: list[Tensor] = []
    reference.linear.register_forward_hook(lambda m, a, out: taken.append(out.clone()))
    output = reference(x)
    keywords = {"dropout": {"linear": 1e-9}} if splice else {}
    module = graphreg.regularize(model, HiddenL1("linear", 1.0), rng=0, **keywords)
    ours = module(x)
    assert "linear_kept" in module.code
    torch.testing.assert_close(ours.output, output)
    torch.testing.assert_close(ours.penalties["hidden_l1"], taken[0].abs().mean())
    for a, b in zip(
        gradients(model, ours.output, ours.penalties["hidden_l1"]), gradients(reference, output, taken[0].abs().mean()), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert "kept" not in graphreg.strip(module).code
