"""A device without float64, as Apple's MPS is: strengths are float32 there, and what they were set to when they come back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import schedules
from graphreg.ir import precision

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Without:
    """``with Without(): …``: no float64 on any device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __enter__(self) -> None:
        for module in ("ir.precision", "runtime.runtime_module", "runtime.clock"):
            self.monkeypatch.setattr(f"graphreg.{module}.has_float64", lambda device: False)

    def __exit__(self, *error: Any) -> None:
        self.monkeypatch.undo()


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Without:
    return Without(monkeypatch)


def regularized(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    return graphreg.regularize(model, hidden_dropout=0.1, hidden_l1=1e-9 / 3, weight_l2=0.3, rng=1, **options)


def buffers(module: Any) -> list[Tensor]:
    return [buffer for _, buffer in module.graphreg_rules.named_buffers(remove_duplicate=False)]


TOLD = {"hidden_dropout": 0.1, "hidden_l1": 1e-9 / 3, "weight_l2": 0.3}


def test_there_and_back(without: Without) -> None:
    module = regularized()
    with without:
        module.to("cpu")
        assert all(buffer.dtype != torch.float64 for buffer in buffers(module))
        assert graphreg.strengths(module) == TOLD
        module.to("cpu")  # to another such device
        output, penalties = module(X)
        assert set(penalties) == {"hidden_l1", "weight_l2"}
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module):
        twin.to("cpu")
        assert graphreg.strengths(twin) == TOLD and {s.dtype for s in twin.graphreg_rules.strengths.values()} == {torch.float64}
        assert [float(s[0]) for s in twin.graphreg_rules.strengths.values()] == list(TOLD.values())
        shared = [leaf.strength for leaf in twin.graphreg_rules.children() if "strength" in leaf._buffers]
        assert {id(s) for s in shared} == {id(s) for s in twin.graphreg_rules.strengths.values()}
    module.graphreg_rules.key.seek(0)
    torch.testing.assert_close(module(X).output, output)


def test_a_strength_that_is_changed_there(without: Without) -> None:
    module = regularized()
    with without:
        module.to("cpu")
        graphreg.set_strength(module, "weight_l2", 0.7)
        assert graphreg.strengths(module)["weight_l2"] == 0.7
    module.to("cpu")
    assert graphreg.strengths(module) == {**TOLD, "weight_l2": 0.7}
    assert float(module.graphreg_rules.strengths["weight_l2"][0]) == 0.7


def test_a_model_that_is_regularized_there(without: Without) -> None:
    with without:
        module = regularized(penalties="attach", scale=1.0)
        assert all(buffer.dtype != torch.float64 for buffer in buffers(module))
        module(X).sum().backward()
        assert graphreg.strengths(module) == TOLD
    module.to("cpu")
    assert [float(s[0]) for s in module.graphreg_rules.strengths.values()] == list(TOLD.values())


def test_a_device_is_asked_once_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, empty = list[str](), torch.empty

    def refusing(*size: int, dtype: torch.dtype, device: str) -> Tensor:
        asked.append(device)
        if device == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return empty(*size, dtype=dtype)

    precision._makes_float64.cache_clear()
    monkeypatch.setattr(torch, "empty", refusing)
    assert [precision.has_float64(torch.device(name)) for name in ("mps", "cuda", "mps", "cpu")] == [False, True, False, True]
    assert asked == ["mps", "cuda"]
    assert [precision.widest(torch.device(name)) for name in ("mps", "cpu")] == [torch.float32, torch.float64]
    precision._makes_float64.cache_clear()


def test_a_backend_feeds_float32_there(without: Without) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    backend = graphreg.backend(hidden_l1=0.5, weight_l2=0.3, inner="eager")
    with without:
        torch.compile(model, backend=backend)(X)
        assert {penalty.dtype for penalty in backend.penalties().values()} == {torch.float32}
        assert backend._strengths_at(0).tensor("hidden_l1", ("1",), torch.device("cpu")).dtype == torch.float32
    assert graphreg.strengths(backend) == {"hidden_l1": 0.5, "weight_l2": 0.3}


def test_schedules_there_and_back(without: Without) -> None:
    rising, values = schedules.linear(0.1, 0.3, 3), [0.1 + 0.2 * (call / 3) for call in range(3)] + [0.3]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    module = graphreg.regularize(net, hidden_l1={"weight": rising, "pattern": "1"})
    with without:
        module.to("cpu")
        assert all(buffer.dtype != torch.float64 for buffer in buffers(module))
        for value in values[:2]:
            assert graphreg.strengths(module) == {"hidden_l1": pytest.approx(value, rel=1e-15)}
            torch.testing.assert_close(module(X).penalties["hidden_l1"], value * net(X).abs().mean())
        made_there = graphreg.regularize(nn.Sequential(nn.Linear(4, 6)), weight_l2=rising)
        assert made_there.graphreg_rules.clock.now.dtype == torch.float32 and graphreg.strengths(made_there) == {"weight_l2": 0.1}
        graphreg.set_strength(made_there, "weight_l2", 0.7)
        assert graphreg.strengths(made_there) == {"weight_l2": 0.7}
    for each, value in ((module, values[2]), (made_there, 0.7)):
        each.to("cpu")
        assert each.graphreg_rules.clock.numbers.dtype == torch.float64
        assert list(graphreg.strengths(each).values()) == [pytest.approx(value, rel=1e-15)]
