"""The export front end: sizes, inputs, outputs, modes, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg import GraphRegError, TraceError
from graphreg.passes import HiddenL1
from graphreg.tracing.export import recorder as recording


def exported(model: nn.Module, example: Any) -> tuple[graphreg.Traced, Any]:
    """A trace by torch.export, and what is made of it without regularizers."""
    traced = graphreg.trace(model, example, front_end="export")
    return traced, graphreg.strip(graphreg.rewrite(traced, graphreg.plan(traced, [])))


def stripped(model: nn.Module, example: Any) -> Any:
    return exported(model, example)[1]


class Loops(nn.Module):
    """Loops over a size, decides on a size, and on a number computed from sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0] * 0
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(x[:, t] + h))
        return h if x.shape[0] > 2 else h * 2


def test_loops_and_decisions_on_sizes_are_followed_and_asserted() -> None:
    model = Loops()
    traced, module = exported(model, torch.randn(4, 3, 4))
    x = torch.randn(7, 3, 4)
    assert torch.equal(module(x), model(x))
    with pytest.raises(GraphRegError, match="x has size 5 in dimension 1. The graph works only for 3, because the model's layers or"):
        module(torch.randn(4, 5, 4))
    with pytest.raises(GraphRegError, match=r"tests a condition on a shape: x.shape\[0\] > 2 held for the example_inputs, and does not"):
        module(torch.randn(2, 3, 4))
    with pytest.raises(GraphRegError, match="x has 2 dimensions, and had 3 in the example_inputs"):
        module(torch.randn(3, 4))
    assert [s.name for s in traced.values if s.op == "Linear"] == ["cell", "cell_1", "cell_2"]


def test_a_batch_of_one_stands_for_any_batch() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3))
    traced, module = exported(model, torch.randn(1, 3, 4))
    assert [site.shape for site in traced.values] == [(1, 3, 4), (1, 12), (1, 3), (1, 3)]
    x = torch.randn(5, 3, 4)
    assert torch.equal(module.eval()(x), model.eval()(x))


class OnlyOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 6) * 2


def test_a_batch_that_must_be_one_stays_one() -> None:
    module = stripped(OnlyOne(), torch.ones(1, 6))
    assert torch.equal(module(torch.ones(1, 6)), torch.full((1, 6), 2.0))
    with pytest.raises((GraphRegError, RuntimeError)):
        module(torch.ones(2, 6))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Answer:
    loss: Tensor
    more: dict[str, Any]
    count: int | None = 3
    nothing: int | None = None


@dataclass
class Question:
    x: Tensor
    scale: Tensor


pytree.register_dataclass(Question, serialized_type_name="tests.Question")
pytree.register_dataclass(Answer, serialized_type_name="tests.Answer")


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, batch: dict[str, Any], question: Question, *more: Tensor, twice: bool = False, **named: Tensor) -> Answer:
        h = self.layer(batch["x"]["deep"]) + question.x * question.scale + more[0] + named["bias"]
        return Answer(h.sum(), {"pair": Pair(h, h * 2), "ordered": OrderedDict(a=h), "list": [h, 3, None], "twice": twice}, count=None)


def nested(seed: int, rows: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    x, y, z = (torch.randn(rows, 3, generator=draw) for _ in range(3))
    return ({"x": {"deep": x}, "kind": "a"}, Question(y, torch.tensor(2.0)), z), {"bias": torch.ones(3)}


def test_nested_inputs_and_outputs_of_the_models_own_types() -> None:
    model, (args, kwargs) = Nested(), nested(0)
    bound = {"batch": args[0], "question": args[1], "bias": kwargs["bias"]}

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch: Any, question: Any, z: Tensor, bias: Tensor) -> Answer:
            return self.inner(batch, question, z, bias=bias)

    outer = Given()
    traced, module = exported(outer, {**bound, "z": args[2]})
    (batch, question, z), named = nested(1, rows=4)
    ours, theirs = (each(batch, question, z, named["bias"]) for each in (module, outer))
    assert isinstance(ours, Answer) and isinstance(ours.more["pair"], Pair) and isinstance(ours.more["ordered"], OrderedDict)
    assert torch.equal(ours.loss, theirs.loss) and ours.more["list"][1:] == [3, None] and ours.more["twice"] is False
    assert torch.equal(ours.more["pair"].right, theirs.more["pair"].right)
    with pytest.raises(GraphRegError, match=r"have the structure \(batch=\{'x': .*, 'kind': 'a', 'extra': a tensor"):
        module({**batch, "extra": z}, question, z, named["bias"])
    with pytest.raises(GraphRegError, match=r"'kind': 'b'\}, .* and the graph was made for .*'kind': 'a'\}"):
        module({**batch, "kind": "b"}, question, z, named["bias"])
    sites = {name: site.role for site in traced.values for name in site.names}
    assert [name for name, role in sites.items() if role == "input"] == ["z", "bias", "batch:x.deep", "question:x", "question:scale"]


