"""``graphreg.verify``: what is the model passes, whatever it is made of; a fault put into the emitted graph is found and named."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import graphreg
from graphreg import GraphRegError, RegularizerError, TraceError, pipeline
from graphreg.session.hosts import rewritten
from graphreg.verification.gradients import freed_if_equal
from pages import DOCS

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A layer, and in ``forward`` whatever a test needs."""

    def __init__(self, forward: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.l, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.f = forward

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.bn(self.l(x))) if self.f is None else self.f(self, x)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Answer:
    loss: Tensor
    more: dict[str, Any]


pytree.register_dataclass(Answer, serialized_type_name="tests.verify.Answer")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 3, 2, dropout=0.5, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, (state, _) = self.rnn(x)
        return self.out(h[:, -1]), state


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop, self.out = nn.Embedding(9, 4), nn.Dropout(0.4), nn.Linear(4, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(F.dropout(self.drop(self.table(ids)).relu(), 0.2, self.training))}


class Two(nn.Module):
    """Of another structure in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aside = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        return Pair(self.b(h), self.aside(h)) if self.training else self.b(h)


class Steps(nn.Module):
    """Torch's own generators and Python's, a buffer that is assigned, an input that is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.noisy = Noisy()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Answer:
        x.mul_(2.0)
        h = torch.relu(self.noisy(self.l(x)))
        self.seen.add_(h.detach().sum(0))
        return Answer(h.sum(), {"pair": Pair(h, h[0]), "list": [h, 3, None, "a"]})


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random() + torch.randn_like(x)


def apart() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4))
    model[1].eval()
    return model


