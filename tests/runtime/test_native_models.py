"""The own dropout of models that people use: torchvision's, and timm's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

import graphreg


def vit(**options: Any) -> nn.Module:
    return tv.VisionTransformer(32, 16, 1, 2, 8, 16, dropout=0.1, attention_dropout=0.2, num_classes=4, **options)


def timm(name: str, **options: Any) -> nn.Module:
    import timm  # noqa: PLC0415  (it takes seconds)

    model: nn.Module = timm.create_model(name, num_classes=4, **options)
    return model


# model, input size, operations found among its dropouts
MODELS: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "vgg11": (lambda: tv.vgg11(num_classes=4), 32, {"Dropout"}),
    "efficientnet_b0": (lambda: tv.efficientnet_b0(num_classes=4), 32, {"Dropout", "stochastic_depth"}),
    "convnext_tiny": (lambda: tv.convnext_tiny(num_classes=4, stochastic_depth_prob=0.3), 32, {"stochastic_depth"}),
    "swin_t": (lambda: tv.swin_t(num_classes=4), 32, {"stochastic_depth", "Dropout"}),
    "vit": (vit, 32, {"Dropout", "MultiheadAttention"}),
    "mobilenet_v3_small": (lambda: tv.mobilenet_v3_small(num_classes=4), 32, {"Dropout"}),
    "timm convnext": (lambda: timm("convnext_atto", drop_path_rate=0.2), 32, {"DropPath", "Dropout"}),
    "timm vit": (
        lambda: timm("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.2, attn_drop_rate=0.1, proj_drop_rate=0.1),
        32, {"DropPath", "Dropout", "scaled_dot_product_attention"},
    ),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own libraries


@pytest.fixture(params=MODELS)
def given(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, set[str]]:
    make, size, kinds = MODELS[request.param]
    torch.manual_seed(0)
    return awake(make()), torch.randn(2, 3, size, size), kinds


def awake(model: nn.Module) -> nn.Module:
    """Fresh models hide what their blocks do: heads of zeros, branches scaled by 1e-6."""
    for name, parameter in model.named_parameters():
        if not parameter.any() or "gamma" in name or "layer_scale" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def near(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Against the largest: an untrained network's outputs may all be small."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def frozen_norms(model: nn.Module) -> nn.Module:
    """Batch norms would change from call to call, and normalize two examples to plus and minus one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def rates_at_zero(model: nn.Module) -> nn.Module:
    """The oracle of "off": the model with each of its rates set to 0 by hand."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name in ("p", "drop_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if hasattr(module, "attn_drop") and isinstance(module.attn_drop, nn.Dropout):
            module.attn_drop.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return twin


def test_moved_off_and_back(given: tuple[nn.Module, Tensor, set[str]]) -> None:
    model, x, kinds = given
    traced = graphreg.trace(frozen_norms(model))
    found = [own for own in traced.native_dropout if own.rate]
    assert {own.site.op for own in traced.native_dropout} == kinds and all(not own.why_not for own in found)
    if any(own.site.op == "DropPath" for own in found):  # opaque, it no longer makes the modes differ
        assert list(traced.graphs) == ["both"]

    module = graphreg.regularize(model, own_dropout="seeded", rng=0)
    state = torch.get_rng_state()
    first, second = module(x).output, module(x).output
    assert torch.equal(torch.get_rng_state(), state) and not near(first, second)
    again = graphreg.regularize(model, own_dropout="seeded", rng=0)
    assert torch.equal(again(x).output, first)
    first.square().sum().backward()

    off = graphreg.regularize(model, own_dropout="off")
    assert near(off(x).output, rates_at_zero(model)(x))

    stripped = graphreg.strip(module)
    assert "graphreg_rules" not in stripped.code
    torch.manual_seed(3)
    ours = stripped(x)
    torch.manual_seed(3)
    assert near(ours, model(x), 1e-5)
    model.eval()
    assert torch.equal(module(x).output, stripped(x))
    samples = graphreg.sample(module, x, 3)
    assert bool((samples.spread > 0).any())


LONG = [pytest.param(name, marks=pytest.mark.sweep) for name in ("swin_t", "vgg11", "timm convnext")]


@pytest.mark.parametrize("name", ["vit", "timm vit", *LONG])
def test_compiled_masks_are_eagers(name: str) -> None:
    make, size, _ = MODELS[name]
    torch.manual_seed(0)
    model, x = frozen_norms(awake(make())), torch.randn(2, 3, size, size)
    module, twin = (graphreg.regularize(copy.deepcopy(model), own_dropout="seeded", rng=0) for _ in range(2))
    run = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours, theirs = run(x).output, module(x).output
        assert near(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (path, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        if p.grad is not None and q.grad is not None:
            assert near(q.grad, p.grad, 1e-2), path
