"""A model may call its own things what it likes: what graphreg or torch.fx call theirs is kept apart, or refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphreg
from graphreg.errors import TraceError
from graphreg.runtime.rewritten_module import RewrittenModule

ISSUED = {
    "_mode", "held", "codes", "meta", "compiled_codes", "_code", "_graph", "_brought", "penalties", "graphs", "graph", "code", "lowering",
    "recompile", "_root", "_source", "_trainer", "_graphs", "_running", "_adopt", "_set_graphs", "_frozen", "key", "attach", "rules",
}  # fmt: skip
WORTH = {"plain": 0.5, "class": 0.5}


def known() -> set[str]:
    """The names that a rewritten module has and a plain module has not."""
    module = graphreg.regularize(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)), weight_l2=0.1)
    names = {*dir(module), *vars(module), *vars(pickle.loads(pickle.dumps(module)))} - set(dir(nn.Module()))
    return {name for name in names if not name.startswith("__")} | ISSUED


@cache
def fx_names() -> frozenset[str]:
    blank = fx.GraphModule(nn.Module(), fx.Graph())
    return frozenset({*dir(blank), *vars(blank)} - set(dir(nn.Module())))


def model(name: str, kind: str) -> nn.Module:
    """One that has something of this kind under the name, and reads it in its forward."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.drop = nn.Linear(4, 4), nn.Linear(4, 2), nn.Dropout(0.5)
            if kind == "submodule":
                self.add_module(name, nn.Linear(4, 4))
            elif kind == "buffer":
                self.register_buffer(name, torch.randn(4))
            elif kind == "parameter":
                self.register_parameter(name, nn.Parameter(torch.randn(4)))
            elif kind == "plain":
                self.__dict__[name] = 0.5

        def forward(self, x: Tensor) -> Tensor:
            thing, h = getattr(self, name), self.drop(torch.relu(self.first(x)))
            h = thing(h) if kind in ("submodule", "method") else h * thing
            return self.last(torch.relu(h))

    if kind == "class":
        setattr(Net, name, 0.5)
    elif kind == "property":
        setattr(Net, name, property(lambda self: 0.5))
    elif kind == "method":
        setattr(Net, name, lambda self, h: h * 0.5)
    return Net()