class Modes(nn.Module):
    """A dropout and an attention that read the mode, a norm, a structure that depends on it, tied weights."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.branch = branch
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.norm(self.first(x)), 0.5, self.training)
        if self.branch and self.training:
            h = h + torch.rand_like(h)
        return self.last(h)


def test_one_graph_where_literals_differ_and_two_where_structure_does() -> None:
    x = torch.randn(6, 4)
    for branch, graphs in ((False, ["both"]), (True, ["train", "eval"])):
        model = Modes(branch)
        twin, (traced, module) = copy.deepcopy(model), exported(model, x)
        assert list(traced.graphs) == graphs
        for _ in range(2):
            torch.manual_seed(0)
            ours = module.train()(x)
            torch.manual_seed(0)
            assert torch.equal(ours, twin.train()(x))
        assert not torch.equal(module(x), module(x))  # random stays random
        assert model.norm.num_batches_tracked == 4 and torch.equal(twin.norm(x * 0), twin.norm(x * 0))
        assert module.norm.running_mean is model.norm.running_mean
        model.norm.running_mean.copy_(twin.norm.running_mean)
        model.norm.running_var.copy_(twin.norm.running_var)
        assert torch.equal(module.eval()(x), twin.eval()(x))
        assert list(module.state_dict()) == list(model.state_dict()) and module.last.weight is module.first.weight


def test_a_frozen_norm_stays_frozen() -> None:
    model, x = Modes(), torch.randn(6, 4)
    model.norm.eval()
    before = model.norm.running_mean.clone()
    module = stripped(model, x)
    assert not model.norm.training
    module(x)
    assert torch.equal(model.norm.running_mean, before)


def test_statistics_are_updated_when_compiled() -> None:
    model, x = Modes(), torch.randn(6, 4)
    module = graphreg.regularize(model, example_inputs=x, front_end="export", rng=0, hidden_dropout=0.1)
    step = torch.compile(module, fullgraph=True, backend="aot_eager")
    step(x)
    assert model.norm.num_batches_tracked == 1 and model.norm.running_mean.abs().sum() > 0


class Steps(nn.Module):
    """Counts its calls in a buffer that it then reads; ``anew``: by a new tensor, which is assigned."""

    def __init__(self, anew: bool) -> None:
        super().__init__()
        self.anew, self.l = anew, nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.anew:
            self.steps = self.steps + 1
        else:
            self.steps += 1
        out: Tensor = self.l(x) * self.steps
        return out


@pytest.mark.parametrize("anew", [False, True])
def test_a_buffer_that_is_written_and_read_is_written_once(anew: bool) -> None:
    """A second write, of the buffer into itself, would make backward fail."""
    model, x = Steps(anew), torch.randn(3, 4)
    twin, module = copy.deepcopy(model), graphreg.regularize(model, example_inputs=x, weight_l2=0.0)
    for count in (1, 2):
        output, expected = module(x).output, twin(x)
        assert torch.equal(output, expected) and model.steps == twin.steps == count
        output.sum().backward()
        expected.sum().backward()
        assert torch.equal(model.l.weight.grad, twin.l.weight.grad)
    assert ("assign_buffer" in module.code) == anew and "copy_" not in module.code


class Norm(nn.Module):
    """A norm by hand, with buffers that its forward updates, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.shift = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.count += 1
        return x - self.mean + self.shift + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_buffers_and_constants() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Norm())
    twin, x = copy.deepcopy(model), torch.randn(5, 4)
    module = stripped(model, torch.randn(3, 4))
    for each in (module, torch.compile(module, fullgraph=True, backend="eager")):
        assert torch.allclose(each(x), twin(x))
    assert torch.allclose(model[1].mean, twin[1].mean) and model[1].count == 2
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again.eval()(x), module.eval()(x)) and torch.equal(copy.deepcopy(module)(x), module(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, (h, _) = self.rnn(x)
        return self.head(out[:, -1] + h[-1])


def test_recurrent_layers_stay_layers_and_compile() -> None:
    model, x = Recurrent(), torch.randn(3, 6, 4)
    traced = graphreg.trace(model, x, front_end="export")
    made = graphreg.from_kwargs(traced, recurrent_state={"weight": 1e-2, "pattern": "rnn"})
    module = graphreg.rewrite(traced, graphreg.plan(traced, made))
    ours, penalties = torch.compile(module, fullgraph=True, backend="eager")(torch.randn(2, 9, 4))
    assert penalties["recurrent_state"] > 0 and ours.shape == (2, 2)
    assert torch.equal(graphreg.strip(module)(x), model(x))
    assert {"rnn", "rnn:h_n", "rnn:c_n"} <= {name for site in traced.values for name in site.names}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Inside(nn.Module):
    """Does what a trace would lose; which is chosen by ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "no_grad":
            with torch.no_grad():
                h = self.layer(x)
            return h + x
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x).float()
        if self.kind == "checkpoint":
            return checkpoint(self.layer, x, use_reentrant=False)  # type: ignore[no-any-return]
        if self.kind == "function":
            return Doubled.apply(self.layer(x))  # type: ignore[no-any-return,no-untyped-call]
        return self.layer(x) * random.random()


KEPT = {
    "no_grad": "it works under torch.no_grad or the like, and a trace would lose that",
    "autocast": "it works under an autocast of its own, and a trace would lose that",
    "checkpoint": "it checkpoints activations, which a trace would lose",
    "function": "it calls a torch.autograd.Function, and a trace would lose its backward",
    "random": "its forward draws random numbers, which a trace would freeze",
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_trace_would_lose_becomes_opaque(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Inside(kind), nn.ReLU()), torch.randn(3, 4)
    traced = graphreg.trace(model, x, front_end="export")
    assert traced.opaque_modules == {"1": KEPT[kind]}
    assert [site.name for site in traced.values] == ["input", "0", "1", "2"]
    module = graphreg.strip(graphreg.rewrite(traced, graphreg.plan(traced, [])))
    grads = []
    for each in (module, model):
        model.zero_grad()
        random.seed(0)
        each(x).sum().backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert all((a is None) == (b is None) and (a is None or torch.allclose(a, b)) for a, b in zip(*grads, strict=True))


class Decides(nn.Module):
    """On data: torch.fx does not take it, and neither would torch.export, which is not what the error may be about."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_front_end_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(changes: Any, seeing: Any) -> Any:
        raise AttributeError("'classmethod_descriptor' object has no attribute '__func__'")

    monkeypatch.setattr(recording, "refuse_untraceable", gone)
    says = (
        rf"^graphreg's export front end does not work with torch {re.escape(torch.__version__)} \(AttributeError: 'classmethod_descriptor' "
        r"object has no attribute '__func__'\)\. No model can be exported with it, so the cause is not your model\. "
    )
    with pytest.raises(TraceError, match=says):
        graphreg.trace(nn.Linear(4, 4), torch.ones(3, 4), front_end="export")
    with pytest.raises(TraceError, match=f"{says}.* torch.fx cannot trace this model either: Decides cannot be traced symbolically"):
        graphreg.trace(Decides(), torch.ones(3, 4))
    stack = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    notes = graphreg.trace(stack, torch.ones(2, 3, 8)).notes
    assert any("front end: symbolic, because graphreg's export front end" in note for note in notes)


def test_at_the_root_it_is_an_error_that_says_what_to_move() -> None:
    for kind in ("no_grad", "checkpoint", "function", "autocast", "random"):
        with pytest.raises(TraceError, match=r"Inside cannot be exported.* move (that|the checkpointed) (step )?into a submodule"):
            graphreg.trace(Inside(kind), torch.randn(3, 4), front_end="export")


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("my own words")


def test_the_choice_and_its_errors() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(GraphRegError, match="front_end='dynamo' is unknown; it is one of 'auto', 'symbolic', 'export'"):
        graphreg.trace(Branches(), x, front_end="dynamo")  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="front_end='export' runs Branches, so it needs example_inputs: a tensor, a tuple or a dict"):
        graphreg.trace(Branches(), front_end="export")
    with pytest.raises(TraceError, match=r"Give example_inputs, .* of forward\(x\)\. With them, graphreg also tries torch\.export"):
        graphreg.trace(Branches())
    line = Branches.forward.__code__.co_firstlineno + 1
    place = rf"at .*{re.escape(__file__)}:{line}: if x.sum\(\) > 0:"
    both = rf"symbolically {place}.*torch.export cannot trace it either: .*exported {place}.*graphreg.backend"
    with pytest.raises(TraceError, match=both):
        graphreg.trace(Branches(), x)
    with pytest.raises(ValueError, match="my own words"):
        graphreg.trace(Fails(), x, front_end="export")
    with pytest.raises(TraceError, match="example_inputs do not fit Branches.forward"):
        graphreg.trace(Branches(), {"y": x}, front_end="export")
    with pytest.raises(TraceError, match="a GraphModule already has a graph, so front_end='export' does not apply to it"):
        graphreg.trace(torch.fx.symbolic_trace(nn.ReLU()), x, front_end="export")
    assert graphreg.trace(nn.Sequential(nn.ReLU()), x).front_end == "symbolic"


class DTensor(Tensor):
    """By its name what torch.distributed.tensor makes of a parameter."""


def test_a_sharded_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2, 2).as_subclass(DTensor))
    with pytest.raises(TraceError, match=r"parameters are sharded already \(DTensor\). Rewrite first, wrap second"):
        graphreg.trace(model, torch.ones(2, 2))


