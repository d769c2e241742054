"""The canaries of what compiles: Dynamo, torch.export, fake tensors, AOTAutograd, Inductor, and their settings."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
from torch import Tensor, fx, nn

import graphreg.torch_internals as door
from canary import canary
from graphreg.torch_internals import Changes

Look = Callable[[fx.GraphModule, list[Any]], None]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any, look: Look, **options: Any) -> Any:
    """The function compiled by a backend that looks at each graph, and runs it as it is."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        look(gm, inputs)
        return gm.forward

    return torch.compile(function, backend=backend, **options)


def nothing(gm: fx.GraphModule, inputs: list[Any]) -> None:
    """A look that sees nothing."""


class Breaks(nn.Module):
    """Two graphs: Dynamo captures the rest of the forward behind the break by itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        door.graph_break(msg="here")
        return y * 2


# dynamo.py


@canary("a call of what torch.compile made runs", "the backend", "compiled_call", "CompiledCall")
def test_compiled_call() -> None:
    found, told, results = list[Any](), list[str](), list[Any]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        call = door.compiled_call()
        assert call is not None and call.result is None
        found.append(call)
        call.at_each_call(begin)

    def begin() -> Callable[[], None]:
        told.append("begin")
        return end

    def end() -> None:
        told.append("end")
        call = door.compiled_call()
        assert call is not None
        results.append(call.result)

    def add(x: Tensor) -> Tensor:
        return x + 1

    x, function = torch.ones(1), compiled(add, look)
    function(x)
    assert told == ["begin", "end"] and isinstance(found[0], door.CompiledCall)
    assert found[0].function is add and found[0].arguments[0] is x
    function(x)
    assert results == [2.0, 2.0]
    assert told == ["begin", "end"] * 2 and found[0].record is door.compile_record_of(function) and door.compiled_call() is None


@canary("torch.compile keeps its backend", "the handle of a backend", "compile_record_of", "backend_in", "function_in")
def test_backend_in() -> None:
    class Given:
        def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            return gm.forward

    given, itself = Given(), nn.Linear(1, 1)
    itself.compile(backend=given)
    for made in (torch.compile(nn.Linear(1, 1), backend=given), torch.compile(lambda x: x + 1, backend=given), itself):
        for _ in range(2):
            inner = door.backend_in(door.compile_record_of(made))
            assert given in (inner, door.function_in(inner))
            made(torch.ones(1))
    assert door.compile_record_of(nn.Linear(1, 1)) is None and door.compile_record_of(3) is None and door.backend_in(None) is None


@canary(
    "torch.compile calls a backend that it was given by name",
    "backend='graphreg'",
    "asking_wrapper",
    "backend_named",
    "name_in",
    "function_in",
)
def test_asking_wrapper() -> None:
    asked = list[Any]()

    @torch._dynamo.register_backend(name="graphreg_canary")
    def canary_backend(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        asked.append((door.asking_wrapper(), options))
        return gm.forward

    functions = [torch.compile(function, backend="graphreg_canary", options={"a": 1}) for function in (Breaks(), nn.Linear(1, 1))]
    for function in functions:
        function(torch.ones(1))
    (first, options), (second, _), (other, _) = asked
    assert options == {"options": {"a": 1}} and door.name_in(first) == "graphreg_canary"
    assert door.function_in(first) is canary_backend and door.name_in(len) is None and door.function_in(len) is None
    assert first is second and first is not other and first is door.backend_in(door.compile_record_of(functions[0]))
    assert door.backend_named("graphreg_canary") is canary_backend and callable(door.backend_named("eager"))


@canary("Dynamo captures code, and the rest of it behind a break", "names of sites in the backend", "captured_code", "CapturedCode",
        "translator", "function_of", "graph_break", "first_arguments")  # fmt: skip
def test_captured_code() -> None:
    codes, running = list[door.CapturedCode](), list[Any]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        codes.append(door.captured_code(door.translator(), gm))
        running.extend(each for each in door.first_arguments() if isinstance(each, Breaks))

    module = Breaks()
    compiled(module, look)(torch.ones(1))
    first, rest = codes
    assert isinstance(first, door.CapturedCode)
    begin = Breaks.forward.__code__.co_firstlineno
    assert (first.name, first.resumed, first.broken, first.line) == ("forward", False, True, begin + 2)
    assert (rest.name, rest.resumed, rest.broken) == ("forward", True, False)
    assert first.values["self"] is module and running and all(each is module for each in running)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="here"):
        compiled(Breaks(), nothing, fullgraph=True)(torch.ones(1))


@canary("Dynamo names the rest of a function", "the error for code that is left to eager", "function_of")
def test_function_of() -> None:
    assert door.function_of("torch_dynamo_resume_in_forward_at_12") == "forward" and door.function_of("forward") == "forward"


@canary("a module's call reaches its forward", "names of sites in the backend", "CALLERS_OF_FORWARD")
def test_callers_of_forward() -> None:
    codes = {each.co_name for each in nn.Module._call_impl.__code__.co_consts if isinstance(each, types.CodeType)}
    assert set(door.CALLERS_OF_FORWARD) <= codes | {nn.Module._call_impl.__name__, nn.Module._wrapped_call_impl.__name__}


@canary(
    "Dynamo knows where an input comes from", "names of inputs in the backend", "source_of", "copy_source", "without_source", "copy_notes"
)
def test_sources() -> None:
    found = list[tuple[str, list[str]]]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        twins, graph = dict[fx.Node, fx.Node](), fx.Graph()
        for node in gm.graph.nodes:
            twin: Any = graph.node_copy(node, twins.__getitem__)
            twins[node] = twin
            if node.op == "placeholder":
                found.append(door.source_of(node))
                assert hasattr(node, "_dynamo_source") and not hasattr(twin, "_dynamo_source")
                door.copy_source(node, twin)
                assert twin._dynamo_source is node._dynamo_source
                door.without_source(twin)
                assert twin._dynamo_source is None
        module = fx.GraphModule(gm, graph)
        door.copy_notes(gm, module)
        assert module.compile_subgraph_reason is gm.compile_subgraph_reason and module._param_name_to_source is gm._param_name_to_source

    def add(x: Tensor, more: dict[str, Any]) -> Tensor:
        y: Tensor = x + more["a"] + more["b"][1]
        return y

    compiled(add, look)(torch.ones(1), {"a": torch.ones(1), "b": [0, torch.ones(1)]})
    assert found == [("x", []), ("more", ["a"]), ("more", ["b", "1"])]


class Box:
    now = 1


def _graphs_of(guard: Callable[[Any, Box], None], changes: Callable[[Box], None], boxes: list[Box]) -> int:
    """How many graphs Dynamo captures of a function that reads nothing of a box, for calls with boxes between which they change."""
    graphs = list[int]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        graphs.append(1)
        guard(door.translator(), boxes[0])

    function = compiled(lambda box, x: x + 1, look)
    for box in boxes:
        function(box, torch.ones(1))
        changes(boxes[0])
    return len(graphs)


@canary("Dynamo guards", "the backend, whose graphs depend on modes and on whose code they are", "guard_identity", "guard_value")
@pytest.mark.parametrize("by_module", [False, True])
def test_guards(by_module: bool) -> None:
    one, other = Box(), Box()

    def value(translator: Any, box: Box) -> None:
        door.guard_value(translator, "__graphreg_canary", box, "now", by_module)

    def count(box: Box) -> None:
        box.now += 1

    assert _graphs_of(lambda translator, box: None, count, [one, other, one]) == 1
    assert _graphs_of(lambda translator, box: door.guard_identity("box"), lambda box: None, [one, one, other]) == 2
    assert _graphs_of(value, lambda box: None, [one, one, one]) == 1
    assert _graphs_of(value, count, [one, one, one]) == 3


@canary("Dynamo gives up past its limit of recompilations", "the backend, which must not be left out in silence", "strict_limit")
def test_strict_limit() -> None:
    graphs = list[int]()
    quiet, strict = (compiled(eval("lambda x, n: x + n"), lambda gm, inputs: graphs.append(1), dynamic=False) for _ in range(2))
    with dynamo_config.patch(recompile_limit=1):
        for function in (quiet, strict):
            function(torch.ones(1), 1)
        quiet(torch.ones(1), 2)
        assert graphs == [1, 1]
        with door.strict_limit(), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            strict(torch.ones(1), 2)


@canary("Dynamo skips a function, and compiles what it calls", "the call of a rewritten module", "skip_frame")
def test_skip_frame() -> None:
    names = list[str]()

    def inner(x: Tensor) -> Tensor:
        return x + 1

    def outer(x: Tensor) -> Tensor:
        return inner(x) * 2

    door.skip_frame(outer)
    compiled(outer, lambda gm, inputs: names.append(door.captured_code(door.translator(), gm).name))(torch.ones(1))
    assert names == ["inner"]


@canary("Dynamo tells of its work", "the error for a call that is left to eager", "on_compilation_start", "left_to_eager", "skipped_code")
def test_left_to_eager() -> None:
    told = list[Any]()

    def looped(x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + 1
            door.graph_break(msg="again")
        return x

    for _ in range(2):
        door.on_compilation_start(told.append)
    before = dict(door.left_to_eager())
    compiled(looped, nothing)(torch.ones(1))
    new = [text for text, count in door.left_to_eager().items() if count > before.get(text, 0)]
    places = [place for text in new for place in door.skipped_code(text)]
    assert told and ("looped", __file__, str(looped.__code__.co_firstlineno)) in places
    torch.compiler.reset()
    told.clear()
    compiled(lambda x: x + 1, nothing)(torch.ones(1))
    assert not told


# fake_tensors.py, export.py, torch_modes.py


@canary("fake tensors are made", "shapes at sites", "FakeTensorMode", "FakeCopyMode", "FAKE_LOGGER", "SOLVER_LOGGER")
def test_fake_tensors() -> None:
    fake, module = door.FakeTensorMode(), nn.Linear(2, 3)
    with door.FakeCopyMode(fake):
        twin = copy.deepcopy(module)
    with fake:
        assert twin(fake.from_tensor(torch.ones(4, 2))).shape == (4, 3)
    weight: Any = twin.weight
    assert weight.fake_mode is fake and fake.from_tensor(torch.ones(1), static_shapes=True).shape == (1,)
    assert {door.FAKE_LOGGER, door.SOLVER_LOGGER} <= set(logging.root.manager.loggerDict)


@canary("a fake tensor is given an attribute", "the export front end, which refuses it", "take_assignments")
def test_take_assignments() -> None:
    given = list[tuple[str, Any]]()
    with door.FakeTensorMode():
        x = torch.ones(1)
    with Changes() as changes, changes:
        door.take_assignments(changes, lambda tensor, name, value: given.append((name, value)))
        x.mark = 3  # type: ignore[attr-defined]
    assert given == [("mark", 3)] and not hasattr(x, "mark")
    x.mark = 4  # type: ignore[attr-defined]
    assert given == [("mark", 3)] and vars(x)["mark"] == 4


@canary("Dynamo keeps a table of torch's functions", "the symbolic front end", "has_function_table", "make_function_table")
def test_function_table() -> None:
    importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map.cache_clear()
    assert not door.has_function_table()
    door.make_function_table()
    assert door.has_function_table()


@canary("a compilation has its fake tensors", "the backend", "fake_mode", "is_fake")
def test_fake_mode() -> None:
    found = list[Any]()
    assert door.is_fake(door.FakeTensorMode().from_tensor(torch.ones(1))) and not door.is_fake(torch.ones(1))

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        found.append(door.fake_mode())
        assert all(mode is found[0] for mode in [each.fake_mode for each in inputs if hasattr(each, "fake_mode")])

    compiled(lambda x: x + 1, look)(torch.ones(1))
    assert isinstance(found[0], door.FakeTensorMode) and door.fake_mode() is None


class Exported(nn.Module):
    """A layer, whose call torch.export takes apart, and a decision on a size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if x.shape[0] > 2 else y + 1


