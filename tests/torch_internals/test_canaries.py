"""Each function of the door to torch's private parts on a tiny example: which of them a new torch has broken, and who needs it."""

from __future__ import annotations

import random
import threading
import types
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import graphreg.torch_internals as door
import test_canaries_compilers as compilers
from canary import TESTED, canary, sentence
from graphreg.torch_internals import Changes, pytree

assert compilers  # its canaries count
# What is in the door and is of graphreg or of Python alone.
NO_PART_OF_TORCH = {
    "CHUNKED", "Changes", "Chunk", "ModuleStack", "at_rest", "collector_at_rest", "deep_enough", "quiet", "raise_interrupt", "regions",
    "with_own_code",
}  # fmt: skip


def test_each_function_has_a_canary() -> None:
    missing = sorted({*door.__all__, *(f"pytree.{name}" for name in pytree.__all__)} - {"pytree"} - NO_PART_OF_TORCH - TESTED)
    assert not missing, f"{missing} of graphreg/torch_internals have no canary: a new torch would break them in silence"
    gone = sorted(TESTED - {*door.__all__, *(f"pytree.{name}" for name in pytree.__all__)})
    assert not gone, f"{gone} are no names of graphreg/torch_internals any more"


def test_a_canary_falls_with_a_sentence() -> None:
    @canary("a backward pass is numbered", "the noise", "in_backward")
    def falls() -> None:
        assert door.backward_task() == 7

    with pytest.raises(pytest.fail.Exception) as caught:
        falls()
    assert str(caught.value).startswith(f"torch {torch.__version__} changed how a backward pass is numbered; the noise needs it")
    assert sentence("x", "y", ("z",)) in f"torch {torch.__version__} changed how x; y needs it: z in graphreg/torch_internals"


# autograd.py


@canary("a backward pass that runs is numbered", "the refusal to draw in backward", "NO_BACKWARD", "backward_task", "in_backward")
def test_backward_task() -> None:
    seen = list[tuple[int, bool]]()
    x = torch.ones(1, requires_grad=True)
    x.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: seen.append((door.backward_task(), door.in_backward()))
    )
    for _ in range(2):
        x.sum().backward()  # type: ignore[no-untyped-call]
    assert (door.backward_task(), door.in_backward()) == (door.NO_BACKWARD, False)
    assert all(inside and task != door.NO_BACKWARD for task, inside in seen) and seen[0] != seen[1]