L = {"weight": 0.5, "pattern": "l"}
IDS = torch.tensor([[1, 2, 8], [0, 3, 3]])
SAME: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "net": (Net, X, {"dropout": L, "hidden_l1": {"weight": 0.1, "pattern": "bn"}, "weight_l2": 0.1}),
    "recurrent": (Recurrent, torch.randn(3, 5, 4), {"hidden_dropout": 0.5}),
    "tied": (Tied, IDS, {"hidden_dropout": 0.5}),
    "own dropout": (Tied, IDS, {"hidden_dropout": 0.5, "own_dropout": "seeded"}),
    "own dropout at a rate, attached": (
        Tied, IDS, {"hidden_noise": 0.5, "weight_l2": 0.1, "own_dropout": 0.7, "penalties": "attach", "scale": 1},
    ),
    "steps": (Steps, X, {"dropout": L, "front_end": "export"}),
    "two graphs": (Two, X, {"hidden_dropout": 0.5}),
    "set apart": (apart, X, {"hidden_dropout": 0.5}),
    "set apart in eval": (lambda: apart().eval(), X, {"hidden_dropout": 0.5}),
    "derivatives": (apart, X, {"contractive": {"weight": 0.1, "pattern": "2"}, "input_noise": 0.2}),
    "exported": (apart, X, {"hidden_dropout": 0.5, "front_end": "export"}),
    "compiled": (Net, X, {"dropout": L, "compile": {"backend": "eager"}}),
    "written into behind a splice": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), X, {"dropout": {"weight": 0.5, "pattern": "0"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_model_passes(name: str) -> None:
    build, inputs, options = SAME[name]
    model = build()
    module = graphreg.regularize(model, example_inputs=inputs, rng=0, **options)
    graphreg.verify(model, module, inputs)


def everything(model: nn.Module, module: nn.Module, x: Tensor) -> list[Any]:
    """What must not change: values, gradients, modes, generators, where the noise stands."""
    values = [v.clone() for each in (model, module) for v in (*each.parameters(), *each.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [m.training for each in (model, module) for m in each.modules()]
    return [*values, *grads, modes, random.getstate(), torch.get_rng_state(), x.clone(), str(graphreg.rng_state(module)), x.grad]


def test_nothing_of_the_users_is_touched() -> None:
    model, x = Steps(), X.clone().requires_grad_()
    model.noisy.eval()
    module = graphreg.regularize(model, dropout=L, weight_l2=0.1, example_inputs=X, penalties="attach", scale=1.0, front_end="export")
    module(X.clone()).loss.backward()
    before, version = everything(model, module, x), x._version
    with torch.no_grad():
        graphreg.verify(model, module, x)
        assert not torch.is_grad_enabled()
    after = everything(model, module, x)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))
    assert x._version == version


# Faults, put into the graph that was emitted


def inserted(module: Any, behind: str, function: Callable[..., Any], **named: Any) -> None:
    """Put a function behind a node, in each graph that has one."""
    found = 0
    for graph in module.graphs.values():
        for node in [n for n in graph.nodes if n.name == behind]:
            with graph.inserting_after(node):
                new = graph.call_function(function, (node,), named)
            if function is torch.clone:
                new.meta["graphreg"] = {"kind": "clone", "site": behind}  # as the rewrite's own
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            found += 1
    assert found, behind
    module.recompile()


def frozen(module: Any) -> None:
    """Make one constant of every tensor that is made in the forward, as torch.fx does."""
    for graph in module.graphs.values():
        for node in [n for n in graph.nodes if n.target in (torch.zeros, torch.ones)]:
            module.__dict__["frozen"] = node.target(*node.args, **node.kwargs)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.create_node("get_attr", "frozen"))
            graph.erase_node(node)
    module.recompile()


def accumulates(self: Any, x: Tensor) -> Tensor:
    loss = torch.zeros(())
    loss += self.l(x).square().sum()
    return loss


def fills(self: Any, x: Tensor) -> Tensor:
    t = torch.zeros(4, 4)
    t[:, 0] = self.l(x)[:, 0]
    return t * 2


def keeps(self: Any, x: Tensor) -> Tensor:
    """No gradient goes through what is filled, and with equal inputs what a call finds there is what it would write."""
    t = torch.zeros(4, 4)
    t.masked_fill_(x.detach() > 0, 1.0)
    return self.l(x) * t


def view_written(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = self.l(x)
    d = h.unfold(0, 2, 2)
    d.mul_(2.0)
    return h, d + 1


def foreach_written(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = self.l(x)
    v = h.view(16)
    torch._foreach_mul_([v], 2.0)
    return h, v + 1


def laid_out(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = self.l(x)[..., -1]
    c = h.contiguous()
    c.mul_(0.5)
    return h, c


WEIGHT = {"weight_l2": 0.1}
FAULTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None], str]] = {
    "a frozen tensor accumulates": (lambda: Net(accumulates), frozen, r"at call 2 of 2.*output differs in 1 of 1.*first node .* 'add_'"),
    "a frozen tensor is filled": (lambda: Net(fills), frozen, r"(output|backward pass) "),
    "a frozen tensor keeps what it had": (lambda: Net(keeps), frozen, r"at call 3 of 3 with the batch in reverse order, output "),
    "an unknown view": (
        lambda: Net(view_written), lambda m: inserted(m, "unfold", torch.clone),
        r"train mode, at call 1 of 2 with equal inputs, output\[0\] differs in 16 of 16 elements.*'l' .*: the model writes into it later",
    ),
    "an unknown writer": (lambda: Net(foreach_written), lambda m: inserted(m, "view", torch.clone), r"output\[0\] .*'l' .*writes into it"),
    "a clone changes the layout": (
        lambda: Net(laid_out), lambda m: inserted(m, "getitem", torch.clone, memory_format=torch.contiguous_format),
        r"output\[0\] differs in 4 of 4",
    ),
    "a lost gradient": (Net, lambda m: inserted(m, "bn", torch.detach), r"output requires no gradient, and does in the model"),
    "a gradient lost in part": (
        lambda: Net(lambda self, x: self.l(x) + self.bn(x)), lambda m: inserted(m, "bn", torch.detach),
        r"the gradient of bn\.weight is None",
    ),
    "another value": (Net, lambda m: inserted(m, "bn", torch.mul, other=1.0001), r"first node whose value differs is 'mul'"),
    "another type": (Net, lambda m: inserted(m, "relu", lambda t: (t,)), r"output is tuple of 1, and a Tensor in the model"),
    "another dtype": (Net, lambda m: inserted(m, "relu", torch.Tensor.double), r"output has dtype torch\.float64, and torch\.float32"),
    "a backward of its own": (Net, lambda m: inserted(m, "relu", torch.Tensor.exp_), "output "),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_graph_is_found(name: str) -> None:
    build, fault, says = FAULTS[name]
    model = build()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=X)
    fault(module)
    with pytest.raises(GraphRegError, match=f"^the rewritten Net is not the model: in .*{says}.* Do not train it, and please report"):
        graphreg.verify(model, module, X)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))
        self.scale = torch.full((4,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return torch.relu(self.l(x) * self.scale)


def test_an_update_that_is_lost() -> None:
    model = Counts()
    module = graphreg.regularize(model, dropout=L, example_inputs=X)
    graphreg.verify(model, module, X)
    for graph in module.graphs.values():
        for node in [n for n in graph.nodes if n.target == "add_"]:
            graph.erase_node(node)
    module.recompile()
    says = r"train mode, at call 1 of 2 .*, the buffer count differs in 1 of 1 .*the model runs aten\.add_\.Tensor in its own forward"
    with pytest.raises(GraphRegError, match=says):
        graphreg.verify(model, module, X)


def test_an_attribute_that_is_not_the_models() -> None:
    model = Counts()
    module: Any = graphreg.regularize(model, dropout=L, example_inputs=X)
    module.scale = {"a": 1}  # as a name of graphreg's own would be there
    with pytest.raises(GraphRegError, match=r"the rewritten module raises TypeError: unsupported operand .*, and the model does not"):
        graphreg.verify(model, module, X)
    module.scale = torch.full((4,), 3.0)
    with pytest.raises(GraphRegError, match=r"output differs in .* The first node whose value differs is 'mul'"):
        graphreg.verify(model, module, X)


def test_a_mode_that_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Drops(), nn.Linear(4, 4))
    module = graphreg.regularize(model, hidden_dropout=0.5, example_inputs=X)
    graphreg.verify(model, module, X)
    for graph in module.graphs.values():
        for node in [n for n in graph.nodes if n.target is F.dropout]:
            node.args, node.kwargs = node.args[:1], {"p": 0.5, "training": True}
    module.recompile()
    with pytest.raises(GraphRegError, match=r"in eval mode, at call 1 of 3 .*, output differs.*first node whose value differs is"):
        graphreg.verify(model, module, X)


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def test_splices_that_act_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that is only there where a splice gives a tensor of its own."""
    model = Net(lambda self, x: self.l(x).relu() * 2)
    module = graphreg.regularize(model, dropout=L, example_inputs=X)
    (leaf,) = (m for m in module.modules() if type(m).__name__ == "SpliceRule")
    forward = type(leaf).forward

    def shifted(self: Any, z: Tensor, key: Tensor) -> Tensor:
        y = forward(self, z, key)
        return y if y is z else y + 1

    monkeypatch.setattr(type(leaf), "forward", shifted)
    with pytest.raises(GraphRegError, match="in train mode, at call 1 of 2 with equal inputs, where each splice returns a copy of"):
        graphreg.verify(model, module, X)


class Clips(nn.Linear):
    """Writes into its weight, on which the versions of tensors say nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return clipped(super().forward(x), self.weight)


@fx.wrap
def clipped(value: Tensor, weight: Tensor) -> Tensor:
    weight.data.mul_(0.9)
    return value.clone()


def test_a_model_that_writes_into_its_parameters() -> None:
    """Copies share their parameters, but not those of such a model: each copy writes into its own."""
    model = nn.Sequential(Clips(4, 4), nn.ReLU(), nn.Linear(4, 4))
    module = graphreg.regularize(model, hidden_dropout=0.5, example_inputs=X)
    before = everything(model, module, X)
    graphreg.verify(model, module, X)
    assert str(everything(model, module, X)) == str(before)
    for graph in module.graphs.values():
        (node,) = [n for n in graph.nodes if n.target is clipped]
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    module.recompile()
    with pytest.raises(GraphRegError, match=r"'linear', the site '0\.linear' .*: the model writes into it later, and the graph does not"):
        graphreg.verify(model, module, X)


def test_a_parameter_that_the_graph_alone_writes_into() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    module = graphreg.regularize(model, hidden_dropout=0.5, example_inputs=X)
    for graph in module.graphs.values():
        node = next(n for n in graph.nodes if n.target == "2")
        with graph.inserting_after(node):
            ours = graph.call_function(clipped, (node, graph.get_attr("2.bias")))
        node.replace_all_uses_with(ours, lambda user, ours=ours: user is not ours)
        ours.prepend(ours.args[1])
    module.recompile()
    with pytest.raises(GraphRegError, match=r"in train mode, at call 1 of 2 .*, after the call the parameter 2\.bias differs in 4 of 4"):
        graphreg.verify(model, module, X)


def test_copies_share_their_parameters() -> None:
    """A copy of the model, and the two that are run, have one set of parameters besides the user's: memory for a large model."""
    model, made = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300)), list[int]()
    module = graphreg.regularize(model, hidden_dropout=0.5)

    def deepcopy(self: nn.Parameter, memo: dict[int, Any]) -> Any:
        made.append(self.numel())
        return original(self, memo)

    original = nn.Parameter.__deepcopy__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Parameter, "__deepcopy__", deepcopy)
        graphreg.verify(model, module, torch.randn(2, 300))
    assert sum(made) == sum(p.numel() for p in model.parameters())


