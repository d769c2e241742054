"""A graph is used only after it gave the model's own result: what the proof finds, what it accepts, and what it leaves as it was."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import operator
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn import functional as F

import graphreg
from graphreg import GraphRegError, TraceError
from graphreg.dynamo_backend import capture
from graphreg.session.hosts import rules_of
from graphreg.tracing.trace import Traced

tracing = sys.modules["graphreg.tracing.trace"]  # the file, whose name in the package is that of the function
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Has what a graph may lose: a buffer that is written, dropout, and an output with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen.add_(1)
        hidden = self.drop(torch.relu(self.norm(self.first(x))))
        return {"logits": self.last(hidden)}


def unproved(module: Any) -> dict[str, str]:
    return dict(rules_of(module).unproved)


# What is found


def without_write(graph: fx.Graph) -> None:
    graph.erase_node(next(n for n in graph.nodes if n.target == "add_"))


def other_function(graph: fx.Graph) -> None:
    next(n for n in graph.nodes if n.target is torch.relu).target = torch.tanh


def other_key(graph: fx.Graph) -> None:
    graph.output_node().args = ({"logit": graph.output_node().args[0]["logits"]},)


def other_type(graph: fx.Graph) -> None:
    graph.output_node().args = (list(graph.output_node().args[0].values()),)


def other_dtype(graph: fx.Graph) -> None:
    node = graph.output_node().args[0]["logits"]
    with graph.inserting_after(node):
        double = graph.call_method("double", (node,))
    graph.output_node().args = ({"logits": double},)


def no_gradient(graph: fx.Graph) -> None:
    node = graph.output_node().args[0]["logits"]
    with graph.inserting_after(node):
        detached = graph.call_method("detach", (node,))
    graph.output_node().args = ({"logits": detached},)


def raising(graph: fx.Graph) -> None:
    relu = next(n for n in graph.nodes if n.target is torch.relu)
    with graph.inserting_after(relu):
        graph.call_function(operator.getitem, (relu, 99))


def writes_input(graph: fx.Graph) -> None:
    x = next(n for n in graph.nodes if n.op == "placeholder")
    with graph.inserting_before(graph.output_node()):
        graph.call_method("zero_", (x,))


FAULTS: dict[Callable[[fx.Graph], None], str] = {
    without_write: "the buffer seen after the call",
    other_function: "output['logits'] differs",
    other_key: "output['logits'] is missing",
    other_type: "output is list of 1, and dict of 1",
    other_dtype: "has dtype torch.float64",
    no_gradient: "requires no gradient",
    raising: "it raises IndexError",
    writes_input: "args[0] after the call",
}


def damage(monkeypatch: pytest.MonkeyPatch, fault: Callable[[fx.Graph], None]) -> None:
    """Make torch.fx's front end return graphs with a fault."""
    original = tracing._trace_symbolically

    def faulty(*given: Any) -> Traced:
        traced = original(*given)
        for graph in traced.graphs.values():
            fault(graph)
        return traced

    monkeypatch.setattr(tracing, "_trace_symbolically", faulty)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_graph_that_does_something_else_is_not_used(fault: Callable[[fx.Graph], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.fx is refused with the difference; without inputs, the first call refuses."""
    damage(monkeypatch, fault)
    model = Net()
    with pytest.raises(TraceError, match="on these inputs, in train mode, its graph does not give the model's result") as refused:
        graphreg.regularize(model, hidden_dropout=0.1, example_inputs=X, front_end="symbolic")
    assert FAULTS[fault] in str(refused.value)
    with pytest.raises(TraceError):
        graphreg.trace(model, X, "symbolic")
    module = graphreg.regularize(model, weight_l2=0.1)
    for call in range(2):  # a refused graph stays refused
        with pytest.raises(GraphRegError, match="does not give the model's result") as refused:
            module(X)
        assert "With them, graphreg also tries torch.export" in str(refused.value), call
    graphreg.regularize(model, weight_l2=0.1, prove=False, example_inputs=X)  # as asked


def test_by_itself_graphreg_goes_on_to_torch_export(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, other_key)
    traced = graphreg.trace(Net(), X)
    assert traced.front_end == "export" and traced.unproved.keys().isdisjoint(("train", "eval"))
    assert FAULTS[other_key] in traced.notes[0]


def test_the_first_node_that_differs_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, other_function)
    with pytest.raises(TraceError, match=r"The first node whose value differs is 'relu' \(.*test_proof.py:\d+\)\."):
        graphreg.trace(Net(), X, "symbolic")


# What is accepted


class Renormalized(nn.Module):
    """Its forward writes into a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.table(x.argmax(1)))
        return out


class Gradient(nn.Module):
    """Computes a gradient in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((x**3).sum(), x)
        return gradient


class Counting(nn.Module):
    """Counts in Python, and draws from Python's generator, so that it stays opaque."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log = 0, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        return x * (self.calls + random.random())


class Nan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.new_zeros(()) - x / x.new_zeros(())


class Frozen(nn.Module):
    """A stack with torch's fast path, which computes in another order where nothing needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.stack, self.last = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).requires_grad_(False), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.last(self.stack(x[None], src_key_padding_mask=mask[None]))
        return out


class Inside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.inner(x))
        return out


ACCEPTED: dict[str, tuple[nn.Module, Any]] = {
    "a net": (Net(), X), "a parameter that is written": (Renormalized(), X), "a gradient": (Inside(Gradient()), X),
    "state in an opaque module": (Inside(Counting()), X), "nan": (Inside(Nan()), X),
    "the fast path": (Frozen(), (X, torch.tensor([False, False, False, True, True]))),
    "an input that is a parameter": (nn.Bilinear(4, 4, 2), (X, X)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_right_graph_is_used_and_the_model_is_as_it_was(kind: str) -> None:
    model, inputs = ACCEPTED[kind]
    model = copy.deepcopy(model)
    state, tensors = {name: value.clone() for name, value in model.state_dict().items()}, dict(model.state_dict(keep_vars=True))
    plain = {path: {k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, (int, list))} for path, m in model.named_modules()}
    given = copy.deepcopy(inputs)
    torch.manual_seed(3)
    random.seed(3)
    drawn = torch.get_rng_state(), random.getstate()
    traced = graphreg.trace(model, inputs)
    module = graphreg.rewrite(traced, graphreg.plan(traced, []))
    dtypes = [torch.bfloat16, torch.float16] if traced.front_end == "export" else []
    later = {f"{mode} mode under autocast to {dtype}" for mode in ("train", "eval") for dtype in dtypes}
    assert traced.unproved.keys() == later == unproved(module).keys()
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(value is tensors[name] for name, value in model.state_dict(keep_vars=True).items())
    assert plain == {path: {k: v for k, v in vars(m).items() if isinstance(v, (int, list))} for path, m in model.named_modules()}
    assert all(map(torch.equal, *((i if isinstance(i, tuple) else (i,)) for i in (given, inputs))))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("is_example", [False, True])
def test_a_nested_tensor_is_copied_for_the_proof(layout: torch.layout, is_example: bool) -> None:
    nested = torch.nested.nested_tensor([X[:2], X[2:]], layout=layout)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=nested if is_example else None)
    ours = module(nested).output
    assert unproved(module).keys() == (set() if is_example else {"eval"})
    assert torch.equal(torch.nested.to_padded_tensor(ours, 0.0), torch.nested.to_padded_tensor(model(nested), 0.0))


def test_what_the_model_itself_refuses_is_told() -> None:
    """Batch norm refuses a batch of one in train mode, so nothing can be compared there."""
    module = graphreg.regularize(Net(), weight_l2=0.1, example_inputs=X[:1])
    assert unproved(module).keys() == {"train"}
    assert "not proved in train mode: the model itself raises ValueError: Expected more than 1 value" in str(graphreg.report(module))
    module.eval()(X)
    module.train()(X)


TICKS = itertools.count().__next__  # nothing can put it back


@fx.wrap
def ticked(x: Tensor, size: float) -> Tensor:
    return x * (1 + size * TICKS())


def test_a_model_that_differs_from_itself() -> None:
    """Below rounding it is accepted. Else it is refused if its graph does not change with it, and accepted unproved if it does."""

    class Tick(nn.Module):
        def __init__(self, size: float, wraps: bool = False) -> None:
            super().__init__()
            self.size, self.wraps, self.ticks = size, wraps, itertools.count().__next__

        def forward(self, x: Tensor) -> Tensor:
            return ticked(x, self.size) if self.wraps else x * (1 + self.size * self.ticks())

    near, wrapped = (graphreg.trace(Inside(tick), X).unproved for tick in (Tick(1.2e-7), Tick(1.0, wraps=True)))
    assert near and all("so the graph was compared within rounding" in reason for reason in near.values())
    assert wrapped.keys() == {"train", "eval"}
    assert all("the model is not the same from run to run" in reason for reason in wrapped.values())
    for inputs in (None, X):
        with pytest.raises(GraphRegError, match="its result is another one from run to run .*, and that of its graph is not") as refused:
            graphreg.regularize(Inside(Tick(1.0)), weight_l2=0.1, example_inputs=inputs)(X)
        assert str(refused.value).count("marked with torch.fx.wrap") == 1 and "test_proof.py:" in str(refused.value)


@pytest.mark.parametrize("path", ["", ".first"])
def test_a_model_that_was_regularized_in_place_meanwhile(path: str) -> None:
    model = Net()
    proved, module = (graphreg.regularize(model, weight_l2=0.1, example_inputs=inputs) for inputs in (X, None))
    inner = model.get_submodule(path[1:])
    graphreg.regularize_(inner, weight_noise=0.5)
    proved(X)
    with pytest.raises(TraceError, match=rf"Net{path} was regularized in place .* after graphreg.regularize, .* call the module once"):
        module(X)
    module.eval()(X)
    graphreg.strip_(inner)
    module.train()(X)


@pytest.mark.parametrize("disturbed", [1, 2])
def test_another_thread_that_draws_meanwhile_does_not_make_a_right_graph_wrong(disturbed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread draws from the generators during one of the runs, which then has other masks than the rest."""
    trial: Any = sys.modules["graphreg.tracing.proof.proof"]._Trial
    original, runs = trial._ran, itertools.count(1)

    def ran(self: Any, forward: Any) -> Any:
        draws = next(runs) == disturbed
        return original(self, lambda call: (torch.rand(7) if draws else None, forward(call))[1])

    monkeypatch.setattr(trial, "_ran", ran)
    assert graphreg.trace(Net(), X).unproved == {}


@pytest.mark.parametrize("proved", [True, False])
def test_hooks_do_not_run_for_a_proof(proved: bool) -> None:
    """Of a layer that the graph calls; what is hooked and opened is part of the graph, and not compared."""
    model, seen = Net(), list[str]()
    hooked = model.first if proved else model
    hooked.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=X)
    runs = len(seen)
    plain = graphreg.regularize(Net(), weight_l2=0.1, example_inputs=X)
    assert unproved(plain) == {}
    if proved:
        assert unproved(module) == {} and runs == 0
        module(X)
        assert seen == ["Linear"]
    else:
        why = "the whole Net has a hook, which is part of the graph, and a proof would run it once more"
        assert set(unproved(module).values()) == {why}


