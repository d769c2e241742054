"""One session: what is set, saved and switched means the same to a module, a model in place and a backend."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap

import graphreg
from graphreg import GraphRegError, RegularizerError, schedules
from graphreg.session.hosts import session_of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
SITES = ("1", "3")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def as_module(**options: Any) -> tuple[Any, Callable[[], Any]]:
    module = graphreg.regularize(net(), **options)
    return module, lambda: module(X)


def in_place(**options: Any) -> tuple[Any, Callable[[], Any]]:
    model = graphreg.regularize_(net(), example_inputs=X, penalties="return", **options)
    return model, lambda: model(X)


def by_backend(**options: Any) -> tuple[Any, Callable[[], Any]]:
    torch._dynamo.reset()
    backend = graphreg.backend(inner="eager", **options)
    run = torch.compile(net(), backend=backend)

    def call() -> Any:
        output = run(X)
        return output, backend.penalties()

    with graphreg.frozen_noise(backend):  # the first call captures the graph
        call()
    state = graphreg.rng_state(backend) | {"calls": {}}
    graphreg.set_rng_state(backend, state | {"clock": 0} if "clock" in state else state)
    return backend, call


HOSTS = {"module": as_module, "in place": in_place, "backend": by_backend}
number = st.sampled_from([0.0, 0.1, 0.25, 0.5])
step = st.one_of(number, st.dictionaries(st.sampled_from([*SITES, "*", "**@ReLU"]), number, min_size=1, max_size=2))


@given(st.lists(st.tuples(st.sampled_from(["hidden_dropout", "hidden_l1"]), step), min_size=1, max_size=3))
@settings(max_examples=4, deadline=None)
def test_what_is_set_means_the_same_to_each_host(steps: list[tuple[str, Any]]) -> None:
    found = []
    for make in HOSTS.values():
        host, call = make(hidden_dropout=0.3, hidden_l1=0.2, rng=0)
        for name, value in steps:
            graphreg.set_strength(host, name, value)
        output, penalties = call()
        found.append((graphreg.strengths(host), graphreg.site_strengths(host), output.detach(), penalties["hidden_l1"].item()))
        assert found[-1][:2] == found[0][:2]
        assert torch.equal(found[-1][2], found[0][2]) and found[-1][3] == pytest.approx(found[0][3], rel=1e-6)
        changed = graphreg.recipe(host).get("strengths", {})
        assert set(changed) == {name for name, _ in steps}


def test_schedules_switches_and_frozen_noise_mean_the_same() -> None:
    options = {"hidden_dropout": schedules.linear(0, 0.5, 4), "hidden_l1": 0.2, "rng": 0}
    found: dict[str, list[Any]] = {}
    for name, make in HOSTS.items():
        host, call = make(**options)
        seen = found.setdefault(name, [])
        for _ in range(2):
            seen.append(call()[0])
        with graphreg.frozen_noise(host):
            seen += [call()[0], call()[0]]
        with graphreg.noise_off(host):
            seen.append(call()[0])
        with graphreg.penalties_off(host):
            output, penalties = call()
            seen += [output, penalties["hidden_l1"]]
        seen.append(torch.tensor(graphreg.strengths(host)["hidden_dropout"]))
        seen.append(torch.tensor(graphreg.rng_state(host)["clock"]))
    for seen in found.values():
        for ours, theirs in zip(seen, found["module"], strict=True):
            torch.testing.assert_close(ours, theirs)
    assert torch.equal(found["module"][2], found["module"][3]) and not torch.equal(found["module"][1], found["module"][2])


@pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)
def test_what_validation_in_between_leaves_in_the_noise(make: Any) -> None:
    """Eval mode leaves nothing; a call under ``noise_off`` is counted by the masks, not by schedules, unless the state is put back."""

    def masks(between: Callable[[Any, Callable[[], Any]], None]) -> tuple[Tensor, Any]:
        host, call = make(hidden_dropout=schedules.linear(0.3, 0.4, 4), rng=0)
        call()
        between(host, call)
        return call()[0], graphreg.rng_state(host)["clock"]

    def quiet(host: Any, call: Callable[[], Any]) -> None:
        with graphreg.noise_off(host):
            call()

    def put_back(host: Any, call: Callable[[], Any]) -> None:
        state = graphreg.rng_state(host)
        quiet(host, call)
        graphreg.set_rng_state(host, state)

    def evaluated(host: Any, call: Callable[[], Any]) -> None:
        model = host if isinstance(host, nn.Module) else host.model
        model.eval()
        call()
        model.train()

    plain, clock = masks(lambda host, call: None)
    for between in (put_back, evaluated):
        found, at = masks(between)
        assert torch.equal(found, plain) and at == clock
    counted, same_clock = masks(quiet)
    assert not torch.equal(counted, plain) and same_clock == clock


def lent(module: Any, strengths: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``functional_call`` gets to run a module with other strengths."""
    records = graphreg.strength_buffers(module)
    return {name: strengths[regularizer] for regularizer in strengths for name in records[regularizer].names}


