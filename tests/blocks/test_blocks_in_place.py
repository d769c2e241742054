"""``regularize_(..., blocks=...)``: the model's own modules are called, whatever acts on their calls acts, and nothing is left behind."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import graphreg
from block_nets import CASES, Case, Named, Residual, Skips, Stack, rewritten
from graphreg.in_place import placed as in_place_model
from saved_tensors import saved_bytes
from test_checkpoint import IMPLEMENTATIONS, checkpointed
from test_flat import KEYWORDS, assert_equal, step

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {**KEYWORDS, "own_dropout": "seeded"}


def placed(depth: int = 3, **more: Any) -> Any:
    torch.manual_seed(0)
    return graphreg.regularize_(Stack(depth), **{**SETTINGS, "penalties": "return", "blocks": "layers.*", **more})


def flat(depth: int = 3, **more: Any) -> Any:
    traced = _traced(depth, more.pop("front_end", "auto"))
    torch.manual_seed(0)
    return rewritten(traced, Stack(depth), **{**SETTINGS, **more})


@functools.cache
def _traced(depth: int, front_end: Any) -> graphreg.Traced:
    return graphreg.trace(Stack(depth), X if front_end == "export" else None, front_end=front_end)


def unwrapped(step: list[Any]) -> list[Any]:
    """A step with the parameters' own names."""
    output, penalties, gradients, inputs = step
    return [output, penalties, {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients.items()}, inputs]


def blocks_of(model: Any) -> tuple[str, ...]:
    blocks: tuple[str, ...] = model.graphreg_in_place.current().graphreg_state.blocks
    return blocks


def pair(case: Case) -> tuple[Any, Any, Any]:
    """The module of ``regularize`` without blocks, the model in place with blocks, and the arguments of a call."""
    torch.manual_seed(1)
    given = case.inputs()
    options = {"penalties": "return", **KEYWORDS, **case.more}
    module = graphreg.regularize(case.model(), example_inputs=given, **options)
    model = graphreg.regularize_(case.model(), blocks=case.blocks, **options)
    return module, model, given if isinstance(given, tuple) else (given,)


# Equal to flat


@pytest.mark.parametrize("name", CASES)
def test_equal_to_flat_copied_and_stripped(name: str) -> None:
    module, model, given = pair(CASES[name])
    before = {path: (inner, type(inner), set(vars(inner))) for path, inner in CASES[name].model().named_modules()}
    objects = dict(model.named_modules())
    for _ in range(2):
        assert_equal(step(model, given), step(module, given))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    expected, called = step(module, given), list[str]()
    assert_equal(step(twin, given), expected)
    paths = blocks_of(model)
    handles = [
        model.get_submodule(path).register_forward_hook(lambda inner, args, output, path=path: called.append(path)) for path in paths
    ]
    assert_equal(step(model, given), expected)
    assert set(called) == set(paths) and paths
    torch.testing.assert_close(model.eval()(*given), graphreg.strip(module).eval()(*given), rtol=0, atol=0)
    for handle in handles:
        handle.remove()
    graphreg.strip_(model)
    assert list(dict(model.named_modules())) == list(before)
    for path, (_, kind, attributes) in before.items():
        inner = model.get_submodule(path)
        assert inner is objects[path] and type(inner) is kind and set(vars(inner)) == attributes


def test_the_objects_are_the_models_own() -> None:
    model = Stack()
    layers = list(model.layers)
    graphreg.regularize_(model, blocks="layers.*", **SETTINGS, scale=1)
    model(X)
    assert list(model.layers) == layers and all(isinstance(layer, Residual) for layer in layers)
    assert type(layers[0]).__qualname__ == "Residual" and type(layers[0]) is type(layers[1])
    assert list(model.state_dict()) == list(Stack().state_dict()) and type(copy.deepcopy(layers[0])) is Residual


def test_a_block_runs_the_code_that_regularize_gives_it() -> None:
    model, module = placed(), graphreg.regularize(Stack(), blocks="layers.*", **SETTINGS)
    model(X)
    for ours, theirs in zip(model.layers, module.layers, strict=True):
        (call,) = vars(ours.graphreg_calls).values()
        assert (call.source,) == theirs.graphreg_block.sources


