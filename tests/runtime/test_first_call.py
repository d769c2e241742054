"""Python compiles emitted code at its first call; until then, nothing that a user sees is different."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import graph_module
from torch.fx.experimental import _config

import graphreg
from graphreg.errors import TraceError
from graphreg.torch_internals.emitted_code import generate_forward

X = torch.linspace(-1, 1, 12).view(3, 4)
_TESTS = list[Any]()  # modules of equal models share their code, so each test needs models with a name of its own


class TwoModes(nn.Module):
    """Has another graph in train mode than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, *, factor: float = 2.0) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.outer(h * factor if self.training else h)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were compiled so far."""
    sources, original = list[str](), graph_module._exec_with_source
    _TESTS.append(sources)

    def counted(source: str, *rest: Any) -> None:
        sources.append(source)
        original(source, *rest)

    monkeypatch.setattr(graph_module, "_exec_with_source", counted)
    return sources


def made(model: type[nn.Module] = TwoModes, **options: Any) -> Any:
    named = type(f"{model.__name__}{len(_TESTS)}", (model,), {})
    return graphreg.regularize(named(), hidden_dropout=0.3, hidden_l1=0.5, weight_l2=0.5, rng=0, **options)


def values(module: Any) -> list[Tensor]:
    """Return the output, the penalties and all gradients of a call."""
    output, penalties = module(X)
    parameters = list(module.parameters())
    return [output, *penalties.values(), *torch.autograd.grad(output.square().sum() + sum(penalties.values()), parameters)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def own(sources: list[str]) -> list[str]:
    """Return the sources of rewritten modules, without those of empty modules that torch.fx makes."""
    return [source for source in sources if "self." in source]


def test_each_mode_is_compiled_at_its_first_call(compiled: list[str]) -> None:
    module = made()
    assert set(module.graphs) == {"train", "eval"} and own(compiled) == []
    values(module)
    values(module)
    assert own(compiled) == [module.code] and "mul" in module.code
    module.eval()
    assert len(own(compiled)) == 1
    values(module)
    values(module)
    assert len(own(compiled)) == 2 and own(compiled)[1] == module.code and "mul" not in module.code


def test_what_a_user_sees_is_the_same_before_and_after() -> None:
    module = made()

    def seen() -> tuple[Any, ...]:
        emitted = inspect.unwrap(type(module).forward)
        signature, defaults = str(inspect.signature(module.forward)), (emitted.__defaults__, emitted.__kwdefaults__)
        return module.code, signature, inspect.getsource(emitted), defaults, emitted.__annotations__

    before = seen()
    assert before[0].strip().startswith("def forward(self, x") and before[0].strip() == before[2].strip()
    values(module)
    assert seen() == before


COPIES = {"deep": copy.deepcopy, "flat": copy.copy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_made_before_the_first_call(copied: Callable[[Any], Any], compiled: list[str]) -> None:
    module = made()
    twin = copied(module)
    assert own(compiled) == []
    assert_same(values(twin), values(module))
    assert_same(values(twin.eval()), values(module.eval()))


class HasNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.softplus, self.outer = nn.Linear(4, 4), nn.Softplus(beta=2.0), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(self.softplus(self.inner(x)))
        return y


def test_the_first_call_is_traced_by_dynamo_twice() -> None:
    """With ``dynamic=True``, Dynamo makes a number of a layer an input, and traces once more if that is of no use."""
    module = made(HasNumber)
    compiled = torch.compile(module, backend="eager", dynamic=True)
    state = graphreg.rng_state(module)
    first = compiled(X)
    graphreg.set_rng_state(module, state)
    torch.testing.assert_close(first.output, module(X).output)


@pytest.mark.parametrize("way", ["torch.compile", "compile()", "within"])
def test_compiled_before_any_eager_call(way: str, compiled: list[str]) -> None:
    eager, module, graphs = made(), made(), list[fx.GraphModule]()

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    options: Any = {"fullgraph": True, "backend": backend}
    if way == "compile()":
        module.compile(**options)

    def within(x: Tensor) -> Any:
        return module(x)

    function = torch.compile(module if way == "torch.compile" else within, **options)
    call: Any = module if way == "compile()" else function

    def run(call: Any) -> list[Tensor]:
        output, penalties = call(X)
        total, parameters = output.square().sum() + sum(penalties.values()), (eager if call is eager else module).parameters()
        return [output, *penalties.values(), *torch.autograd.grad(total, list(parameters))]

    modes = (True, True, False, False) if way == "torch.compile" else (True, True)
    for mode in modes:
        eager.train(mode)
        module.train(mode)
        assert_same(run(call), run(eager))
    assert len(graphs) == len(set(modes))  # one for each mode, and none for the second call of a mode
    torch.compiler.reset()


def test_compiled_when_both_modes_are_compiled_in_eager_already() -> None:
    """Dynamo then never sees the code that waits."""
    module = made()
    expected = [values(module.train(mode)) for mode in (True, False)]
    again = made()
    function = torch.compile(again, fullgraph=True, backend="eager")
    for mode, ours in zip((True, False), expected, strict=True):
        again.train(mode)
        output, penalties = function(X)
        torch.testing.assert_close([output, *penalties.values()], ours[: 1 + len(penalties)])
    torch.compiler.reset()


def test_export_before_any_call() -> None:
    module = made().eval()
    program = torch.export.export(module, (X,))
    torch.testing.assert_close(program.module()(X).output, module(X).output)


@pytest.mark.parametrize("called", [False, True])
def test_an_edited_graph(called: bool, compiled: list[str]) -> None:
    """Only the code of the last ``recompile`` is run, whether or not the code before it was ever called."""
    module = made()
    if called:
        values(module)
    for mode in (True, False):
        module.train(mode)
        (node,) = [node for node in module.graph.nodes if node.target is torch.tanh]
        node.target = torch.sigmoid
    module.recompile()
    assert len(own(compiled)) == called
    model = TwoModes()
    expected = model.outer(torch.sigmoid(model.inner(X)))
    torch.testing.assert_close(module(X).output, expected)
    assert own(compiled)[called:] == [module.code] and "sigmoid" in module.code


def test_modules_of_one_class_compile_once(compiled: list[str]) -> None:
    one, two = made(), made()
    assert type(one) is type(two)
    assert_same(values(one), values(two))
    assert len(own(compiled)) == 1


def test_equal_blocks_compile_once(compiled: list[str]) -> None:
    module, flat = made(Blocks, blocks="layers.*"), made(Blocks)
    assert own(compiled) == []
    assert_same(values(module), values(flat))
    values(module)
    blocks = [source for source in compiled if "\n    _0 = getattr(self" in source]
    assert len(set(blocks)) == len(blocks) == 2  # the first two are alike; the last block's output is not hidden


def test_two_threads_at_the_first_call(compiled: list[str]) -> None:
    module, results, together = made().eval(), list[Tensor](), threading.Barrier(4)

    def run() -> None:
        together.wait()
        results.append(module(X).output.detach())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, results[0]) for result in results)
    assert len(own(compiled)) == 1


# The forward of any GraphModule


def emitted(graph: fx.Graph) -> Any:
    module = fx.GraphModule(nn.Module(), fx.Graph())
    module._graph = graph
    generate_forward(module)
    return module


def test_arguments_of_every_kind() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y", default_value=(1, "a\nb"))
    rest, more = graph.placeholder("*rest"), graph.placeholder("**more")
    graph.output((x, y, rest, more))
    module = emitted(graph)
    for _ in range(2):  # before and after it is compiled
        assert str(inspect.signature(module.forward)) == "(x, y=(1, 'a\\nb'), *rest, **more)"
        assert module.forward(5) == (5, (1, "a\nb"), (), {})
        assert module.forward(5, 6, 7, 8, z=9) == (5, 6, (7, 8), {"z": 9})


def test_code_that_is_no_python_is_refused_at_once() -> None:
    module = made()
    (node,) = [node for node in module.graph.nodes if node.target is torch.tanh]
    node.kwargs = {"no name": 1}
    with pytest.raises(TraceError, match=r"^the code of \w+'s graph would be no Python: tanh = torch.tanh\(\w+, no name = 1\)"):
        module.recompile()


LINES = {"y = (x +\n 1)\n": True, "y = (x +\n": False, "y = '''\n1 1'''; y = x\n": True, "y = 1x\n": False}


@pytest.mark.parametrize(("line", "right"), LINES.items())
def test_statements_of_several_lines(line: str, right: bool) -> None:
    """They are accepted if Python accepts the whole code."""
    graph = fx.Graph()
    graph.output(graph.call_function(torch.sigmoid, (graph.placeholder("x"),)))
    graph.on_generate_code(lambda _: lambda body: [line, *body])
    if right:
        torch.testing.assert_close(emitted(graph)(X), X.sigmoid())
    else:
        with pytest.raises(SyntaxError):
            emitted(graph)


def test_numbers_that_no_two_lines_share() -> None:
    """Of lines that differ in digits only, one is tried; keywords of one call may differ in digits only, too."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    for i in range(30):
        x = graph.call_function(torch.nn.functional.bilinear, (), {"input1": x, "input2": x, "weight": i})
    graph.output(x)
    assert emitted(graph).code.count("bilinear") > 30


def test_other_code_generators_compile_at_once(compiled: list[str]) -> None:
    """torch.fx flattens arguments by a code generator of its own, and adds marks for a profiler to the code."""

    def pairs(pair: dict[str, Tensor]) -> Tensor:
        return pair["a"] + pair["b"]

    flattening = fx.symbolic_trace(pairs, concrete_args={"pair": {"a": fx.PH, "b": fx.PH}}).graph
    assert emitted(flattening)({"a": X, "b": X}).equal(2 * X)
    graph = fx.Graph()
    graph.output(graph.call_function(torch.sigmoid, (graph.placeholder("x"),)))
    if not hasattr(_config, "enrich_profiler_metadata"):
        return
    with _config.patch(enrich_profiler_metadata=True):  # type: ignore[attr-defined]
        module = emitted(graph)
    assert sum("sigmoid" in source for source in compiled) == 1 and "PLACEHOLDER" not in module.code
    assert module(X).equal(X.sigmoid())
