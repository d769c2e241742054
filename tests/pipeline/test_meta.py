"""Models that are made on the meta device, and get their values after they were regularized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")

import graphreg  # noqa: E402
from graphreg import GraphRegError, schedules  # noqa: E402

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ASKED: dict[str, Any] = {
    "hidden_dropout": 0.2, "noise": 0.1, "weight_l2": 0.1, "hidden_l1": {"weight": schedules.linear(0.1, 0.5, 3)},
    "own_dropout": "seeded", "rng": 3,
}  # fmt: skip


def vit() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, drop_path_rate=0.1, num_classes=5)


def losses(module: nn.Module) -> list[Tensor]:
    """Three losses and the gradients of the last one."""
    results, parameters = [], list(module.parameters())
    for _ in range(3):
        output = module.train()(IMAGES)
        results.append(output.sum() if isinstance(output, Tensor) else output[0].sum() + sum(output[1].values()))
    return [*results, *torch.autograd.grad(results[-1], parameters)]


def by_assign(module: nn.Module, values: dict[str, Tensor]) -> None:
    module.load_state_dict(values, assign=True)


def by_to_empty(module: nn.Module, values: dict[str, Tensor]) -> None:
    module.to_empty(device="cpu").load_state_dict(values)


@pytest.mark.parametrize(("regularize", "more", "fill"), [
    (graphreg.regularize, {}, by_assign), (graphreg.regularize, {"penalties": "attach", "scale": 1}, by_to_empty),
    (graphreg.regularize_, {"penalties": "return"}, by_assign),
])  # fmt: skip
def test_a_model_made_on_meta_draws_and_penalizes_as_one_made_on_the_cpu(
    regularize: Callable[..., nn.Module], more: dict[str, Any], fill: Callable[..., None]
) -> None:
    """It is regularized and called while meta is the default device; with its values, it gives the same bits, and its graph is proved."""
    values = {name: tensor.clone() for name, tensor in vit().state_dict().items()}
    usual = vit()
    usual.load_state_dict(values)
    expected = losses(regularize(usual, example_inputs=IMAGES, **ASKED, **more))
    with torch.device("meta"):
        module = regularize(vit(), example_inputs=torch.randn(2, 3, 32, 32), **ASKED, **more)
        state = graphreg.rng_state(module)
        output = module(torch.randn(2, 3, 32, 32))
        assert (output if isinstance(output, Tensor) else output[0]).is_meta
        assert module.eval()(torch.randn(2, 3, 32, 32)) is not None
        graphreg.set_rng_state(module, state)
    fill(module, values)
    assert all(map(torch.equal, losses(module), expected))
    assert "not proved in train" not in str(graphreg.report(module, cost=False))


def test_a_state_needs_values() -> None:
    with torch.device("meta"), pytest.raises(GraphRegError, match="Materialize the model, then regularize it"):
        graphreg.regularize_(vit(), l2_sp=0.1)
    with torch.device("meta"):  # the default device of a script, and not that of the model
        module = graphreg.regularize(nn.Sequential(nn.Linear(3, 2, device="cpu")), spectral=0.1, l2_sp=0.1)
    assert set(module(torch.ones(1, 3)).penalties) == {"spectral", "l2_sp"}