@pytest.mark.parametrize("blocks", [None, "[13]"], ids=["flat", "blocks"])
def test_strength_buffers_are_what_a_call_reads(blocks: str | None) -> None:
    """By the strengths that ``set_strength`` sets, in another module of the same seed."""
    module = graphreg.regularize(net(), hidden_dropout=0.3, hidden_l1=0.2, weight_l2=0.1, rng=0, blocks=blocks)
    other = graphreg.regularize(net(), hidden_dropout=0.3, hidden_l1=0.2, weight_l2=0.1, rng=0)
    records = graphreg.strength_buffers(module)
    assert {name: record.sites for name, record in records.items()} == {
        "hidden_dropout": SITES, "hidden_l1": SITES, "weight_l2": ("0.weight", "2.weight", "4.weight"),
    }  # fmt: skip
    assert all(record.absolute and len(record.names) >= 1 for record in records.values())
    given = {"hidden_dropout": torch.tensor([0.5, 0.0]), "hidden_l1": torch.tensor([0.0, 0.7]), "weight_l2": torch.tensor([0.1, 0.2, 0.3])}
    for name, values in given.items():
        graphreg.set_strength(other, name, dict(zip(records[name].sites, values.tolist(), strict=True)))
    (output, penalties), expected = functional_call(module, lent(module, given), (X,)), other(X)
    assert torch.equal(output, expected.output)
    torch.testing.assert_close(penalties, expected.penalties)
    assert graphreg.strengths(module) == {"hidden_dropout": 0.3, "hidden_l1": 0.2, "weight_l2": 0.1}


def test_an_element_that_nothing_reads_is_refused_and_missing_ones() -> None:
    module = graphreg.regularize(net(), noise=0.3, hidden_l1=0.2, rng=0)
    for name, wrong in (("noise", 3), ("hidden_l1", 3), ("hidden_l1", 1), ("noise", 1)):
        message = rf"{name} was given a strength of shape \[{wrong}\], but needs \[2\]: one element for each site in graphreg\."
        with pytest.raises(RegularizerError, match=message):
            functional_call(module, lent(module, {name: torch.rand(wrong)}), (X,))
        with pytest.raises(RegularizerError, match=message):
            many = {name: torch.rand(4, wrong)}
            vmap(lambda strengths: functional_call(module, lent(module, strengths), (X,)).output, randomness="same")(many)
    first = graphreg.strength_buffers(module)["noise"].names[:1]
    assert torch.equal(functional_call(module, dict.fromkeys(first, torch.zeros(2)), (X,)).output, net()(X))  # torch ties the others


def test_many_strengths_at_once() -> None:
    module = graphreg.regularize(net(), hidden_l1=0.2, weight_l2=0.1)
    many = {"hidden_l1": torch.rand(5, 2), "weight_l2": torch.rand(5, 3)}
    at_once = vmap(lambda strengths: functional_call(module, lent(module, strengths), (X,)).penalties)(many)
    for i in range(5):
        alone = functional_call(module, lent(module, {name: values[i] for name, values in many.items()}), (X,)).penalties
        torch.testing.assert_close({name: values[i] for name, values in at_once.items()}, alone)


def test_a_derivative_by_a_strength_is_that_of_its_site() -> None:
    """Of equal strengths, too: the penalty is 0.1 times the mean of two means, so each strength has half of a mean."""
    module = graphreg.regularize(net(), hidden_l1=0.1)
    strengths = torch.tensor([0.1, 0.1], requires_grad=True)
    functional_call(module, lent(module, {"hidden_l1": strengths}), (X,)).penalties["hidden_l1"].backward()
    h = torch.tanh(module.get_submodule("0")(X))
    relu = torch.relu(module.get_submodule("2")(h))
    torch.testing.assert_close(strengths.grad, torch.stack([h.abs().mean(), relu.abs().mean()]) / 2)


