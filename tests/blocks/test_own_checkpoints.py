"""Blocks that checkpoint their own forward, as layers of transformers do: they keep doing so, and have their sites."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")

from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402

import graphreg  # noqa: E402
import language_models  # noqa: E402
from block_nets import Residual, Stack, rewritten  # noqa: E402
from saved_tensors import saved_bytes  # noqa: E402
from test_flat import assert_equal, step  # noqa: E402

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"hidden_dropout": 0.2, "hidden_l1": 0.1, "weight_l2": 0.1, "own_dropout": "seeded", "rng": 3}


class Layer(Residual, GradientCheckpointingLayer):  # type: ignore[misc]
    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        return Residual.forward(self, x)


class Layers(Stack):
    def __init__(self) -> None:
        super().__init__(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))


def made() -> Any:
    torch.manual_seed(0)
    return Layers()


def switched(model: nn.Module, on: bool = True, **options: Any) -> Any:
    """The model with checkpoints on or off, as ``gradient_checkpointing_enable`` and ``_disable`` of transformers do it."""
    for inner in model.modules():
        if hasattr(inner, "gradient_checkpointing"):
            inner._gradient_checkpointing_func = partial(checkpoint, **{"use_reentrant": False, **options})
            inner.gradient_checkpointing = on
    return model


def flat() -> Any:
    return rewritten(_traced(), made(), **SETTINGS)


@functools.cache
def _traced() -> graphreg.Traced:
    return graphreg.trace(made())


def counted(model: Any) -> list[int]:
    """A list with the number of calls of the up layers so far: three in a forward, three more in a backward that recomputes."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for layer in model.layers:
        layer.up.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_result_of_regularize_checkpoints_as_the_model_does(reentrant: bool) -> None:
    module = graphreg.regularize(switched(made(), use_reentrant=reentrant), **SETTINGS)
    assert module.graphreg_state.blocks == ("layers.0", "layers.1", "layers.2") and isinstance(module.layers[0], Layer)
    other, calls = flat(), counted(module)
    for _ in range(2):
        assert_equal(step(module, (X,)), step(other, (X,)))
    assert calls == [12]
    assert_equal(step(copy.deepcopy(module), (X,)), step(other, (X,)))  # the copies of the hooks count, too
    assert calls == [18]
    torch.testing.assert_close(module.eval()(X), other.eval()(X), rtol=0, atol=0)
    assert calls == [21]
    given = X.clone().requires_grad_()  # as reentrant checkpoints need it
    models = module.train(), switched(made(), use_reentrant=reentrant), other.train()
    sizes = [saved_bytes(lambda each=each: each(given))[1] for each in models]
    assert sizes[0] <= 1.1 * sizes[1] < 0.2 * sizes[2]


def test_the_plan_names_them_and_a_recipe_does_not() -> None:
    model = switched(made())
    model.layers[1].gradient_checkpointing = False
    decided = graphreg.plan(graphreg.trace(model), [], blocks="layers.1")
    assert str(decided).endswith("3 blocks: layers.0, layers.1, layers.2; these checkpoint their own forward: layers.0, layers.2")
    assert graphreg.recipe(decided)["blocks"] == [r"layers.1"]
    assert "blocks" not in graphreg.recipe(graphreg.regularize(model, **SETTINGS))


def test_stripped_it_still_checkpoints() -> None:
    model = switched(made())
    stripped = graphreg.strip(graphreg.regularize(model, **SETTINGS))
    torch.manual_seed(1)
    ours, size = saved_bytes(lambda: stripped(X))
    torch.manual_seed(1)
    theirs, expected = saved_bytes(lambda: model(X))
    assert torch.equal(ours, theirs) and size == expected
    again = graphreg.regularize(stripped, **SETTINGS)
    assert_equal(step(again, (X,)), step(flat(), (X,)))


def test_compiled() -> None:
    torch._dynamo.reset()
    for model in (
        graphreg.regularize(switched(made()), **SETTINGS),
        graphreg.regularize_(switched(made()), **SETTINGS, penalties="return"),
    ):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(step(model, (X,), compiled), step(flat(), (X,)))
    torch._dynamo.reset()


