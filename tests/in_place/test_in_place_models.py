"""Regularized in place: tiny GPT-2 that generates and is saved between steps, adapters, and a model that accelerate has prepared."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from perceptron import perceptron  # noqa: E402
from traces_left import seen, stored  # noqa: E402

import graphreg  # noqa: E402
from graphreg import TraceError  # noqa: E402
from language_models import batch, build, traced  # noqa: E402

ASKED: dict[str, Any] = {"hidden_dropout": 0.2, "weight_l2": 0.1, "own_dropout": "seeded", "rng": 1}


def steps(model: nn.Module, call: Any, calls: int = 2) -> list[Tensor]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for number in range(calls):
        loss = call(**batch(seed=number)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def beside_flat() -> tuple[Any, Any, Any]:
    """GPT-2 in place, which checkpoints its block; another, and the module without blocks that ``rewrite`` makes of it."""
    model, other = build("gpt2").train(), build("gpt2").train()
    graphreg.regularize_(model, **ASKED)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    made = dataclasses.replace(traced("gpt2"), model=other)
    asked = graphreg.from_kwargs(made, hidden_dropout=0.2, weight_l2=0.1)
    module = graphreg.rewrite(made, graphreg.plan(made, asked, own_dropout="seeded"), 1, penalties="attach")
    return model, other, module


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gpt2_trains_generates_and_is_saved(tmp_path: Any) -> None:
    """It checkpoints its block, and the module that it is compared with does not."""
    model, other, module = beside_flat()
    assert steps(model, model) == steps(other, module)
    assert model.graphreg_in_place.current().graphreg_state.blocks == ("transformer.h.0",)  # type: ignore[union-attr,operator]
    expected = copy.deepcopy(other.eval())
    words = batch()["input_ids"][:, :3]
    sampled = model.eval().generate(words, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(sampled, expected.generate(words, max_new_tokens=4, do_sample=False, pad_token_id=0))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(other) and loaded.config.architectures == ["GPT2LMHeadModel"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    model.train()
    other.train()
    assert steps(model, model) == steps(other, module)
    with pytest.raises(TraceError, match=r"the call carries a DynamicCache.* Leave the cache out.* call model\.eval\(\) first, as for gen"):
        model(**batch(), past_key_values=transformers.DynamicCache())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gpt2_compiled() -> None:
    model, other, module = beside_flat()
    frames: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    assert [float(loss) for loss in steps(model, compiled)] == pytest.approx([float(loss) for loss in steps(other, module)])
    assert frames.frame_count == 1


def test_strip_leaves_no_trace_in_gpt2() -> None:
    model, plain = build("gpt2").train(), build("gpt2")
    before, kept, config = seen(model), stored(model), model.config.to_dict()  # type: ignore[union-attr,operator]
    graphreg.regularize_(model, **ASKED)
    model(**batch()).loss.backward()
    assert graphreg.strip_(model) is model
    assert type(model) is type(plain) and seen(model) == before and stored(model) == kept
    assert model.config.to_dict() == config  # type: ignore[union-attr,operator]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.equal(model.eval()(**batch()).logits, plain.eval()(**batch()).logits)


class Beside:
    """Trains a model in place, and beside it a plain twin, which ``regularize`` rewrites anew for each step."""

    def __init__(self, model: Any, twin: Any, inner: Callable[[Any], Any] = lambda model: model, **options: Any) -> None:
        """``inner``: the module that is regularized."""
        self.inner, self.options, self.call = inner, {**ASKED, "scale": 1.0, **options}, 0
        self.both = model.train(), twin.train()
        graphreg.regularize_(inner(model), **self.options)

    def step(self, **call: Any) -> Tensor:
        """Take a step with both, compare outputs and gradients bit for bit, and return the output."""
        model, twin = self.both
        module = graphreg.regularize(self.inner(twin), **self.options, penalties="attach", example_inputs=call)
        graphreg.set_rng_state(module, graphreg.rng_state(module) | {"call": self.call})
        self.call += 1
        outputs, gradients = [], []
        for each, run in ((model, model), (twin, module)):
            each.zero_grad()
            output = run(**call)
            (output.square().mean() if isinstance(output, Tensor) else output.loss).backward()
            outputs.append(output if isinstance(output, Tensor) else output.loss)
            gradients.append({name: p.grad.clone() for name, p in each.named_parameters() if p.grad is not None})
            torch.optim.SGD(each.parameters(), lr=0.1).step()
        assert torch.equal(*outputs) and gradients[0].keys() == gradients[1].keys() and gradients[0]
        assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
        assert graphreg.rng_state(self.inner(model))["call"] == self.call
        found: Tensor = outputs[0]
        return found


def adapted(*adapters: str) -> Any:
    """A perceptron with adapters; its last layer learns, too, so that a step without adapters has gradients."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["hid"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(perceptron(), config)
    for name in adapters:
        model.add_adapter(name, config)
    model.base_model.model.out.weight.requires_grad_()
    return model


ROWS = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))


