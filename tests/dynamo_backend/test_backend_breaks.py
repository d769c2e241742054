"""The backend on models that Dynamo captures in several graphs, beside forward hooks that do the same by hand."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

import graphreg
from graphreg import GraphRegError
from graphreg.dynamo_backend.all_graphs import union
from graphreg.rng.noise import call_keys, stream
from lacking import needs_result

# torch's own, where a graph's input is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
SEED, RATE = 5, 0.25


class ByHand:
    """Hooks that drop and measure at the outputs of modules, with the masks of graphreg's streams.

    ``inner``: the value's first name, where what a block returns is the value of something in it.
    """

    def __init__(self, model: nn.Module, dropped: tuple[str, ...], measured: tuple[str, ...], inner: dict[str, str]) -> None:
        self.model, self.dropped, self.measured, self.inner = model, dropped, measured, inner
        self.drawn: Counter[str] = Counter()
        self.called: Counter[str] = Counter()
        self.values: list[Tensor] = []
        for path in {*dropped, *measured}:
            model.get_submodule(path).register_forward_hook(self.hook(path))

    def hook(self, path: str) -> Any:
        def at(module: nn.Module, inputs: Any, z: Tensor) -> Tensor:
            name = self.inner.get(path, path) + (f"_{self.called[path]}" if self.called[path] else "")
            self.called[path] += 1
            if path in self.dropped and module.training:
                words = torch.tensor([stream(SEED, name, "BernoulliDropout", 0)])
                (key,) = call_keys(words, torch.tensor([self.drawn[name]]))
                self.drawn[name] += 1
                z = z * graphreg.Noise(key).keep(z, RATE) / (1 - RATE)
            if path in self.measured:
                self.values.append(z.clone().abs().mean())  # a layer behind may write into the value
            return z

        return at

    def __call__(self, *args: Any) -> tuple[Any, Tensor]:
        self.called.clear()
        self.values.clear()
        output = self.model(*args)
        return output, 0.1 * torch.stack(self.values).mean()


def both(
    model: nn.Module, dropped: tuple[str, ...], measured: tuple[str, ...], inside: dict[str, str] | None = None, **options: Any
) -> tuple[Any, graphreg.Backend, ByHand]:
    by_hand = ByHand(copy.deepcopy(model), dropped, measured, inside or {})
    ours = {"dropout": {_calls(dropped): RATE}, "hidden_l1": {"weight": 0.1, "pattern": _calls(measured)}}
    backend = graphreg.backend(rng=SEED, **{"inner": "eager", "missing": "ignore", **ours, **options})
    return torch.compile(model, backend=backend), backend, by_hand


def _calls(paths: tuple[str, ...]) -> tuple[str, ...]:
    """A hook acts at each call of a module; ``head_1`` is the second call of ``head``."""
    return tuple(text for path in paths for text in (path, f"{path}_[0-9]"))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Branch(nn.Module):
    """Goes one way or the other, as its values go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.down, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = torch.tanh(self.up(h)) if h.sum() > 0 else torch.sigmoid(self.down(h))
        out: Tensor = self.out(h)
        return out


ALL = ("a", "up", "down", "out")


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_branch_trains_as_by_hand(inner: str) -> None:
    torch.manual_seed(0)
    model = Branch()
    run, backend, by_hand = both(model, ALL, ALL, inner=inner)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, by_hand.model)]
    ways = set()
    for i in range(6):
        x = torch.randn(3, 4) + 3 * (-1) ** i
        ours, (theirs, penalty) = run(x), by_hand(x)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(backend.penalties()["hidden_l1"], penalty)
        ways.add("up" in by_hand.called)
        loss, expected = ours.square().mean() + backend.penalties()["hidden_l1"], theirs.square().mean() + penalty
        torch.testing.assert_close(gradients(model, loss), gradients(by_hand.model, expected))
        for optimizer in optimizers:
            optimizer.step()
    assert ways == {True, False} and len(backend.subgraphs) == 3
    assert graphreg.rng_state(backend)["calls"] == {f"{name}|BernoulliDropout|0": count for name, count in by_hand.drawn.items()}


@needs_result
def test_attached_over_several_graphs() -> None:
    torch.manual_seed(0)
    model, x = Branch(), torch.randn(3, 4)
    run, backend, by_hand = both(model, ALL, ALL, penalties="attach", scale=1.0)
    theirs, penalty = by_hand(x)
    torch.testing.assert_close(gradients(model, run(x).sum()), gradients(by_hand.model, theirs.sum() + penalty))


def test_report_of_several_graphs() -> None:
    torch.manual_seed(1)
    model = Branch()
    penalty = {"weight": 0.1, "pattern": ("up", "down")}
    backend = graphreg.backend(inner="eager", missing="ignore", dropout={("a", "out"): RATE}, hidden_l1=penalty)
    run = torch.compile(model, backend=backend)
    run(torch.ones(3, 4)), run(-torch.ones(3, 4))
    broken = f"forward breaks at line {Branch.forward.__code__.co_firstlineno + 2}"
    head, to_end = "code".ljust(len(broken)), "forward to its end".ljust(len(broken))
    assert graphreg.report(backend).text(None) == BRANCHES.format(head=head, broken=broken, to_end=to_end)


