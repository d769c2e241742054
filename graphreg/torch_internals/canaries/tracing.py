"""Canaries of torch.func and torch.fx.

In each ``@canary``, the first text completes "torch changed how …", the second "this concerns …"; then come the tested names.
"""

from __future__ import annotations

import inspect
import random
import sys
import threading
import types
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx, nn

import graphreg.torch_internals as door
from graphreg.torch_internals import Changes, functorch
from graphreg.torch_internals.canaries.canary import canary, compiled, raising
from graphreg.torch_internals.canaries.operators import Seen


@canary("torch.func wraps values in levels", "noise under torch.vmap and attached penalties", "innermost_transform", "transform_level",
        "level_of", "one_level_below", "is_wrapped", "transforms", "unwrapped", "without_transforms")  # fmt: skip
def levels() -> None:
    def inside(x: Tensor) -> Tensor:
        level = door.transform_level()
        assert door.transforms() and door.innermost_transform() is not None and level is not None
        assert door.is_wrapped(x) and door.level_of(x) == level and not door.is_wrapped(door.one_level_below(x))
        assert door.is_wrapped(made := torch.ones(2)) and not door.is_wrapped(door.unwrapped(made))
        with door.without_transforms():
            assert not door.transforms()
        return x.sum()

    torch.func.grad(inside)(torch.ones(3))
    assert not door.transforms() and door.transform_level() is None and door.innermost_transform() is None
    assert not door.is_wrapped(torch.ones(1))


@canary("torch.vmap records its batch", "noise under torch.vmap", "vmaps", "batch_positions")
def mappings() -> None:
    def inside(x: Tensor) -> Tensor:
        ((level, randomness),) = door.vmaps()
        assert randomness == "different"
        return door.batch_positions(level, x.device)[0] * 10

    assert torch.vmap(inside, randomness="different")(torch.ones(3, 2)).tolist() == [0, 10, 20] and door.vmaps() == ()


@canary("torch.vmap runs its chunks", "noise under torch.vmap(chunk_size=...)", "chunks", "in_chunks")
def chunks() -> None:
    seen = list[tuple[int, int, bool]]()

    def inside(x: Tensor) -> Tensor:
        (chunk,) = door.chunks()
        seen.append((chunk.number, chunk.start, door.in_chunks()))
        return x

    torch.vmap(inside, chunk_size=2)(torch.ones(5))
    assert seen == [(0, 0, True), (1, 2, True), (2, 4, True)] and not door.chunks() and not door.in_chunks()


@canary("torch.vmap's steps are functions of torch", "the export front end", "is_transform_step")
def is_transform_step() -> None:
    assert door.is_transform_step(torch._functorch.predispatch._add_batch_dim) and not door.is_transform_step(torch.sin)