def test_equal_gradients_are_freed_while_backward_runs() -> None:
    equal, other, tied = (nn.Parameter(torch.ones(2)) for _ in range(3))
    expected: dict[str, Tensor | None] = {
        "the gradient of equal": torch.full((2,), 3.0), "the gradient of other": torch.zeros(2),
        "the gradient of a": torch.full((2,), 5.0), "the gradient of b": torch.full((2,), 5.0),
    }  # fmt: skip
    with freed_if_equal({"equal": equal, "other": other, "a": tied, "b": tied}, expected, near=False):
        (equal * 3 + other * 4 + tied * 2 + tied * 3).sum().backward()
        (equal * 0).sum().backward()  # a part that adds nothing
    assert equal.grad is None
    assert tied.grad is None
    assert torch.equal(other.grad, torch.full((2,), 4.0))
    assert [name for name, value in expected.items() if value is not None] == ["the gradient of other"]
    with freed_if_equal({"equal": equal}, {"the gradient of equal": torch.full((2,), 3.0)}, near=False):
        (equal * 3).sum().backward()
        equal.sum().backward()
    assert torch.equal(equal.grad, torch.ones(2))  # what came after is a difference


# regularize(..., verify=True)


def test_with_regularize() -> None:
    module = graphreg.regularize(Net(), dropout=L, example_inputs=X, verify=True)
    assert graphreg.strengths(module) == {"dropout": 0.5}
    with pytest.raises(RegularizerError, match=r"^verify=True runs the model, so it needs example_inputs: a tensor, a tuple or a dict\.$"):
        graphreg.regularize(Net(), dropout=L, verify=True)
    with pytest.raises(RegularizerError, match=r"^verify=1 is not allowed; give True or False\.$"):
        graphreg.regularize(Net(), dropout=L, example_inputs=X, verify=1)  # type: ignore[arg-type]
    with pytest.raises(RegularizerError, match=r"^verify= is no option of graphreg\.backend"):
        graphreg.backend(dropout=L, verify=True)


