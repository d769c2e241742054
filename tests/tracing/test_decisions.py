"""What a forward asks of a shape is answered for the example inputs, asserted in the graph, and never guessed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, TraceError


class Decides(nn.Module):
    """A root that pads odd lengths, loops over an axis and slices by a rounded half."""

    def __init__(self) -> None:
        super().__init__()
        self.hid, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            x = torch.cat([x, x[:, :1]], 1)
        h = torch.relu(self.hid(x))
        h = sum(h[:, i] for i in range(h.shape[1]))
        return self.out(h[: round(len(h) / 2)])


def test_a_decision_at_the_root_follows_the_example() -> None:
    model = Decides()
    with pytest.raises(TraceError, match=r"Decides cannot be traced symbolically at .*if x.shape\[1\] % 2:.*example_inputs"):
        graphreg.trace(model)
    odd, even = torch.randn(4, 3, 4), torch.randn(4, 2, 4)
    for x, other in ((odd, even), (even, odd)):
        module = graphreg.regularize(model, example_inputs=x, hidden_dropout=0.1).eval()
        assert torch.equal(module(x).output, model(x))
        assert torch.equal(graphreg.strip(module)(x), model(x))
        with pytest.raises(GraphRegError, match="decides something on a shape, dtype or the like, and these inputs give"):
            module(other)


def test_the_whole_graph() -> None:
    code = graphreg.strip(graphreg.regularize(Decides(), example_inputs=torch.randn(4, 2, 4), weight_l2=1.0)).code.strip()
    assert code == GRAPH


GRAPH = """\
def forward(self, x):
    getattr_1 = x.shape
    getitem = getattr_1[1];  getattr_1 = None
    mod = getitem % 2;  getitem = None
    decided = graphreg_tracing_shape_decisions_decided(mod, 0);  mod = decided = None
    hid = self.hid(x);  x = None
    relu = torch.relu(hid);  hid = None
    getattr_2 = relu.shape
    getitem_1 = getattr_2[1];  getattr_2 = None
    decided_1 = graphreg_tracing_shape_decisions_decided(getitem_1, 2);  getitem_1 = decided_1 = None
    getitem_2 = relu[(slice(None, None, None), 0)]
    add = 0 + getitem_2;  getitem_2 = None
    getitem_3 = relu[(slice(None, None, None), 1)];  relu = None
    add_1 = add + getitem_3;  add = getitem_3 = None
    len_1 = len(add_1)
    decided_2 = graphreg_tracing_shape_decisions_decided(len_1, 4);  len_1 = decided_2 = None
    getitem_4 = add_1[slice(None, 2, None)];  add_1 = None
    out = self.out(getitem_4);  getitem_4 = None
    return out"""


def test_names_pass_over_the_assertions() -> None:
    found = [site.name for site in graphreg.trace(Decides(), torch.randn(4, 2, 4)).values if site.selectable]
    assert found == ["x", "hid", "relu", "getitem_2", "add", "getitem_3", "add_1", "getitem_4", "out"]


def test_the_listing_and_the_report_say_so() -> None:
    model, x = nn.Sequential(Decides()), torch.randn(4, 2, 4)
    line = "decided: 0 follows the example's shapes (3 asserted)"
    assert str(graphreg.names(model, x)).splitlines()[-1] == line
    assert graphreg.report(graphreg.regularize(model, example_inputs=x, weight_l2=1.0)).notes[-1] == line
    assert "decided" not in str(graphreg.names(nn.Sequential(nn.Linear(4, 2)), x))


def test_decisions_are_compiled() -> None:
    model, x = Decides(), torch.randn(4, 2, 4)
    module = torch.compile(graphreg.regularize(model, example_inputs=x, weight_l2=1.0), fullgraph=True, backend="eager")
    assert torch.equal(module(x).output, model(x))


class OnParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position, self.out = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.position if self.position.shape[0] == 3 else x)


def test_the_size_of_a_parameter_needs_no_example_and_no_assertion() -> None:
    model, x = OnParameters(), torch.randn(2, 3, 4)
    graph = graphreg.trace(model).graphs["both"]
    assert not any("decided" in node.name for node in graph.nodes)
    assert torch.equal(graphreg.strip(graphreg.regularize(model, weight_l2=1.0))(x), model(x))


class OnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h if h.sum() > 0 and h.shape[0] else -h


def test_a_decision_on_data_is_refused_and_nothing_has_run() -> None:
    model, x = OnData(), torch.randn(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TraceError, match="control flow"):
        graphreg.trace(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class AfterNorm(OnData):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h if h.shape[0] == 3 else -h


def test_answering_runs_no_layer_on_the_users_own_buffers() -> None:
    model, x = AfterNorm(), torch.randn(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graphreg.trace(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.norm.running_mean) is Tensor


def test_what_is_asked_in_a_trace_does_not_spoil_the_compiler() -> None:
    """In a new process, where the trace is the first to need fake tensors, and with them Dynamo."""
    code = """
import torch
from torch import nn
import graphreg
from graphreg.passes import RecurrentState

class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(3, 4)

    def forward(self, x, lengths):
        h, one = None, torch.tensor(1.0)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h * one

x, lengths = torch.randn(2, 3, 3), torch.tensor([3, 2])
model = Loop()
module = graphreg.regularize(model, RecurrentState("cell", 1.0, lengths="lengths"), example_inputs=(x, lengths))
assert set(vars(model)) == set(vars(Loop()))
compiled = torch.compile(module, fullgraph=True, backend="eager")  # lengths are compared with torch.arange
assert torch.allclose(compiled(x, lengths).penalties["recurrent_state"], module(x, lengths).penalties["recurrent_state"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        for each in more:
            x = x + self.l(each)
        return x


def test_variadic_arguments_are_followed_as_far_as_the_example_inputs_have_them() -> None:
    model, x = Variadic(), torch.randn(3, 4)
    traced = graphreg.trace(model, (x, x, x), front_end="symbolic")
    assert [site.name for site in traced.values if site.shape == (3, 4)] == ["x", "getitem", "getitem_1", "l", "add", "l_1", "add_1"]
    module = graphreg.regularize(model, example_inputs=(x, x, x), front_end="symbolic", weight_l2={"weight": 0.0})
    assert torch.equal(module(x, 2 * x, x).output, model(x, 2 * x, x))
    with pytest.raises(GraphRegError, match=r"more=\(the same tensor again\)\), and the graph was made for"):
        module(x, x)


class TableBySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hid, self.tables = nn.Linear(4, 4), dict[int, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        if n not in self.tables:
            self.tables[n] = torch.arange(1.0 * n)[:, None]
        y: Tensor = self.hid(x) * self.tables[n]
        return y


def test_a_dict_that_the_forward_fills_by_size() -> None:
    """The key is a stand-in, and is compared when the dict is restored, after the forward has returned."""
    model, x = TableBySize(), torch.randn(3, 4)
    module = graphreg.regularize(model, example_inputs=x, front_end="symbolic", weight_l2={"weight": 0.0})
    assert not model.tables and torch.equal(module(x).output, model(x))
    model = graphreg.regularize_(TableBySize(), weight_l2={"weight": 0.0}, scale=1)
    for n in (3, 5, 3):
        assert torch.equal(model(x[:1].expand(n, 4)), TableBySize.forward(model, x[:1].expand(n, 4)))
        model.tables.clear()
