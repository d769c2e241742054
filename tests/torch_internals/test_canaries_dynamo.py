"""Canaries of Dynamo."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo_config
import torch._dynamo.testing
from torch import Tensor, fx, nn

from canary import compiled, nothing
from graphreg.torch_internals import dynamo, dynamo_marks, torch_modes
from lacking import tells_skipped_code


class Breaks(nn.Module):
    """A forward with a graph break. Dynamo captures a second graph from the code after the break."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        torch._dynamo.graph_break(msg="here")
        return y * 2


def test_compiled_call() -> None:
    """How a call of a compiled function runs. It concerns the backend."""
    found, told, results = list[Any](), list[str](), list[Any]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        call = dynamo.compiled_call()
        assert call is not None and call.result is None
        found.append(call)
        call.at_each_call(begin)

    def begin() -> Callable[[], None]:
        told.append("begin")
        return end

    def end() -> None:
        told.append("end")
        call = dynamo.compiled_call()
        assert call is not None
        results.append(call.result)

    def add(x: Tensor) -> Tensor:
        return x + 1

    x, function = torch.ones(1), compiled(add, look)
    function(x)
    assert told == ["begin", "end"] and isinstance(found[0], dynamo.CompiledCall)
    assert found[0].function is add and found[0].arguments[0] is x
    function(x)
    assert told == ["begin", "end"] * 2
    assert results == ([torch.tensor([2.0])] * 2 if dynamo.tells_result() else [None, None])
    assert found[0].record is dynamo.compile_record_of(function) and dynamo.compiled_call() is None


def test_backend_in() -> None:
    """How torch.compile keeps its backend. It concerns the handle of a backend."""

    class Given:
        def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            return gm.forward

    given, itself = Given(), nn.Linear(1, 1)
    itself.compile(backend=given)
    for made in (torch.compile(nn.Linear(1, 1), backend=given), torch.compile(lambda x: x + 1, backend=given), itself):
        for _ in range(2):
            inner = dynamo.backend_in(dynamo.compile_record_of(made))
            assert given in (inner, dynamo.function_in(inner))
            made(torch.ones(1))
    assert dynamo.compile_record_of(nn.Linear(1, 1)) is None and dynamo.compile_record_of(3) is None and dynamo.backend_in(None) is None