class Sums(nn.Module):
    def forward(self, *rows: Tensor) -> Tensor:
        return sum(torch.vmap(torch.neg)(-row) for row in rows)  # type: ignore[return-value]


def test_what_torch_fx_refuses_goes_to_export_by_itself() -> None:
    module = graphreg.regularize(Sums(), example_inputs=(torch.ones(2), torch.ones(2)), noise={"rows:0": 0.0})
    assert torch.equal(graphreg.strip(module)(torch.ones(3), torch.ones(3)), torch.full((3,), 2.0))
    assert "traced by the export front end" in graphreg.report(module).made
    assert maybe_current_level() is None  # torch.vmap's, which is entered and left while it is traced
    with pytest.raises(GraphRegError, match=r"rows=\(a tensor of float32, a tensor of float32, a tensor of float32\)\), and"):
        module(*torch.ones(3, 2).unbind())


def test_what_is_within_vmap_is_no_site() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.out = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.vmap(lambda row: row.tanh() * 2)(self.l(x)))  # type: ignore[no-any-return]

    model, x = Maps(), torch.randn(4, 2)
    module = graphreg.regularize(model, HiddenL1("*", 1.0), example_inputs=x)
    output, penalties = module(x)
    hidden = model.l(x).tanh() * 2
    assert torch.equal(output, model.out(hidden))
    torch.testing.assert_close(penalties["hidden_l1"], hidden.abs().mean())
    assert not {"tanh", "mul"} & set(graphreg.names(model, x))


