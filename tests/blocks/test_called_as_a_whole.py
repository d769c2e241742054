"""A module that the graph calls as a whole may be named in ``blocks=``: nothing changes for it, whatever acts at its output."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import graphreg
from block_nets import Residual, rewritten
from test_flat import assert_equal, step

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
ACTING: dict[str, dict[str, Any]] = {
    "splices": {"noise": {"1": 0.1}, "dropout": {"2.relu": 0.2}},
    "penalties": {"hidden_l1": {"weight": 0.1, "pattern": ["1", "2.**"]}},
}
ACTING["all"] = {**ACTING["splices"], **ACTING["penalties"], "own_dropout": "seeded", "contractive": 0.1}
COMPILED = {**ACTING["splices"], **ACTING["penalties"]}


class Opaque(nn.Module):
    """A module that no tracer enters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = x.mean()
        return torch.tanh(self.linear(x - shift))


def net(**parts: Any) -> nn.Module:
    """A model in whose middle is a layer, an opaque module, or a module that checkpoints."""
    torch.manual_seed(0)
    middle = {"layer": nn.Tanh, "dropout": nn.Dropout, "opaque": Opaque, "wrapped": lambda: checkpoint_wrapper(Residual())}[parts["part"]]()
    return nn.Sequential(nn.Linear(8, 8), middle, Residual(), nn.Linear(8, 2))


def traced(part: str, front_end: Any = "auto") -> graphreg.Traced:
    return graphreg.trace(net(part=part), X, front_end=front_end)


def pair(trace: graphreg.Traced, part: str, acting: dict[str, Any]) -> tuple[Any, Any]:
    """The module without blocks, and with the middle and the block after it as blocks."""
    options: dict[str, Any] = {"rng": 3, **acting}
    if part == "wrapped":
        options = {name: value for name, value in options.items() if name not in ("own_dropout", "contractive")}
    return rewritten(trace, net(part=part), **options), rewritten(trace, net(part=part), blocks=["1", "2"], **options)


PARTS = ["layer", "dropout", "opaque", "wrapped"]
pytestmark = pytest.mark.filterwarnings("ignore:there are no sites for")  # inside a module that checkpoints


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("part", PARTS)
def test_equal_to_flat_whatever_acts(part: str, front_end: str) -> None:
    """In both modes, so are copies; the module itself is called, and ``strip`` gives the model back."""
    trace = traced(part, front_end)
    for acting, options in ACTING.items():
        flat, module = pair(trace, part, options)
        assert module.graphreg_state.blocks[-1:] == ("2",)
        for _ in range(2):
            assert_equal(step(module, (X,)), step(flat, (X,)))
        if acting == "splices" and part != "wrapped":
            called: list[nn.Module] = []
            handle = module.get_submodule("1").register_forward_hook(lambda inner, args, output, called=called: called.append(inner))
            assert_equal(step(module, (X,)), step(flat, (X,)))
            assert called == [module.get_submodule("1")] and type(called[0]) is type(net(part=part)[1])  # type: ignore[index]
            handle.remove()
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)]
    expected = step(flat, (X,))
    for twin in (*twins, module):
        assert_equal(step(twin, (X,)), expected)
    assert_equal(step(graphreg.strip(module).eval(), (X,)), step(net(part=part).eval(), (X,)))
    assert_equal(step(module.eval(), (X,)), step(flat.eval(), (X,)))


@pytest.mark.parametrize("part", PARTS)
def test_compiled_it_is_equal(part: str) -> None:
    flat, module = pair(traced(part), part, COMPILED)
    backend = "aot_eager" if part == "wrapped" else "eager"
    ours = step(module, (X,), torch.compile(module, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    assert_equal(ours, step(flat, (X,), torch.compile(flat, backend=backend, fullgraph=True)))
    torch._dynamo.reset()


@pytest.mark.parametrize("part", PARTS[:-1])
def test_in_place(part: str) -> None:
    flat = graphreg.regularize(net(part=part), rng=3, example_inputs=X, **ACTING["all"])
    model = graphreg.regularize_(net(part=part), blocks=["1", "2"], rng=3, **{**ACTING["all"], "penalties": "return"})
    for _ in range(2):
        assert_equal(step(model, (X,)), step(flat, (X,)))
    graphreg.strip_(model)
    assert_equal(step(model.eval(), (X,)), step(net(part=part).eval(), (X,)))


def test_of_a_graph_module() -> None:
    graph = torch.fx.symbolic_trace(net(part="layer"))
    ours = graphreg.regularize(graph, blocks="1", rng=3, **ACTING["penalties"])
    assert_equal(step(ours, (X,)), step(graphreg.regularize(graph, rng=3, **ACTING["penalties"]), (X,)))


def test_layers_whose_input_or_output_is_no_single_float_tensor() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.rnn, self.out = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(self.words(x))[0])

    def result(**more: Any) -> Any:
        torch.manual_seed(0)
        module = graphreg.regularize(
            Tagger(), dropout={"words": 0.2, "rnn": 0.2}, hidden_l1={"weight": 0.1, "pattern": ["words", "rnn"]}, rng=3, **more
        )
        output, penalties = module(torch.arange(6).reshape(2, 3))
        (output.square().mean() + sum(penalties.values())).backward()
        return [output, penalties, [p.grad for p in module.parameters()]]

    assert_equal(result(blocks=["words", "rnn"]), result())
