"""``load_by_name``: the state of each parameter, in whatever order the groups are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from graphreg import NoMatchError, RegularizerError, load_by_name, param_groups

X = torch.randn(5, 3)


def trained(selectors: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after two steps, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(param_groups(model, selectors, **options), lr=0.01)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters() if "exp_avg" in optimizer.state[p]}


FIRST, OTHER = {"0.*": {"lr": 0.1}, "1.*": {"lr": 0.2}}, {"*.bias": {"lr": 0.4}, "*": {"lr": 0.3}}


def test_groups_in_another_order() -> None:
    """By position, one layer gets the moments of the other, without an error; by name, a resumed run is the uninterrupted one."""
    model, optimizer = trained(FIRST)
    state = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(model)
    swapped = param_groups(twin, FIRST)[::-1]
    for by_name in (False, True):
        again = torch.optim.AdamW([dict(group) for group in swapped], lr=0.5)
        if by_name:
            load_by_name(again)
        again.load_state_dict(state)
        pairs = zip(moments(model, optimizer).values(), moments(twin, again).values(), strict=True)
        equal = [torch.equal(one, other) for one, other in pairs]
        assert equal == [by_name] * 4
    assert [group["lr"] for group in again.param_groups] == [0.2, 0.1]
    step(model, optimizer)
    step(twin, again)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_groups_of_other_parameters() -> None:
    """The moments are loaded; options belong to groups, so they are those of the optimizer, and a warning says so."""
    model, optimizer = trained(FIRST)
    twin = copy.deepcopy(model)
    again = torch.optim.AdamW(param_groups(twin, OTHER, default={"weight_decay": 0.7}))
    handle = load_by_name(again)
    names = [group["param_names"] for group in again.param_groups]
    with pytest.warns(UserWarning, match=r"the checkpoint has other groups: group 0 \(0.weight, 0.bias and 2 more\) has no group"):
        again.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(one, moments(twin, again)[name]) for name, one in moments(model, optimizer).items())
    assert [(group["lr"], group["weight_decay"]) for group in again.param_groups] == [(0.3, 0.7)]
    assert [group["param_names"] for group in again.param_groups] == names
    handle.remove()
    with pytest.raises(ValueError, match="different number of parameter groups"):  # torch's own
        again.load_state_dict(optimizer.state_dict())


def test_a_state_before_the_first_step_and_one_that_was_saved(tmp_path: Any) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(param_groups(model))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    load_by_name(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not optimizer.state


def test_refused() -> None:
    model, optimizer = trained(FIRST)
    state = optimizer.state_dict()
    fewer = torch.optim.AdamW(param_groups(model, {"0.*": "frozen"}))
    load_by_name(fewer)
    with pytest.raises(NoMatchError, match=r"the checkpoint has a state for 0.weight, 0.bias, which the optimizer has not. Near"):
        fewer.load_state_dict(state)
    load_by_name(optimizer)
    with pytest.raises(NoMatchError, match=r"the checkpoint has no state for 0.weight, 0.bias. Near names: 1.weight.* Load it into"):
        optimizer.load_state_dict(fewer.state_dict())
    with pytest.raises(RegularizerError, match=r"the state that is loaded has no param_names.*call remove\(\)"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    with pytest.raises(RegularizerError, match=r"the groups of AdamW have no param_names.* Make the optimizer from graphreg.param_groups"):
        load_by_name(torch.optim.AdamW(model.parameters()))
    with pytest.raises(RegularizerError, match="the state of LBFGS is that of all parameters together"):
        load_by_name(torch.optim.LBFGS(model.named_parameters()))
    with pytest.raises(RegularizerError, match="optimizer=Linear.* is not allowed; give an instance of torch.optim.Optimizer"):
        load_by_name(nn.Linear(1, 1))  # type: ignore[arg-type]
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(each["exp_avg"], now[i]["exp_avg"]) for i, each in state["state"].items())