class TwoLevels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        doubled, squared = torch.vmap(torch.vmap(lambda each: (each * 2, each**2)))(self.l(x))
        return self.out(doubled + squared)  # type: ignore[no-any-return]


def test_what_vmap_returns_is_a_value_outside_of_it() -> None:
    model, x = TwoLevels(), torch.randn(5, 4)
    returned = [name for name in graphreg.names(model, x) if name.startswith("_remove_batch_dim")]
    assert len(returned) == 2  # what the inner vmap returns is a row of the outer one
    module = graphreg.regularize(
        model, dropout={"_remove_batch_dim*": 0.5}, variance_floor={"_remove_batch_dim*": 1.0}, keep=returned, example_inputs=x
    )
    output, penalties, kept = module(x)
    hidden = model.l(x)
    for value, plain in zip(kept.values(), (hidden * 2, hidden**2), strict=True):
        drawn = value != 0
        assert not drawn.all() and not (~drawn).all()
        torch.testing.assert_close(value, torch.where(drawn, plain / 0.5, 0.0))
    assert torch.equal(output, model.out(sum(kept.values())))
    assert penalties["variance_floor"].dim() == 0


def test_sizes_that_the_model_takes_for_equal() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    module = stripped(Adds(), (torch.ones(4), torch.ones(4)))
    assert torch.equal(module(torch.ones(3), torch.ones(3)), torch.full((3,), 2.0))
    with pytest.raises(GraphRegError, match="y has size 2 in dimension 0 and x size 3 in dimension 0. In the example_inputs the two were"):
        module(torch.ones(3), torch.ones(2))


