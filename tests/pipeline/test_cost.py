"""What regularize() costs grows with the graph and no faster: counted in function calls, which no load on a machine changes."""

from __future__ import annotations

import cProfile
import gc
import pstats
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

import graphreg
from graphreg import TraceError
from graphreg.passes import BernoulliDropout, HiddenL1, WeightL2
from graphreg.tracing import shape_decisions as decisions
from graphreg.tracing.side_effects import retrace
from graphreg.tracing.symbolic import other_mode, tracer

WIDTH = 4
SITES = {"hidden_dropout": 0.1, "hidden_l1": 1e-3, "weight_l2": 1e-4}


class Sized(nn.Module):
    """Something done ``count`` times over."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer() for _ in range(count))
        self.head = nn.Linear(WIDTH, WIDTH)

    def layer(self) -> nn.Module:
        return nn.Linear(WIDTH, WIDTH)


class Block(nn.Module):
    """Residual, with a dropout that depends on the mode and an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.linear(F.dropout(self.norm(x), 0.1, self.training)))
        return self.linear(F.gelu(h)) + x


class Deep(Sized):
    def layer(self) -> nn.Module:
        return Block()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.head(x)


class Fan(Sized):
    """One value that all layers read; one sum of them all."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x).relu()
        return torch.stack([layer(h) for layer in self.layers]).sum(0)


class Parts(Sized):
    """One value in parts, which share its storage, each of which a layer reads."""

    def forward(self, x: Tensor) -> Tensor:
        parts = self.head(x).sigmoid().repeat(1, len(self.layers)).chunk(len(self.layers), 1)
        read = [layer(parts[i]) for i, layer in enumerate(self.layers)]
        return torch.stack(read).sum(0) + self.head(x).view(-1, WIDTH).mul_(2)


class Written(Sized):
    """One storage that every layer's output is written into."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for layer in self.layers:
            out = out.add_(layer(self.head(x).tanh()))
        return out


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h if float(h.sum()) > 0 else -h


class Whole(Sized):
    """Modules that become opaque after a part of each was traced and rolled back; names that repeat."""

    def layer(self) -> nn.Module:
        return Untraceable()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return self.head(x)


class Modes(Sized):
    """A structure that depends on the mode: two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.relu()) if self.training else layer(x.relu()) * 0.9
        return self.head(x)


def calls_of(run: Callable[[], object]) -> int:
    profile, enabled = cProfile.Profile(), gc.isenabled()
    gc.disable()  # a collection calls what other tests have left to be finalized
    try:
        profile.runcall(run)
    finally:
        if enabled:
            gc.enable()
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined, no-any-return]


def calls(model: nn.Module) -> int:
    return calls_of(lambda: graphreg.regularize(model, rng=0, **SITES))


@pytest.mark.parametrize("kind", [Deep, Fan, Parts, Written, Whole, Modes])
def test_twice_the_model_is_twice_the_work(kind: type[Sized]) -> None:
    calls(kind(4))  # imports, caches
    first, second, third = (calls(kind(n)) for n in (25, 50, 75))
    # by differences, so that what is done once does not hide what is done for each: 2 of a line is 1, of a square 5 / 3
    assert (third - second) / (second - first) < 1.1


def test_twice_the_exact_names_are_twice_the_work() -> None:
    traced = graphreg.trace(Deep(40))
    sites = [site.name for site in traced.values if site.selectable]
    weights = [site.name for site in traced.parameters if site.shape and len(site.shape) > 1]
    counted: dict[str, list[int]] = {"plan": [], "rewrite": []}
    for count in (10, 10, 20, 30):  # the first for imports and caches
        asked = [HiddenL1(sites[:count], 1.0), BernoulliDropout(sites[:count:4], 0.1), WeightL2(weights[:count], 1.0)]
        counted["plan"].append(calls_of(lambda asked=asked: graphreg.plan(traced, asked)))  # type: ignore[misc]
        plan = graphreg.plan(traced, asked)
        counted["rewrite"].append(calls_of(lambda plan=plan: graphreg.rewrite(traced, plan, rng=0)))  # type: ignore[misc]
    for _, first, second, third in counted.values():
        assert (third - second) / (second - first) < 1.2


def test_twice_the_model_is_twice_the_work_of_names() -> None:
    models = {count: Deep(count) for count in (4, 25, 50, 75)}
    counted = {count: calls_of(lambda model=model: graphreg.names(model)) for count, model in models.items()}  # type: ignore[misc]
    assert (counted[75] - counted[50]) / (counted[50] - counted[25]) < 1.1


@pytest.mark.parametrize(("kind", "traces", "follows"), [(Fan, 1, 0), (Deep, 1, 1), (Modes, 2, 1)])
def test_a_trace_takes_one_snapshot_and_looks_for_draws_a_fixed_number_of_times(
    kind: type[Sized], traces: int, follows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        original: Callable[..., object] = getattr(owner, name)

        def counting(*args: object, **more: object) -> object:
            counted[name] += 1
            return original(*args, **more)

        monkeypatch.setattr(owner, name, counting)

    count(retrace, "Snapshot")
    count(tracer, "randomness")
    count(tracer.SiteTracer, "trace")
    count(other_mode.ModeFollower, "trace")
    seen = []
    for layers in (3, 9):
        counted.clear()
        graphreg.trace(kind(layers))
        seen.append(dict(counted))
    assert seen[0] == seen[1] and seen[0]["Snapshot"] == 1 and seen[0]["trace"] == traces + follows


def test_a_model_as_deep_as_the_benchmarks_is_no_recursion() -> None:
    module = graphreg.regularize(Deep(1500), rng=0, **SITES)
    assert len(module.graph.nodes) > 10_000


@pytest.mark.parametrize(("kind", "graphs"), [(Deep, 1), (Modes, 2)])
def test_code_is_generated_and_linted_once_a_graph(kind: type[Sized], graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: Counter[str] = Counter()

    def count(name: str) -> None:
        original: Callable[..., object] = getattr(fx.Graph, name)

        def counting(graph: fx.Graph, *args: object, **more: object) -> object:
            counted[name] += name == "graph_copy" or len(graph.nodes) > 0  # a GraphModule starts with an empty graph
            return original(graph, *args, **more)

        monkeypatch.setattr(fx.Graph, name, counting)

    for name in ("python_code", "lint", "graph_copy"):
        count(name)
    graphreg.regularize(kind(3), rng=0, **SITES)
    assert counted == dict.fromkeys(("python_code", "lint"), graphs)  # the rewrite copies a graph in a walk of its own


class Tuples(nn.Module):
    """Layers with tuples of numbers in attributes, which a forward that is exported leaves as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 6, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.conv(x)))  # type: ignore[no-any-return]


