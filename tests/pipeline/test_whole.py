"""What comes back is the user's model: copies, state, hooks, modes, noise, and bit-equal where nothing is regularized."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg.errors import GraphRegError, RegularizerError, TraceError
from graphreg.passes import BernoulliDropout, GaussianNoise, HiddenL1, WeightL2
from graphreg.runtime.penalty import Measure
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.splice import SpliceRule
from saved_nets import Auxiliary, Blocks, Frozen
from ten_models import tensors

ALL: dict[str, Any] = {"hidden_dropout": 0.2, "hidden_noise": 0.1, "weight_l2": 1e-2, "hidden_l1": 1e-2}


class Net(nn.Module):
    """The values at relu and tanh belong to the root; the model has a dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.relu(self.first(x)), 0.1, self.training)
        return self.head(torch.tanh(self.second(h)))


class TwoForms(Net):
    """Another structure in each mode: two graphs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        h = torch.tanh(self.second(torch.relu(self.first(x))))
        return (self.head(h), h) if self.training else self.head(h)


SMALL = {"net": Net, "two_forms": TwoForms, "blocks": Blocks}


def made(cls: Callable[[], nn.Module], **keywords: Any) -> tuple[nn.Module, RewrittenModule]:
    torch.manual_seed(0)
    model = cls()
    return model, graphreg.regularize(model, rng=1, **(keywords or ALL))


def batch(features: int = 6, rows: int = 32) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(5))


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))


def run(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Outputs and penalties; the model's own dropout draws the same each time."""
    torch.manual_seed(11)
    return tensors(module(*inputs))


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def shared(a: nn.Module, b: nn.Module) -> set[int]:
    """Tensors and modules that two modules have in common."""

    def things(module: nn.Module) -> set[int]:
        rules = getattr(module, "graphreg_rules", None)
        strengths = rules.strengths.values() if rules is not None else ()
        return {id(x) for x in (*module.parameters(), *module.buffers(), *module.modules(), *strengths)}

    return things(a) & things(b)


# --- copies ------------------------------------------------------------------------------------------------------


def pickled(module: RewrittenModule) -> RewrittenModule:
    return pickle.loads(pickle.dumps(module))


def saved(module: RewrittenModule, folder: Path) -> RewrittenModule:
    torch.save(module, folder / "module.pt")
    return torch.load(folder / "module.pt", weights_only=False)


Copies = Callable[[RewrittenModule], list[RewrittenModule]]


@pytest.fixture
def copies(tmp_path: Path) -> Copies:
    """The copies of a module by deepcopy, by pickle and by torch.save."""
    return lambda module: [copy.deepcopy(module), pickled(module), saved(module, tmp_path)]


@pytest.mark.parametrize("name", SMALL)
def test_a_copy_is_independent_and_goes_on_alike(name: str, copies: Copies) -> None:
    model, module = made(SMALL[name])
    run(module, batch())  # not at its first call
    twins, others = copies(module), copies(module)
    report = graphreg.report(module)
    for twin, other in zip(twins, others, strict=True):
        assert shared(twin, module) == shared(twin, model) == shared(twin, other) == set()
        assert {m: str(g) for m, g in twin.graphs.items()} == {m: str(g) for m, g in module.graphs.items()}
        assert graphreg.report(twin) == report
        assert graphreg.rng_state(twin) == graphreg.rng_state(module)
        other.eval()
        assert module.training and all(m.training for m in module.modules())
    first, second = run(module, batch()), run(module, batch())
    assert not torch.equal(first[0], second[0])
    for twin, other in zip(twins, others, strict=True):
        assert graphreg.rng_state(twin)["call"] == 1  # its own counter
        assert equal(run(twin, batch()), first) and equal(run(twin, batch()), second)  # the other's mode does not silence it
        assert equal(run(other, batch()), run(other, batch()))  # nor its mode the other
        graphreg.set_strength(other, "weight_l2", 3.0)
        assert graphreg.strengths(other)["weight_l2"] == 3 and graphreg.strengths(module)["weight_l2"] == ALL["weight_l2"]
        assert torch.allclose(other(batch()).penalties["weight_l2"], 300 * module(batch()).penalties["weight_l2"])


def test_a_copy_trains_alone() -> None:
    model, module = made(Blocks)
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(module)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    output, penalties = twin(batch())
    (output.square().mean() + sum(penalties.values())).backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert not torch.equal(twin.head.weight, module.head.weight)


def test_a_compiled_module_is_copied_without_its_compiled_code(copies: Copies) -> None:
    _, module = made(Blocks)
    plain = run(copy.deepcopy(module), batch())
    module.compile(backend="eager")
    assert all(equal(run(twin, batch()), plain) for twin in copies(module))


CHILD = """
import sys, torch
cases = torch.load(sys.argv[1], weights_only=False)
answers = {}
for name, (module, x) in cases.items():
    for mode in (True, False):
        torch.manual_seed(11)
        output, penalties = module.train(mode)(x)
        answers[name, mode] = (output, penalties, type(output).__name__)
torch.save(answers, sys.argv[2])
"""