def test_operations_go_by_torchvisions_names() -> None:
    class Signs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x / 2 + x.div(3)
            y -= 1 - x
            y.mul_(2)
            y[:, 0] = 0
            return (y @ y.T) ** 2

    symbolic, export = (graphreg.trace(Signs(), torch.randn(3, 4), front_end=end) for end in ("symbolic", "export"))
    names = [[site.name for site in traced.values if site.selectable] for traced in (symbolic, export)]
    assert names[0] == names[1] == ["x", "truediv", "div", "add", "sub", "sub_1", "mul_", "written", "getattr", "matmul", "pow"]


class Within(nn.Module):
    """A model with a submodule that works in a way that torch.export does not write down."""

    def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.l, self.inner, self.out = nn.Linear(4, 4), Inner(function), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.inner(self.l(x)))
        return out


class Inner(nn.Module):
    def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.function = nn.Linear(4, 4), function
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x) if self.function is assigns else self.function(self.q, x)


def infers(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = layer(x)
    return y.clone() + x


def differentiates(layer: nn.Linear, x: Tensor) -> Tensor:
    z = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(layer(z).square().sum(), z, create_graph=True)
    return x - slope


def differentiates_by_assignment(layer: nn.Linear, x: Tensor) -> Tensor:
    z = x.detach()
    z.requires_grad = True
    (slope,) = torch.autograd.grad(layer(z).square().sum(), z, create_graph=True)
    return x - slope


def goes_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    slope: Tensor = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
    return x + slope


def assigns(inner: Any, x: Tensor) -> Tensor:
    inner.mean = inner.mean / 2 + x.detach().mean(0)
    return x * inner.mean


REASONS = {
    infers: "it works under torch.inference_mode, and a trace would lose that",
    differentiates: "it switches whether a value requires gradients, and torch.export loses that",
    differentiates_by_assignment: "it switches whether a value requires gradients, and torch.export loses that",
    goes_forward: "it differentiates by torch.func, and a graph would fix how deeply torch.func's transforms are nested",
    assigns: "its forward assigns or registers mean, which torch.export loses",
}


@pytest.mark.parametrize("function", REASONS, ids=lambda function: function.__name__)
def test_what_torch_export_would_lose_stays_in_its_submodule(function: Callable[[Any, Tensor], Tensor]) -> None:
    model, example = Within(function), torch.randn(3, 4)
    twin = copy.deepcopy(model)
    traced = graphreg.trace(model, example, front_end="export")
    assert traced.opaque_modules == {"inner": REASONS[function]}
    module = graphreg.rewrite(traced, graphreg.plan(traced, [HiddenL1("l", 0.0)]))
    for _ in range(2):
        x = torch.randn(3, 4)
        ours, theirs = module(x).output, twin(x)
        torch.testing.assert_close(ours, theirs)
        ours.square().sum().backward(), theirs.square().sum().backward()
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("function", [infers, differentiates, goes_forward])
def test_what_torch_export_would_lose_of_the_model_itself_is_refused(function: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(TraceError, match=f"{re.escape(REASONS[function])}.*move that"):
        graphreg.trace(Inner(function), torch.randn(3, 4), front_end="export")


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.out = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.vmap(lambda row: self.l(row).tanh())(x))  # type: ignore[no-any-return]


def test_a_vmap_in_the_model_under_a_transform_of_the_callers() -> None:
    """Its level is another then than when it was traced."""
    model, x = Maps(), torch.randn(5, 4)
    module = stripped(model, x)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def gradient(of: nn.Module) -> Any:
        return torch.func.grad(lambda p: torch.func.functional_call(of, p, (x,)).square().sum())(parameters)

    torch.testing.assert_close(gradient(module), gradient(model))
    torch.testing.assert_close(torch.func.jacrev(module)(x), torch.func.jacrev(model)(x))
    run = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x), model(x))


def test_a_call_that_fails_within_a_vmap_leaves_no_level() -> None:
    """It would stay for all code of the process, in which nothing could draw any more."""
    model = Maps()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=torch.randn(5, 4))
    model.l.weight = nn.Parameter(torch.zeros(3, 7))
    with pytest.raises(RuntimeError):
        module(torch.randn(5, 4))
    assert maybe_current_level() is None
    torch.rand(2)