def test_on_meta_nothing_is_proved() -> None:
    module = graphreg.regularize(Net().to("meta"), weight_l2=0.1, example_inputs=X.to("meta"))
    assert set(unproved(module).values()) == {"the model or its inputs have no values (device meta)"}


# When


def test_without_inputs_the_first_eager_call_in_each_mode_proves() -> None:
    module = graphreg.regularize(Net(), hidden_dropout=0.1, rng=1)
    again = graphreg.regularize(copy.deepcopy(Net()), hidden_dropout=0.1, rng=1, prove=False)
    assert unproved(module).keys() == {"train", "eval"} and "proved" not in str(graphreg.report(module))
    weights = dict(again.state_dict())
    module.load_state_dict(weights)
    for _ in range(2):  # the proof moves neither masks nor the model's own draws
        torch.manual_seed(5)
        one = module(X).output["logits"]
        torch.manual_seed(5)
        assert torch.equal(one, again(X).output["logits"])
        assert unproved(module).keys() == {"eval"}
    with torch.no_grad():
        module.eval()(X)
    assert unproved(module) == {} and set(unproved(again).values()) == {"prove=False"}
    assert "not proved in train and eval mode: prove=False" in str(graphreg.report(again))


def test_within_a_transform_the_next_eager_call_proves() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    module, told = graphreg.regularize(model, weight_l2=0.1), list[str]()
    logger, handler = logging.getLogger("graphreg"), logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        for _ in range(2):
            torch.vmap(lambda row: module(row).output, randomness="same")(X)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert told == [
        "the first call of Sequential in train mode runs within a tracer or a transform, and proves nothing; the next eager call proves "
        "the graph"
    ]
    assert "not proved in train mode: its calls so far ran within a tracer or a transform" in str(graphreg.report(module))
    module(X)
    assert unproved(module).keys() == {"eval"}