def test_in_place_a_switch_is_followed_at_the_next_call() -> None:
    model, module = graphreg.regularize_(made(), **SETTINGS, penalties="return"), flat()
    calls = counted(model)
    for on, expected in ((False, 3), (True, 9), (False, 12), (True, 18)):
        switched(model, on)
        assert_equal(step(model, (X,)), step(module, (X,)))
        assert calls == [expected]
    assert_equal(step(copy.deepcopy(model), (X,)), step(module, (X,)))
    model.eval()(X)
    graphreg.strip_(model)
    assert [type(layer) for layer in model.layers] == [Layer] * 3


def test_options_of_the_checkpoints_are_followed_too() -> None:
    model, began = graphreg.regularize_(switched(made()), **SETTINGS, penalties="return"), list[bool]()

    def spy(function: Any, *args: Any) -> Any:
        began.append(True)
        return checkpoint(function, *args, use_reentrant=True)

    model(X)
    for layer in model.layers:
        layer._gradient_checkpointing_func = spy
    assert_equal(step(model, (X,))[0].shape, torch.Size((64, 4)))
    assert began == [True] * 3


class InItsForward(Residual):
    """Checkpoints in a way that a trace cannot see through."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


class Opaque(Stack):
    def __init__(self) -> None:
        super().__init__(2)
        self.layers[1] = InItsForward()


@functools.cache
def _opaque() -> graphreg.Traced:
    return graphreg.trace(Opaque())


def planned(**keywords: Any) -> None:
    """What ``regularize`` does with keywords before it rewrites."""
    graphreg.plan(_opaque(), graphreg.from_kwargs(_opaque(), **keywords))


SENTENCE = r"no sites for {} inside layers\.1, because a module that checkpoints activations in its forward is opaque.*checkpoint_wrapper"


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("hidden_dropout", {"hidden_dropout": 0.1}),
        ("dropout", {"dropout": {"**@LayerNorm": 0.1}}),
        ("dropout", {"dropout": {"layers.*.drop": 0.1}}),
    ],
)
def test_a_selector_that_loses_sites_says_so(name: str, keywords: Any) -> None:
    with pytest.warns(UserWarning, match=SENTENCE.format(name)):
        planned(**keywords)


@pytest.mark.parametrize(
    "keywords", [{"dropout": {"layers.*": 0.1}}, {"weight_l2": 0.1}, {"dropout": {"layers.0.*u": 0.1}}, {"input_noise": 0.1}]
)
def test_a_selector_that_loses_none_does_not(keywords: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(**keywords)


class InTheModel(Stack):
    """The model itself checkpoints its blocks, as models of timm do after ``set_grad_checkpointing()``."""

    gradient_checkpointing, reentrant = True, False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if self.gradient_checkpointing else layer(x)
        y: Tensor = self.head(x)
        return y


class AndMore(InTheModel):
    """It checkpoints more than calls of modules."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(checkpoint(lambda x: 2 * self.layers[0](x), x, use_reentrant=False))
        return y


def in_the_model(reentrant: bool = False, on: bool = True) -> Any:
    torch.manual_seed(0)
    model: Any = InTheModel()
    model.reentrant, model.gradient_checkpointing = reentrant, on
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_the_model_itself(reentrant: bool) -> None:
    """Its layers become blocks, with sites, whose code runs with a checkpoint: masks and gradients are those without, and less is kept."""
    other = graphreg.regularize(in_the_model(on=False), **SETTINGS)
    module = graphreg.regularize(in_the_model(reentrant), **SETTINGS)
    assert module.graphreg_state.blocks == ("layers.0", "layers.1", "layers.2")
    expected = [step(other, (X,)) for _ in range(2)]
    for each in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        if each is not module:
            graphreg.set_rng_state(each, graphreg.rng_state(module) | {"call": 0})
        calls = counted(each)
        assert_equal(step(each, (X,)), expected[0])
        assert calls == [6]
        if each is module:
            assert_equal(step(each, (X,)), expected[1])
    given = X.clone().requires_grad_()
    assert saved_bytes(lambda: module(given))[1] < 0.2 * saved_bytes(lambda: other(given))[1]

    stripped = graphreg.strip(module)
    sizes = [saved_bytes(lambda each=each: each(given))[1] for each in (stripped, in_the_model(reentrant))]
    assert sizes[0] <= 1.1 * sizes[1]
    assert graphreg.regularize(stripped, **SETTINGS).graphreg_state.checkpoints == dict.fromkeys(module.graphreg_state.blocks, reentrant)

    if not reentrant:  # Dynamo makes one operation of either
        compiled = graphreg.regularize(in_the_model(reentrant), **SETTINGS)
        torch.testing.assert_close(step(compiled, (X,), torch.compile(compiled, backend="aot_eager", fullgraph=True)), expected[0])


