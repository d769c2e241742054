"""A trace is the same function as the model, or an error, or an opaque submodule: never silently another function."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg.passes import HiddenL1, WeightL2

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def model(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = type("Made", (nn.Module,), {"forward": forward})()
    made.l, made.k = nn.Linear(4, 4), nn.Linear(4, 4)
    return made


def skip(self: Any, x: Tensor) -> Tensor:
    h = self.l(x)
    before = h
    h += self.k(h)
    return h + before


def column(self: Any, x: Tensor) -> Tensor:
    h = self.l(x)
    c = h[:, 0]
    c += 1
    return self.k(h)


def callers(self: Any, x: Tensor) -> Tensor:
    before = x
    x *= 2
    return self.k(x) + before


def flat(self: Any, x: Tensor) -> Tensor:
    h = self.l(x)
    v = h.view(-1)
    v -= 1
    v /= 3
    return self.k(h)


def sizes(self: Any, x: Tensor) -> Tensor:
    n = x.shape[1]
    m = n
    n += 1  # a number: its other name keeps the old one
    return self.l(x) * n + m


def assigned(self: Any, x: Tensor) -> Tensor:
    h = self.l(x)
    h.view(-1)[2:5] = 0.5
    h[0] = h[1] * 2
    return self.k(h)


def attribute(self: Any, x: Tensor) -> Tensor:
    h = self.l(x)
    v = h.mT
    v -= 1
    h.T[0] = 2
    n = h.shape
    n += (1,)
    return self.k(h.view(n)[..., 0])


@pytest.mark.parametrize("forward", [skip, column, callers, flat, sizes, assigned, attribute])
def test_augmented_assignment_writes_where_the_model_writes(forward: Callable[..., Any]) -> None:
    original, given, ours = model(forward), X.clone(), X.clone()
    module = graphreg.regularize(original, HiddenL1("k" if forward is not sizes else "l", 1.0))
    assert torch.equal(original(given), module(ours).output)
    assert torch.equal(given, ours)  # what the caller sees of its own tensor
    assert torch.equal(original(X.clone()), graphreg.strip(module)(X.clone()))


class FrozenHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        frozen = {name: weight.detach() for name, weight in self.head.named_parameters()}
        return torch.func.functional_call(self.head, frozen, (self.l(x),))


def test_a_call_with_other_parameters_is_refused_or_opaque() -> None:
    for front_end in ("symbolic", "export"):
        with pytest.raises(graphreg.TraceError, match="it calls head with other parameters than its own, as torch.func.functional_call"):
            graphreg.regularize(FrozenHead(), weight_l2=0.1, example_inputs=X, front_end=front_end)
    outer = nn.Sequential(FrozenHead(), nn.Linear(4, 4))
    module = graphreg.regularize(outer, weight_l2=0.0, example_inputs=X, penalties="attach", scale=1)
    assert torch.equal(module(X), outer(X))
    module(X).sum().backward()
    assert outer[0].head.weight.grad is None


def test_a_shape_has_no_items_to_assign() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x.shape[0] = 2
        return self.l(x)

    with pytest.raises(graphreg.TraceError, match="'shape' does not support item assignment"):
        graphreg.regularize(model(forward), weight_l2=0.1)


def test_augmented_assignment_has_the_name_of_the_operator() -> None:
    assert "add" in list(graphreg.names(model(skip)))


def test_an_assignment_is_no_site_and_what_is_assigned_is_used() -> None:
    traced = graphreg.trace(model(assigned))
    assert [site.name for site in traced.values] == ["x", "l", "view", "written", "getitem", "mul", "written_1", "k"]
    assert all(site.used for site in traced.values)


def twice(self: Any, x: Tensor) -> Tensor:
    parts = self.l(x).chunk(2, 1)
    return self.k(torch.cat([parts[0] * 2, parts[0]], 1))


def test_a_part_that_is_taken_twice_is_one_site_with_both_names() -> None:
    original = model(twice)
    (site,) = (site for site in graphreg.trace(original).values if site.name == "chunk:0")
    assert [label.text for label in site.labels] == ["chunk:0", "getitem", "getitem_1"]
    code = graphreg.regularize(original, graphreg.build("noise", weight=1.0, pattern="getitem_1")).code
    assert "mul = chunk_0_noise * 2" in code and "torch.cat([mul, chunk_0_noise], 1)" in code
    assert torch.equal(graphreg.strip(graphreg.regularize(original, weight_l2=1.0))(X), original(X))


def made_of_sizes(self: Any, x: Tensor) -> Tensor:
    return self.l(x) * torch.full((x.shape[0], 1), 2.0) + torch.arange(x.shape[1], dtype=x.dtype) + torch.ones(x.shape[0], x.size(1))


def test_tensors_are_made_at_the_size_of_the_call() -> None:
    original = model(made_of_sizes)
    stripped = graphreg.strip(graphreg.regularize(original, weight_l2=1.0))
    assert all(torch.equal(stripped(x), original(x)) for x in (X, torch.randn(5, 4)))


def turned(self: Any, x: Tensor) -> Tensor:
    return self.k(self.l(x).unsqueeze(2).transpose(1, 2))


def test_a_splice_keeps_the_strides_of_axes_of_length_one() -> None:
    module = graphreg.regularize(model(turned), graphreg.build("dropout", weight=0.5, pattern="transpose"))
    strides = []
    module.graphreg_rules.transpose_dropout.register_forward_hook(lambda m, args, y: strides.extend((args[0].stride(), y.stride())))
    module(X).output.sum().backward()
    assert strides == [(4, 1, 1)] * 2


class Inner(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.l, self.p = how, nn.Linear(4, 4), 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.l(x)
        if self.how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.l(x).float()
        if self.how == "checkpoint":
            return checkpoint(lambda value: self.l(value).relu(), x, use_reentrant=False)
        if self.how == "reentrant":
            return checkpoint(lambda value: self.l(value).relu(), x, use_reentrant=True)
        if self.how == "random":
            return self.l(x) if random.random() < 0.5 else x
        return self.l(x) if torch.rand(()) < 0.5 else x


class Outer(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.head = Inner(how), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


REASONS = {
    "no_grad": "no_grad", "autocast": "autocast", "checkpoint": "checkpoints activations", "reentrant": "checkpoints activations",
    "random": "random numbers", "torch.rand": "random numbers",
}  # fmt: skip


@pytest.mark.parametrize("how", REASONS)
def test_a_submodule_becomes_opaque_and_the_report_says_so(how: str) -> None:
    torch.manual_seed(0)
    random.seed(0)
    outer, states = Outer(how), (random.getstate(), torch.get_rng_state())
    traced = graphreg.trace(outer)
    assert list(traced.opaque_modules) == ["inner"] and REASONS[how] in traced.opaque_modules["inner"]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    module = graphreg.regularize(outer, WeightL2("head.*", 1.0))
    assert "opaque module: inner" in graphreg.report(module).text(None)
    for seed in range(4):
        outputs = []
        for run in (outer, lambda x: module(x).output):
            torch.manual_seed(seed)
            random.seed(seed)
            outer.zero_grad()
            y = run(X.clone().requires_grad_())
            y.sum().backward()
            outputs.append((y.detach(), None if outer.inner.l.weight.grad is None else outer.inner.l.weight.grad.clone()))
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert (outputs[0][1] is None) == (outputs[1][1] is None)


@pytest.mark.parametrize("how", [how for how in REASONS if how != "no_grad"])  # see test_no_grad.py
def test_at_the_root_it_is_an_error(how: str) -> None:
    with pytest.raises(graphreg.TraceError, match="submodule"):
        graphreg.trace(Inner(how))


def test_tensors_made_in_the_forward_are_the_graphs() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.l(x) * torch.tensor(2.0) + torch.arange(4)

    original = model(forward)
    before = list(original.__dict__)
    module = graphreg.regularize(original, example_inputs=X, weight_l2=1.0)
    assert list(original.__dict__) == before and list(module.graphs) == ["both"]
    assert torch.equal(module(X).output, original(X))
    assert torch.equal(graphreg.strip(module)(X), original(X))
    assert list(module.state_dict()) == list(original.state_dict())


def test_containers_get_their_content_back() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.last = x
        return self.k(x)

    original = model(forward)
    original.seen = kept = []
    graphreg.trace(original)
    assert original.seen is kept and kept == [] and not hasattr(original, "last")


def test_an_argument_that_the_example_carried_is_needed() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.k(x) if mask is None else self.k(x) * mask

    module = graphreg.regularize(model(forward), weight_l2=1.0, example_inputs=(X, X))
    module(X, X)
    module(X, mask=X)
    with pytest.raises(graphreg.GraphRegError, match="mask was carried by the example_inputs"):
        module(X)


def test_forgetting_to_unpack_says_so() -> None:
    result = graphreg.regularize(model(skip), weight_l2=1.0)(X)
    with pytest.raises(AttributeError, match=r"output, penalties = module\(x\)"):
        result.mean()


def test_definitions_that_could_not_work() -> None:
    with pytest.raises(graphreg.RegularizerError, match="does not take weight"):

        class Deaf(graphreg.Splice):
            def __call__(self, z: Tensor) -> Tensor:
                return z * self.weight

    class Empty(graphreg.Penalty):
        pass

    with pytest.raises(graphreg.RegularizerError, match="Empty has no __call__"):
        Empty("*", 1.0)
    with pytest.raises(graphreg.RegularizerError, match="a selector is a string"):
        HiddenL1(nn.Linear(2, 2), 1.0)  # type: ignore[arg-type]
    with pytest.raises(graphreg.TraceError, match="compiled by torch.jit"):
        graphreg.trace(torch.jit.ScriptModule())


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("made", [torch.jit.script, lambda layer: torch.jit.trace(layer, torch.ones(1, 4))])
@pytest.mark.parametrize("regularize", [graphreg.trace, graphreg.regularize_])
def test_a_layer_that_torch_jit_compiled_is_refused_by_name(made: Any, regularize: Any) -> None:
    with pytest.raises(graphreg.TraceError, match="'1' in Sequential is compiled by torch.jit"):
        regularize(nn.Sequential(nn.Linear(4, 4), made(nn.Linear(4, 4))))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_in_place_a_layer_that_is_replaced_by_one_of_torch_jit_is_refused_by_name() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(1, 4)
    graphreg.regularize_(model, hidden_dropout=0.1)
    model(x)
    model[2] = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(graphreg.TraceError, match="'2' in Sequential is compiled by torch.jit"):
        model(x)


def test_shapes_of_what_fake_tensors_cannot_follow_cost_no_random_number() -> None:
    """A branch on a random number runs for real to find its shapes; the user's streams go on as if it had not."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    traced = graphreg.trace(Outer("torch.rand"), example_inputs=X)
    assert {site.name: site.shape for site in traced.values}["inner"] == (3, 4)
    assert not torch.equal(torch.get_rng_state(), before)  # the layers' own initialization
    before = torch.get_rng_state()
    graphreg.trace(traced.model, example_inputs=X)
    assert torch.equal(torch.get_rng_state(), before)