def test_first_calls_of_several_threads_prove_one_after_the_other() -> None:
    """Each lends the model copies of its buffers, and another one would put these back as the model's own."""
    model = Net()
    module, buffers, start = graphreg.regularize(model, weight_l2=0.1), dict(model.named_buffers()), threading.Barrier(6)
    failed = list[BaseException]()

    def call() -> None:
        start.wait()
        try:
            module(X)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and unproved(module).keys() == {"eval"}
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers()) and int(model.seen) > 0


def test_a_copy_and_a_changed_model_are_not_compared() -> None:
    module = graphreg.regularize(model := Net(), weight_l2=0.1)
    twin = copy.deepcopy(module)
    twin(X)
    assert unproved(twin)["train"] == "the module is a copy or was unpickled, and the model is not there"
    edited = graphreg.regularize(Net(), weight_l2=0.1)
    other_function(edited.graph)
    edited.recompile()
    edited(X)
    assert unproved(edited)["train"] == "the graph was edited after the model was regularized"
    with graphreg.monitor(watched := graphreg.regularize(Net(), weight_l2=0.1), "*"):
        watched(X)
    assert unproved(watched).keys() == {"eval"}
    model.last = nn.Linear(6, 3)
    module(X)
    assert unproved(module)["train"] == "modules of the model were replaced after it was regularized"


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_call_is_proved_outside_of_the_compiler(whole: bool) -> None:
    module = graphreg.regularize(Net(), hidden_dropout=0.1)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    if whole:
        torch.compile(module, fullgraph=True, backend=counter)(X)
    else:
        module.compile(fullgraph=True, backend=counter)
        module(X)
    assert unproved(module).keys() == {"eval"} and counter.frame_count == 1