def test_checkpoints_of_the_model_itself_in_place() -> None:
    """A switch is followed at the next call."""
    model = graphreg.regularize_(in_the_model(on=False), **SETTINGS, penalties="return")
    module, calls = graphreg.regularize(in_the_model(on=False), **SETTINGS), counted(model)
    for on, expected in ((False, 3), (True, 9), (False, 12)):
        model.gradient_checkpointing = on  # type: ignore[assignment]
        assert_equal(step(model, (X,)), step(module, (X,)))
        assert calls == [expected]
    graphreg.strip_(model)
    assert [type(layer) for layer in model.layers] == [Residual] * 3  # type: ignore[union-attr,arg-type]


def test_what_a_model_checkpoints_beside_its_modules_is_refused() -> None:
    sentence = r"activation checkpointing is on \(AndMore\), and a trace of AndMore would lose .*name the blocks in blocks="
    with pytest.raises(graphreg.TraceError, match=sentence):
        graphreg.regularize_(AndMore(), **SETTINGS, example_inputs=X)


@pytest.mark.parametrize("reentrant", [False, True])
def test_timm(reentrant: bool) -> None:
    """``set_grad_checkpointing()`` before ``regularize``, and after ``regularize_``, which follows; with drop path of the model's own."""
    timm = pytest.importorskip("timm")
    given = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def vit() -> Any:
        torch.manual_seed(0)
        size: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
        return timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.2, **size).train()

    settings: dict[str, Any] = {"hidden_dropout": 0.2, "own_dropout": "seeded", "rng": 0, "example_inputs": given}
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        plain, model = graphreg.regularize(vit(), **settings), vit()
        sizes = [saved_bytes(lambda: plain(given))[1]]
        graphreg.set_rng_state(plain, graphreg.rng_state(plain) | {"call": 0})
        expected = [step(plain, (given,)) for _ in range(2)]
        model.set_grad_checkpointing()
        models = [module := graphreg.regularize(model, **settings)]
        assert_equal(step(module, (given,)), expected[0])
        if not reentrant:
            models.append(placed := vit())
            graphreg.regularize_(placed, **settings, penalties="return")
            assert_equal(step(placed, (given,)), expected[0])
            placed.set_grad_checkpointing()
            assert_equal(step(placed, (given,)), expected[1])
        sizes += [saved_bytes(lambda each=each: each(given))[1] for each in models]
        assert max(sizes[1:]) < 0.4 * sizes[0]
        assert module.graphreg_state.checkpoints == {"blocks.0": reentrant, "blocks.1": reentrant}
    finally:
        timm.layers.set_reentrant_ckpt(before)


INSIDE = {"gpt2": "transformer.h.**", "bert": "bert.encoder.layer.**", "llama": "model.layers.**"}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", INSIDE)
def test_language_models_in_place(name: str) -> None:
    inside = f"{INSIDE[name]}#hidden"
    settings: dict[str, Any] = {"dropout": {inside: 0.1}, "hidden_l1": {"weight": 0.1, "pattern": inside}, "rng": 0, "scale": 1}
    model: Any = graphreg.regularize_(language_models.build(name).train(), **settings)
    given, found = language_models.batch(16, 24), list[Any]()
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        graphreg.set_rng_state(model, graphreg.rng_state(model) | {"call": 1})
        model.zero_grad()
        torch.manual_seed(1)
        output, size = saved_bytes(lambda: model(**given))
        output.loss.backward()
        found.append(([output.loss, model.penalties(), [p.grad.clone() for p in model.parameters()]], size))
    (plain, size_plain), (checkpointed, size) = found
    assert_equal(checkpointed[:2], plain[:2])
    # autograd adds the gradients of a value that a block and its residual sum read in another order
    for ours, theirs in zip(checkpointed[2], plain[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()) + 1e-12)
    graphreg.strip_(model)
    _, size_of_model = saved_bytes(lambda: model(**given))
    assert size <= 1.1 * size_of_model < 0.2 * size_plain