def test_a_saved_module_gives_the_same_in_a_new_process(tmp_path: Path) -> None:
    cases = {
        "one graph": (made(Blocks)[1], batch()),
        "two graphs": (made(Auxiliary)[1], batch()),
        "root train()": (made(Frozen)[1], batch()),
    }
    assert [len(module.graphs) for module, _ in cases.values()] == [1, 2, 1]
    for module, x in cases.values():
        run(module, x)  # not at its first call
    torch.save(cases, tmp_path / "cases.pt")
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    subprocess.run(
        [sys.executable, "-W", "error", str(script), str(tmp_path / "cases.pt"), str(tmp_path / "answers.pt")],
        check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    answers = torch.load(tmp_path / "answers.pt", weights_only=False)
    for (name, mode), (output, penalties, kind) in answers.items():
        module, x = cases[name]
        torch.manual_seed(11)
        ours = module.train(mode)(x)
        assert equal(tensors(output), tensors(ours.output)), (name, mode)
        assert type(ours.output).__name__ == kind
        assert penalties.keys() == ours.penalties.keys() and equal(list(penalties.values()), list(ours.penalties.values()))


# --- state, and all else that the model has ----------------------------------------------------------------------


class Carrying(nn.Module):
    """Parameters, buffers and layers that the forward never uses, tied weights, plain attributes, methods, a version of its own."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.unused = nn.Linear(6, 6), nn.Linear(2, 2)
        self.same = self.encode  # one layer under two names
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.encode.weight
        self.spare = nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("scratch", torch.randn(6), persistent=False)
        self.classes = ["cat", "dog"]
        self.threshold = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(torch.relu(self.same((x - self.mean) * self.scale + self.scratch)))

    def predict(self, x: Tensor) -> list[str]:
        return [self.classes[i] for i in self(x).argmax(1) % 2]


class Tied(nn.Module):
    """Six layers under twelve names, four of them doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again_a, self.again_b = self.a, self.b
        self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4)
        self.d.weight, self.d.bias = self.a.weight, self.b.bias

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.again_a, self.again_b, self.c, self.d):
            x = torch.tanh(layer(x))
        return x