def test_a_call_that_is_none_of_a_graph_is_plain() -> None:
    model, plain = placed(own_dropout="off"), Stack()
    plain.load_state_dict(model.state_dict())
    model(X)
    torch.manual_seed(2)
    ours = model.layers[1](X)
    torch.manual_seed(2)
    assert torch.equal(ours, plain.layers[1](X))


def test_structures_have_graphs_of_their_own_and_one_noise() -> None:
    torch.manual_seed(0)
    model: Any = graphreg.regularize_(Named(), **KEYWORDS, penalties="return", blocks=["first", "second"])
    for mask in (None, torch.ones(5, 8), None):
        torch.manual_seed(0)
        module = graphreg.regularize(Named(), **KEYWORDS, example_inputs=(X,) if mask is None else (X, mask))
        graphreg.set_rng_state(module, graphreg.rng_state(module) | {"call": graphreg.rng_state(model)["call"]})
        given = (X,) if mask is None else (X, mask)
        assert_equal(step(model, given), step(module, given))
    assert graphreg.rng_state(model)["call"] == 3 and len(vars(model.first.graphreg_calls)) == 2


def test_verified_reported_and_watched() -> None:
    model = placed(verify=True, example_inputs=X)
    assert "in place: a graph" in str(graphreg.report(model, cost=False))
    module = flat()
    with graphreg.monitor(model) as watching:
        assert_equal(step(model, (X,)), step(module, (X,)))
    assert str(watching) and graphreg.rng_state(model)["call"] == 1
    assert_equal(step(model, (X,)), step(module, (X,)))


def test_a_recipe_has_the_selector() -> None:
    model = placed()
    assert graphreg.recipe(model)["blocks"] == ["layers.*"]
    again = graphreg.regularize_(Stack(), recipe=graphreg.recipe(model))
    again(X)
    assert blocks_of(again) == ("layers.0", "layers.1", "layers.2")
    chosen = placed(blocks=lambda site: site.name == "layers.1")
    chosen(X)
    assert graphreg.recipe(chosen)["blocks"] == ["layers.1"]


# What acts on calls


@pytest.mark.parametrize(
    ("implementation", "when"), [(IMPLEMENTATIONS[0], "before"), (IMPLEMENTATIONS[0], "traced"), (IMPLEMENTATIONS[1], "untraced")]
)
def test_checkpoint_wrappers(implementation: CheckpointImpl, when: str) -> None:
    torch.manual_seed(0)
    model = checkpointed(Stack(), implementation) if when == "before" else Stack()
    graphreg.regularize_(model, **SETTINGS, penalties="return", blocks="layers.*")
    module = flat()
    if when == "traced":
        assert_equal(step(model, (X,)), step(module, (X,)))
    if when != "before":
        checkpointed(model, implementation)
    for _ in range(2):
        assert_equal(unwrapped(step(model, (X,))), step(module, (X,)))
    graphreg.strip_(model)
    assert type(model.layers[0]).__name__ == "CheckpointWrapper" and type(model.layers[0]._checkpoint_wrapped_module) is Residual
    assert model(X.clone().requires_grad_()).shape == (5, 4)


def test_checkpoints_save_what_the_plain_model_saves() -> None:
    """What the totals of the penalties save beside that, does not depend on the width."""
    x, module = torch.randn(20, 64, requires_grad=True), graphreg.regularize(Stack(4, 64), **SETTINGS)
    size = saved_bytes(lambda: module(x))[1]
    for implementation in IMPLEMENTATIONS:
        plain, model = checkpointed(Stack(4, 64), implementation), checkpointed(Stack(4, 64), implementation)
        graphreg.regularize_(model, **SETTINGS, penalties="return", blocks="layers.*")
        model(x)  # it is traced
        sizes = [saved_bytes(lambda each=each: each(x))[1] for each in (model, plain)]
        assert sizes[0] <= 1.1 * sizes[1] < 0.2 * size