def test_a_model_that_changes_nothing_is_exported_once_in_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    exports, export = list[bool](), torch.export.export

    def counting(model: nn.Module, *args: object, **more: object) -> object:
        exports.append(model.training)
        return export(model, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export, "export", counting)
    graphreg.trace(Tuples(), torch.ones(2, 3, 8, 8), "export")
    assert exports == [True, False]


class Seen(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert not gc.isenabled()
        return super().forward(x)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_and_is_as_the_user_had_it(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        traced = graphreg.trace(Seen(2, 2))
        assert gc.isenabled() == enabled
        graphreg.rewrite(traced, graphreg.plan(traced, []))
        assert gc.isenabled() == enabled
        graphreg.regularize(Seen(2, 2), weight_l2=1.0)
        assert gc.isenabled() == enabled
        graphreg.names(traced, select=lambda site: not gc.isenabled())
        assert gc.isenabled() == enabled
        with pytest.raises(TraceError):
            graphreg.regularize(Untraceable(), weight_l2=1.0)
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()


class Decided(Sized):
    """A decision on a shape in each layer, answered for the example inputs and asserted in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.relu() if x.shape[0] % 2 else x.sigmoid())
        return x


def test_decisions_on_shapes_look_at_each_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[int] = Counter()
    needed = decisions.needed

    def counting(node: fx.Node, known: object) -> list[fx.Node]:
        found = needed(node, known)  # type: ignore[arg-type]
        seen[count] += len(found)
        return found

    monkeypatch.setattr(decisions, "needed", counting)
    for count in (5, 10, 15):
        graphreg.trace(Decided(count), torch.randn(3, WIDTH))
    assert seen[15] - seen[10] == seen[10] - seen[5] > 0


class Heads(nn.Module):
    """Views, whose sizes vary."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.linear(x).view(*x.shape[:-1], 2, -1).transpose(1, 2)
        return heads.transpose(1, 2).reshape(x.shape)


def test_a_recording_costs_what_an_export_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size that is multiplied before the tracer's eyes is written down, and each operator that is forgotten is found anew."""
    counted: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        original: Callable[..., object] = getattr(owner, name)

        def counting(*args: object) -> object:
            counted[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, counting)

    count(ProxyTorchDispatchMode, "__sym_dispatch__")
    count(torch._ops.OpOverload, "_uncache_dispatch")
    model, x = Heads(), torch.randn(2, 3, WIDTH)
    for mode in (True, False):
        torch.export.export(model.train(mode), (x,), dynamic_shapes=((Dim.AUTO,) * 3,), strict=False)
    theirs = counted.copy()
    counted.clear()
    graphreg.trace(model, x, front_end="export")
    assert counted["__sym_dispatch__"] <= theirs["__sym_dispatch__"]
    assert counted["_uncache_dispatch"] <= 2 * theirs["_uncache_dispatch"] > 0  # once for each trace, not for each operation