def test_asking_wrapper() -> None:
    """How torch.compile calls a backend that it was given by name. It concerns backend='graphreg'."""
    asked = list[Any]()

    @torch._dynamo.register_backend(name="graphreg_canary")
    def canary_backend(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        asked.append((dynamo.asking_wrapper(), options))
        return gm.forward

    functions = [torch.compile(function, backend="graphreg_canary", options={"a": 1}) for function in (Breaks(), nn.Linear(1, 1))]
    for function in functions:
        function(torch.ones(1))
    (first, options), (second, _), (other, _) = asked
    assert options == {"options": {"a": 1}} and dynamo.name_in(first) == "graphreg_canary"
    assert dynamo.function_in(first) is canary_backend and dynamo.name_in(len) is None and dynamo.function_in(len) is None
    assert first is second and first is not other and first is dynamo.backend_in(dynamo.compile_record_of(functions[0]))
    assert dynamo.backend_named("graphreg_canary") is canary_backend and callable(dynamo.backend_named("eager"))


def test_captured_code() -> None:
    """How Dynamo captures code, and the rest of it after a graph break. It concerns names of sites in the backend."""
    codes, running = list[dynamo.CapturedCode](), list[Any]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        codes.append(dynamo.captured_code(dynamo.translator(), gm))
        running.extend(each for each in dynamo.first_arguments() if isinstance(each, Breaks))

    module = Breaks()
    compiled(module, look)(torch.ones(1))
    first, rest = codes
    assert isinstance(first, dynamo.CapturedCode)
    begin = Breaks.forward.__code__.co_firstlineno
    assert (first.name, first.resumed, first.broken, first.line) == ("forward", False, True, begin + 2)
    assert (rest.name, rest.resumed, rest.broken) == ("forward", True, False)
    assert first.values["self"] is module and running and all(each is module for each in running)


def test_function_of() -> None:
    """How Dynamo names the rest of a function after a graph break. It concerns the error for code that is left to eager."""
    assert dynamo.function_name_of("torch_dynamo_resume_in_forward_at_12") == "forward" and dynamo.function_name_of("forward") == "forward"


def test_callers_of_forward() -> None:
    """How a module's call reaches its forward. It concerns names of sites in the backend."""
    codes = {each.co_name for each in nn.Module._call_impl.__code__.co_consts if isinstance(each, types.CodeType)}
    assert set(dynamo.CALLERS_OF_FORWARD) <= codes | {nn.Module._call_impl.__name__, nn.Module._wrapped_call_impl.__name__}


def test_sources() -> None:
    """How Dynamo records where an input comes from. It concerns names of inputs in the backend."""
    found = list[tuple[str, list[str]]]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        twins, graph = dict[fx.Node, fx.Node](), fx.Graph()
        for node in gm.graph.nodes:
            twin: Any = graph.node_copy(node, twins.__getitem__)
            twins[node] = twin
            if node.op == "placeholder":
                found.append(dynamo.input_source(node))
                assert hasattr(node, "_dynamo_source") and not hasattr(twin, "_dynamo_source")
                dynamo.copy_source(node, twin)
                assert twin._dynamo_source is node._dynamo_source
                dynamo.copy_source(None, twin)
                assert twin._dynamo_source is None
        module = fx.GraphModule(gm, graph)
        dynamo.copy_notes(gm, module)
        assert module.compile_subgraph_reason is gm.compile_subgraph_reason and module._param_name_to_source is gm._param_name_to_source

    def add(x: Tensor, more: dict[str, Any]) -> Tensor:
        y: Tensor = x + more["a"] + more["b"][1]
        return y

    compiled(add, look)(torch.ones(1), {"a": torch.ones(1), "b": [0, torch.ones(1)]})
    assert found == [("x", []), ("more", ["a"]), ("more", ["b", "1"])]


class Box:
    now = 1


def _graphs_of(guard: Callable[[Any, Box], None], changes: Callable[[Box], None], boxes: list[Box]) -> int:
    """Call a compiled function with each of the boxes in turn, and return how many graphs Dynamo captures.

    The function ignores its box, so only ``guard`` can cause another capture. ``guard`` installs a guard on the first box while a graph is
    captured; ``changes`` is called with that box after each call.
    """
    graphs = list[int]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        graphs.append(1)
        guard(dynamo.translator(), boxes[0])

    function = compiled(lambda box, x: x + 1, look)
    for box in boxes:
        function(box, torch.ones(1))
        changes(boxes[0])
    return len(graphs)


def test_guards() -> None:
    """How Dynamo guards. It concerns the backend, whose graphs depend on the module and on modes."""
    for by_module in (False, True):
        torch.compiler.reset()
        _guarded(by_module)


def _guarded(by_module: bool) -> None:
    one, other = Box(), Box()

    def value(translator: Any, box: Box) -> None:
        dynamo.guard_value(translator, "__graphreg_canary", box, "now", by_module)

    def count(box: Box) -> None:
        box.now += 1

    assert _graphs_of(lambda translator, box: None, count, [one, other, one]) == 1
    assert _graphs_of(lambda translator, box: dynamo.guard_identity("box"), lambda box: None, [one, one, other]) == 2
    assert _graphs_of(value, lambda box: None, [one, one, one]) == 1
    assert _graphs_of(value, count, [one, one, one]) == 3


def test_strict_limit() -> None:
    """How Dynamo gives up past its limit of recompilations. It concerns the error for code that is compiled too often."""
    graphs = list[int]()
    quiet, strict = (compiled(eval("lambda x, n: x + n"), lambda gm, inputs: graphs.append(1), dynamic=False) for _ in range(2))
    with dynamo_config.patch(recompile_limit=1):
        for function in (quiet, strict):
            function(torch.ones(1), 1)
        quiet(torch.ones(1), 2)
        assert graphs == [1, 1]
        with dynamo.strict_limit(), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            strict(torch.ones(1), 2)


def test_left_to_eager() -> None:
    """How Dynamo reports what it compiles and skips. It concerns the error for a call that is left to eager."""
    told = list[Any]()

    def looped(x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + 1
            torch._dynamo.graph_break(msg="again")
        return x

    for _ in range(2):
        dynamo.on_compilation_start(told.append)
    before = dict(dynamo.left_to_eager())
    compiled(looped, nothing)(torch.ones(1))
    new = [text for text, count in dynamo.left_to_eager().items() if count > before.get(text, 0)]
    places = [place for text in new for place in dynamo.skipped_code(text)]
    assert told and new and (not tells_skipped_code() or ("looped", __file__, str(looped.__code__.co_firstlineno)) in places)
    torch.compiler.reset()
    told.clear()
    compiled(lambda x: x + 1, nothing)(torch.ones(1))
    assert not told


def test_plain_number() -> None:
    """How Dynamo traces numbers that have changed. It concerns the structure of a call; messages from compiled code."""
    graphs = list[Any]()

    def text(x: Tensor, number: float) -> tuple[Tensor, str]:
        return x * number, f"{dynamo.plain_number(number)!r} {dynamo.plain_number(x.shape[0])}"

    call = compiled(text, lambda gm, inputs: graphs.append(gm), fullgraph=True)
    for size, number in ((1, 1.5), (2, 2.5), (3, 2.5), (3, -0.25), (3, 7)):
        assert call(torch.ones(size), number)[1] == f"{number!r} {size}"
    assert len(graphs) == 5


def test_known_or_asserted() -> None:
    """How compiled code asserts a condition on a size that a value decides. It concerns the largest draw."""

    def many(x: Tensor, count: Tensor) -> Tensor:
        y = torch.zeros(int(count.max()) + 1, 2)
        return x * (2 if dynamo.known_or_asserted(y.shape[0] <= 3) else 1)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        call = compiled(many, lambda gm, inputs: None, fullgraph=True)
        assert call(torch.ones(1), torch.tensor(2)).item() == 2
        with pytest.raises(RuntimeError, match="<= 3|Runtime assertion"):
            call(torch.ones(1), torch.tensor(4))
    assert many(torch.ones(1), torch.tensor(4)).item() == 1


def test_known_true() -> None:
    """How Dynamo answers a condition on a size that a value decides. It concerns noise and penalties on values of such sizes."""

    def twice(x: Tensor, count: Tensor) -> Tensor:
        y = torch.zeros(int(count.max()) + 1, 2)
        return x * (2 if dynamo.known_true(y.shape[0] > 3) else 1) * (5 if dynamo.known_true(x.shape[0] == 1) else 3)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert compiled(twice, lambda gm, inputs: None, fullgraph=True)(torch.ones(1), torch.tensor(4)).item() == 5
    assert twice(torch.ones(1), torch.tensor(4)).item() == 10


class Attributes:
    """An object with attributes."""

    def __init__(self) -> None:
        self.a, self.b = 1, 2


def test_objects() -> None:
    """How Dynamo traces objects. It concerns objects among the arguments or outputs of compiled code."""

    def read(x: Tensor, value: Attributes) -> Tensor:
        twin = copy.copy(value)
        twin.a = 10
        total: int = sum([getattr(twin, name) for name in vars(twin)]) + sum([getattr(value, name) for name in value.__dict__])
        return x + total

    def told(x: Tensor) -> Tensor:
        return x + dynamo.traces_objects()

    if dynamo.traces_objects():
        assert compiled(read, nothing, fullgraph=True)(torch.ones(1), Attributes()) == 16
    assert compiled(told, nothing, fullgraph=True)(torch.zeros(1)) == dynamo.traces_objects()


def test_runs_compiled() -> None:
    """How a call knows whether Dynamo is active. It concerns structures of arguments of compiled modules."""
    module, found = nn.Linear(2, 2), list[bool]()

    def look(given: nn.Module) -> None:
        found.append(dynamo.runs_compiled(given))

    dynamo_marks.skip_frame(look)
    look(module)
    torch.compile(look, backend="eager")(module)
    module.compile(backend="eager")
    look(module)
    assert found == [False, True, True]


def test_tensor_guard() -> None:
    """How Dynamo's guard compares shapes, dtypes and devices of tensors. It concerns changes of a model that is regularized in place."""
    parameter = nn.Parameter(torch.ones(2, 3))
    same = dynamo.tensor_guard([parameter])
    others = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    assert same is not None and [same(each) for each in (parameter, *others)] == [True, True, False, False]
    assert dynamo.tensor_guard([parameter, parameter]) is None


def test_uncompiled() -> None:
    """How torch.compile's stance lets compiled code run in eager. It concerns proofs and other trial runs."""
    frames = torch._dynamo.testing.CompileCounter()
    function = torch.compile(lambda x: x + 1, backend=frames)
    with torch_modes.uncompiled(), torch_modes.uncompiled():
        function(torch.ones(2))
    assert frames.frame_count == 0
    with torch.compiler.set_stance("fail_on_recompile"):  # type: ignore[no-untyped-call]
        with torch_modes.uncompiled():
            function(torch.ones(2))
        assert torch._dynamo.eval_frame._stance.stance == "fail_on_recompile"
    function(torch.ones(2))
    assert frames.frame_count == 1