BRANCHES = """\
Branch, captured by torch.compile in 3 graphs: 2 regularizers at 4 values

graph  {head}  modes
1      {broken}  train
2      {to_end}  train
3      {to_end}  train

regularizer  class             strength  selector  sites          share
dropout      BernoulliDropout  0.25      a, out    2 of 8 values  22 %
hidden_l1    HiddenL1          0.1       up, down  2 of 8 values  35 %

graph  site  op      shape  dtype    what acts, in order  matched by
1      a     Linear  3x8    float32  dropout              a
2      out   Linear  3x2    float32  dropout              out
2      up    Linear  3x8    float32  hidden_l1            up
3      out   Linear  3x2    float32  dropout              out
3      down  Linear  3x8    float32  hidden_l1            down

cost: not known, because the compiler decides what it keeps"""


class Forces(nn.Module):
    """Its backward runs within its forward: Dynamo compiles it there, and calls back while it does."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(torch.tanh(self.energy(z)).sum(), z)
        output: Tensor = self.head(torch.relu(force))
        return output


def test_a_backward_within_the_forward() -> None:
    torch.manual_seed(0)
    model, x = Forces(), torch.randn(5, 4)
    backend = graphreg.backend(inner="aot_eager", weight_l2={"weight": 0.5, "pattern": "head.weight"})
    captured = torch._dynamo.testing.CompileCounter()
    torch.compile(copy.deepcopy(model), backend=captured)(x)
    if not captured.frame_count:  # torch 2.15 leaves this forward to eager
        with pytest.raises(GraphRegError, match="captured no graph of Forces"):
            torch.compile(copy.deepcopy(model), backend=backend)(x)
        return
    output = torch.compile(copy.deepcopy(model), backend=backend)(x)
    torch.testing.assert_close(output, model(x))
    (penalty,) = backend.penalties().values()
    torch.testing.assert_close(penalty, 0.5 * model.head.weight.square().mean())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        torch._dynamo.graph_break()
        out: Tensor = self.act(h)
        return out


class Blocks(nn.Module):
    """Twelve blocks of one class, each broken in the middle: one code, more modules than Dynamo's limit of recompilations."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_each_block_of_a_class_has_its_own_names_and_masks() -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(3, 4)
    dropped = tuple(f"blocks.{i}.act" for i in range(0, 12, 3)) + tuple(f"blocks.{i}.linear" for i in range(12))
    run, backend, by_hand = both(model, dropped, tuple(f"blocks.{i}.act" for i in range(12)))
    graphs = []
    for _ in range(3):
        ours, (theirs, penalty) = run(x), by_hand(x)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(backend.penalties()["hidden_l1"], penalty)
        graphs.append(len(backend.subgraphs))
    assert len(set(graphs)) == 1
    torch.testing.assert_close(gradients(model, ours.sum()), gradients(by_hand.model, theirs.sum()))


