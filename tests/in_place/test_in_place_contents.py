"""Objects, lists and variables that a graph was made for and that change in place: the graph is never used for other contents."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from test_in_place import Net, X, net
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, TraceError
from graphreg.ir import contents
from lacking import needs_objects

FACTOR = 1.0
TABLE = {"a": [1.0, 2.0]}


class Config:
    def __init__(self, gain: float = 2.0) -> None:
        self.gain, self.table = gain, [1.0, {"a": 2.0}]


class Configured(nn.Module):
    """Reads an object and lists, which are arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, config: Any = None, scales: Any = None) -> Tensor:
        h: Tensor = self.layer(x)
        for scale in scales or ():
            h = h * scale
        return h if config is None else h * config.gain * config.table[0]


def configured() -> Configured:
    torch.manual_seed(0)
    return Configured()


def test_regularize_refuses_other_contents_of_the_same_object() -> None:
    model, config, scales = configured(), Config(), [2.0]
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=(X, config, scales))
    assert torch.equal(module(X, config, scales).output, model(X, config, scales))
    assert torch.equal(module(X, Config(), [2.0]).output, model(X, config, scales))  # another object of the same contents
    config.gain = 5.0
    with pytest.raises(GraphRegError, match=r"config was Config\(gain=2.0, table=.*\) when the model was traced, and the graph is special"):
        module(X, config, scales)
    config.gain = 2.0
    config.table[0] = 3.0
    with pytest.raises(GraphRegError, match="It has other contents now, or is another object. Regularize the model once more, with this"):
        module(X, config, scales)
    config.table[0] = 1.0
    scales.append(2.0)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with pytest.raises(GraphRegError, match=r"scales was \[2.0\] when the model was traced"):
            each(X, config, scales)
    module.recompile()  # which does not take what the object has become for what it was
    with pytest.raises(GraphRegError, match=r"scales was \[2.0\]"):
        module(X, config, scales)
    with pytest.raises(GraphRegError, match=r"scales was \[2.0\]"):
        torch.compile(module, backend="eager")(X, config, scales)


def test_a_forward_that_changes_its_argument_is_refused() -> None:
    class Counts(Configured):
        def forward(self, x: Tensor, config: Any = None, scales: Any = None) -> Tensor:
            config.gain += 1
            return super().forward(x, config, scales)

    with pytest.raises(TraceError, match="the forward of Counts changes the contents of its argument config, which a graph would not do"):
        graphreg.regularize(Counts(), weight_l2=0.1, example_inputs=(X, Config()))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_objects)])
def test_in_place_other_contents_are_another_structure(compiled: bool) -> None:
    model, plain, config, scales = graphreg.regularize_(configured(), weight_l2=0.1, scale=1), configured(), Config(), [2.0]
    torch.compiler.reset()
    call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model

    def graphs() -> int:
        assert torch.equal(call(X, config, scales), plain(X, config, scales))
        return len(vars(model)["graphreg_in_place"]._made)

    assert [graphs(), graphs()] == [1, 1]
    config.gain = 5.0
    assert [graphs(), graphs()] == [2, 2]
    scales.append(3.0)
    assert graphs() == 3
    config = Config(5.0)
    assert graphs() == 3
    config.gain, scales[1:] = 2.0, []
    assert graphs() == 3


def test_where_torch_does_not_compile_reads_of_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before torch 2.12: with fullgraph=True an error says so, without it the call runs in eager."""
    monkeypatch.setattr(contents, "traces_objects", lambda: False)
    model, plain, config = graphreg.regularize_(configured(), weight_l2=0.1, scale=1), configured(), Config()
    with pytest.raises(Exception, match=r"an argument is an object of class Config\. graphreg .* from torch 2\.12 on\. Leave fullgraph"):
        torch.compile(model, fullgraph=True, backend="eager")(X, config, [2.0])
    assert torch.equal(torch.compile(model, backend="eager")(X, config, [2.0]), plain(X, config, [2.0]))


def test_a_default_that_changes() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, scales: list[float] = [1.0]) -> Tensor:  # noqa: B006
            h: Tensor = self.layer(x)
            for scale in scales:
                h = h * scale
            return h

    model = graphreg.regularize_(Scales(), weight_l2=0.1, scale=1)
    for _ in range(3):
        assert torch.equal(model.train()(X), model.eval()(X))
        Scales.forward.__defaults__[0].append(2.0)


def test_a_keyword_only_default_that_changes() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, *more: Tensor, scales: list[float] = [1.0]) -> Tensor:  # noqa: B006
            h: Tensor = self.layer(x)
            for each in more:
                h = h + each
            for scale in scales:
                h = h * scale
            return h

    model, more = graphreg.regularize_(Scales(), weight_l2=0.1, scale=1), torch.randn(4)
    for _ in range(3):
        assert torch.equal(model.train()(X, more), model.eval()(X, more))
        Scales.forward.__kwdefaults__["scales"].append(2.0)


class Reads(nn.Module):
    """Reads objects in a list, a list in a dict, tensors in a list and global variables."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.configs, self.deep, self.tensors = nn.Linear(4, 4), [Config(), Config()], {"a": [Config()]}, [torch.ones(1)]

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x) * FACTOR * TABLE["a"][0] * self.tensors[0]
        for config in self.configs:
            h = h * config.gain
        return h * self.deep["a"][0].gain


@pytest.mark.parametrize("change", [
    lambda model: model.configs.append(Config(3.0)), lambda model: setattr(model.configs[1], "gain", 5.0),
    lambda model: model.configs.__setitem__(0, Config(4.0)), lambda model: setattr(model.deep["a"][0], "gain", 5.0),
    lambda model: model.tensors.__setitem__(0, torch.full((1,), 7.0)),
], ids=["appended", "an object in a list", "another object in a list", "deep inside", "a tensor in a list"])  # fmt: skip
def test_what_is_in_attributes_may_change(change: Any) -> None:
    model = graphreg.regularize_(Reads(), weight_l2=0.1, scale=1)
    before = model(X)
    assert torch.equal(model(X), before) and len(vars(model)["graphreg_in_place"]._made["x=torch· float32[2]"]) == 1
    change(model)
    after = model(X)
    assert torch.equal(after, model.eval()(X)) and not torch.equal(after, before)


def test_global_variables_and_those_of_functions_around_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    gain = 2.0

    class Around(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * gain

    def changed() -> None:
        nonlocal gain
        gain = 3.0

    def checked() -> Tensor:
        output: Tensor = model.train()(X)
        assert torch.equal(output, model.eval()(X))
        return output

    model = graphreg.regularize_(Around(), weight_l2=0.1, scale=1)
    outputs = [checked()]
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    outputs.append(checked())
    monkeypatch.setitem(TABLE, "a", [4.0])
    outputs.append(checked())
    TABLE["a"][0] = 5.0
    outputs.append(checked())
    changed()
    outputs.append(checked())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))


def test_numbers_that_nothing_reads_make_no_other_graph() -> None:
    model: Net = graphreg.regularize_(net(), weight_l2=0.1, scale=1)
    model(X)
    model.note = [object()]  # type: ignore[assignment]
    model(X)
    assert [len(made) for made in vars(model)["graphreg_in_place"]._made.values()] == [1]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(4, 6)

    def forward(self, x: Any) -> Tensor:
        out: Tensor = self.cells(x)[0].data * 2
        return out


def test_a_packed_sequence_as_an_argument() -> None:
    """A container whose class checks what it gets is not made anew to keep the arguments."""
    packed, plain = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)]), Packed()
    model = graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.1, scale=1)
    assert torch.equal(model(packed), plain(packed))
