"""Blocks of real models in small: with them the module equals the one without, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import graphreg
import language_models
from block_nets import rewritten
from saved_tensors import saved_bytes
from test_flat import KEYWORDS, assert_equal


def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.VisionTransformer(16, 8, 3, 2, 16, 32, num_classes=5, dropout=0.1)
    nn.init.normal_(model.heads[-1].weight)  # type: ignore[index]
    return model


def timm_vit() -> nn.Module:
    import timm  # noqa: PLC0415  (it takes seconds)

    torch.manual_seed(0)
    model: nn.Module = timm.models.VisionTransformer(16, 8, depth=3, embed_dim=16, num_heads=2, num_classes=5, drop_path_rate=0.2)
    nn.init.normal_(model.head.weight)  # type: ignore[arg-type,union-attr]
    return model


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(num_classes=5)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], Any]]] = {
    "vit": (vit, "encoder.layers.*", lambda: {"x": torch.randn(2, 3, 16, 16)}),
    "timm vit": (timm_vit, "blocks.*", lambda: {"x": torch.randn(2, 3, 16, 16)}),
    "resnet18": (resnet, "layer[1-4].*", lambda: {"x": torch.randn(2, 3, 32, 32)}),
    "gpt2": (lambda: language_models.build("gpt2"), "transformer.h.*", language_models.batch),
    "llama": (lambda: language_models.build("llama"), "model.layers.*", language_models.batch),
}


def step(module: Any, given: dict[str, Any]) -> list[Any]:
    torch.manual_seed(1)
    output, penalties = module(**given)
    logits = getattr(output, "logits", output)
    (logits.square().mean() + sum(penalties.values())).backward()
    return [logits, penalties, {name: p.grad for name, p in module.named_parameters()}]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_flat(name: str) -> None:
    make, blocks, inputs = MODELS[name]
    options = {**KEYWORDS, "own_dropout": "keep" if name in ("resnet18", "llama") else "seeded"}
    given, is_language_model = inputs(), name in language_models.MODELS
    traced = language_models.traced(name) if is_language_model else graphreg.trace(make(), given)
    flat, module = (rewritten(traced, make(), **options, blocks=each) for each in (None, blocks))
    called: list[str] = []
    for path in module.graphreg_state.blocks:
        module.get_submodule(path).register_forward_hook(lambda block, args, output, path=path: called.append(path))
    expected = step(flat, given)
    assert_equal(step(module, given), expected)
    assert called == list(module.graphreg_state.blocks) and called
    assert list(module.state_dict()) == list(make().state_dict())
    if is_language_model:  # and if the model checkpoints its blocks, also without blocks=
        model: Any = make()
        model.gradient_checkpointing_enable()
        checkpointed = rewritten(traced, model, **options)
        assert checkpointed.graphreg_state.blocks == module.graphreg_state.blocks
        assert_equal(step(checkpointed, given), expected)
        (_, size), (_, size_flat) = (saved_bytes(lambda each=each: each(**given)) for each in (checkpointed, module))
        assert size < 0.5 * size_flat