class Inside(nn.Module):
    """Breaks at what it cannot see into; what is hidden is seen only behind the break."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        torch._dynamo.graph_break()
        out: Tensor = self.b(h)
        return out


def test_a_value_that_crosses_a_break_is_hidden_as_in_one_graph() -> None:
    torch.manual_seed(0)
    model, x = Inside(), torch.randn(3, 4)
    hidden: dict[str, Any] = {"hidden_dropout": RATE, "hidden_l1": 0.1, "weight_l2": 0.1}

    class Whole(Inside):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    twin = Whole()
    twin.load_state_dict(model.state_dict())
    module = graphreg.regularize(twin, rng=SEED, **hidden)
    backend = graphreg.backend(inner="eager", rng=SEED, **hidden)
    run = torch.compile(model, backend=backend)
    for _ in range(2):
        ours, (theirs, penalties) = run(x), module(x)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(backend.penalties(), penalties)
    loss, expected = ours.sum() + sum(backend.penalties().values()), theirs.sum() + sum(penalties.values())
    torch.testing.assert_close(gradients(model, loss), gradients(twin, expected))
    assert [[e.site.name for e in part.plan.edits] for part in backend.subgraphs] == [[], ["relu", "relu"]]


def test_where_a_value_was_spliced_before_the_break_it_is_not_spliced_again() -> None:
    torch.manual_seed(0)
    backend = graphreg.backend(inner="eager", rng=SEED, dropout={"relu": RATE}, hidden_noise=0.1)
    torch.compile(Inside(), backend=backend)(torch.randn(3, 4))
    assert [[(e.name, e.site.name) for e in part.plan.edits] for part in backend.subgraphs] == [
        [("dropout", "relu")],
        [("hidden_noise", "relu")],
    ]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.act, self.out = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.act(checkpoint(self.block, x, use_reentrant=False)))
        return out


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_around_a_checkpoint(inner: str) -> None:
    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(3, 4)
    run, backend, by_hand = both(model, ("act",), ("act",), inner=inner)
    ours, (theirs, penalty) = run(x), by_hand(x)
    torch.testing.assert_close(ours, theirs)
    loss = ours.sum() + backend.penalties()["hidden_l1"]
    torch.testing.assert_close(gradients(model, loss), gradients(by_hand.model, theirs.sum() + penalty))
    names = {site.name: site.names for site in union(backend.subgraphs).values if site.selectable}
    assert list(names) == ["x", "block.2", "act", "out"] and names["block.2"] == ("block.2", "block")


DETECTED = ("backbone.body.1", "backbone.body.6", "rpn.head.conv.0.0", "roi_heads.box_head.fc6")
MEASURED = ("backbone.body.6", "backbone.body.13", "rpn.head.conv.0.0", "roi_heads.box_head.fc7")

INSIDE = {"backbone.body.1": "backbone.body.1.add", "backbone.body.6": "backbone.body.6.add"}


@pytest.mark.filterwarnings("ignore:.create_unbacked_symint. is deprecated:FutureWarning")  # torchvision's
def test_fasterrcnn_trains_as_by_hand() -> None:
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64).double()
    run, backend, by_hand = both(model, DETECTED, MEASURED, INSIDE)
    images = [torch.rand(3, 64, 64, dtype=torch.float64) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]], dtype=torch.float64), "labels": torch.tensor([1])} for _ in images]
    for seed in range(2):
        torch.manual_seed(seed)  # the model chooses sizes and samples at random
        ours = run(images, copy.deepcopy(targets))
        torch.manual_seed(seed)
        theirs, penalty = by_hand(images, copy.deepcopy(targets))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(backend.penalties()["hidden_l1"], penalty)
        loss, expected = sum(ours.values()) + backend.penalties()["hidden_l1"], sum(theirs.values()) + penalty
        torch.testing.assert_close(gradients(model, loss), gradients(by_hand.model, expected))
        for each in (model, by_hand.model):
            torch.optim.SGD(each.parameters(), lr=0.01).step()
    assert len(backend.subgraphs) > 20 and by_hand.called["rpn.head.conv.0.0"] == 3
    planned = {edit.site.name for edit in graphreg.plan(run).edits}
    assert {"roi_heads.box_head.fc6", "roi_heads.box_head.fc7"} <= planned <= {*graphreg.names(run)}


def scaled(layer: nn.Module, x: Tensor) -> Tensor:
    print(end="")  # a function of its own for Dynamo
    return layer(x).sigmoid() * 2


class Local(nn.Module):
    """After its break, Dynamo passes the submodule on in a local variable, before ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        down = self.down
        print(end="")
        return x + down(h).tanh()


class Passing(nn.Module):
    """Passes a submodule to a function, which Dynamo captures by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        print(end="")
        return x + scaled(self.down, h).tanh()


@pytest.mark.parametrize("kind", [Local, Passing])
def test_after_a_break_values_have_the_names_of_regularize(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(), kind()), torch.randn(3, 4)
    names = {each.name for each in graphreg.report(graphreg.regularize(model, hidden_l1=0.1)).sites}
    backend = graphreg.backend(hidden_l1=0.1, inner="eager", rng=0)
    torch.compile(model, backend=backend)(x)
    assert {each.name for each in backend.report().sites} == names


class Scripted(torch.jit.ScriptModule):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    @torch.jit.script_method
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)) if self.training else x  # type: ignore[no-any-return]


class AroundScripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.scripted, self.down, self.head = nn.Linear(4, 4), Scripted(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.scripted(self.up(x).relu())).relu())  # type: ignore[no-any-return]


# torch.jit imports at its first call; after two threads have traced at once, __import__ is still the function that follows imports
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_around_a_module_of_torch_jit_the_graphs_are_regularized() -> None:
    torch.manual_seed(0)
    model, x = AroundScripted(), torch.randn(3, 4)
    running = model.scripted.norm.running_mean
    backend = graphreg.backend(hidden_l1=0.1, inner="eager")
    compiled = torch.compile(model, backend=backend)
    output, once = compiled(x), running.clone()
    assert {each.name for each in backend.report().sites} == {"relu_1"}
    torch.testing.assert_close(output, model(x))
    expected = 0.9 * once + once  # the momentum is 0.1, and the batch is the same
    torch.testing.assert_close(running, expected)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.vmap(torch.func.jacrev(lambda row: self.up(row).tanh()))(x)
        return self.down(torch.vmap(lambda row: self.up(row).relu())(x)) + slopes.sum((1, 2))[:, None]  # type: ignore[no-any-return]


def test_vmap_and_jacrev_of_batches_of_other_sizes() -> None:
    torch.manual_seed(0)
    model, backend = Mapped(), graphreg.backend(weight_l2=0.1, inner="eager")
    compiled = torch.compile(model, backend=backend)
    for rows in (5, 3, 7):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), model(x))
