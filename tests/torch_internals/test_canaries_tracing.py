"""Canaries of torch.func and torch.fx."""

from __future__ import annotations

import inspect
import random
import sys
import threading
import types
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributions import Normal

import graphreg
from canary import Seen, compiled
from graphreg.torch_internals import emitted_code, functorch, torch_modes, trace_state
from graphreg.torch_internals import fx as fx_internals
from graphreg.torch_internals.patching import Changes


def test_levels() -> None:
    """How torch.func wraps values in levels. It concerns noise under torch.vmap and attached penalties."""

    def inside(x: Tensor) -> Tensor:
        level = functorch.transform_level()
        assert functorch.transforms() and functorch.innermost_transform() is not None and level is not None
        assert functorch.is_wrapped(x) and functorch.level_of(x) == level and not functorch.is_wrapped(functorch.one_level_below(x))
        assert functorch.is_wrapped(made := torch.ones(2)) and not functorch.is_wrapped(functorch.without_levels(made))
        with functorch.without_transforms():
            assert not functorch.transforms()
        return x.sum()

    torch.func.grad(inside)(torch.ones(3))
    assert not functorch.transforms() and functorch.transform_level() is None and functorch.innermost_transform() is None
    assert not functorch.is_wrapped(torch.ones(1))


def test_mappings() -> None:
    """How torch.vmap records its batch. It concerns noise under torch.vmap."""

    def inside(x: Tensor) -> Tensor:
        ((level, randomness),) = functorch.vmaps()
        assert randomness == "different"
        return functorch.batch_positions(level, x.device)[0] * 10

    assert torch.vmap(inside, randomness="different")(torch.ones(3, 2)).tolist() == [0, 10, 20] and functorch.vmaps() == ()


def test_chunks() -> None:
    """How torch.vmap runs its chunks. It concerns noise under torch.vmap(chunk_size=...)."""
    seen = list[tuple[int, int, bool]]()

    def inside(x: Tensor) -> Tensor:
        (chunk,) = functorch.chunks()
        seen.append((chunk.number, chunk.start, functorch.in_chunks()))
        return x

    torch.vmap(inside, chunk_size=2)(torch.ones(5))
    assert seen == [(0, 0, True), (1, 2, True), (2, 4, True)] and not functorch.chunks() and not functorch.in_chunks()


def test_is_transform_step() -> None:
    """How torch.vmap's steps are functions of torch. It concerns the export front end."""
    assert functorch.is_transform_step(torch._functorch.predispatch._add_batch_dim) and not functorch.is_transform_step(torch.sin)