@canary("torch.export handles a torch.func.jvp", "the export front end", "in_unwritten_jvp")
def unwritten_jvp() -> None:
    found = list[bool]()

    class Forwards(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def asks(y: Tensor) -> Tensor:
                found.append(door.in_unwritten_jvp())
                return y * y

            tangent: Tensor = torch.func.jvp(asks, (x,), (x,))[1]
            return tangent

    x = torch.ones(2)
    Forwards()(x)
    (unwritten,) = found
    assert not torch.vmap(lambda row: row * door.in_unwritten_jvp())(x).any() and not door.in_unwritten_jvp()
    if not unwritten:
        names = [getattr(node.target, "__name__", "") for node in torch.export.export(Forwards(), (x,), strict=False).graph.nodes]
        assert "_jvp_increment_nesting" in names, names


@canary("torch.export writes the levels of torch.vmap into its graph", "modules that call torch.vmap", "enters_levels", "leaving_no_level")
def leaving_no_level() -> None:
    steps = torch._functorch.predispatch
    assert door.enters_levels(steps._vmap_increment_nesting) and not door.enters_levels(steps._add_batch_dim)

    def fails(inside: bool) -> None:
        levels = torch._C._functorch
        steps._vmap_increment_nesting(2, "error")
        levels._grad_increment_nesting()
        levels._jvp_increment_nesting()
        levels._func_increment_nesting(True)
        assert levels.maybe_current_level() == 4
        if inside:
            raise KeyError

    with raising(KeyError):
        door.leaving_no_level(fails, True)
    assert torch._C._functorch.maybe_current_level() is None
    assert door.leaving_no_level(lambda a, b: a + b, 1, b=2) == 3


@canary("a tensor that a transform differentiates is known by its levels", "rates under torch.func", "is_differentiated")
def differentiated() -> None:
    one, seen = torch.ones(()), list[tuple[bool, bool]]()

    def asks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((door.is_differentiated(a * 1), door.is_differentiated(b * 1)))
        return a * b

    torch.func.grad(asks)(one, one)
    torch.func.jvp(lambda a: torch.func.grad(asks, argnums=1)(a, one), (one,), (one,))
    torch.func.jvp(lambda a: torch.func.vmap(asks, (0, None))(a[None], one), (one,), (one,))
    asks(one, one.clone().requires_grad_())
    assert seen == [(True, False), (True, True), (True, False), (False, True)]


@canary("functional_call lends tensors to a module", "strengths under torch.func.functional_call", "is_lent")
def lent() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self) -> bool:
            return door.is_lent(self._parameters["weight"], 1)  # type: ignore[arg-type]

    module = Asks()
    assert torch.func.functional_call(module, {"weight": torch.zeros(1)}, ()) and not module()
    assert torch.func.functional_call(module, dict(module.named_parameters()), ()) and not module()
    holder = {"": torch.zeros(1)}
    with mock.patch.object(functorch, "sys") as stack:
        stack.getrefcount, stack._getframe.return_value = sys.getrefcount, None
        assert not door.is_lent(holder[""], 1) and not stack._getframe.called  # nobody else has it


@fx.wrap
def one_operation(x: Any) -> Any:
    return x


@canary(
    "torch.fx traces",
    "rewritten modules, which refuse to be traced",
    "is_traced",
    "traces_here",
    "restore_fx_patches",
    "restore_after_trace",
)
def tracing() -> None:
    found = list[bool]()

    class Asks(nn.Module):
        def forward(self, x: Any) -> Any:
            door.restore_fx_patches()
            found.extend((door.is_traced(), door.traces_here()))
            patcher: Any = fx._symbolic_trace.CURRENT_PATCHER
            patcher.revert_all_patches = lambda: None  # as if an interrupt had prevented this call
            assert one_operation is not operation
            thread = threading.Thread(target=lambda: found.append(door.traces_here()))
            thread.start()
            thread.join()
            return x

    theirs, operation = nn.Module.__call__, one_operation
    with Changes() as changes, changes:
        door.restore_after_trace(changes)
        fx.symbolic_trace(Asks())
    assert found == [True, True, False] and not door.is_traced() and not door.traces_here() and nn.Module.__call__ is theirs
    assert one_operation is operation


@canary("torch keeps its flags and modes while it traces", "traces that are interrupted", "restore_after_trace")
def kept() -> None:
    guards: Any = torch._guards
    fx.symbolic_trace(nn.Identity())
    with guards.tracing(guards.TracingContext(None)), guards.compile_context(guards.CompileContext(None)):
        for place, names in door.trace_state._PLACES:
            assert all(hasattr(place, name) for name in names), (place, names)
    modes, mode = door.operator_modes(), Seen()
    with Changes() as changes, changes:
        door.restore_after_trace(changes)
        mode.__enter__()  # type: ignore[no-untyped-call]
        torch._C._set_grad_enabled(False)
    assert door.operator_modes() == modes and torch.is_grad_enabled()
    compiled_graphs = list[Any]()
    compiled(lambda x: x + 1, lambda gm, inputs: compiled_graphs.append(gm))(torch.ones(1))
    assert len(compiled_graphs) == 1