def test_in_place_each_structure_is_proved_under_the_callers_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    graphreg.regularize_(model, weight_l2=0.1, scale=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16
    assert unproved(model) == {}
    off = graphreg.regularize_(nn.Sequential(nn.Linear(4, 6)), weight_l2=0.1, scale=1, prove=False)
    off(X)
    assert set(unproved(off).values()) == {"prove=False"}


def test_in_place_a_wrong_graph_is_refused_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, other_function)
    model = graphreg.regularize_(Net(), weight_l2=0.1, scale=1, front_end="symbolic")
    for _ in range(2):
        with pytest.raises(TraceError, match="in train mode, its graph does not give the model's result"):
            model(X)
    model.eval()(X)


def test_in_place_a_first_call_within_a_transform_is_refused_with_the_order_that_works() -> None:
    model = graphreg.regularize_(nn.Linear(4, 2), weight_l2=0.1, scale=1)
    with pytest.raises(GraphRegError, match=r"within a transform of torch.func. Call the model with such arguments once before"):
        torch.vmap(model)(X)


def test_a_graph_of_the_backend_is_proved_at_its_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the graph that Dynamo captured: here graphreg's form of it is damaged."""
    original = capture.Capture.captured

    def faulty(self: Any, *given: Any) -> Any:
        captured = original(self, *given)
        next(n for n in captured.graph.nodes if n.target is torch.relu).target = torch.tanh
        return captured

    torch._dynamo.reset()
    right = torch.compile(model := Net(), backend=graphreg.backend(weight_l2=0.1, hidden_dropout=0.0, inner="eager"))
    torch.manual_seed(5)
    output = right(X)["logits"]
    assert int(model.seen) == 1 and output.requires_grad
    monkeypatch.setattr(capture.Capture, "captured", faulty)
    torch._dynamo.reset()
    for prove in (True, False):
        compiled = torch.compile(Net(), backend=graphreg.backend(hidden_l1=0.1, inner="eager", prove=prove))
        if prove:
            with pytest.raises(GraphRegError, match="its graph does not give the model's result"):
                compiled(X)
        else:
            compiled(X)


class Reducing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x


