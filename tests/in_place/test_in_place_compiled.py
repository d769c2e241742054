"""A model that is regularized in place, compiled: frames, guards, and what cannot be traced while Dynamo compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_in_place import ASKED, MASK, Net, X, equal, gradients, net
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import graphreg


def counter(backend: str = "eager") -> Any:
    torch.compiler.reset()
    return CompileCounterWithBackend(backend)


def test_compiled_equals_eager_and_each_structure_is_one_frame() -> None:
    model, eager, frames = graphreg.regularize_(net(), **ASKED), graphreg.regularize_(net(), **ASKED), counter("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    for args in ((X,), (X,), (X, MASK), (X,), (X, MASK), (X,)):
        ours, theirs = compiled(*args), eager(*args)
        assert torch.equal(ours, theirs)
        (ours**2).sum().backward()
        (theirs**2).sum().backward()
        assert equal(gradients(model), gradients(eager))
        assert equal(model.penalties(), eager.penalties())  # type: ignore[operator]
    assert frames.frame_count == 3  # the keys have one row more when the masked sites come: the first structure is compiled again
    graphreg.set_strength(model, "weight_l2", 0.9)
    graphreg.set_rng_state(model, graphreg.rng_state(eager))
    compiled(X)
    assert frames.frame_count == 3


def test_in_place_compilation() -> None:
    model, eager = graphreg.regularize_(net(), **ASKED, compile={"backend": counter()}), graphreg.regularize_(net(), **ASKED)
    for _ in range(2):
        assert torch.equal(model(X), eager(X))
    assert torch.equal(model.eval()(X), eager.eval()(X))


def layers(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


@pytest.mark.parametrize("attach", [{}, {"weight_l2": 0.3, "hidden_l1": 0.1, "scale": 1}])
@pytest.mark.parametrize("way", ["function", "method", "option"])
def test_many_models_have_one_frame_each(attach: dict[str, Any], way: str) -> None:
    """A limit of 1 allows one compilation of each code object, so no function that the models share may be compiled."""
    frames = counter()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for width in range(1, 4):
            options = {"compile": {"backend": frames}} if way == "option" else {}
            model = graphreg.regularize_(layers(width), hidden_dropout=0.5, rng=0, **attach, **options)
            if way == "method":
                model.compile(fullgraph=True, backend=frames)
            run = torch.compile(model, fullgraph=True, backend=frames) if way == "function" else model
            assert torch.equal(run(X), graphreg.regularize_(layers(width), hidden_dropout=0.5, rng=0, **attach)(X))
    assert frames.frame_count == 3


def test_a_change_is_noticed_when_the_model_is_compiled() -> None:
    model, eager, frames = graphreg.regularize_(net(), **ASKED), graphreg.regularize_(net(), **ASKED), counter()
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    for step in range(4):
        if step == 2:
            for each in (model, eager):
                torch.manual_seed(2)
                each.head, each.gain = nn.Linear(8, 3), 2.0
        assert torch.equal(compiled(X), eager(X))
    assert frames.frame_count == 2


def test_noise_on_and_modes() -> None:
    model, frames = graphreg.regularize_(net(), **ASKED), counter()
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    compiled(X)
    plain = model.eval()(X)
    for _ in range(3):
        assert torch.equal(compiled.eval()(X), plain)
        with graphreg.noise_on(compiled):
            assert not torch.equal(compiled(X), plain)
    assert frames.frame_count == 3


class Trained(nn.Module):
    def __init__(self, model: Net) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).pow(2).mean() + 1  # type: ignore[no-any-return]


def test_within_a_larger_compiled_module() -> None:
    model, eager, frames = graphreg.regularize_(net(), **ASKED), graphreg.regularize_(net(), **ASKED), counter()
    step = torch.compile(Trained(model), fullgraph=True, backend=frames)
    with pytest.raises(Exception, match=r"GraphRegError: Net is called with arguments of the structure \(x=float32\[2\]\), for which"):
        step(X)
    torch.compiler.reset()
    graphreg.regularize_(graphreg.strip_(model), **ASKED, example_inputs=X)
    for _ in range(3):
        ours, theirs = step(X), Trained(eager)(X)
        assert torch.equal(ours, theirs)
        ours.backward()
        theirs.backward()
        assert equal(gradients(model), gradients(eager))
    assert frames.frame_count == 1
    model.gain = 3.0
    with pytest.raises(Exception, match="GraphRegError: Net is called with arguments of the structure"):
        step(X)
    model(X)
    eager.gain = 3.0
    eager(X)
    assert torch.equal(step(X), Trained(eager)(X))


def test_numbers_among_the_arguments() -> None:
    class Powers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, power: float = 1.0, times: int = 1) -> Tensor:
            for _ in range(times):
                x = torch.tanh(self.layer(x))
            return x**power

    torch.manual_seed(0)
    model, frames = graphreg.regularize_(Powers(), dropout={"layer": 0.5}, rng=1), counter()
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    for power, times in ((1.0, 1), (2.0, 1), (3.0, 2), (1.0, 3), (2.0, 1), (-1, 1), (-2, 1)):
        state = graphreg.rng_state(model)
        ours = compiled(X, power=power, times=times)
        graphreg.set_rng_state(model, state)
        assert torch.equal(ours, model(X, power, times)), (power, times)


class OfSizes(nn.Module):
    """Has one graph for up to four rows and one for more; ``by_count``: one graph for each number of rows."""

    def __init__(self, by_count: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.by_count = nn.Linear(4, 4), nn.BatchNorm1d(4), by_count

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.layer(x))
        if self.by_count:
            return h.relu_() / float(h.shape[0])
        return h.relu_() * 2 if h.shape[0] > 4 else h


@pytest.mark.parametrize("by_count", [False, True])
def test_sizes_of_which_each_needs_its_graph(by_count: bool) -> None:
    torch.manual_seed(0)
    models, frames = [OfSizes(by_count), OfSizes(by_count)], counter("aot_eager")
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        graphreg.regularize_(model, dropout={"layer": 0.5}, weight_l2=0.1, scale=1, rng=1)
    compiled, rows = torch.compile(models[0], fullgraph=True, backend=frames), []
    for size in (5, 3, 7, 3, 5, 2):
        x = torch.randn(size, 4)
        ours, theirs = compiled(x), models[1](x)
        assert torch.equal(ours, theirs), size
        ours.sum().backward()
        theirs.sum().backward()
        assert equal(gradients(models[0]), gradients(models[1])), size
        assert equal(dict(models[0].named_buffers()), dict(models[1].named_buffers())), size
        rows.append(frames.frame_count)
    assert rows[4] == rows[2]  # two sizes that have been there are not compiled again
    assert graphreg.rng_state(models[0]) == graphreg.rng_state(models[1])


def test_the_error_for_other_sizes_within_a_larger_compiled_module() -> None:
    model = graphreg.regularize_(OfSizes(False), dropout={"layer": 0.5}, example_inputs=torch.randn(5, 4))
    step = torch.compile(lambda x: model(x).sum(), fullgraph=True, backend=counter())
    step(torch.randn(5, 4))
    with pytest.raises(Exception, match=r"or compile a model that is regularized in place by itself \(torch\.compile\(model\)"):
        step(torch.randn(3, 4))
