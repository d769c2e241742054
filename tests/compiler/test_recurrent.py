"""Recurrent layers under torch.compile(fullgraph=True): the outputs and gradients of the layer, in every setting."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, fx, nn

import graphreg
from graphreg.compiler import recurrent
from recurrent_nets import VALUES, Bare, Classifier, Setting, answer, net, pairwise, possible, same, told

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's, of the layer too


def compiled(module: nn.Module, backend: Any = "aot_eager", **more: Any) -> Any:
    return torch.compile(module, fullgraph=True, backend=backend, **more)


def check_equal(s: Setting, backend: str = "aot_eager") -> None:
    """The module compiled, against the layer itself: outputs, states, gradients of every input and every weight."""
    torch.manual_seed(0)
    model, inputs = net(s), s.inputs()
    module = graphreg.regularize(model)
    run = compiled(module, backend)
    ours, theirs = answer(lambda *given: run(*given).output, module, inputs, s.autocast), answer(model, model, inputs, s.autocast)
    same(ours, theirs)
    assert [t.dtype for t in ours[0]] == [t.dtype for t in theirs[0]]
    assert [t.stride() for t in ours[0]] == [t.stride() for t in theirs[0]]
    assert not recurrent._saved


@pytest.mark.parametrize("s", pairwise(), ids=told)
def test_equals_the_layer(s: Setting) -> None:
    check_equal(s)


INDUCTOR = [
    Setting(layers=2, bidirectional=True, batch_first=True, dropout=0.4),
    Setting("GRU", layers=2, dropout=0.4, states=True, raw=False),
    Setting(proj=True, batch_first=True, trained="hidden"),
]


@pytest.mark.parametrize("s", INDUCTOR, ids=told)
def test_equals_the_layer_under_inductor(s: Setting) -> None:
    check_equal(s, "inductor")


@pytest.mark.sweep
@pytest.mark.parametrize("kind", VALUES["kind"])
@pytest.mark.parametrize("name", [name for name in VALUES if name != "kind"])
def test_each_setting_under_inductor(kind: str, name: str) -> None:
    for value in VALUES[name]:
        s = replace(Setting(kind, layers=2, states=True), **{name: value})
        if possible(s):
            check_equal(s, "inductor")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_lengths_and_batches_do_not_compile_again(kind: type[nn.RNNBase]) -> None:
    """Two compilations, of which the second knows that sizes vary; the layer reads raw features."""
    module = graphreg.regularize(Classifier(kind), hidden_dropout=0.1, hidden_l1={"weight": 1e-2, "pattern": "rnn:out"}, rng=0)
    twin, counter = copy.deepcopy(module), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(twin, counter)
    for time, batch in ((10, 4), (20, 5), (60, 7), (200, 3)):
        x = torch.randn(batch, time, 3)
        same(total(run, twin, x), total(module, module, x))
    assert counter.frame_count == 2


def test_as_many_operations_however_long_the_sequence() -> None:
    counts = []
    for time in (10, 60):
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        module = graphreg.regularize(Classifier(num_layers=2), hidden_l1={"weight": 1e-2, "pattern": "rnn:out"})
        compiled(module, counter, dynamic=False)(torch.randn(2, time, 3))
        counts.append([n.target for n in counter.graphs[0].graph.nodes])
    assert counts[0] == counts[1] and counts[0].count(torch.ops.graphreg.recurrent.default) == 1


def total(run: Any, module: nn.Module, x: Tensor) -> tuple[Any, ...]:
    module.zero_grad()
    output, penalties = run(x)
    (output.square().sum() + sum(penalties.values())).backward()
    return output.detach(), penalties["hidden_l1"].detach(), [p.grad for p in module.parameters()]


# The model as a whole


def test_dropout_and_a_penalty_on_an_lstm_in_the_graph() -> None:
    """The graph calls the layer; what torch.compile is given, the operator. Masks and gradients are the same."""
    torch.manual_seed(0)
    module = graphreg.regularize(
        Classifier(num_layers=2, dropout=0.3), hidden_dropout=0.2, hidden_l1={"weight": 1e-2, "pattern": "rnn:out"},
        weight_l2={"weight": 1e-2, "pattern": "rnn.weight_hh_l1"}, rng=3,
    )  # fmt: skip
    code = """def forward(self, x):
    key = self.graphreg_rules.key()
    rnn = self.rnn(x);  x = None
    getitem = rnn[0]
    rnn_hidden_dropout = self.graphreg_rules.rnn_hidden_dropout(getitem, key);  getitem = key = None
    rnn_hidden_l1 = self.graphreg_rules.rnn_hidden_l1(rnn_hidden_dropout)
    getitem_1 = rnn[1];  rnn = getitem_1 = None
    getitem_2 = rnn_hidden_dropout[(slice(None, None, None), -1)];  rnn_hidden_dropout = None
    head = self.head(getitem_2);  getitem_2 = None
    hidden_l1 = self.graphreg_rules.hidden_l1(rnn_hidden_l1);  rnn_hidden_l1 = None
    rnn_weight_hh_l1 = self.rnn.weight_hh_l1
    weight_l2 = self.graphreg_rules.weight_l2(rnn_weight_hh_l1);  rnn_weight_hh_l1 = None
    return graphreg_Regularized(head, {'hidden_l1': hidden_l1, 'weight_l2': weight_l2})"""
    given = code.replace("self.rnn(x)", "self.graphreg_recurrent.rnn(x)").replace(
        "self.rnn.weight_hh_l1", "self.graphreg_recurrent.rnn_weight_hh_l1()"
    )
    assert (module.code.strip(), module.compiled_code.strip()) == (code, given)
    assert "rnn: LSTM, lowered to graphreg::recurrent when compiled" in graphreg.report(module).notes
    twin = copy.deepcopy(module)
    run, x = compiled(twin), torch.randn(4, 9, 3)
    for training in (True, True, False):
        twin.train(training), module.train(training)
        found = []
        for call, owner in ((run, twin), (module, module)):
            torch.manual_seed(5)  # the layer's own dropout draws from torch's generator
            found.append(total(call, owner, x))
        same(*found)


def test_with_the_same_seed_eager_is_the_model() -> None:
    model, x = Classifier(num_layers=2, dropout=0.5), torch.randn(4, 9, 3)
    module = graphreg.regularize(model)
    for run in (model, lambda x: module(x).output, graphreg.strip(module)):
        torch.manual_seed(2)
        found = run(x)
        torch.manual_seed(2)
        assert torch.equal(found, model(x))


def test_strip_gives_the_model_back_and_compiles_too() -> None:
    model, x = Classifier(bidirectional=False).eval(), torch.randn(4, 9, 3)
    keys = list(model.state_dict())
    module = graphreg.regularize(model, hidden_dropout=0.2, hidden_l1=1e-2, compile={"backend": "aot_eager"})
    module.train()(x).output.sum().backward()
    stripped = graphreg.strip(module).eval()
    assert list(module.state_dict()) == list(stripped.state_dict()) == list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(stripped.parameters(), model.parameters(), strict=True))
    assert stripped.rnn is model.rnn and isinstance(stripped.rnn, nn.LSTM)
    assert torch.equal(stripped(x), model(x)) and torch.equal(compiled(stripped)(x), model(x))
    assert [name for name, _ in module.named_modules() if "recurrent" in name] == []


def test_layers_at_a_depth_twice_and_under_two_names() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.GRU(3, 3)})
            self.a_b = nn.GRU(3, 3)
            self.again = self.a["b"]

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.a["b"], self.a_b, self.a["b"], self.again):
                x, _ = layer(x)
            return x

    torch.manual_seed(0)
    model, x = Deep(), torch.randn(5, 2, 3)
    module = graphreg.regularize(model, weight_l2={"weight": 1.0, "pattern": "a.b.weight_hh_l0"})
    assert module.compiled_code.count("self.graphreg_recurrent.a_b(") == 3 and "self.graphreg_recurrent.a_b_(" in module.compiled_code
    run = compiled(module, "eager")
    same(answer(lambda x: run(x).output, module, [x]), answer(model, model, [x]))
    same(run(x).penalties["weight_l2"].detach(), model.a["b"].weight_hh_l0.square().mean().detach())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_calls_of_one_layer_draw_two_masks(backend: str) -> None:
    class Twice(Bare):
        def forward(self, x: Tensor) -> Any:
            return self.rnn(x)[0], self.rnn(x)[0]

    torch.manual_seed(0)
    model, x = Twice(nn.LSTM(3, 5, 2, dropout=0.5)), torch.randn(6, 2, 3)
    module = graphreg.regularize(model)
    run = compiled(module, backend)
    ours, theirs = answer(lambda x: run(x).output, module, [x]), answer(model, model, [x])
    assert not torch.equal(ours[0][0], ours[0][1])
    same(ours, theirs)
    one = graphreg.regularize(Bare(model.rnn))  # and two calls of the module in one compiled function
    first, second = torch.compile(lambda x: (one(x).output[0], one(x).output[0]), fullgraph=True, backend=backend)(x)
    assert not torch.equal(first, second)


def test_two_graphs_by_mode() -> None:
    class Differs(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.rnn(x)
            return self.head(out[:, -1]) if self.training else self.head(out.mean(1))

    model, x = Differs(), torch.randn(4, 9, 3)
    module = graphreg.regularize(model)
    assert list(module.graphs) == ["train", "eval"]
    run = compiled(module, "eager")
    for mode in (True, False, True):
        module.train(mode)
        same(run(x).output, model(x))
        assert "self.graphreg_recurrent.rnn(x)" in module.compiled_code and ("mean" in module.compiled_code) != mode


def test_the_mode_of_the_layer_alone() -> None:
    """A layer that the user sets apart in eval mode drops nothing; a rate that is changed is the rate that acts."""
    model, x = Classifier(num_layers=2, dropout=0.5), torch.randn(4, 9, 3)
    module = graphreg.regularize(model)
    run = compiled(module)
    assert not torch.equal(run(x).output, run(x).output)
    model.rnn.eval()
    assert module.training and torch.equal(run(x).output, run(x).output)
    same(run(x).output, model(x))
    model.rnn.train().dropout = 0.0
    same(run(x).output, model(x))


def test_copies_and_other_dtypes_go_on() -> None:
    torch.manual_seed(0)
    module = graphreg.regularize(Classifier(), hidden_l1={"weight": 1e-2, "pattern": "rnn:out"}, compile={"backend": "aot_eager"})
    x = torch.randn(4, 9, 3)
    expected = total(module, module, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        same(total(compiled(twin), twin, x), expected)
    module.double()
    assert module(x.double()).output.dtype == torch.float64
    same(module(x.double()).output.float(), expected[0])
    with torch.no_grad():
        module.rnn.weight_hh_l0 = nn.Parameter(torch.zeros(32, 8, dtype=torch.float64))  # another parameter in its place
    same(module(x.double()).output, graphreg.strip(module)(x.double()))


def test_no_gradient_wanted_nothing_kept() -> None:
    model, x = Classifier(), torch.randn(4, 9, 3)
    run = compiled(graphreg.regularize(model))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(run(x).output, model(x)) and not recurrent._saved


def test_the_graph_of_the_original_stays_as_it_was() -> None:
    traced = fx.symbolic_trace(Classifier())
    before = str(traced.graph)
    module = graphreg.regularize(traced, hidden_l1={"weight": 1.0, "pattern": "rnn:out"})
    compiled(module, "eager")(torch.randn(2, 4, 3))
    assert str(traced.graph) == before and "graphreg_recurrent" not in str(module.graph)
    module.graph.lint()


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")  # torch's, of any nn.LSTM
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_no_graphreg(strict: bool) -> None:
    """torch.export takes the layer itself."""
    x = torch.randn(4, 9, 3)
    stripped = graphreg.strip(graphreg.regularize(Classifier(), hidden_l1={"weight": 1e-2, "pattern": "rnn:out"})).eval()
    program = torch.export.export(stripped, (x,), strict=strict)
    called = {str(n.target) for n in program.graph.nodes}
    assert "aten.lstm.input" in called and not any("graphreg" in name for name in called)
    same(program.module()(x), stripped(x))


def test_every_size_dynamic_from_the_start() -> None:
    model = Classifier(nn.GRU)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(graphreg.strip(graphreg.regularize(model)), counter, dynamic=True)
    counts = []
    for batch, time in ((2, 5), (3, 7), (5, 60)):
        x = torch.randn(batch, time, 3)
        same(run(x), model(x))
        counts.append(counter.frame_count)
    assert counts[0] == counts[2]  # the first is two: torch starts over at a float attribute, here the rate (with nn.Dropout too)


def test_inside_a_larger_model() -> None:
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(4, 9, 3)
    larger = nn.Sequential(nn.Linear(3, 3), graphreg.strip(graphreg.regularize(model)))
    run = compiled(larger)
    same(answer(run, larger, [x]), answer(nn.Sequential(larger[0], model), larger, [x]))
