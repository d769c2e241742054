"""Outputs that transformers captures by hooks (``output_hidden_states=True``): those of the rewritten values, in train mode, too."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import graphreg  # noqa: E402
from graphreg import GraphRegError  # noqa: E402

SMALL: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
WORDS: dict[str, Any] = {"vocab_size": 20, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(3, 20, (2, 5), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS}
IMAGE = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
CAPTURE = {"output_hidden_states": True, "output_attentions": True}
KINDS: dict[str, Any] = {  # the class, its settings, a call, the layers; symbolically traced, exported, another rule for the last state
    "bert": ("BertForSequenceClassification", SMALL | WORDS, TEXT, "bert.encoder.layer.*"),
    "llama": ("LlamaForCausalLM", SMALL | WORDS | {"use_cache": False}, TEXT, "model.layers.*"),
    "vit": ("ViTForImageClassification", SMALL | {"image_size": 8, "patch_size": 4}, IMAGE, "vit.layers.*"),
}


def made(kind: str, **settings: Any) -> tuple[Any, dict[str, Any], str]:
    name, config, call, layers = KINDS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**config, attn_implementation="eager", **settings)).train(), call, layers


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def tensors(output: Any) -> Iterator[Tensor]:
    for value in output.values():
        yield from (value if isinstance(value, tuple) else (value,))


def assert_same(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    for first, second in zip(tensors(one), tensors(other), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_in_train_mode(kind: str) -> None:
    """By regularize, in place, and in place with blocks, a train call has what the model's has; the trace leaves no hook behind."""
    model, call, layers = made(kind)
    call = call | CAPTURE
    plain = copy.deepcopy(model)
    expected = plain(**call)
    assert len(expected.hidden_states) == 3 and len(expected.attentions) == 2
    torch.manual_seed(1)
    expected = plain(**call)

    if kind != "llama":  # torch.export takes seconds
        module = graphreg.regularize(model, example_inputs=call)
        torch.manual_seed(1)
        assert_same(module(**call).output, expected)
        assert hooks(model) == 0 and not hasattr(model.base_model, "_output_capturing_hooks_installed")

    for blocks in (None, layers) if kind == "vit" else (layers,):
        model = made(kind)[0]
        graphreg.regularize_(model, blocks=blocks, penalties="attach", scale=1)
        torch.manual_seed(1)
        assert_same(model(**call), expected)
        assert hooks(model) == 0


def test_captured_values_are_rewritten_values() -> None:
    """A dropped layer's output is what the call collects, by an argument or by the configuration."""
    model, call, _ = made("bert", output_hidden_states=True)
    graphreg.regularize_(model, dropout={"bert.encoder.layer.0": 0.5}, penalties="attach", scale=1, rng=0)
    first = model(**call).hidden_states[1]
    assert 0.3 < float((first == 0).float().mean()) < 0.7
    assert not torch.equal(first, model(**call).hidden_states[1])


@pytest.mark.parametrize("blocks", [None, "bert.encoder.layer.*"])
def test_after_an_eval_call(blocks: str | None) -> None:
    """An eval call leaves hooks behind. They do not refuse train calls, trace nothing again, act on no call, and may be compiled."""
    model, call, _ = made("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    graphreg.regularize_(model, hidden_dropout=0.5, blocks=blocks, penalties="attach", scale=1, rng=0)
    other = copy.deepcopy(model)
    expected = [model(**call).logits for _ in range(2)]
    assert torch.equal(other(**call).logits, expected[0])
    first = other.graphreg_in_place.current()
    assert len(other.eval()(**call, output_hidden_states=True).hidden_states) == 3
    assert hooks(other) > 0
    other.train()
    if blocks is not None:  # their hooks are in the compiled code
        other.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(other(**call).logits, expected[1])
    assert other.graphreg_in_place.current() is first

    handle = other.bert.encoder.layer[0].register_forward_hook(lambda *args: None)
    if blocks is None:
        with pytest.raises(GraphRegError, match=r"bert\.encoder\.layer\.0 has a hook"):
            other(**call)
    handle.remove()


def test_hooks_there_before() -> None:
    """With the hooks of an earlier call, ``regularize`` and ``regularize_`` give one result, and the model keeps its hooks."""
    model, call, layers = made("bert")
    model.eval()(**call, output_hidden_states=True)
    count = hooks(model.train())
    module = graphreg.regularize(model, hidden_dropout=0.5, blocks=layers, example_inputs=call, rng=0)
    torch.manual_seed(1)
    expected = module(**call).output.logits
    graphreg.regularize_(model, hidden_dropout=0.5, blocks=layers, penalties="attach", scale=1, rng=0)
    torch.manual_seed(1)
    assert torch.equal(model(**call).logits, expected)
    assert hooks(model) == count


class _Waits(nn.Module):
    """Its forward lets another thread work."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["waits"] = (threading.Event(), threading.Event())

    def forward(self, x: Tensor) -> Tensor:
        entered, done = self.__dict__["waits"]
        entered.set()
        done.wait(60)
        return x + 1


def test_another_thread_installs_the_hooks_that_it_needs() -> None:
    """A trace stops where its own forward would install hooks, and no other thread does."""
    model, call, _ = made("bert")
    waits = _Waits()
    entered, done = waits.__dict__["waits"]
    found: list[Any] = []

    def work() -> None:
        entered.wait(60)
        try:
            found.append(model(**call, output_hidden_states=True))
        except BaseException as error:
            found.append(error)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    graphreg.trace(waits, front_end="symbolic")
    thread.join(60)
    (output,) = found
    assert len(output.hidden_states) == 3 and hooks(model) > 0