@canary("torch.fx records a call of a function as one operation", "both front ends", "wrapped_functions", "take_as_one")
def taken_as_one() -> None:
    assert (__name__, "one_operation", one_operation) in door.wrapped_functions()

    class Calls(nn.Module):
        def forward(self, x: Any) -> Any:
            return place.many(x)

    def many(x: Any) -> Any:
        return x + 1 + 2

    place: Any = types.ModuleType("place")
    tracer = fx.Tracer()
    place.many = many
    assert len(fx.Tracer().trace(Calls()).nodes) == 4
    door.take_as_one(tracer, [many], [place])
    assert [node.target for node in tracer.trace(Calls()).nodes] == ["x", many, "output"]


@canary("torch.fx emits code and names values", "names of sites, and graphs that are copied", "share_emitter", "snake_case", "value_name")
def emitting() -> None:
    class Own(fx.graph.CodeGen):
        pass

    graph, twin = fx.Graph(), fx.Graph()
    graph.set_codegen(Own())
    door.share_emitter(graph, twin)
    assert isinstance(twin._codegen, Own)
    assert door.snake_case("MaxPool2d") == "max_pool2d" and door.value_name(graph, "relu") == "relu"


class Named(NamedTuple):
    """What a graph returns."""

    value: Any
    more: Any


class CanaryPair(NamedTuple):
    """What a copied graph returns. After the canary, every graph of this process knows the name."""

    value: Any
    more: Any


@canary(
    "torch.fx writes what a graph returns",
    "a rewritten module's named tuple",
    "defines_named_tuples",
    "define_named_tuples",
    "define_in_copies",
)
def named_tuples() -> None:
    def returns(x: Any) -> Any:
        return Named(x + 1, [Named(x, {})])

    module = fx.symbolic_trace(returns)
    door.define_named_tuples(module.graph)
    module.recompile()
    assert module(1) == Named(2, [Named(1, {})]) and isinstance(module(1), Named), module.code
    assert isinstance(door.defines_named_tuples(), bool)
    door.define_in_copies(CanaryPair)
    graph, copy = fx.symbolic_trace(lambda x: CanaryPair(x, {})).graph, fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    assert fx.GraphModule(nn.Module(), copy)(1) == CanaryPair(1, {})


CANDIDATES = [
    "relu", "relu_1", "key", "input", "sum", "x_kept", "x_kept_3", "a.b", "1x", "add", "add_2", "self", "é", "relu_kept_1_2",
]  # fmt: skip


@canary("torch.fx names nodes", "the rewrite, which chooses names before it makes the nodes", "node_namer")
def node_namer() -> None:
    for seed in range(300):
        draw, graph, copy = random.Random(seed), fx.Graph(), fx.Graph()
        for _ in range(draw.randint(0, 6)):
            graph.create_node("placeholder", "x", name=draw.choice(CANDIDATES))
        for node in graph.nodes:
            copy.node_copy(node)
        namer = door.node_namer(node.name for node in graph.nodes)
        for name in draw.choices(CANDIDATES, k=6):
            assert namer(name) == copy.create_node("placeholder", "x", name=name).name, f"seed {seed}"


@canary("torch.fx compiles emitted code, and Dynamo reads the code of a function", "emitted code that is compiled at its first call",
        "generate_forward")  # fmt: skip
def emitted_code() -> None:
    def module() -> fx.GraphModule:
        made = fx.GraphModule(nn.Module(), fx.Graph())
        x = made.graph.placeholder("x")
        made.graph.output(made.graph.call_function(torch.add, (x, made.graph.placeholder("y", default_value=1)), {"alpha": 2}))
        door.generate_forward(made)
        return made

    in_eager, in_dynamo, seen = module(), module(), list[fx.GraphModule]()
    assert inspect.getsource(in_eager.forward) in in_eager.code and str(inspect.signature(in_eager.forward)) == "(x, y=1)"
    assert "add" not in in_eager.forward.__code__.co_names and in_eager(torch.ones(1)).item() == 3
    assert in_eager.forward.__code__.co_names == ("torch", "add")
    run = compiled(lambda x: in_dynamo(x, 3), lambda graph, _: seen.append(graph))
    assert run(torch.ones(1)).item() == 7 and run(torch.ones(1)).item() == 7 and len(seen) == 1