def test_a_forward_that_communicates_is_proved_only_with_example_inputs(tmp_path: Path) -> None:
    """At a call, one rank cannot know whether the others prove. The proof ends before anything is sent."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    try:
        model = Inside(Reducing())
        later = graphreg.regularize(model, weight_l2=0.1)
        later(X)
        assert "its forward communicates with other ranks" in unproved(later)["train"]
        assert unproved(graphreg.regularize(model, weight_l2=0.1, example_inputs=X)) == {}
    finally:
        dist.destroy_process_group()


def test_the_option_is_a_flag() -> None:
    for call in (
        lambda: graphreg.regularize(Net(), weight_l2=0.1, prove=1), lambda: graphreg.regularize_(Net(), weight_l2=0.1, prove=None),
        lambda: graphreg.backend(weight_l2=0.1, prove="yes"), lambda: graphreg.trace(Net(), prove=0),
    ):  # fmt: skip
        with pytest.raises(graphreg.RegularizerError, match=r"prove=.* is not allowed; give True or False."):
            call()


def test_prove_false_runs_no_forward() -> None:
    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x)

    runs = []
    original = Loud.forward
    Loud.forward = lambda self, x: runs.append(isinstance(x, fx.Proxy)) or original(self, x)  # type: ignore[method-assign,assignment,func-returns-value]
    graphreg.trace(nn.Sequential(nn.Linear(4, 4), Loud()), X, prove=False)
    assert all(runs)


class Calls(Net):
    def __call__(self, *args: Any) -> Any:
        return {"logits": super().__call__(*args)["logits"] * 2}


class CallsAlike(Net):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


def test_a_call_of_the_models_own_is_named() -> None:
    def placed(model: nn.Module, **options: Any) -> Any:
        return graphreg.regularize_(model, scale=1, front_end="symbolic", **options)(X)

    for regularize in (graphreg.regularize, placed):
        with pytest.raises(TraceError, match=r"Calls has a __call__ of its own, which no graph has: do in the forward what it does\."):
            regularize(Calls(), weight_l2=0.1, example_inputs=X)
    assert graphreg.regularize(CallsAlike(), weight_l2=0.1, example_inputs=X)


class AsksAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x)
        return h + 1 if torch.is_autocast_enabled("cpu") else h


def test_only_a_call_of_the_models_own_is_named() -> None:
    """In place, the model has another class during a trace, with a ``__call__`` that makes other threads wait."""
    placed = graphreg.regularize_(AsksAutocast(), hidden_dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TraceError, match=r"The forward does something that a trace cannot follow\."):
        placed(torch.randn(3, 4))


class Compiled(nn.Module):
    """Has a part that the user compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["without inputs", "with inputs", "in place"])
def test_trial_runs_leave_what_the_user_compiles_to_the_calls(way: str) -> None:
    torch.compiler.reset()
    model, frames = Compiled(), torch._dynamo.testing.CompileCounter()
    model.part = torch.compile(model.part, backend=frames)
    if way == "in place":
        module = graphreg.regularize_(model, weight_l2=0.1, scale=1)
    else:
        module = graphreg.regularize(model, weight_l2=0.1, example_inputs=None if way == "without inputs" else X)
    assert frames.frame_count == 0
    for _ in range(2):
        module(X)
    graphreg.report(module)  # counts operations
    assert frames.frame_count == 1
    torch.compile(lambda x: x + 1, backend=frames)(X)
    assert frames.frame_count == 2  # torch.compile is on again


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,)))  # type: ignore[no-any-return]


def test_torch_cond_works_after_a_proof() -> None:
    torch.compiler.reset()
    model = nn.Sequential(Branches(), nn.Tanh())
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=X)
    for _ in range(2):
        assert torch.equal(module(X).output, model(X))