@canary("the engine of autograd is called", "graphreg.doctor", "wrap_engine")
def test_wrap_engine() -> None:
    runs = list[int]()

    def around(run: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            runs.append(1)
            return run(*args, **kwargs)

        return counted

    x = torch.ones(1, requires_grad=True)
    with Changes() as changes, changes:
        door.wrap_engine(changes, around)
        x.sum().backward()  # type: ignore[no-untyped-call]
        torch.autograd.grad(x.sum(), x)
    x.sum().backward()  # type: ignore[no-untyped-call]
    assert len(runs) == 2


@torch.library.custom_op("graphreg_canary::plain", mutates_args=())
def plain(x: Tensor) -> Tensor:
    with torch.enable_grad():
        outside = (x.detach().requires_grad_() * 2).grad_fn
        with door.recorded_in_operator():
            inside = (x.detach().requires_grad_() * 2).grad_fn
    recorded.append((outside is not None, inside is not None))
    return x * 2


@torch.library.custom_op("graphreg_canary::derived", mutates_args=())
def derived(x: Tensor) -> Tensor:
    return x * 2


derived.register_autograd(lambda ctx, gradient: gradient * 2)
recorded = list[tuple[bool, bool]]()


@canary("a custom operator excludes autograd", "the recurrent operator", "recorded_in_operator")
def test_recorded_in_operator() -> None:
    recorded.clear()
    plain(torch.ones(1, requires_grad=True))
    assert recorded == [(False, True)]


@canary(
    "autograd calls an operator and keeps its formula", "the error of a penalty without a gradient", "custom_operators", "has_no_formula"
)
def test_custom_operators() -> None:
    x = torch.ones(1, requires_grad=True)
    assert {"graphreg_canary::plain", "graphreg_canary::derived"} <= set(door.custom_operators())
    assert door.has_no_formula(plain(x).grad_fn) and not door.has_no_formula(derived(x).grad_fn)
    assert str(plain(x).grad_fn.name()).endswith("GeneratedBackwardFor_graphreg_canary_plain_defaultBackward")


@canary("a level of forward-mode differentiation is entered", "the refusal to attach penalties there", "is_forward_mode")
def test_is_forward_mode() -> None:
    with forward_ad.dual_level():
        assert door.is_forward_mode()
    assert not door.is_forward_mode()


@canary("a storage is known", "the tape of the symbolic front end", "storage_number", "number_of_storage")
def test_storage_number() -> None:
    for x in (torch.ones(4), torch.ones(4, device="meta"), torch.ones(0)):
        assert door.storage_number(x) == door.storage_number(x[1:]) == door.number_of_storage(x.untyped_storage())
        assert door.storage_number(x) != door.storage_number(other := torch.empty_like(x)), other
    with pytest.raises((NotImplementedError, RuntimeError)):
        door.storage_number(torch.ones(2, 2).to_sparse())


@canary("writes into a tensor are counted", "the front ends", "version_of")
def test_version_of() -> None:
    x = torch.ones(4)
    before = door.version_of(x)
    x[:2].add_(1)
    assert door.version_of(x) == before + 1
    with torch.inference_mode():
        assert door.version_of(torch.ones(1).add_(1)) == -1


@canary("a view knows what it is a view of", "attached penalties", "base_of", "same_view")
def test_base_of() -> None:
    base, other = (torch.arange(4.0, requires_grad=True) * n for n in (1, 10))
    view = base.view(2, 2)[1]
    assert door.base_of(view) is base and door.base_of(base) is base
    assert torch.equal(door.same_view(view, other), other.view(2, 2)[1]) and door.base_of(door.same_view(view, other)) is other


class Reversed(torch.autograd.Function):
    """A view with a derivative that is no view's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


@canary("a view knows how it was made", "attached penalties of outputs that share storage", "is_plain_view")
def test_is_plain_view() -> None:
    base = torch.arange(4.0, requires_grad=True) * 1
    assert all(map(door.is_plain_view, (base.view(2, 2), base[1:], *torch.split(base, 2), *base.unbind())))
    by_function = Reversed.apply(base)  # type: ignore[no-untyped-call]
    assert door.base_of(by_function) is base and not door.is_plain_view(by_function)


@canary("a GradScaler keeps its scale", "attached penalties", "scale_tensor", "first_scale")
def test_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert door.scale_tensor(scaler) is None and door.first_scale(scaler) == (True, 8.0)
    scaler.scale(torch.ones(()))
    assert float(door.scale_tensor(scaler)) == 8.0  # type: ignore[arg-type]
    assert door.first_scale(torch.amp.GradScaler("cpu", enabled=False))[0] is False


@canary("a tensor tells facts by private names", "the symbolic front end", "PRIVATE_FACTS", "PRIVATE_STORAGE")
def test_private_facts() -> None:
    assert {*door.PRIVATE_FACTS, door.PRIVATE_STORAGE} <= set(dir(Tensor))


# checkpointing.py


@canary("activation checkpointing begins", "the front ends, which refuse it", "before_checkpoints")
@pytest.mark.parametrize("reentrant", [True, False])
def test_before_checkpoints(reentrant: bool) -> None:
    asked = list[int]()
    x = torch.ones(1, requires_grad=True)
    with Changes() as changes, changes:
        door.before_checkpoints(changes, lambda: asked.append(1))
        checkpoint(torch.sin, x, use_reentrant=reentrant)
    checkpoint(torch.sin, x, use_reentrant=reentrant)
    assert asked == [1]


@canary("Dynamo numbers regions that are recomputed", "masks that are recomputed", "next_region")
def test_next_region() -> None:
    first, second = door.next_region(), door.next_region()
    assert isinstance(first, int) and first != second


# modules.py


@canary("torch's layers are derived", "the kinds of operations", "DropoutBase", "BatchNormBase", "ConstantPadBase", "ConvolutionBase")
def test_bases() -> None:
    dropouts = (nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout())
    assert all(isinstance(layer, door.DropoutBase) for layer in dropouts)
    norms = (nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.BatchNorm3d(1), nn.InstanceNorm2d(1), nn.SyncBatchNorm(1))
    assert all(isinstance(layer, door.BatchNormBase) for layer in norms)
    assert all(isinstance(layer, door.ConstantPadBase) for layer in (nn.ConstantPad1d(1, 0), nn.ConstantPad3d(1, 0), nn.ZeroPad2d(1)))
    assert all(isinstance(layer, door.ConvolutionBase) for layer in (nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)))


@canary("a module keeps its hooks", "the front ends and the refusals", "CALL_HOOKS", "STATE_HOOKS", "forward_hooks", "drop_forward_hooks",
        "has_backward_hooks", "has_global_hook")  # fmt: skip
def test_hooks() -> None:
    module = nn.Linear(1, 1)
    attributes: dict[str, Any] = vars(module)
    assert all(attributes[name] == {} for name in (*door.CALL_HOOKS, *door.STATE_HOOKS))
    hook: Any = lambda *args: None  # noqa: E731
    module.register_forward_hook(hook)
    assert door.forward_hooks(module) == (hook,) and not door.has_backward_hooks(module)
    module.register_forward_pre_hook(hook)
    assert door.forward_hooks(module) == (hook, hook)
    module.register_full_backward_hook(hook)
    assert door.has_backward_hooks(module) and sum(len(attributes[name]) for name in door.CALL_HOOKS) == 3
    door.drop_forward_hooks(module)
    assert door.forward_hooks(module) == ()
    before = door.has_global_hook()
    handle = nn.modules.module.register_module_forward_hook(hook)
    assert door.has_global_hook() and not before
    handle.remove()


@canary("hooks of state_dict are kept", "rewritten modules, which take them over", "STATE_HOOKS")
def test_state_hooks() -> None:
    module, hook = nn.Linear(1, 1), lambda *args: None
    module._register_state_dict_hook(hook)  # type: ignore[no-untyped-call]
    module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    assert [len(vars(module)[name]) for name in door.STATE_HOOKS] == [1, 1, 1, 1]


@canary("a module keeps its tensors", "rewritten modules, which share them", "TENSOR_REGISTRIES")
def test_tensor_registries() -> None:
    module = nn.Module()
    module.register_buffer("b", torch.ones(1), persistent=False)
    module.p = nn.Parameter(torch.ones(1))
    assert [list(vars(module)[name]) for name in door.TENSOR_REGISTRIES] == [["p"], ["b"], ["b"]]


@canary("a module compiles itself and is compiled", "the handles and the front ends", "COMPILED_CALL", "compiles_itself", "original_of")
def test_compiled_modules() -> None:
    module = nn.Linear(1, 1)
    assert not door.compiles_itself(module) and door.original_of(module) is None
    assert door.original_of(torch.compile(module, backend="eager")) is module
    module.compile(backend="eager")
    assert door.compiles_itself(module) and vars(module)[door.COMPILED_CALL] is not None


@canary("a module is called", "the symbolic front end", "bound_call")
def test_bound_call(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = nn.Identity(), list[int]()
    module.register_forward_hook(lambda *args: seen.append(1))
    monkeypatch.setattr(nn.Module, "__call__", None)
    assert door.bound_call(module)(3) == 3 and seen == [1]


@canary("a module writes its version into a state_dict", "rewritten modules", "take_state_version")
def test_take_state_version() -> None:
    class Versioned(nn.Module):
        _version = 7

    module = nn.Linear(1, 1)
    door.take_state_version(module, Versioned())
    assert module.state_dict()._metadata[""]["version"] == 7  # type: ignore[attr-defined]


@canary("a recurrent layer keeps its weights", "recurrent layers that are compiled", "weight_names", "kernel_weights")
def test_kernel_weights() -> None:
    layer = nn.LSTM(1, 1)
    assert door.weight_names(vars(layer)) == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert all(getattr(layer, name) is weight for name, weight in door.kernel_weights(vars(layer)))


@canary("nn.Transformer detects a causal mask", "the export front end", "leave_mask_unread")
def test_leave_mask_unread() -> None:
    asked = nn.modules.transformer._detect_is_causal_mask
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    assert "_detect_is_causal_mask" in nn.TransformerEncoder.forward.__code__.co_names and asked(mask, None, 3)
    with Changes() as changes, changes:
        door.leave_mask_unread(changes)
        assert nn.modules.transformer._detect_is_causal_mask(mask, None, 3) is False
        assert nn.modules.transformer._detect_is_causal_mask(mask, True) is True
    assert nn.modules.transformer._detect_is_causal_mask is asked


@canary("nn.TransformerEncoder takes its fused kernel", "the export front end", "plain_transformers")
def test_plain_transformers() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with Changes() as changes, changes:
        door.plain_transformers(changes)
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


# operators.py


@canary("operators tell their schemas and names", "what is known of operations", "OpOverload", "OpOverloadPacket", "HigherOrderOperator",
        "schema_of", "overload_name", "qualified_name", "packet_of", "is_name_of_namespace")  # fmt: skip
def test_operators() -> None:
    packet, overload = torch.ops.aten.add_, torch.ops.aten.add_.Tensor
    assert isinstance(packet, door.OpOverloadPacket) and isinstance(overload, door.OpOverload)
    assert isinstance(torch.ops.higher_order.cond, door.HigherOrderOperator)
    first = door.schema_of(overload).arguments[0]
    assert (first.name, first.alias_info.is_write, door.schema_of(overload).name) == ("self", True, "aten::add_")
    assert door.schema_of(overload).arguments[2].kwarg_only and str(door.schema_of(overload).returns[0].type) == "Tensor"
    assert door.schema_of(torch.ops.higher_order.cond) is None
    assert (door.overload_name(overload), door.qualified_name(packet)) == ("Tensor", "aten::add_")
    assert door.packet_of(overload) is packet and door.packet_of(len) is len
    assert door.is_name_of_namespace("__getattr__") and not door.is_name_of_namespace("add_")


@canary("operators have kernels", "what is known of operations", "has_kernel")
def test_has_kernel() -> None:
    add, matmul = torch.ops.aten.add.Tensor, torch.ops.aten.matmul.default
    assert door.has_kernel(add) and door.has_kernel(add, "Meta") and not door.has_kernel(add, "CompositeImplicitAutograd")
    assert door.has_kernel(matmul, "CompositeImplicitAutograd")
    assert door.has_kernel(torch.ops.aten.ones_like.default, "CompositeExplicitAutograd")
    assert not door.has_kernel(torch.ops.aten.sort.int)  # of TorchScript's alone


@canary("softmax takes a row of which nothing is attended to", "native dropout of attention", "safe_softmax")
def test_safe_softmax() -> None:
    assert torch.equal(door.safe_softmax(torch.full((1, 2), -torch.inf), -1), torch.zeros(1, 2))


@canary("a tensor is asserted", "lengths of sequences in compiled graphs", "assert_async")
def test_assert_async() -> None:
    door.assert_async(torch.ones((), dtype=torch.bool), "fine")
    with pytest.raises(RuntimeError, match="too long"):
        door.assert_async(torch.zeros((), dtype=torch.bool), "too long")


# torch_modes.py


class Seen(door.TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = list[Any]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@canary("a mode sees operators", "the watch over formulas", "TorchDispatchMode", "operator_modes", "without_modes")
def test_dispatch_modes() -> None:
    x, before = torch.ones(1), door.operator_modes()
    with Seen() as seen:
        assert door.operator_modes() == before + 1
        x + 1
        with door.without_modes():
            x * 2
    assert seen.calls == ["aten.add.Tensor"] and door.operator_modes() == before


@canary("a mode sees functions", "the tape of the symbolic front end", "without_functions", "is_gradient_switch")
def test_function_modes() -> None:
    x = torch.ones(1)
    with Called() as called:
        torch.sin(x)
        with door.without_functions():
            torch.cos(x)
        assert not any(map(door.is_gradient_switch, called.calls))
        with torch.no_grad():
            pass
    assert called.calls[0] is torch.sin and torch.cos not in called.calls and any(map(door.is_gradient_switch, called.calls))


@canary("torch.jit traces", "the quick path of the noise", "jit_trace")
def test_jit_trace() -> None:
    states = list[Any]()

    def asks(x: Tensor) -> Tensor:
        states.append(door.jit_trace())
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(asks, torch.ones(1), check_trace=False)  # type: ignore[no-untyped-call]
    assert states[0] is not None and door.jit_trace() is None


# functorch.py


@canary("torch.func wraps values in levels", "noise under torch.vmap and attached penalties", "innermost_transform", "transform_level",
        "level_of", "one_level_below", "is_wrapped", "transforms", "unwrapped", "without_transforms")  # fmt: skip
def test_levels() -> None:
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


@canary("torch.vmap knows its batch", "noise under torch.vmap", "vmaps", "batch_positions")
def test_mappings() -> None:
    def inside(x: Tensor) -> Tensor:
        (mapping,) = door.vmaps()
        assert mapping.randomness == "different"
        return door.batch_positions(mapping.level, x.device)[0] * 10

    assert torch.vmap(inside, randomness="different")(torch.ones(3, 2)).tolist() == [0, 10, 20] and door.vmaps() == ()


@canary("torch.vmap runs its chunks", "noise under torch.vmap(chunk_size=...)", "chunks", "in_chunks")
def test_chunks() -> None:
    seen = list[tuple[int, int, bool]]()

    def inside(x: Tensor) -> Tensor:
        (chunk,) = door.chunks()
        seen.append((chunk.number, chunk.start, door.in_chunks()))
        return x

    torch.vmap(inside, chunk_size=2)(torch.ones(5))
    assert seen == [(0, 0, True), (1, 2, True), (2, 4, True)] and not door.chunks() and not door.in_chunks()


@canary("torch.vmap's steps are functions of torch", "the export front end", "is_transform_step")
def test_is_transform_step() -> None:
    assert door.is_transform_step(torch._functorch.predispatch._add_batch_dim) and not door.is_transform_step(torch.sin)


@canary("functional_call lends tensors", "strengths under torch.func.functional_call", "is_lent")
def test_lent() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self) -> bool:
            return door.is_lent(self.weight)

    module = Asks()
    assert torch.func.functional_call(module, {"weight": torch.zeros(1)}, ()) and not module()


# fx.py


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
def test_tracing() -> None:
    found = list[bool]()

    class Asks(nn.Module):
        def forward(self, x: Any) -> Any:
            door.restore_fx_patches()
            found.extend((door.is_traced(), door.traces_here()))
            patcher: Any = fx._symbolic_trace.CURRENT_PATCHER
            patcher.revert_all_patches = lambda: None  # as if an interrupt came between
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
def test_kept() -> None:
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


@canary("torch.fx takes functions as one operation", "both front ends", "wrapped_functions", "take_as_one")
def test_one_operation() -> None:
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
def test_emitting() -> None:
    class Own(fx.graph.CodeGen):
        pass

    graph, twin = fx.Graph(), fx.Graph()
    graph.set_codegen(Own())
    door.share_emitter(graph, twin)
    assert isinstance(twin._codegen, Own)
    assert door.snake_case("MaxPool2d") == "max_pool2d" and door.value_name(graph, "relu") == "relu"


CANDIDATES = [
    "relu", "relu_1", "key", "input", "sum", "x_kept", "x_kept_3", "a.b", "1x", "add", "add_2", "self", "é", "relu_kept_1_2",
]  # fmt: skip


@canary("torch.fx names nodes", "the rewrite, which decides on names before it makes the nodes", "node_namer")
def test_node_namer() -> None:
    for seed in range(300):
        draw, graph, copy = random.Random(seed), fx.Graph(), fx.Graph()
        for _ in range(draw.randint(0, 6)):
            graph.create_node("placeholder", "x", name=draw.choice(CANDIDATES))
        for node in graph.nodes:
            copy.node_copy(node)
        namer = door.node_namer(node.name for node in graph.nodes)
        for name in draw.choices(CANDIDATES, k=6):
            assert namer(name) == copy.create_node("placeholder", "x", name=name).name, f"seed {seed}"


# random_state.py


@canary(
    "a mode of operators tells what draws", "modules that draw while they are traced", "draws_watched", "randomness", "restore_randomness",
    "with_draws_restored",
)  # fmt: skip
def test_draws() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with door.draws_watched():
            before = door.randomness()
            torch.rand(1)
            random.random()
            assert door.randomness() != before
            door.restore_randomness(before)
            assert before.states == door.randomness().states
        door.with_draws_restored(lambda: (torch.rand(1), random.random()))
        assert before.states == door.randomness().states
    finally:
        end.set()
        thread.join()


seed_all = torch.manual_seed  # as user code may have imported it, before any trace


@canary("torch seeds its generator", "modules that seed while they are traced", "on_seeding", "draws_watched", "randomness",
        "restore_randomness")  # fmt: skip
def test_seeds() -> None:
    seeds = list[int]()
    with torch.random.fork_rng():
        with Changes() as changes, changes:
            door.on_seeding(changes, lambda: seeds.append(1))
            seed_all(1)
            torch.rand(1)
            torch.get_rng_state()
            assert seeds == [1]
        seed_all(1)
        assert seeds == [1]
        with door.draws_watched():
            before = door.randomness()
            seed_all(1)  # as it is already: the state tells nothing
            assert before.states == door.randomness().states and before != door.randomness()
            door.restore_randomness(before)
            assert before == door.randomness()
            with torch.random.fork_rng():
                seed_all(2)
            assert before == door.randomness()


# pytree.py


class Pair(NamedTuple):
    first: Any
    second: Any


@canary("nested values are taken apart", "samples, penalties and front ends", *(f"pytree.{name}" for name in pytree.__all__))
def test_pytree() -> None:
    pytree.register_namedtuple(Pair, serialized_type_name="graphreg_canary.Pair")
    value = {"a": Pair(1, [torch.ones(1)])}
    leaves, spec = pytree.tree_flatten(value)
    assert "graphreg_canary.Pair" in torch.utils._pytree.treespec_dumps(spec)
    assert isinstance(spec, pytree.TreeSpec) and leaves == pytree.tree_leaves(value) == [1, value["a"].second[0]]
    assert pytree.tree_unflatten([2, 3], spec) == {"a": Pair(2, [3])}
    assert pytree.tree_map_only(int, lambda n: n + 1, {"a": 1, "b": "c"}) == {"a": 2, "b": "c"}
    assert pytree.tree_unflatten([5], pytree.treespec_leaf()) == 5