STATES: dict[str, Callable[[], nn.Module]] = {
    "carrying": Carrying, "tied": Tied, "blocks": Blocks, "mnasnet": lambda: tv.mnasnet0_5(num_classes=10),
    "googlenet": lambda: tv.googlenet(num_classes=10, init_weights=False),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_the_state_dict_is_the_models(name: str) -> None:
    torch.manual_seed(0)
    model = STATES[name]()
    keys, metadata = list(model.state_dict()), copy.deepcopy(model.state_dict()._metadata)
    module = graphreg.regularize(model, rng=1, **ALL)
    state = module.state_dict()
    assert list(state) == keys and state._metadata == metadata and list(state._metadata) == list(metadata)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    other = STATES[name]()
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    third = STATES[name]()
    assert str(module.load_state_dict(third.state_dict())) == "<All keys matched successfully>"
    for key, value in third.state_dict().items():
        assert torch.equal(module.state_dict()[key], value) and torch.equal(model.state_dict()[key], value)
    stripped = graphreg.strip(module).state_dict()
    assert list(stripped) == keys and stripped._metadata == metadata
    assert state._metadata[""]["version"] == (1 if name in ("tied", "blocks", "googlenet") else 2)


def test_tied_weights_go_by_each_of_their_names() -> None:
    traced = graphreg.trace(Tied())
    found = {site.name: site.names for site in traced.parameters}
    assert found["a.weight"] == ("a.weight", "again_a.weight", "d.weight") and len(found) == 6
    assert "again_a.weight, d.weight" in str(graphreg.names(traced))
    for selector in ("d.weight", "again_a.*", ["a.weight", "d.weight"]):
        plan = graphreg.plan(traced, WeightL2(selector, 0.1))
        assert [site.name for edit in plan.edits for site in edit.sites] == ["a.weight"]
    everything = graphreg.plan(traced, WeightL2("*", 0.1))
    assert len(everything.edits) == 3
    penalties = graphreg.rewrite(traced, everything)(torch.ones(2, 4)).penalties
    weights = [p for p in traced.model.parameters() if p.dim() == 2]
    torch.testing.assert_close(penalties["weight_l2"], 0.1 * torch.stack([w.square().mean() for w in weights]).mean())


def test_tied_weights_stay_tied(copies: Copies) -> None:
    model, module = made(Tied)
    assert len(module.state_dict()) == 12
    for each in (module, *copies(module), *(twin.double() for twin in copies(module))):
        assert len(each.state_dict()) == 12 and len(list(each.parameters())) == len(list(model.parameters())) == 6
        assert each.again_a is each.a and each.again_b is each.b
        assert each.d.weight is each.a.weight and each.d.bias is each.b.bias
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    output, penalties = module(batch(4))
    (output.sum() + sum(penalties.values())).backward()
    optimizer.step()
    assert module.d.weight is module.a.weight and model.d.weight is module.d.weight


def test_what_the_forward_does_not_use_is_carried_over_and_a_missing_method_says_where_it_lives(copies: Copies) -> None:
    model, module = made(Carrying)
    for name in ("unused", "spare", "scale", "mean", "scratch", "encode", "same", "twin"):
        assert getattr(module, name) is getattr(model, name), name
    assert module.classes is model.classes and module.threshold == 0.5
    assert [n for n, _ in module.named_buffers() if not n.startswith("graphreg_rules")] == ["mean", "scratch"]
    twins = copies(module)
    for twin in twins:
        assert twin.classes == ["cat", "dog"] and twin.threshold == 0.5 and "scratch" not in twin.state_dict()
        assert torch.equal(twin.spare, model.spare) and torch.equal(twin.unused.weight, model.unused.weight)
    for each in (module, *twins):
        with pytest.raises(AttributeError, match="'predict' belongs to Carrying"):
            each.predict(batch())
        with pytest.raises(AttributeError, match="nonsense"):
            _ = each.nonsense
        assert not hasattr(each, "predict")
    with pytest.raises(AttributeError, match="'predict' belongs to Carrying"):
        graphreg.strip(module).predict(batch())


# --- hooks and forwards of an instance ---------------------------------------------------------------------------


def doubled(_: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def shifted(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 1, *args[1:])


def shifted_keywords(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return tuple(a - 3 for a in args), {name: value - 3 for name, value in kwargs.items()}


def root_forward_hook(model: nn.Module) -> None:
    model.register_forward_hook(doubled)


def root_pre_hook(model: nn.Module) -> None:
    model.register_forward_pre_hook(shifted)


def root_pre_hook_with_keywords(model: nn.Module) -> None:
    model.register_forward_pre_hook(shifted_keywords, with_kwargs=True)


def both_root_hooks(model: nn.Module) -> None:
    root_forward_hook(model)
    root_pre_hook(model)


def forward_of_the_instance(model: nn.Module) -> None:
    plain = model.forward
    model.forward = lambda x: plain(x * 2) + 1


def method_of_the_instance(model: nn.Module) -> None:
    model.forward = types.MethodType(lambda self, x: self.head(self.body(x)), model)


def leaf_hooks(model: nn.Module) -> None:
    model.head.register_forward_hook(doubled)
    model.body[0].register_forward_pre_hook(shifted)


def block_hooks(model: nn.Module) -> None:
    model.body.register_forward_hook(doubled)
    model.more.register_forward_pre_hook(shifted)


def forward_of_a_block(model: nn.Module) -> None:
    plain = model.body.forward
    model.body.forward = lambda x: plain(x) * 3


HOOKS = [
    root_forward_hook, root_pre_hook, root_pre_hook_with_keywords, both_root_hooks, forward_of_the_instance,
    method_of_the_instance, leaf_hooks, block_hooks, forward_of_a_block,
]  # fmt: skip


@pytest.mark.parametrize("hooking", HOOKS)
def test_hooks_and_forwards_of_the_instance_are_in(hooking: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = Blocks().eval()
    plain = model(batch())
    hooking(model)
    hooked = model(batch())
    assert not torch.equal(plain, hooked)
    module = graphreg.regularize(model, rng=1, **ALL)
    assert torch.equal(module(batch()).output, hooked)
    assert torch.equal(graphreg.strip(module)(batch()), hooked)
    assert torch.equal(model(batch()), hooked)  # and the model still has them, once


def test_a_hook_of_a_layer_is_called_once_a_call_on_tensors() -> None:
    torch.manual_seed(0)
    model, seen = Blocks(), []
    handle = model.body[0].register_forward_hook(lambda m, args, out: seen.append(type(out)))
    module = graphreg.regularize(model, rng=1, **ALL)
    assert seen == []
    module(batch())
    assert seen == [Tensor]
    handle.remove()
    module(batch())
    assert seen == [Tensor]


# --- modes -------------------------------------------------------------------------------------------------------


def statistics(norm: nn.Module) -> list[Tensor]:
    return [norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()]


def step(module: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.5, weight_decay=0.1)
    output, penalties = module(x)
    (sum(t.square().mean() for t in tensors(output)) + sum(penalties.values())).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_root_that_overrides_train_is_obeyed_and_a_copys_train_does_not_reach_the_original(copies: Copies) -> None:
    model, module = made(Frozen)
    twins = copies(module)
    for each in (*twins, module):
        assert each.train() is each and each.training
        assert not each.body[1].training and each.more[1].training and each.body.training
        frozen, free = statistics(each.body[1]), statistics(each.more[1])
        step(each, batch())
        assert equal(statistics(each.body[1]), frozen) and not equal(statistics(each.more[1]), free)
        assert each.eval() is each and not each.training and not any(m.training for m in (each.body, each.more[1]))
        assert each is module or (module.training and model.more[1].training)
        each.train()
    assert not model.body[1].training and model.more[1].training


class Functional(nn.Module):
    """A batch norm by hand: its mode is a literal of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.register_buffer("running_mean", torch.zeros(16))
        self.register_buffer("running_var", torch.ones(16))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1)


class FunctionalBlocks(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.body[1], self.more[1] = Functional(), Functional()


class TwoFormBlocks(FunctionalBlocks):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        h = self.body(x)
        answer = self.head(self.more(h) + h)
        return (answer, h) if self.training else answer


@pytest.mark.parametrize("cls", [Blocks, FunctionalBlocks, TwoFormBlocks])
def test_a_batch_norm_set_apart_stays_still(cls: type[Blocks]) -> None:
    torch.manual_seed(0)
    model = cls()
    norm, other = model.train().body[1], model.more[1]
    norm.eval()
    for p in norm.parameters():
        p.requires_grad_(False)
    module = graphreg.regularize(model, rng=1, **ALL)
    assert not norm.training and other.training and not module.body[1].training
    frozen = [*statistics(norm), norm.weight.clone(), norm.bias.clone()]
    moving, weight = other.running_mean.clone(), other.weight.clone()
    for _ in range(2):
        step(module, batch())
    assert equal([*statistics(norm), norm.weight, norm.bias], frozen)
    assert not torch.equal(other.running_mean, moving) and not torch.equal(other.weight, weight)
    assert norm.weight.grad is None and not norm.weight.requires_grad
    module.train()  # as nn.Module does: this puts it into train mode
    step(module, batch())
    assert not torch.equal(norm.running_mean, frozen[0])


def test_modes_set_on_the_models_layers_reach_the_result() -> None:
    model, module = made(Blocks, dropout={"body": 0.5, "more": 0.5})
    model.eval()
    assert torch.equal(module(batch()).output, model(batch()))
    model.body.train()
    with masks(module) as seen:
        module(batch())
    assert not bool(seen["body_2_dropout"].all()) and bool(seen["more_2_dropout_1"].all())


@pytest.mark.parametrize("cls", [Net, TwoForms, Blocks])
def test_modes_set_on_the_model_reach_what_its_root_owns(cls: type[nn.Module]) -> None:
    model, module = made(cls)
    model.eval()
    assert equal(tensors(module(batch()).output), tensors(model(batch())))
    model.train()
    first, second = module(batch()).output, module(batch()).output
    assert not torch.equal(tensors(first)[0], tensors(second)[0])
    module.eval()
    assert torch.equal(model(batch()), module(batch()).output)


def test_splices_follow_the_module_that_owns_the_site() -> None:
    model, module = made(Blocks, hidden_dropout=0.5)
    model.body.eval()
    with masks(module) as seen:
        module(batch())
    assert len(seen) == 2
    assert bool(seen["body_2_hidden_dropout"].all()) and not bool(seen["add_hidden_dropout"].all())


# --- traced again, checkpointed ----------------------------------------------------------------------------------


class Bigger(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).output * 2


@pytest.mark.parametrize("name", SMALL)
def test_another_tracer_is_refused(name: str) -> None:
    _, module = made(SMALL[name])
    before = graphreg.rng_state(module)
    for root in (module, Bigger(module), nn.Sequential(module)):
        with pytest.raises(TraceError, match="strip"):
            fx.symbolic_trace(root)
        with pytest.raises(GraphRegError, match="strip"):
            graphreg.trace(root)
    assert graphreg.rng_state(module) == before


def test_the_cure_that_the_refusal_names_works_and_a_stripped_module_is_regularized_again() -> None:
    model, module = made(Blocks)
    stripped = graphreg.strip(module)
    again = graphreg.regularize(stripped, rng=1, **ALL)
    assert again.graphs.keys() == module.graphs.keys() and str(again.graph) == str(module.graph)
    assert equal(run(again, batch()), run(module, batch()))
    traced = fx.symbolic_trace(stripped.eval())
    assert torch.equal(traced(batch()), model.eval()(batch()))


@pytest.mark.parametrize("name", ["net", "blocks"])
def test_checkpointing_the_whole_of_it_is_refused(name: str) -> None:
    _, module = made(SMALL[name])
    for reentrant in (False, True):
        x = batch().requires_grad_()
        output = checkpoint(lambda x: module(x).output, x, use_reentrant=reentrant)
        with pytest.raises(GraphRegError, match="checkpoint only blocks inside"):
            output.sum().backward()


@pytest.mark.parametrize("keywords", [ALL, {"hidden_l1": 0.1}])
def test_checkpointing_what_draws_nothing_is_right(keywords: dict[str, Any]) -> None:
    _, module = made(Net, **keywords)
    module.eval()

    def loss(x: Tensor) -> Tensor:
        output, penalties = module(x)
        return output.square().sum() + sum(penalties.values())

    y = batch().requires_grad_()
    loss(y).backward()
    for reentrant in (False, True):
        x = batch().requires_grad_()
        checkpoint(loss, x, use_reentrant=reentrant).backward()
        assert torch.equal(x.grad, y.grad)


def test_checkpointing_inside_is_right() -> None:
    """Blocks of the model may recompute themselves; what graphreg adds stands around them."""
    grads = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = Blocks()
        module = graphreg.regularize(model, rng=1, hidden_dropout=0.3, hidden_l1=0.1)
        if reentrant is not None:
            plain = model.more[2].forward
            model.more[2].forward = lambda z, plain=plain, how=reentrant: checkpoint(plain, z, use_reentrant=how)
            model.more[2].inplace = False
        output, penalties = module(batch())
        (output.square().mean() + sum(penalties.values())).backward()
        grads.append([p.grad for p in module.parameters()])
    assert equal(grads[0], grads[1]) and equal(grads[0], grads[2])


# --- dtypes and devices ------------------------------------------------------------------------------------------


def test_a_dtype_reaches_both() -> None:
    model, module = made(Carrying)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for each in (module.float(), model.float()):
            each.to(dtype)
            for name in ("mean", "scratch", "scale", "spare"):  # what belongs to the root is the hard part
                assert getattr(model, name).dtype == dtype and getattr(module, name) is getattr(model, name), name
            assert all(p.dtype == dtype for p in (*module.parameters(), *model.parameters()))
            output, penalties = module(batch().to(dtype))
            assert output.dtype == dtype
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert penalties and all(p.dtype == wide for p in penalties.values())


TINY = {"hidden_dropout": 0.1, "weight_l2": 1e-8, "hidden_l1": 1 / 3}


def test_strengths_keep_their_float64() -> None:
    _, module = made(Blocks, **TINY)
    moves: list[Callable[[nn.Module], nn.Module]] = [nn.Module.half, nn.Module.bfloat16]
    for move in (*moves, lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.bfloat16)):
        graphreg.set_strength(module.float(), "weight_l2", 1e-8)
        before = graphreg.rng_state(module)
        move(module)
        assert graphreg.strengths(module) == TINY and graphreg.rng_state(module) == before
        leaves = [leaf for leaf in module.graphreg_rules.children() if hasattr(leaf, "strength")]
        assert leaves and all(leaf.strength.dtype == torch.float64 for leaf in leaves)
        graphreg.set_strength(module, "weight_l2", 2e-8)  # the same buffer still
        assert float(module.graphreg_rules.weight_l2.strength[0]) == 2e-8
        weights = [p for n, p in module.named_parameters() if p.dim() >= 2]
        expected = torch.tensor(2e-8) * torch.stack([w.float().square().mean() for w in weights]).mean()
        assert torch.equal(module(batch().to(weights[0].dtype)).penalties["weight_l2"], expected)


def test_strengths_and_noise_survive_to_empty() -> None:
    _, module = made(Blocks, **TINY)
    before, state = graphreg.rng_state(module), copy.deepcopy(module.state_dict())
    first = copy.deepcopy(module)(batch())
    module.to_empty(device="cpu")
    assert graphreg.strengths(module) == TINY and graphreg.rng_state(module) == before
    module.load_state_dict(state)
    again = module(batch())
    assert torch.equal(first.output, again.output) and equal(list(first.penalties.values()), list(again.penalties.values()))


def test_a_model_built_on_meta_is_regularized_and_filled_later() -> None:
    with torch.device("meta"):
        model = Blocks()
    module = graphreg.regularize(model, rng=1, **TINY)
    module.to_empty(device="cpu")
    other = Blocks()
    module.load_state_dict(other.state_dict())
    same = graphreg.regularize(other, rng=1, **TINY)
    assert graphreg.strengths(module) == TINY and graphreg.rng_state(module) == graphreg.rng_state(same)
    assert equal(run(module, batch()), run(same, batch()))


# --- strengths and noise -----------------------------------------------------------------------------------------


def test_strengths_are_read_and_set() -> None:
    _, module = made(Net)
    assert graphreg.strengths(module) == ALL
    before = module.eval()(batch()).penalties
    graphreg.set_strength(module, "hidden_l1", 2e-2)
    graphreg.set_strength(module, "weight_l2", 0)
    after = module(batch()).penalties
    assert torch.allclose(after["hidden_l1"], 2 * before["hidden_l1"]) and after["weight_l2"] == 0
    with pytest.raises(RegularizerError, match=r"\[0, 1\)"):
        graphreg.set_strength(module, "hidden_dropout", 1.0)
    with pytest.raises(RegularizerError, match="finite"):
        graphreg.set_strength(module, "hidden_l1", math.nan)
    with pytest.raises(graphreg.NoMatchError, match="hidden_l1"):
        graphreg.set_strength(module, "hiden_l1", 0.1)
    assert graphreg.strengths(module) == ALL | {"hidden_l1": 2e-2, "weight_l2": 0}


def test_a_strength_is_changed_with_no_recompilation() -> None:
    _, module = made(Net)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for i in range(4):
        graphreg.set_strength(compiled, "weight_l2", 0.1 * i)
        expected = 0.1 * i * torch.stack([w.square().mean() for w in module.parameters() if w.dim() == 2]).mean()
        assert torch.allclose(compiled(batch()).penalties["weight_l2"], expected.detach())
    assert counter.frame_count == 1 and graphreg.rng_state(compiled)["call"] == 4


def test_noise_on_keeps_the_splices_in_eval() -> None:
    model, module = made(Net)
    module.eval()
    plain = module(batch()).output
    assert torch.equal(plain, model.eval()(batch()))
    with pytest.raises(ZeroDivisionError), graphreg.noise_on(module):
        with graphreg.noise_on(module):
            first = module(batch()).output
        second = module(batch()).output
        assert not torch.equal(first, plain) and not torch.equal(second, plain) and not torch.equal(first, second)
        assert graphreg.rng_state(module)["call"] == 2
        assert not module.training
        _ = 1 / 0
    assert torch.equal(module(batch()).output, plain) and graphreg.rng_state(module)["call"] == 2


@contextmanager
def masks(module: RewrittenModule) -> Iterator[dict[str, Tensor]]:
    """What each splice keeps of a tensor of ones, at each call, by the name of its leaf."""
    seen: dict[str, Tensor] = {}
    leaves = {name: leaf for name, leaf in module.graphreg_rules.named_children() if isinstance(leaf, SpliceRule)}

    def watch(name: str) -> Callable[..., None]:
        return lambda leaf, args, _: seen.update({name: leaf.forward(torch.ones_like(args[0]), args[1]) != 0})

    handles = [leaf.register_forward_hook(watch(name)) for name, leaf in leaves.items()]
    yield seen
    for handle in handles:
        handle.remove()


def drawn(module: RewrittenModule, calls: int = 1) -> list[dict[str, Tensor]]:
    found = []
    for _ in range(calls):
        with masks(module) as seen:
            module(batch())
        found.append(dict(seen))
    return found


def dropping(*regularizers: Any, rng: Any = 1) -> RewrittenModule:
    torch.manual_seed(0)
    model = Net()
    with torch.random.fork_rng():
        return graphreg.regularize(model, regularizers, rng=rng)


def test_the_noise_resumes_exactly() -> None:
    module = dropping(BernoulliDropout(["relu", "tanh"], 0.5), GaussianNoise("tanh", 0.1))
    run(module, batch())
    state = json.loads(json.dumps(graphreg.rng_state(module)))  # a plain dict
    expected = [run(module, batch()) for _ in range(3)]
    for other in (module, dropping(BernoulliDropout(["relu", "tanh"], 0.5), GaussianNoise("tanh", 0.1), rng=99)):
        graphreg.set_rng_state(other, state)
        assert graphreg.rng_state(other) == state
        assert all(equal(run(other, batch()), each) for each in expected)


def test_a_state_of_another_module_is_refused() -> None:
    module, other = dropping(BernoulliDropout("relu", 0.5)), dropping(BernoulliDropout("tanh", 0.5))
    with pytest.raises(RegularizerError, match="relu"):
        graphreg.set_rng_state(other, graphreg.rng_state(module))
    with pytest.raises(RegularizerError, match="rng_state"):
        graphreg.set_rng_state(other, {})
    with pytest.raises(RegularizerError, match="only the state has"):
        graphreg.set_rng_state(made(Net, weight_l2=0.1)[1], graphreg.rng_state(module))


def test_calls_that_draw_nothing_do_not_move_the_counter() -> None:
    module = dropping(BernoulliDropout(["relu", "tanh"], 0.5))
    first, second = (each["relu_dropout"] for each in drawn(copy.deepcopy(module), 2))
    assert torch.equal(drawn(module)[0]["relu_dropout"], first)
    for _ in range(3):
        module.eval()(batch())
    assert graphreg.rng_state(module)["call"] == 1
    assert torch.equal(drawn(module.train())[0]["relu_dropout"], second)
    with torch.no_grad():
        module(batch())
    assert graphreg.rng_state(module)["call"] == 3


def test_the_mask_of_a_site_stays_when_others_come() -> None:
    alone = drawn(dropping(BernoulliDropout("relu", 0.5)), 3)
    for more in (
        [BernoulliDropout(["relu", "tanh"], 0.5)], [BernoulliDropout("x", 0.5), BernoulliDropout("relu", 0.5)],
        [BernoulliDropout("relu", 0.5), HiddenL1("relu", 0.1), WeightL2("*", 0.1)],
    ):  # fmt: skip
        found = drawn(dropping(*more), 3)
        names = [next(n for n in each if n.startswith("relu_dropout")) for each in found]
        assert all(torch.equal(a["relu_dropout"], b[n]) for a, b, n in zip(alone, found, names, strict=True))


def agreement(a: Tensor, b: Tensor) -> float:
    """The share of the elements at which two masks agree; by chance a half, at p = 0.5."""
    return float((a == b).double().mean())


def test_masks_differ_between_sites_steps_seeds_and_occurrences() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 4096)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(torch.exp(self.first(x)))

    def masks_of(rng: int) -> list[Tensor]:
        module = graphreg.regularize(Wide(), BernoulliDropout(["exp", "sigmoid"], 0.5), rng=rng)
        found: list[Tensor] = []
        for _ in range(2):
            with masks(module) as seen:
                module(torch.zeros(8, 6))
            found += [seen["exp_dropout"], seen["sigmoid_dropout"]]
        return found

    found = [*masks_of(1), *masks_of(2), *masks_of(-1)]
    count = found[0].numel()
    assert count == 8 * 4096
    for i, a in enumerate(found):
        assert abs(float(a.double().mean()) - 0.5) < 5 * (0.25 / count) ** 0.5
        for b in found[:i]:
            assert abs(agreement(a, b) - 0.5) < 5 * (0.25 / count) ** 0.5


def test_two_dropouts_at_one_site_draw_apart() -> None:
    module = dropping(BernoulliDropout("relu", 0.5), BernoulliDropout("relu", 0.5, name="again"))
    inputs = torch.ones(64, 16)
    key = module.graphreg_rules.key()
    a, b = (module.graphreg_rules.get_submodule(name)(inputs, key) for name in ("relu_dropout", "relu_again"))
    assert abs(agreement(a != 0, b != 0) - 0.5) < 5 * (0.25 / 1024) ** 0.5


def test_the_seed_of_torch_governs_what_has_none() -> None:
    def masks_after(seed: int, **options: Any) -> tuple[Tensor, Tensor]:
        model = Net()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        module = graphreg.regularize(model, hidden_dropout=0.5, **options)
        return drawn(module)[0]["relu_hidden_dropout"], torch.tensor(not torch.equal(torch.get_rng_state(), before))

    assert torch.equal(masks_after(3)[0], masks_after(3)[0]) and not torch.equal(masks_after(3)[0], masks_after(4)[0])
    assert torch.equal(masks_after(3, rng=5)[0], masks_after(4, rng=5)[0])
    generators = [torch.Generator().manual_seed(n) for n in (8, 8, 9)]
    a, b, c = (masks_after(3, rng=g)[0] for g in generators)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize(("options", "moves"), [({"rng": 5}, False), ({"rng": torch.Generator()}, False), ({}, True)])
def test_torchs_generator_is_drawn_from_once_or_not_at_all(options: dict[str, Any], moves: bool) -> None:
    model = Net()
    torch.manual_seed(3)
    torch.randint(1 << 62, ())
    once = torch.get_rng_state()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    graphreg.regularize(model, hidden_dropout=0.5, hidden_noise=0.5, **options)
    assert torch.equal(torch.get_rng_state(), once if moves else before)
    graphreg.regularize(model, weight_l2=0.5)  # nothing to draw
    assert torch.equal(torch.get_rng_state(), once if moves else before)


def test_a_splice_with_a_seed_of_its_own() -> None:
    def masks_of(rng: int, own: Any) -> dict[str, Tensor]:
        return drawn(dropping(BernoulliDropout("relu", 0.5, rng=own), BernoulliDropout("tanh", 0.5, name="other"), rng=rng))[0]

    a, b, c = masks_of(1, 7), masks_of(2, 7), masks_of(1, 8)
    assert torch.equal(a["relu_dropout"], b["relu_dropout"]) and not torch.equal(a["relu_dropout"], c["relu_dropout"])
    assert not torch.equal(a["tanh_other"], b["tanh_other"]) and torch.equal(a["tanh_other"], c["tanh_other"])
    d, e = (masks_of(1, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(d["relu_dropout"], e["relu_dropout"]) and not torch.equal(d["relu_dropout"], a["relu_dropout"])


@pytest.mark.parametrize("rng", ["7", 1.5, True, torch.tensor(3)])
def test_what_is_no_seed_is_refused(rng: Any) -> None:
    with pytest.raises(RegularizerError, match="rng"):
        dropping(BernoulliDropout("relu", 0.5), rng=rng)
    with pytest.raises(RegularizerError, match="rng"):
        dropping(BernoulliDropout("relu", 0.5, rng=rng))


# --- exact -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attend(h, h, h)[0]
        x = x + self.body(x)
        x *= 0.5
        return x.mean(1)


EXACT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "net": (Net, batch), "two_forms": (TwoForms, batch), "blocks": (Blocks, batch), "tied": (Tied, lambda: batch(4)),
    "resnet18": (lambda: tv.resnet18(num_classes=10), image), "attention": (Attention, lambda: torch.randn(3, 5, 8)),
    "mobilenet": (lambda: nn.Sequential(*tv.mobilenet_v3_small().features[:5], nn.AdaptiveAvgPool2d(1), nn.Flatten()), image),
}  # fmt: skip


def zeroed(model: nn.Module, *regularizers: Any) -> RewrittenModule:
    module = graphreg.regularize(model, regularizers, rng=1)
    for name in graphreg.strengths(module):
        graphreg.set_strength(module, name, 0)
    return module


def gradients(module: nn.Module, outputs: list[Tensor], more: Any = 0) -> list[Tensor]:
    for p in module.parameters():
        p.grad = None
    (sum(t.square().mean() for t in outputs) + more).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


@pytest.mark.parametrize("name", EXACT)
def test_with_all_strengths_0_it_is_the_model_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = EXACT[name]
    model, x = make(), inputs()
    original = copy.deepcopy(model)
    module = zeroed(
        model, HiddenL1("*", 0.3), BernoulliDropout("*", 0.3), GaussianNoise("*", 0.2),
        HiddenL1("*", 0.1, name="before", clean=True), WeightL2("*", 0.1),
    )  # fmt: skip
    for mode in (True, False):
        torch.manual_seed(4)
        theirs = tensors(original.train(mode)(x))
        torch.manual_seed(4)
        output, penalties = module.train(mode)(x)
        assert equal(tensors(output), theirs)
        assert all(value == 0 for value in penalties.values()) and len(penalties) == 3
        assert equal(gradients(module, tensors(output), sum(penalties.values())), gradients(original, theirs))
        assert equal(list(module.state_dict().values()), list(original.state_dict().values()))  # running statistics


class View(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)


class BaseWritten(View):
    """A view is read after its base was overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        view = h.view(-1, 2, 2)
        h.add_(1)
        return view * 2


class ViewWritten(View):
    """The base is read after a view of it was overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        view = h.view(-1, 2, 2)
        more = view.add_(1)
        return h * 2 + more.view(-1, 4)


class Unread(View):
    """The base is read after a view of it was overwritten, whose value nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        view = h.view(-1, 2, 2)
        view.relu_()
        return h * 2


class DropoutThenInPlace(View):
    """In eval mode the dropout's output is its input, and the ReLU writes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.act, self.head = nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(self.act(self.drop(h))) + h


@pytest.mark.parametrize("regularizer", [HiddenL1, BernoulliDropout])
@pytest.mark.parametrize(
    ("cls", "site"),
    [(BaseWritten, "view"), (BaseWritten, "body"), (ViewWritten, "view"), (ViewWritten, "body"), (ViewWritten, "add_"),
     (Unread, "view"), (Unread, "body"), (DropoutThenInPlace, "drop"), (DropoutThenInPlace, "body"), (DropoutThenInPlace, "act")],
)  # fmt: skip
def test_writes_through_another_name_of_the_value_are_the_models(cls: type[nn.Module], site: str, regularizer: Any) -> None:
    """A penalty never changes what the model computes; a splice whose value is written from elsewhere may be refused."""
    torch.manual_seed(0)
    model = cls()
    try:
        module = zeroed(model, regularizer(site, 0.5))
    except GraphRegError as error:
        assert regularizer is BernoulliDropout and site in str(error) and "failed its check" not in str(error), error
        return
    for mode in (False, True):
        assert equal(run(module.train(mode), batch(4))[:1], run(model.train(mode), batch(4))), f"training={mode}"


def test_a_splice_that_changes_nothing_says_so() -> None:
    """In Unread, nobody reads what ``relu_`` returns: a dropout there would do nothing, in silence."""
    with pytest.raises(GraphRegError, match="relu_"):
        graphreg.regularize(Unread(), BernoulliDropout("relu_", 0.5))


@pytest.mark.parametrize("name", ["blocks", "net"])
def test_under_autocast_penalties_are_float32_and_exact(name: str) -> None:
    _, module = made(SMALL[name], hidden_l1=0.3, weight_l2=0.1, hidden_dropout=0.2)
    seen: list[Tensor] = []
    measures = [leaf for leaf in module.graphreg_rules.children() if isinstance(leaf, Measure)]
    for leaf in measures:
        leaf.register_forward_hook(lambda _, args, out: seen.append(args[0].detach().clone()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, penalties = module(batch())
    assert output.dtype == torch.bfloat16
    assert len(seen) == len(measures) == 2 and torch.bfloat16 in {z.dtype for z in seen}
    values = torch.stack([z.float().abs().mean() for z in seen]).mean() * torch.tensor(0.3)
    weights = torch.stack([w.square().mean() for w in module.parameters() if w.dim() == 2]).mean() * torch.tensor(0.1)
    assert penalties["hidden_l1"].dtype == penalties["weight_l2"].dtype == torch.float32
    assert torch.equal(penalties["hidden_l1"], values) and torch.equal(penalties["weight_l2"], weights)


class DropsBehind(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.dropout(h, 0.5, training=self.training)


class TwoWays(nn.Module):
    """Two graphs; the dropout stands directly behind what each mode does in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.hid, self.drop, self.out = nn.Linear(4, 8), DropsBehind(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hid(x)
        h = h * 2.0 if self.training else h + 0.5
        y: Tensor = self.out(self.drop(h))
        return y


def test_a_dropout_set_apart_behind_another_structure_follows_its_own_mode() -> None:
    model, x = TwoWays(), torch.randn(16, 4)
    model.drop.eval()
    module = graphreg.regularize(model, weight_l2={"weight": 0.0})
    assert set(module.graphs) == {"train", "eval"}
    assert torch.equal(module(x).output, model(x))
    for mode in (True, False):
        model.train(mode)  # reaches the block, too
        for inner in (True, False):
            model.drop.train(inner)
            torch.manual_seed(0)
            ours = module(x).output
            torch.manual_seed(0)
            assert torch.equal(ours, model(x)), (mode, inner)
    assert [own.site.name for own in graphreg.trace(model).native_dropout] == ["drop.dropout"]