class AsksForAutocast(nn.Module):
    """``by``: what the result is multiplied by under autocast."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.linear, self.by = nn.Linear(4, 4), by

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * self.by if torch.is_autocast_enabled("cpu") else x


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("how", ["bare", "inputs", "in place"])
def test_a_forward_that_asks_for_autocast_is_proved_with_it_and_without(how: str, first: bool) -> None:
    x = torch.randn(2, 4)
    for by in (1.0, 2.0):
        plain = AsksForAutocast(by)
        model: Any = copy.deepcopy(plain)
        with torch.autocast("cpu", torch.bfloat16, enabled=first and how == "inputs"):
            if how == "in place":
                graphreg.regularize_(model, weight_l2=0.1, penalties="attach", scale=1)
            else:
                model = graphreg.regularize(model, weight_l2=0.1, example_inputs=x if how == "inputs" else None)
        for is_on in (first, not first, first, not first):
            wrong = by == 2 and (is_on if how != "inputs" else is_on != first)  # bare and in place, it is traced without autocast
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                if wrong or (how == "in place" and by == 2 and first):  # the trace itself fails
                    with pytest.raises(TraceError, match="does not give the model's result"):
                        model(x)
                else:
                    ours = model(x) if how == "in place" else model(x).output
                    assert torch.equal(ours, plain(x))
    if how == "inputs":
        with torch.autocast("cpu", torch.bfloat16, enabled=not first), pytest.raises(TraceError, match="Call regularize where it is as"):
            model(x)


class SetsMore(nn.Module):
    """``train`` sets a number that the forward reads (``by``: in eval mode), merges a branch into a weight, or freezes a layer."""

    def __init__(self, by: float = 1.0, merges: bool = False) -> None:
        super().__init__()
        self.linear, self.norm, self.branch = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Parameter(torch.randn(4, 4))
        self.by, self.merges, self.now, self.merged = by, merges, 1.0, False

    def train(self, mode: bool = True) -> SetsMore:
        super().train(mode)
        self.norm.eval()
        self.now = 1.0 if mode else self.by
        if self.merges and self.merged == mode:
            self.linear.weight.data += self.branch * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x) + (x @ self.branch.T if self.merges and not self.merged else 0.0)
        return self.norm(h) * self.now  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [SetsMore(), SetsMore(by=0.5), SetsMore(merges=True)])
def test_what_a_train_of_the_models_own_sets_is_proved(model: SetsMore) -> None:
    x, wrong = torch.randn(3, 4), model.by != 1 or model.merges
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if wrong:
        with pytest.raises(TraceError, match=r"in eval mode, its graph does not give .* A train\(\) or eval\(\) of the model's own sets"):
            graphreg.regularize(model, weight_l2=0.1, example_inputs=x)
    else:
        graphreg.regularize(model, weight_l2=0.1, example_inputs=x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and not model.norm.training and model.now == 1 and not model.merged

    module = graphreg.regularize(copy.deepcopy(model), weight_l2=0.1)
    assert torch.equal(module(x).output, model(x))
    placed: Any = graphreg.regularize_(copy.deepcopy(model), weight_l2=0.1, penalties="attach", scale=1)
    plain = copy.deepcopy(model)
    for mode in (True, False, True):
        assert torch.equal(placed.train(mode)(x), plain.train(mode)(x))
    if wrong:
        with pytest.raises(TraceError, match="in eval mode"):
            module.eval()(x)
    else:
        assert torch.equal(module.eval()(x).output, model.eval()(x))


class Epochs(nn.Module):
    """``train`` counts epochs, which the forward reads (``reads``), for a slow start."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.linear, self.reads, self.epoch = nn.Linear(4, 4), reads, 0

    def train(self, mode: bool = True) -> Epochs:
        self.epoch += mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu() * (self.epoch / 5 if self.reads else 1.0)


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("reads", [True, False])
def test_epochs_that_a_train_of_the_models_own_counts(reads: bool, front_end: Any) -> None:
    model, x = Epochs(reads), torch.randn(3, 4)
    options: dict[str, Any] = {"weight_l2": 0.1, "example_inputs": x, "front_end": front_end}
    if reads:
        with pytest.raises(TraceError, match=r"differs .* after eval\(\) and train\(\)\. A train\(\) or eval\(\) of the model's own sets"):
            graphreg.regularize(model, **options)
    else:
        graphreg.regularize(copy.deepcopy(model), **options)
    assert model.epoch == 0 and model.training
    plain, placed = copy.deepcopy(model), graphreg.regularize_(model, **options, penalties="attach", scale=1)
    for _ in range(2):
        assert torch.equal(placed.train()(x), plain.train()(x)) and torch.equal(placed.eval()(x), plain.eval()(x))


class SetsModesByItself(nn.Sequential):
    def train(self, mode: bool = True) -> SetsModesByItself:
        self[0].train(mode)
        return super().train(mode)