def test_adapters_of_peft() -> None:
    model = adapted()
    with pytest.raises(TraceError, match="PeftModel passes its calls on to the model inside it. .*regularize_.model.base_model.model"):
        graphreg.regularize_(model, hidden_dropout=0.5)
    twin = copy.deepcopy(model)
    beside = Beside(model, twin, lambda each: each.base_model.model, own_dropout="keep")
    with_adapter = beside.step(x=ROWS)
    with model.disable_adapter(), twin.disable_adapter():
        assert not torch.equal(beside.step(x=ROWS), with_adapter)
    beside.step(x=ROWS)
    assert torch.equal(model.eval()(ROWS), twin.eval()(ROWS))


def test_adapters_are_switched() -> None:
    model = adapted("other")
    twin = copy.deepcopy(model)
    beside = Beside(model, twin, lambda each: each.base_model.model, own_dropout="keep")
    for name in ("default", "other", "default", "other"):
        for each in (model, twin):
            each.set_adapter(name)
        beside.step(x=ROWS)
        trained = [path for path, p in model.named_parameters() if p.grad is not None]
        assert any(name in path for path in trained) and len(trained) == 3  # two factors of one adapter, and the last layer


def vit() -> nn.Module:
    import timm  # noqa: PLC0415  (it takes seconds)

    torch.manual_seed(0)
    model: nn.Module = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3)
    return model


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_classifier_is_reset_between_steps() -> None:
    beside = Beside(vit(), vit())
    for step, classes in enumerate((3, 5, 2)):
        for each in beside.both:
            torch.manual_seed(step)
            each.reset_classifier(classes)
        assert beside.step(x=IMAGES).shape == (2, classes)


def test_a_head_is_replaced_between_steps() -> None:
    beside = Beside(perceptron(), perceptron(), own_dropout="keep")
    heads: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(8, 2), lambda: nn.Linear(8, 5), lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 5)),
    ]  # fmt: skip
    for step, head in enumerate(heads):
        for each in beside.both:
            torch.manual_seed(step)
            each.out = head()
        beside.step(x=ROWS)


def test_a_value_of_the_configuration_is_changed_between_steps() -> None:
    """The model's loss depends on it."""

    def model() -> Any:
        torch.manual_seed(0)
        config = transformers.DistilBertConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, hidden_dim=16, num_labels=3)
        config.problem_type = "regression"
        return transformers.DistilBertForSequenceClassification(config)

    beside = Beside(model(), model())
    words, labels = batch()["input_ids"], torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    losses = []
    for kind in ("regression", "multi_label_classification", "regression"):
        for each in beside.both:
            each.config.problem_type = kind
        losses.append(beside.step(input_ids=words, labels=labels).item())
    assert len(set(losses)) == 3


def lightning_module() -> nn.Module:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

    return Module()


COMPILED: dict[str, tuple[Any, dict[str, Any]]] = {
    "timm vit": (vit, {"x": IMAGES}),
    "lightning": (lightning_module, {"x": torch.ones(3, 4)}),
    "bert": (lambda: build("bert"), batch()),
    "llama": (lambda: build("llama"), batch()),
}


@pytest.mark.parametrize(
    "name", [name if name in ("timm vit", "lightning") else pytest.param(name, marks=pytest.mark.sweep) for name in COMPILED]
)
def test_compiled_as_a_whole(name: str) -> None:
    """One frame in train mode, and the losses of eager."""
    make, call = COMPILED[name]
    torch.compiler.reset()
    losses = []
    frames: Any = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        model = graphreg.regularize_(make().train(), hidden_dropout=0.2, weight_l2=0.1, rng=1, scale=1)
        run: Any = torch.compile(model, fullgraph=True, backend=frames) if compiled else model
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), list[float]()
        for _ in range(2):
            output = run(**call)
            loss = output.square().mean() if isinstance(output, Tensor) else output.loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1]) and frames.frame_count == 1


def test_prepared_by_accelerate_after() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # of a trainer in another test
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model, x = graphreg.regularize_(perceptron(), hidden_dropout=0.5, rng=1), torch.randn(3, 4)
    prepared = accelerator.prepare(model)
    module = graphreg.regularize(perceptron(), hidden_dropout=0.5, rng=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x).output.float()
    assert torch.equal(prepared(x), expected)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # whose forward is the last __wrapped__
    assert torch.equal(unwrapped(x), module(x).output)
    with pytest.raises(TraceError, match="Regularize first, prepare after"):
        graphreg.regularize_(accelerator.prepare(perceptron()), hidden_dropout=0.5)
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("how", ["inputs", "in place"])
def test_layers_that_are_skipped_by_chance(how: str) -> None:
    """The decoder and the encoder are opaque. A trace must not hide the registry in which transformers enters classes of outputs."""
    config = transformers.BartConfig(
        vocab_size=50, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layerdrop=0.5, decoder_layerdrop=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    plain, ids = transformers.BartModel(config).train(), torch.randint(3, 50, (2, 5))
    model = copy.deepcopy(plain)
    if how == "in place":
        graphreg.regularize_(model, weight_l2=0.0, penalties="attach", scale=1)
    else:
        model = graphreg.regularize(model, weight_l2=0.0, example_inputs={"input_ids": ids})
    outputs = []
    for each in (model, plain):
        torch.manual_seed(3)
        result = each(input_ids=ids)
        outputs.append(getattr(result, "output", result).last_hidden_state)
    assert torch.equal(*outputs)