def no_shape(x: Tensor) -> Tensor:
    raise RuntimeError("no shape")


DOUBLE = torch.library.Library("graphreg_same_function", "DEF")
DOUBLE.define("double(Tensor x) -> Tensor")
DOUBLE.impl("double", lambda x: x * 2, "CPU")
DOUBLE.impl("double", no_shape, "Meta")


def test_torch_prints_nothing_about_shapes_that_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an operator refuses fake tensors, torch's logger would print a long traceback."""
    printed, log = list[logging.LogRecord](), logging.getLogger(fake_tensor.__name__)
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", printed.append)
    log.addHandler(handler)
    try:
        net = model(lambda self, x: self.l(x) if torch.ops.graphreg_same_function.double(x).shape[0] > 1 else x)
        with pytest.raises(graphreg.TraceError):
            graphreg.trace(net, X, front_end="symbolic")
    finally:
        log.removeHandler(handler)
    assert not printed


def test_attached_penalties_of_two_dtypes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).double())

    two = Two()
    penalties = [WeightL2("a.*", 1.0), WeightL2("b.*", 1.0)]
    graphreg.regularize(two, penalties, penalties="attach", scale=1)(X).mul(0).sum().backward()
    for layer in (two.a, two.b):
        torch.testing.assert_close(layer.weight.grad, 2 * layer.weight.detach() / layer.weight.numel())


@fx.wrap
def add_into(h: Tensor, q: Tensor) -> None:
    """An opaque function that writes into its argument, as in torchvision's MViT."""
    h += q


def written_by_a_function(self: Any, x: Tensor) -> Tensor:
    q = self.l(x)
    h = torch.sigmoid(q)
    add_into(h, q)
    return self.k(h)


def test_what_is_spliced_and_measured_is_not_written_into_by_an_opaque_function() -> None:
    original = model(written_by_a_function)
    module = graphreg.regularize(original, hidden_dropout=0.5, hidden_l1=1.0)
    output, penalties = module(X)
    (output.sum() + penalties["hidden_l1"]).backward()
    assert "add_into(sigmoid_kept, l)" in module.code
    assert "kept" not in graphreg.regularize(original, hidden_dropout=0.5).code  # it may write; what a splice saves is its own affair
    graphreg.set_strength(module, "hidden_dropout", 0.0)
    assert torch.equal(module(X).output, original(X))