class AsksLayout(nn.Module):
    def __init__(self, ask: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.l, self.ask = nn.Linear(4, 3), ask

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.l(x) * int(self.ask(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("ask", [lambda y: y.is_contiguous(), lambda y: y.stride(1) == 1], ids=["is_contiguous", "stride"])
def test_a_question_how_an_input_lies_in_memory(ask: Callable[[Tensor], Any]) -> None:
    """Inputs of other sizes are right, also of size 1; inputs with other strides are refused."""
    model, x, y = AsksLayout(ask), torch.randn(5, 4), torch.randn(5, 7)
    module = stripped(model, (x, y))
    for n in (5, 3, 1):
        assert torch.equal(module(x[:n], y[:n]), model(x[:n], y[:n]))
    refusal = r"The strides of y are now \(1, 5\)|these inputs give False where the example_inputs gave True"
    with pytest.raises(GraphRegError, match=refusal):
        module(x, torch.randn(7, 5).t())


BASE = torch.randn(12, 14)
ASKED = {
    "storage_offset": (lambda y: y.storage_offset() + 1, BASE[1:6, :7], "these inputs give 14 where the example_inputs gave 0"),
    "dim_order": (lambda y: y.dim_order()[0], BASE[:7, :5].t(), r"these inputs give \(1, 0\) where the example_inputs gave \(0, 1\)"),
    "is_shared": (lambda y: y.is_shared(), torch.randn(5, 7).share_memory_(), "these inputs give True where the example_inputs gave False"),
    "a batch of one": (lambda y: y.stride(0), BASE[:1, :7], r"The strides of y are now \(14, 1\), in another order or with other gaps"),
}


@pytest.mark.parametrize(("ask", "other", "refusal"), ASKED.values(), ids=ASKED)
def test_what_a_method_of_an_input_answers_is_asserted(ask: Callable[[Tensor], Any], other: Tensor, refusal: str) -> None:
    model, x, y = AsksLayout(ask), torch.randn(5, 4), torch.randn(5, 7)
    module = stripped(model, (x, y))
    assert torch.equal(module(x[:1], y[:1]), model(x[:1], y[:1]))
    with pytest.raises(GraphRegError, match=refusal):
        module(x[: len(other)], other)
    alike = other.clone(memory_format=torch.contiguous_format)  # the cure
    assert torch.equal(module(x[: len(other)], alike), model(x[: len(other)], alike))


def test_a_question_about_the_layout_compiled_and_in_place() -> None:
    """Compiled it holds for other sizes, too; in place inputs with other strides are traced anew."""
    model, x, y, other = AsksLayout(lambda y: y.is_contiguous()), torch.randn(5, 4), torch.randn(5, 7), torch.randn(7, 5).t()
    run = torch.compile(stripped(model, (x, y)), backend="eager", fullgraph=True)
    for n in (5, 3, 1):
        assert torch.equal(run(x[:n], y[:n]), model(x[:n], y[:n]))
    placed = graphreg.regularize_(copy.deepcopy(model), front_end="export", weight_l2=0.1, scale=1)
    for each in (y, other, y):
        assert torch.equal(placed(x, each), model(x, each))


def test_a_question_about_an_example_with_other_strides() -> None:
    model, x, y, alike = AsksLayout(lambda y: y.is_contiguous()), torch.randn(5, 4), torch.randn(5, 7), torch.randn(7, 3).t()
    strided = stripped(model, (x, torch.randn(7, 5).t()))
    with pytest.raises(GraphRegError, match="The strides of y are now|these inputs give True where"):
        strided(x, y)
    assert torch.equal(strided(x[:3], alike), model(x[:3], alike))


def test_in_a_backend() -> None:
    """A backend that exports another model leaves no guards on that model's sizes in what is being compiled."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphreg.trace(nn.Linear(4, 2), torch.randn(5, 4), front_end="export")
        return graph.forward

    x = torch.randn(3, 2)
    assert torch.equal(torch.compile(nn.Tanh(), backend=backend)(x), torch.tanh(x))


class SwapsParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.one, self.two = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.one, self.two = self.two, self.one
        return self.l(x) * self.one


def test_parameters_that_the_forward_swaps_are_refused() -> None:
    model = SwapsParameters()
    with pytest.raises(TraceError, match="its forward assigns another tensor to the parameter one"):
        graphreg.trace(model, torch.ones(2, 4), front_end="export")
    assert model.one.sum() == 4