def test_a_train_of_the_models_own_that_only_sets_modes_costs_no_further_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    trial, ran = sys.modules["graphreg.tracing.proof.proof"]._Trial, list[str]()
    for name in ("_call_model", "_run_graph"):
        own = getattr(trial, name)
        monkeypatch.setattr(trial, name, lambda self, call, own=own, name=name: (ran.append(f"{self.mode} {name}"), own(self, call))[1])
    graphreg.regularize(SetsModesByItself(nn.Linear(4, 4), nn.ReLU()), weight_l2=0.1, example_inputs=X)
    assert sorted(ran) == [f"{mode} {name}" for mode in ("eval", "train") for name in ("_call_model", "_run_graph")]


def test_strip_warns_of_a_graph_that_was_never_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[str]()
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: told.append(text % args))
    module = graphreg.regularize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), weight_l2=0.1)
    graphreg.strip(module)
    assert told[0].startswith("Sequential is stripped before its graph was compared with the model in train and eval mode, and ")
    for mode in (True, False):
        module.train(mode)(X)
    graphreg.strip(module)
    assert len(told) == 1


class Exact(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.linear(x).relu()  # type: ignore[no-any-return]


class ExactInPart(nn.Module):
    """Switches autocast off: in a submodule, or itself (``inlined``)."""

    def __init__(self, inlined: bool) -> None:
        super().__init__()
        self.exact, self.last, self.inlined = Exact(), nn.Linear(64, 2), inlined

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = Exact.forward(self.exact, x) if self.inlined else self.exact(x)
        return torch.cat([h, self.last(h)], 1)


class SetsByHand(Exact):
    def forward(self, x: Tensor) -> Tensor:
        was_on = torch.is_autocast_enabled("cpu")
        torch.set_autocast_enabled("cpu", False)
        h: Tensor = self.linear(x)
        torch.set_autocast_enabled("cpu", was_on)
        return h


class CastsToTheDtype(nn.Module):
    """``inner``: whether a block of its own has float16, or else it asks for the dtype."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.first, self.last, self.inner = nn.Linear(64, 64), nn.Linear(64, 2), inner

    def forward(self, x: Tensor) -> Tensor:
        if not self.inner:
            return self.last(self.first(x).to(torch.get_autocast_dtype("cpu")).float().relu())  # type: ignore[no-any-return]
        with torch.autocast("cpu", torch.float16, enabled=torch.is_autocast_enabled("cpu")):
            h = self.first(x).relu()
        return self.last(h)  # type: ignore[no-any-return]


def casting(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


@pytest.mark.parametrize("how", ["bare", "inputs", "in place"])
@pytest.mark.parametrize("model", [ExactInPart(True), ExactInPart(False), CastsToTheDtype(True), CastsToTheDtype(False), SetsByHand()])
def test_a_forward_with_an_autocast_of_its_own_is_right_or_refused_under_another(model: nn.Module, how: str) -> None:
    """A block that changes nothing during the trace changes something at other calls. In place, a submodule with one becomes opaque."""
    x, dtypes = torch.randn(3, 64), (None, torch.bfloat16, torch.float16)
    for first in dtypes:
        module: Any = copy.deepcopy(model)
        with casting(first):
            try:
                if how == "in place":
                    graphreg.regularize_(module, weight_l2=0.1, penalties="return")
                else:
                    module = graphreg.regularize(module, weight_l2=0.1, example_inputs=x if how == "inputs" else None)
            except TraceError:
                assert first is not None and getattr(model, "inlined", True)  # its own forward has a block that changes something
                continue
        right = 0
        for dtype in (first, *dtypes, first):
            with casting(dtype), contextlib.suppress(TraceError):
                ours, plain = module(x).output, model(x)
                assert ours.dtype == plain.dtype and torch.equal(ours, plain)
                right += 1
        if how == "in place" and not getattr(model, "inlined", True):
            assert right == 5
        assert right or (how == "in place" and first is not None)  # the trace itself failed


def test_the_report_names_what_could_not_be_proved_under_autocast() -> None:
    module = graphreg.regularize(AsksForAutocast(1.0).to("meta"), weight_l2=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(2, 4, device="meta"))
    notes = [line for line in str(graphreg.report(module)).splitlines() if line.startswith("not proved in")]
    assert notes == ["not proved in train mode under autocast to torch.bfloat16: the model or its inputs have no values (device meta)"]
