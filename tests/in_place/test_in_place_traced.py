"""In place, torch.jit.script and torch.fx see the model's own forward in eval mode, and are refused in train mode."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")

import graphreg  # noqa: E402
from graphreg import GraphRegError, TraceError  # noqa: E402

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hid, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.hid(x).relu()
        if mask is not None:
            h = h * mask
        return self.out(h)


class ByName(Net):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def net(kind: type[Net] = Net, **options: Any) -> Net:
    model: Net = graphreg.regularize_(kind(), hidden_dropout=0.5, weight_l2=0.1, scale=1, rng=0, **options)
    model(torch.ones(2, 4))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tool", [torch.jit.script, torch.fx.symbolic_trace])
def test_a_model_of_timm(tool: Callable[[nn.Module], nn.Module]) -> None:
    """The result is that of the plain model; the model stays regularized, and its blocks stay its blocks."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, scriptable=True)
    graphreg.regularize_(model, blocks="blocks.*", weight_l2=0.1, scale=1, rng=0)
    model(IMAGES)
    made = tool(model.eval())
    assert torch.equal(made(IMAGES), model(IMAGES))
    assert {p.data_ptr() for p in made.parameters()} == {p.data_ptr() for p in model.parameters()}
    before = dict(model.named_modules())
    model.train()(IMAGES)
    assert list(model.penalties()) == ["weight_l2"] and dict(model.named_modules()) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_they_see_the_own_forward_in_eval_mode_alone() -> None:
    model, x, mask = net(blocks="hid"), torch.ones(2, 4), torch.full((2, 8), 0.5)
    for tool in (torch.jit.script, torch.fx.symbolic_trace):
        for given in (model.train(), net(eval_penalties=True).eval(), Outer(model)):
            with pytest.raises(TraceError, match=r"this Net where it runs the graph of graphreg.regularize_. Call model.eval\(\) first"):
                tool(given)  # type: ignore[operator]
        plain = tool(graphreg.strip_(copy.deepcopy(model)).eval())  # type: ignore[operator]
        made = tool(model.eval())  # type: ignore[operator]
        assert made.code == plain.code
    traced = torch.fx.symbolic_trace(model, concrete_args={"mask": None})
    assert torch.equal(traced(x), model(x))
    assert torch.equal(torch.jit.script(model)(x, mask), model(x, mask))  # type: ignore[no-untyped-call]
    assert inspect.getsource(model.forward) == inspect.getsource(Net.forward)
    assert torch.equal(torch.jit.script(model.hid)(x), model.hid(x))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_they_would_change_is_refused() -> None:
    """torch.jit.script leaves what it compiles in the modules around; torch.fx changes the code of some forwards."""
    outer = Outer(net()).eval()
    with pytest.raises(GraphRegError, match=r"compiles a module that contains a Net, which is, or is in, a model in place"):
        torch.jit.script(outer)  # type: ignore[no-untyped-call]
    assert type(outer.inner).__mro__[1] is Net
    model = net(ByName).eval()
    with pytest.raises(TraceError, match=r"cannot trace the forward of this ByName in place.*graphreg.strip_\(copy.deepcopy\(model\)\)"):
        torch.fx.symbolic_trace(model)
    assert torch.fx.symbolic_trace(graphreg.strip_(copy.deepcopy(model)))
    model.lock = (value for value in ())
    with pytest.raises(GraphRegError, match="ByName cannot be copied"):
        torch.jit.script(model)  # type: ignore[no-untyped-call]