def test_strengths_with_a_schedule_have_no_buffers_and_other_hosts_are_refused() -> None:
    module = graphreg.regularize(net(), hidden_l1=schedules.linear(0, 1, 3), weight_l2=0.1)
    assert set(graphreg.strength_buffers(module)) == {"weight_l2"}
    for host in (graphreg.regularize_(net(), hidden_l1=0.1), graphreg.backend(hidden_l1=0.1)):
        with pytest.raises(GraphRegError, match=r"strength_buffers is for what graphreg\.regularize returned"):
            graphreg.strength_buffers(host)


class Deeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2, self.l3, self.a1, self.a2 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor, more: bool = False) -> Any:
        x = self.a1(self.l1(x))
        x = self.a2(self.l2(x)) if more else x
        return self.l3(x)


def test_in_place_a_selector_means_the_sites_of_its_time_and_copies_agree() -> None:
    model = graphreg.regularize_(Deeper(), example_inputs=X, penalties="return", hidden_l1=0.1, rng=0)
    graphreg.set_strength(model, "hidden_l1", {"a*": 0.5})
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        each(X, more=True)
        assert graphreg.site_strengths(each)["hidden_l1"] == {"a1": 0.5, "a2": 0.1}


def test_copies_have_the_scale_that_was_set() -> None:
    model = graphreg.regularize_(net(), example_inputs=X, penalties="attach", hidden_l1=0.1, rng=0, scale=2.0)
    session_of(model).set_scale(8.0)
    assert [session_of(each).scale for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))] == [8.0, 8.0]
    assert graphreg.recipe(model)["scale"] == 8.0


def test_the_last_waiting_selector_counts_in_a_restored_session_too() -> None:
    first, second = (graphreg.regularize_(net(), penalties="return", hidden_l1=0.1) for _ in "ab")
    graphreg.set_strength(first, "hidden_l1", {"1": 0.3, "*": 0.5})
    graphreg.set_strength(second, "hidden_l1", {"*": 0.5, "1": 0.3})
    session_of(second).restore_strengths(session_of(first).changed_strengths())
    for each in (first, second):
        each(X)
        assert graphreg.site_strengths(each)["hidden_l1"] == {"1": 0.5, "3": 0.5}


def test_what_another_regularizer_has_leaves_the_clock_alone() -> None:
    module = graphreg.regularize(net(), hidden_dropout=0.5, hidden_l1=schedules.linear(0.1, 1, 4), rng=0)
    clock = module.graphreg_rules.clock
    before = clock.numbers, clock.now
    graphreg.set_strength(module, "hidden_dropout", 0.1)
    assert clock.numbers is before[0] and clock.now is before[1]
    with torch.inference_mode():
        graphreg.set_strength(module, "hidden_l1", 0.2)
    assert not clock.now.is_inference()


def test_a_schedule_that_was_replaced_is_none() -> None:
    backend, _ = by_backend(hidden_l1=schedules.linear(0, 0.5, 10), rng=0)
    graphreg.set_strength(backend, "hidden_l1", 0.1)
    assert not session_of(backend).strength("hidden_l1").is_scheduled


@pytest.mark.parametrize("make", HOSTS.values(), ids=list(HOSTS))
def test_no_selector_is_empty_and_no_name_a_list(make: Callable[..., Any]) -> None:
    host, _ = make(hidden_l1=0.1, rng=0)
    with pytest.raises(GraphRegError, match="'' is no selector"):
        graphreg.set_strength(host, "hidden_l1", {"": 0.1})
    with pytest.raises(GraphRegError, match="no regularizer is named"):
        graphreg.set_strength(host, ["hidden_l1"], 0.1)  # type: ignore[arg-type]


def test_a_call_that_raises_takes_back_its_own_number_alone() -> None:
    """Also if another thread calls between."""
    module = graphreg.regularize(net(), hidden_dropout=0.5, rng=0)

    def elsewhere(*_: Any) -> None:
        thread = threading.Thread(target=lambda: module(X))
        handle.remove()
        thread.start()
        thread.join()
        raise ValueError("here")

    handle = module.get_submodule("0").register_forward_hook(elsewhere)
    with pytest.raises(ValueError, match="here"):
        module(X)
    assert graphreg.rng_state(module)["call"] == 2