def test_a_trace_that_writes_into_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = pipeline.trace

    def writing(model: Any, *given: Any) -> Any:
        traced = trace(model, *given)
        model.scale.add_(1)
        return traced

    graphreg.regularize(Counts(), dropout=L, example_inputs=X, verify=True)
    monkeypatch.setattr(pipeline, "trace", writing)
    with pytest.raises(GraphRegError, match=r"^tracing Counts has changed it: scale differs in 4 of 4 elements, by 1 at most"):
        graphreg.regularize(Counts(), dropout=L, example_inputs=X, verify=True)


def test_the_page() -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", (DOCS / "verify.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {"__name__": "page"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for code in (code for language, code in blocks if language == "python"):
            exec(compile(code, "verify.md", "exec"), space)
    assert printed.getvalue() == "".join(text for language, text in blocks if language == "text")


# What cannot be compared


def test_what_is_given_is_checked() -> None:
    model = Net()
    module = graphreg.regularize(model, dropout=L)
    with pytest.raises(GraphRegError, match=r"^Net is not a module that graphreg rewrote"):
        graphreg.verify(model, model, X)
    with pytest.raises(GraphRegError, match=r"^verify compares with the model that regularize was given, not with Net: graphreg\.verify"):
        graphreg.verify(module, module, X)
    with pytest.raises(GraphRegError, match=r"^this module was not made from this Net, or the model was changed since: l\.weight differs"):
        graphreg.verify(Net(), module, X)
    with pytest.raises(GraphRegError, match=r"^this module was not made from this Linear, .*: weight is not in the module"):
        graphreg.verify(nn.Linear(4, 4), module, X)
    graphreg.verify(copy.deepcopy(model), module, X)
    graphreg.verify(torch.compile(model, backend="eager"), torch.compile(module, backend="eager"), X)  # type: ignore[arg-type]


def test_a_model_without_values() -> None:
    model = Net().to("meta")
    module = graphreg.regularize(model, dropout=L)
    with pytest.raises(GraphRegError, match=r"^verify compares values, and Net or its inputs have none \(device meta\)\."):
        graphreg.verify(model, module, X.to("meta"))


def test_a_model_that_cannot_be_copied() -> None:
    class Alone(Net):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise RuntimeError("there is one alone")

    model = Alone()
    module = graphreg.regularize(model, dropout=L)
    with pytest.raises(GraphRegError, match=r"^Alone cannot be copied \(RuntimeError: there is one alone\), and verify runs only copies"):
        graphreg.verify(model, module, X)


def test_a_model_that_draws_from_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Elsewhere())
    module = graphreg.regularize(model, dropout={"weight": 0.5, "pattern": "1"})
    says = r"^Sequential cannot be verified, for it is not the same from run to run: from equal seeds, in train mode, output differs"
    with pytest.raises(GraphRegError, match=says):
        graphreg.verify(model, module, X)