def test_unwritten_jvp() -> None:
    """How torch.export handles a torch.func.jvp. It concerns the export front end."""
    found = list[bool]()

    class Forwards(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def asks(y: Tensor) -> Tensor:
                found.append(functorch.in_unwritten_jvp())
                return y * y

            tangent: Tensor = torch.func.jvp(asks, (x,), (x,))[1]
            return tangent

    x = torch.ones(2)
    Forwards()(x)
    (unwritten,) = found
    assert not torch.vmap(lambda row: row * functorch.in_unwritten_jvp())(x).any() and not functorch.in_unwritten_jvp()
    if not unwritten:
        names = [getattr(node.target, "__name__", "") for node in torch.export.export(Forwards(), (x,), strict=False).graph.nodes]
        assert "_jvp_increment_nesting" in names, names


def test_leaving_no_level() -> None:
    """How torch.export writes the levels of torch.vmap into its graph. It concerns modules that call torch.vmap."""
    steps = torch._functorch.predispatch
    assert functorch.enters_levels(steps._vmap_increment_nesting) and not functorch.enters_levels(steps._add_batch_dim)

    def fails(inside: bool) -> None:
        levels = torch._C._functorch
        steps._vmap_increment_nesting(2, "error")
        levels._grad_increment_nesting()
        levels._jvp_increment_nesting()
        levels._func_increment_nesting(True)
        assert levels.maybe_current_level() == 4
        if inside:
            raise KeyError

    with pytest.raises(KeyError):
        functorch.leaving_no_level(fails, True)
    assert torch._C._functorch.maybe_current_level() is None
    assert functorch.leaving_no_level(lambda a, b: a + b, 1, b=2) == 3


def test_differentiated() -> None:
    """How a tensor that a transform differentiates is known by its levels. It concerns rates under torch.func."""
    one, seen = torch.ones(()), list[tuple[bool, bool]]()

    def asks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((functorch.is_differentiated(a * 1), functorch.is_differentiated(b * 1)))
        return a * b

    torch.func.grad(asks)(one, one)
    torch.func.jvp(lambda a: torch.func.grad(asks, argnums=1)(a, one), (one,), (one,))
    torch.func.jvp(lambda a: torch.func.vmap(asks, (0, None))(a[None], one), (one,), (one,))
    asks(one, one.clone().requires_grad_())
    assert seen == [(True, False), (True, True), (True, False), (False, True)]


def test_lent() -> None:
    """How functional_call lends tensors to a module. It concerns strengths under torch.func.functional_call."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self) -> bool:
            return functorch.is_lent(self._parameters["weight"], 1)  # type: ignore[arg-type]

    module = Asks()
    assert torch.func.functional_call(module, {"weight": torch.zeros(1)}, ()) and not module()
    assert torch.func.functional_call(module, dict(module.named_parameters()), ()) and not module()
    holder = {"": torch.zeros(1)}
    with mock.patch.object(functorch, "sys") as stack:
        stack.getrefcount, stack._getframe.return_value = sys.getrefcount, None
        is_lent = functorch.is_lent(holder[""], 1)  # not in the assertion, because pytest would hold the tensor, too
        assert not is_lent and not stack._getframe.called


@fx.wrap
def one_operation(x: Any) -> Any:
    return x


def test_tracing() -> None:
    """How torch.fx traces. It concerns rewritten modules, which refuse to be traced."""
    found = list[bool]()

    class Asks(nn.Module):
        def forward(self, x: Any) -> Any:
            trace_state.restore_fx_patches()
            found.extend((fx_internals.is_traced(), fx_internals.traces_here()))
            patcher: Any = fx._symbolic_trace.CURRENT_PATCHER
            patcher.revert_all_patches = lambda: None  # as if an interrupt had prevented this call
            assert one_operation is not operation
            thread = threading.Thread(target=lambda: found.append(fx_internals.traces_here()))
            thread.start()
            thread.join()
            return x

    theirs, operation = nn.Module.__call__, one_operation
    with Changes() as changes, changes:
        trace_state.restore_after_trace(changes)
        fx.symbolic_trace(Asks())
    assert found == [True, True, False] and not fx_internals.is_traced() and not fx_internals.traces_here() and nn.Module.__call__ is theirs
    assert one_operation is operation


def test_kept() -> None:
    """How torch keeps its flags and modes while it traces. It concerns traces that are interrupted."""
    guards: Any = torch._guards
    fx.symbolic_trace(nn.Identity())
    with guards.tracing(guards.TracingContext(None)), guards.compile_context(guards.CompileContext(None)):
        for place, names in trace_state._PLACES:
            assert all(hasattr(place, name) for name in names), (place, names)
    modes, mode = torch_modes.operator_modes(), Seen()
    with Changes() as changes, changes:
        trace_state.restore_after_trace(changes)
        mode.__enter__()  # type: ignore[no-untyped-call]
        torch._C._set_grad_enabled(False)
    assert torch_modes.operator_modes() == modes and torch.is_grad_enabled()
    compiled_graphs = list[Any]()
    compiled(lambda x: x + 1, lambda gm, inputs: compiled_graphs.append(gm))(torch.ones(1))
    assert len(compiled_graphs) == 1


def test_taken_as_one() -> None:
    """How torch.fx records a call of a function as one operation. It concerns both front ends."""
    assert (__name__, "one_operation", one_operation) in fx_internals.wrapped_functions()

    class Calls(nn.Module):
        def forward(self, x: Any) -> Any:
            return place.many(x)

    def many(x: Any) -> Any:
        return x + 1 + 2

    place: Any = types.ModuleType("place")
    tracer = fx.Tracer()
    place.many = many
    assert len(fx.Tracer().trace(Calls()).nodes) == 4
    fx_internals.take_as_one(tracer, [many], [place])
    assert [node.target for node in tracer.trace(Calls()).nodes] == ["x", many, "output"]


def test_emitting() -> None:
    """How torch.fx emits code and names values. It concerns names of sites, and graphs that are copied."""

    class Own(fx.graph.CodeGen):
        pass

    graph, twin = fx.Graph(), fx.Graph()
    graph.set_codegen(Own())
    fx_internals.share_emitter(graph, twin)
    assert isinstance(twin._codegen, Own)
    assert fx_internals.snake_case("MaxPool2d") == "max_pool2d" and fx_internals.value_name(graph, "relu") == "relu"


class Named(NamedTuple):
    """What a graph returns."""

    value: Any
    more: Any


class CanaryPair(NamedTuple):
    """What a copied graph returns. After the canary, every graph of this process knows the name."""

    value: Any
    more: Any


def test_named_tuples() -> None:
    """How torch.fx writes what a graph returns. It concerns a rewritten module's named tuple."""

    def returns(x: Any) -> Any:
        return Named(x + 1, [Named(x, {})])

    module = fx.symbolic_trace(returns)
    fx_internals.define_named_tuples(module.graph)
    module.recompile()
    assert module(1) == Named(2, [Named(1, {})]) and isinstance(module(1), Named), module.code
    assert isinstance(fx_internals.defines_named_tuples(), bool)
    fx_internals.define_in_copies(CanaryPair)
    graph, copy = fx.symbolic_trace(lambda x: CanaryPair(x, {})).graph, fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    assert fx.GraphModule(nn.Module(), copy)(1) == CanaryPair(1, {})


CANDIDATES = [
    "relu", "relu_1", "key", "input", "sum", "x_kept", "x_kept_3", "a.b", "1x", "add", "add_2", "self", "é", "relu_kept_1_2",
]  # fmt: skip


def test_node_namer() -> None:
    """How torch.fx names nodes. It concerns the rewrite, which chooses names before it makes the nodes."""
    for seed in range(300):
        draw, graph, copy = random.Random(seed), fx.Graph(), fx.Graph()
        for _ in range(draw.randint(0, 6)):
            graph.create_node("placeholder", "x", name=draw.choice(CANDIDATES))
        for node in graph.nodes:
            copy.node_copy(node)
        namer = fx_internals.node_namer(node.name for node in graph.nodes)
        for name in draw.choices(CANDIDATES, k=6):
            assert namer(name) == copy.create_node("placeholder", "x", name=name).name, f"seed {seed}"


def test_emitted_code() -> None:
    """How torch.fx compiles emitted code, and Dynamo reads the code of a function. It concerns code that is compiled at its first call."""

    def module() -> fx.GraphModule:
        made = fx.GraphModule(nn.Module(), fx.Graph())
        x = made.graph.placeholder("x")
        made.graph.output(made.graph.call_function(torch.add, (x, made.graph.placeholder("y", default_value=1)), {"alpha": 2}))
        emitted_code.generate_forward(made)
        return made

    in_eager, in_dynamo, seen = module(), module(), list[fx.GraphModule]()
    assert inspect.getsource(in_eager.forward) in in_eager.code and str(inspect.signature(in_eager.forward)) == "(x, y=1)"
    assert "add" not in in_eager.forward.__code__.co_names and in_eager(torch.ones(1)).item() == 3
    assert in_eager.forward.__code__.co_names == ("torch", "add")
    run = compiled(lambda x: in_dynamo(x, 3), lambda graph, _: seen.append(graph))
    assert run(torch.ones(1)).item() == 7 and run(torch.ones(1)).item() == 7 and len(seen) == 1


def test_a_trace_gives_the_methods_of_modules_other_code_and_sets_none_on_the_class() -> None:
    """As long as torch.fx replaces these methods, and keeps the originals by these names."""
    methods = {name: vars(nn.Module)[name] for name in ("__call__", "__getattr__")}
    codes = {name: method.__code__ for name, method in methods.items()}

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            set_on_class = any(vars(nn.Module)[name] is not method for name, method in methods.items())
            of_own_code = any(method.__code__ is codes[name] for name, method in methods.items())
            return x.sigmoid() if set_on_class or of_own_code else x.relu()

    assert [site.name for site in graphreg.names(Looks()).sites if site.role] == ["x", "relu"]
    assert {name: method.__code__ for name, method in methods.items()} == codes


def test_take_checks() -> None:
    """By which function torch checks a condition. It concerns the symbolic front end."""
    asked = list[Any]()

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check(x.shape[0] > 1)
            torch._check_value(x.shape[0] > 2)
            return x + 1

    with Changes() as changes, changes:
        fx_internals.take_checks(changes, lambda proxy: asked.append(proxy) is None)
        fx.Tracer().trace(Net())
    assert len(asked) == 2
    with pytest.raises(ValueError, match="no"):
        torch._check_value(False, lambda: "no")


def test_take_shapes_of_samples() -> None:
    """Which method gives a distribution the shape of a sample."""
    traced, x = list[Any](), torch.ones(2, 3)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Any = Normal(torch.zeros(2, 3), 1.0)
            found._batch_shape = x.shape
            traced.append(found._extended_shape((4,)))
            return x

    with Changes() as changes, changes:
        fx_internals.take_shapes_of_samples(changes)
        assert Normal(x, x).rsample((4,)).shape == (4, 2, 3)  # type: ignore[arg-type]
        fx.Tracer().trace(Net())
    assert isinstance(traced[0], fx.Proxy)


def test_gradients_switched() -> None:
    """By which function grad mode is switched; that of a graph may be compiled as a whole."""

    def squared(x: Tensor) -> Tensor:
        before = torch_modes.gradients_switched(False)
        y = x * x
        torch_modes.gradients_switched(before)
        return y + x

    x = torch.ones(2, requires_grad=True)
    for run in (squared, torch.compile(squared, backend="eager", fullgraph=True)):
        (gradient,) = torch.autograd.grad(run(x).sum(), x)
        assert torch.equal(gradient, torch.ones(2)) and torch.is_grad_enabled()
        with torch.no_grad():
            assert not run(x).requires_grad and not torch.is_grad_enabled()