@canary("torch.export tells its tracer of modules and values", "the export front end", "take_module_calls", "module_behind", "proxy_of",
        "give_proxy", "without_proxies", "size_decisions")  # fmt: skip
def test_export() -> None:
    model, seen, decided, outside = Exported(), list[Any](), list[int](), torch.ones(1)

    def around(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def call_module(tracer: Any, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            if (inner := door.module_behind(module)) is not model.layer:
                value = theirs(tracer, module, forward, args, kwargs)
                decided.append(len(door.size_decisions()))
                return value
            decided.append(len(door.size_decisions()))
            given, size = (door.proxy_of(each, tracer) for each in (args[0], args[0].shape[0]))
            seen.append((inner, given, size, door.proxy_of(outside, tracer)))
            with door.without_proxies():
                value = forward(*args, **kwargs)
            proxy = tracer.create_proxy("call_function", torch.ops.aten.relu.default, (given,), {})
            proxy.node.meta["val"] = None
            assert door.give_proxy(value, proxy, tracer) is value and door.proxy_of(value, tracer).node is proxy.node  # type: ignore[union-attr]
            return value

        return call_module

    with Changes() as changes, changes:
        door.take_module_calls(changes, around)
        sizes = {"x": {0: torch.export.Dim.AUTO}}
        program = torch.export.export(model, (torch.ones(3, 2),), dynamic_shapes=sizes, strict=False)
    (inner, given, size, other), *more = seen
    assert not more and inner is model.layer and isinstance(given, fx.Proxy) and given.node.op == "placeholder"
    assert isinstance(size, fx.Proxy) and other is None and decided[0] < decided[-1] and door.size_decisions() == []
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.relu.default" in called and "aten.linear.default" not in called


@canary("torch.export prints its graph when it fails", "the export front end", "silence_export")
def test_silence_export(capsys: pytest.CaptureFixture[str]) -> None:
    module = torch.export._trace
    assert "print(" in inspect.getsource(module) and not hasattr(module, "print")
    with Changes() as changes, changes:
        door.silence_export(changes)
        exec("print('the graph')", vars(module))
    assert capsys.readouterr() == ("", "") and not hasattr(module, "print")


@canary("torch computes conditions on sizes", "inputs of other sizes than the examples", "evaluated")
def test_evaluated() -> None:
    size = sympy.Symbol("s0", integer=True, positive=True)
    assert door.evaluated(sympy.Eq(size * 2, 8), {size: 4}) is True
    proxy = fx.proxy.GraphAppendingTracer(fx.Graph())
    value = fx.Proxy(proxy.graph.placeholder("n"), proxy)
    door.evaluated(sympy.Eq(size + 1, 8), {size: value})
    assert [getattr(node.target, "__name__", node.target) for node in proxy.graph.nodes] == ["n", "add", "eq"]


traced = list[bool]()


def asks(x: Tensor) -> Tensor:
    """Asked while AOTAutograd traces: Dynamo does not look into it."""
    traced.append(door.is_functionalized())
    return x + 1


@canary("AOTAutograd traces without writes", "attached penalties", "is_functionalized")
def test_is_functionalized() -> None:
    torch.compiler.allow_in_graph(asks)  # type: ignore[no-untyped-call]
    torch.compile(lambda x: asks(x) * 2, backend="aot_eager", fullgraph=True)(torch.ones(2, requires_grad=True))
    assert any(traced) and not door.is_functionalized()


# config.py, inductor.py


@canary("the compiler's settings are kept", "graphreg.doctor", "CONFIGS", "DYNAMO", "FUNCTORCH", "INDUCTOR", "default_of", "has_setting")
def test_settings() -> None:
    assert set(door.CONFIGS) == {door.DYNAMO, door.FUNCTORCH, door.INDUCTOR}
    known = {
        door.FUNCTORCH: ("activation_memory_budget", 1.0),
        door.INDUCTOR: ("fallback_random", False),
        door.DYNAMO: ("suppress_errors", False),
    }
    for place, (name, default) in known.items():
        assert door.has_setting(place, name) and not door.has_setting(place, "no_such_setting")
        with door.CONFIGS[place].patch(**{name: 0.5 if default else True}):
            assert door.default_of(place, name) == default != getattr(door.CONFIGS[place], name)
            assert name in door.CONFIGS[place].codegen_config()


@canary("AOTAutograd caches graphs", "the backend", "without_autograd_cache")
def test_without_autograd_cache() -> None:
    with functorch_config.patch(enable_autograd_cache=True), door.without_autograd_cache():
        assert functorch_config.enable_autograd_cache is False


@torch.library.custom_op("graphreg_canary::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=x.dtype).view(x.shape)


counted.register_fake(torch.empty_like)


@canary(
    "Inductor lowers operators and calls passes",
    "the noise in compiled graphs",
    "lower",
    "pointwise",
    "strides_of",
    "graph_pass",
    "inductor_with",
)
def test_inductor() -> None:
    passed, lowered = list[int](), list[int]()

    def lowering(x: Any) -> Any:
        lowered.append(1)
        shape = x.get_size()

        def value(ops: Any, index: Any) -> Any:
            place = sum(i * stride for i, stride in zip(index, door.strides_of(shape), strict=True))
            return ops.to_dtype(ops.index_expr(place, torch.int32), torch.float32)

        return door.pointwise(x, torch.float32, shape, value)

    operator = torch.ops.graphreg_canary.counted.default
    assert door.lower({operator: lowering}) and door.lower({operator: lowering})
    change = door.graph_pass(lambda graph: passed.append(len(graph.nodes)), __file__)
    assert isinstance(change.uuid(), bytes) and change.uuid() == door.graph_pass(lambda graph: None, __file__).uuid()
    function = torch.compile(
        lambda x: counted(x) * 2, backend=door.inductor_with({"post_grad_custom_post_pass": change, "fx_graph_cache": False})
    )
    assert function(torch.ones(2, 3)).tolist() == [[0, 2, 4], [6, 8, 10]] and passed and lowered
    with pytest.raises(RuntimeError, match="no_such_option"):
        door.inductor_with({"no_such_option": 1})