def test_a_wrapper_around_a_child_of_the_model_itself() -> None:
    case, given = CASES["skips"], CASES["skips"].inputs()
    module, model, _ = pair(case)
    assert_equal(step(model, (given,)), step(module, (given,)))
    began: list[type] = []
    for name in ("down2", "up1"):
        setattr(model, name, checkpoint_wrapper(getattr(model, name)))
        getattr(model, name).register_forward_pre_hook(lambda inner, args: began.append(type(inner)))
    assert_equal(unwrapped(step(model, (given,))), step(module, (given,)))
    assert len(began) == 2 and len(model.graphreg_in_place._made) == 1 and isinstance(Skips(), nn.Module)


def test_what_a_wrapper_checkpoints_is_a_block_with_sites() -> None:
    model = placed(blocks="layers.0", missing="ignore", own_dropout="keep")
    apply_activation_checkpointing(model, check_fn=lambda inner: inner is model.layers[1])
    model(X)
    assert blocks_of(model) == ("layers.0", "layers.1._checkpoint_wrapped_module")
    assert "layers.1._checkpoint_wrapped_module.relu" in str(graphreg.report(model))


def test_hooks_run_at_calls_and_are_not_traced() -> None:
    torch.manual_seed(0)
    model, seen = Stack(2), list[Any]()
    model.layers[0].register_forward_hook(lambda block, args, output: seen.append(("before", type(output))))
    graphreg.regularize_(model, hidden_dropout=0.2, rng=3, penalties="return", blocks="layers.*")
    torch.manual_seed(0)
    module = graphreg.regularize(Stack(2), hidden_dropout=0.2, rng=3)
    assert_equal(step(model, (X,)), step(module, (X,)))
    assert seen == [("before", Tensor)]
    handle = model.layers[1].register_forward_hook(lambda block, args, output: output * 0)
    torch.testing.assert_close(model(X).output, model.head.bias.expand(5, 4))
    assert_equal(model.eval()(X), model.head.bias.expand(5, 4))
    handle.remove()
    assert len(seen) == 3
    graphreg.strip_(model)
    assert len(model.layers[0]._forward_hooks) == 1


def test_without_blocks_a_hook_is_refused_with_the_cure() -> None:
    model = placed(blocks=None)
    model.layers[0].register_forward_hook(lambda block, args, output: None)
    cure = r"layers\.0 has a hook.*regularize_\(.*, blocks='layers\.0'\), unless it computes nothing itself.*; or register the"
    with pytest.raises(graphreg.GraphRegError, match=cure):
        model(X)


@pytest.mark.parametrize("wrap", [False, True])
def test_compiled_as_a_whole(wrap: bool) -> None:
    torch._dynamo.reset()
    model, module = placed(), flat()
    if wrap:
        checkpointed(model)
    frames: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(unwrapped(step(model, (X,), compiled)), step(module, (X,)))
    assert frames.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of Dynamo's, also for plain blocks