RANDOM = random.Random(0)


class Elsewhere(nn.Module):
    """An opaque module, because a trace would freeze what it draws."""

    def forward(self, x: Tensor) -> Tensor:
        return drawn(x)


@fx.wrap
def drawn(x: Tensor) -> Tensor:
    return x * RANDOM.random()


def test_a_models_own_error_stays_its_own() -> None:
    model = Net()
    module = graphreg.regularize(model, dropout=L)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|mat1 and mat2") as met:
        graphreg.verify(model, module, torch.ones(4, 5))
    assert "This is Net's own error: graphreg.verify ran a copy of it." in met.value.__notes__


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor, pair: Any = None, example_inputs: Any = None) -> Tensor:
        more = 0 if pair is None else pair[0] + pair[1]
        y: Tensor = self.l(x).relu() + more + (0 if example_inputs is None else example_inputs)
        return y


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(graphreg.regularize, X), (graphreg.regularize_, (X,)), (graphreg.regularize_, {"x": X}), (graphreg.regularize, [X])],
    ids=["tensor", "tuple", "dict", "list"],
)
def test_example_inputs_as_everything_takes_them(make: Callable[..., Any], inputs: Any) -> None:
    model = Net()
    module = make(model, dropout=L, example_inputs=inputs)
    graphreg.verify(model, module, example_inputs=inputs)
    inserted(rewritten(module), "l", torch.neg)
    with pytest.raises(GraphRegError, match=re.escape("The first node whose value differs is 'neg'")):
        graphreg.verify(model, module, example_inputs=inputs)


def test_example_inputs_or_the_arguments_of_a_call() -> None:
    model = Net()
    module = graphreg.regularize(model, dropout=L)
    for args, kwargs in (((X,), {}), ((), {"x": X})):
        with pytest.raises(RegularizerError, match=r"takes the arguments of a call, or example_inputs=, and was given both\. Give one"):
            graphreg.verify(model, module, *args, example_inputs=X, **kwargs)
    with pytest.raises(TraceError, match=r"example_inputs=int is not allowed; give a tensor, a tuple \(positional\) or a dict"):
        graphreg.verify(model, module, example_inputs=3)
    for packed in ((X,), {"x": X}):
        with pytest.raises((TypeError, AttributeError)) as met:
            graphreg.verify(model, module, packed)
        assert f"It got one {type(packed).__name__}; for arguments that it holds, write verify" in met.value.__notes__[-1]


def test_arguments_of_a_call_stay_arguments() -> None:
    """A tuple is the argument that it is, and so is an argument that the model calls ``example_inputs``."""
    model = TakesTwo()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=(X, (X, X), X))
    graphreg.verify(model, module, X, (X, X), example_inputs=X)
    graphreg.verify(model, module, X, (X, X), X)


class Kept(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(x.numpy().sum())


def test_inputs_that_cannot_require_a_gradient() -> None:
    class Outer(Net):
        def __init__(self) -> None:
            super().__init__(lambda self, x: torch.relu(self.l(x) * self.kept(x)))
            self.kept = Kept()

    model = Outer()
    module = graphreg.regularize(model, dropout=L)
    graphreg.verify(model, module, X)
    inserted(module, "l", torch.neg)
    with pytest.raises(GraphRegError, match=re.escape("The first node whose value differs is 'neg'")):
        graphreg.verify(model, module, X)