def same(ours: nn.Module, theirs: nn.Module, take: Callable[[Any], Tensor]) -> None:
    """Outputs and gradients, in both modes."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for mode in (True, False):
        found = []
        for module, of in ((ours, take), (theirs, lambda output: output)):
            module.train(mode)
            module.zero_grad()
            torch.manual_seed(3)
            of(module(x)).sum().backward()
            found.append([of(module(x)), *[p.grad.clone() for p in module.parameters() if p.grad is not None]] if not mode else
                         [p.grad.clone() for p in module.parameters() if p.grad is not None])  # fmt: skip
        assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["plain", "class", "property", "method", "submodule", "buffer", "parameter"])
def test_every_name_is_the_models_or_refused(kind: str) -> None:
    refused = set()
    for name in sorted(known() if kind not in ("property", "method") else ISSUED):
        net = model(name, kind)
        try:
            module = graphreg.regularize(net, weight_l2=0.1, hidden_noise=0.0)
        except TraceError as error:
            assert repr(name) in str(error) and "Rename it" in str(error)
            refused.add(name)
            continue
        assert list(module.state_dict()) == list(net.state_dict())
        same(module, net, lambda given: given[0])
        if kind in WORTH:
            assert getattr(module, name) == WORTH[kind]
        if kind in ("submodule", "buffer", "parameter"):
            assert getattr(module, name) is getattr(net, name)
        twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))] if name in ISSUED | {"compiled_code"} else []
        for twin in twins:
            same(twin, net, lambda given: given[0])
            assert list(twin.state_dict()) == list(net.state_dict())
        if twins:
            same(graphreg.strip(module), net, lambda given: given)
        assert list(module(torch.ones(1, 4)).penalties) == ["weight_l2"]
    ours = {name for name in known() if name.startswith("graphreg_")}
    # what torch.fx has, and nothing else, is refused; a graph has no methods, so those of the model do not get in its way
    assert refused == (set() if kind in ("property", "method") else (fx_names() & known()) | ours | {"_ddp_params_and_buffers_to_ignore"})


@pytest.mark.parametrize(("name", "kind"), [("penalties", "submodule"), ("graphs", "parameter"), ("lowering", "plain")])
def test_compiled_too(name: str, kind: str) -> None:
    net = model(name, kind)
    module = graphreg.regularize(net, weight_l2=0.1, hidden_noise=0.0, compile={"backend": "eager", "fullgraph": True})
    module.drop.p = 0.0
    same(module, net, lambda given: given[0])


def test_a_models_own_meta_stays() -> None:
    net = model("held", "plain")
    net.meta = {"classes": 3}
    module = graphreg.regularize(net, weight_l2=0.1)
    module.meta["more"] = 1
    assert net.meta == {"classes": 3} and copy.deepcopy(module).meta == {"classes": 3, "more": 1}


def test_penalties_that_attach_need_the_name() -> None:
    with pytest.raises(TraceError, match=r"something called 'penalties'.*module\.penalties\(\).*Rename it"):
        graphreg.regularize(model("penalties", "submodule"), weight_l2=0.1, penalties="attach", scale=1)
    module = graphreg.regularize(model("penalties", "method"), weight_l2=0.1, penalties="attach", scale=1)
    module(torch.ones(1, 4))
    assert list(module.penalties()) == ["weight_l2"]


def test_the_report_and_the_handle_of_such_a_module() -> None:
    module = graphreg.regularize(model("graphs", "buffer"), weight_l2=0.1, hidden_dropout=0.1)
    assert "weight_l2" in str(graphreg.report(module)) and "weight_l2" in str(graphreg.diff(module))
    graphreg.set_strength(module, "weight_l2", 0.0)
    assert graphreg.strengths(module)["weight_l2"] == 0
    with graphreg.monitor(module):
        module(torch.ones(2, 4))


def test_the_backend_keeps_names_apart() -> None:
    for name, kind in (("penalties", "submodule"), ("held", "parameter"), ("code", "plain"), ("meta", "plain"), ("codes", "buffer")):
        net = model(name, kind)
        net.drop.p = 0.0
        twin, backend = copy.deepcopy(net), graphreg.backend(inner="eager", hidden_l1=0.1)
        run = torch.compile(net, backend=backend)
        x = torch.randn(3, 4)
        assert torch.equal(run(x), twin(x)) and list(backend.penalties()) == ["hidden_l1"]


def test_parameters_that_ddp_is_to_ignore_are_the_models_and_ours() -> None:
    net = model("held", "buffer")
    net._ddp_params_and_buffers_to_ignore = ["held"]
    module: Any = graphreg.regularize(net, hidden_dropout=0.1)
    assert module._ddp_params_and_buffers_to_ignore[0] == "held"
    assert all(name.startswith("graphreg_rules.") for name in module._ddp_params_and_buffers_to_ignore[1:])
    assert net._ddp_params_and_buffers_to_ignore == ["held"]
    again: Any = graphreg.regularize(graphreg.strip(module), hidden_dropout=0.1)
    assert again._ddp_params_and_buffers_to_ignore == module._ddp_params_and_buffers_to_ignore


def test_a_modules_own_names_by_default() -> None:
    module = graphreg.regularize(model("held", "buffer"), weight_l2=0.1)
    assert isinstance(module, RewrittenModule) and list(module.graphs) == ["both"] and module.lowering().report_lines() == []
    assert "def forward" in module.compiled_code == module.code


def test_a_layer_called_self_is_refused() -> None:
    model = nn.Sequential()
    model.add_module("self", nn.Linear(4, 4))
    with pytest.raises(TraceError, match="has something called 'self'"):
        graphreg.regularize(model, weight_l2=1e-4)