def test_equal_blocks_compile_once() -> None:
    torch._dynamo.reset()
    relu = "layers.*.relu"
    more: dict[str, Any] = {"hidden_dropout": None, "hidden_noise": None, "dropout": {relu: 0.2}}
    more |= {"hidden_l1": {"weight": 0.1, "pattern": relu}}
    model, module = placed(6, **more), flat(6, **more)
    frames: Any = CompileCounterWithBackend("aot_eager")
    for layer in model.layers:
        layer.compile(backend=frames, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(step(model, (X,)), step(module, (X,)))
    assert frames.frame_count == 1
    graphreg.strip_(model)
    torch.testing.assert_close(model.eval()(X), graphreg.strip(module).eval()(X))
    torch._dynamo.reset()


def test_the_first_call_may_be_under_hooks_on_saved_tensors() -> None:
    model, module = placed(front_end="export"), flat(front_end="export")
    (ours, size), (theirs, expected) = (saved_bytes(lambda each=each: each(X)) for each in (model, module))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert size == expected > 0


# Changes, copies, refusals


def test_a_change_within_a_block_is_followed_and_old_code_is_dropped() -> None:
    model = placed(2)
    for width in range(10, 19):
        model.layers[0].up, model.layers[0].down = nn.Linear(8, width), nn.Linear(width, 8)
        assert model(X).output.shape == (5, 4)
    assert len(vars(model.layers[0].graphreg_calls)) == len(vars(model.layers[1].graphreg_calls)) == 8
    first, model.layers[0] = model.layers[0], Residual()
    model(X)
    graphreg.strip_(model)
    assert type(first) is Residual and "graphreg_calls" not in vars(first)


def test_copies_that_share_blocks() -> None:
    model, module = placed(), flat()
    step(model, (X,)), step(module, (X,))
    twin = copy.copy(model)
    expected = step(module, (X,))
    assert_equal(step(twin, (X,)), expected)
    assert_equal(step(model, (X,)), expected)
    graphreg.strip_(model)
    assert_equal(step(twin, (X,)), step(module, (X,)))
    graphreg.strip_(twin)
    assert type(model.layers[0]) is Residual


def test_nothing_keeps_a_model() -> None:
    model = placed()
    model(X)
    gone = [weakref.ref(model), *map(weakref.ref, model.layers)]
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_what_is_refused() -> None:
    model = Stack(2)
    model.layers[0].forward = Residual().forward  # type: ignore[method-assign]
    with pytest.raises(graphreg.TraceError, match=r"the forward of 'layers\.0', which is a block \(blocks=\), was replaced on the object"):
        graphreg.regularize_(model, hidden_dropout=0.1, blocks="layers.*", example_inputs=X)
    assert type(model) is Stack and [type(layer) for layer in model.layers] == [Residual, Residual]
    for wrong, sentence in (("*", "names no modules"), (3, "a selector is a string, a sequence of strings or a function of a site")):
        with pytest.raises(graphreg.RegularizerError, match=sentence):
            graphreg.regularize_(Stack(2), hidden_dropout=0.1, blocks=wrong)
    with pytest.raises(graphreg.NoMatchError, match=r"'layer\.\*' matches no called module of Stack\. Near names: layers\.\*"):
        placed(blocks="layer.*")(X)


def test_strip_refuses_a_block_whose_class_another_library_changed() -> None:
    model = placed(2)
    model(X)
    kind = type(model.layers[1])
    object.__setattr__(model.layers[1], "__class__", type("Other", (kind,), {}))
    with pytest.raises(graphreg.GraphRegError, match="changed the class of a block of this model to Other since the model was regular"):
        graphreg.strip_(model)
    assert type(model.layers[0]) is kind and model(X).output.shape == (5, 4)
    object.__setattr__(model.layers[1], "__class__", kind)
    graphreg.strip_(model)
    assert type(model.layers[1]) is Residual


def test_strengths_by_site_in_graphs_that_are_made_later() -> None:
    """For another structure of arguments, in a copy and after a change of the model: as without blocks."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            y: Tensor = self.head(x if mask is None else x * mask)
            return y

    def made(blocks: str | None) -> Any:
        torch.manual_seed(0)
        model = graphreg.regularize_(Masked(), dropout={"layers.*.1": 0.01}, rng=0, blocks=blocks)
        model(x)
        graphreg.set_strength(model, "dropout", {"layers.0.*": 0.9})
        return model

    x = torch.randn(16, 8)
    ours, flat = made("layers.*"), made(None)
    twins = copy.deepcopy(ours), copy.deepcopy(flat)
    assert torch.equal(ours(x), flat(x))
    assert torch.equal(ours(x, torch.ones(8)), flat(x, torch.ones(8)))
    assert torch.equal(twins[0](x), twins[1](x))
    assert graphreg.site_strengths(twins[0]) == graphreg.site_strengths(flat) == {"dropout": {"layers.0.1": 0.9, "layers.1.1": 0.01}}
    for model in (ours, flat):
        torch.manual_seed(1)
        model.head = nn.Linear(8, 8)
    assert torch.equal(ours(x), flat(x))


def test_wrappers_of_checkpoints_that_come_and_go_make_no_other_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """So they may come between ``regularize_`` and ``fully_shard``, after which nothing can be traced."""
    model = placed(2)
    model(X)
    monkeypatch.setattr(in_place_model, "traced_for", None)  # a trace would fail
    apply_activation_checkpointing(model, check_fn=lambda inner: isinstance(inner, Residual))
    assert isinstance(model.layers[0], CheckpointWrapper)
    model(X)
    model.eval()(X)
    for name, wrapper in [*model.layers._modules.items()]:
        model.layers._modules[name] = wrapper._checkpoint_wrapped_module
    model.train()(X)
