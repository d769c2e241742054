"""What isinstance answers of a traced value."""

import builtins
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphreg

HELPER = ModuleType("helper_of_test_kinds")  # a function that stands elsewhere than the model's class
sys.modules[HELPER.__name__] = HELPER
exec("from torch import Tensor\ndef doubled(x): return x * 2 if isinstance(x, Tensor) else x", vars(HELPER))
doubled = vars(HELPER)["doubled"]


class Asks(nn.Module):
    """``of`` the value that ``make`` gives: the layer runs where the answer is yes."""

    def __init__(self, make: Callable[[Any, Any], Any], kinds: Any, whole: nn.Module | None = None) -> None:
        super().__init__()
        self.make: Callable[[Any, Any], Any] = make
        self.kinds = kinds
        self.whole = whole or nn.Identity()
        self.attend, self.rnn = nn.MultiheadAttention(4, 1), nn.LSTM(4, 4)
        self.register_buffer("mean", torch.ones(4))
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        value = self.make(x, self)
        return self.out(self.layer(x) if isinstance(value, self.kinds) else torch.relu(x))


class Pair(nn.Module):
    """A forward that no trace sees into; it gives a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x, -x) if float(x.shape[0]) * 0 == 0 and (x > 5).all().item() is not None else (x, x)


VALUES: dict[str, Callable[[Any, Any], Any]] = {
    "the argument": lambda x, m: x,
    "a function's": lambda x, m: torch.relu(x),
    "a method's": lambda x, m: x.abs(),
    "an operator's": lambda x, m: x + 1,
    "a part of a tensor": lambda x, m: x[0],
    "a part of a split": lambda x, m: x.chunk(2)[0],
    "a split": lambda x, m: x.chunk(2),
    "an attention's": lambda x, m: m.attend(x[:, None], x[:, None], x[:, None]),
    "its first part": lambda x, m: m.attend(x[:, None], x[:, None], x[:, None])[0],
    "a state": lambda x, m: m.rnn(x[:, None])[1],
    "a state's part": lambda x, m: m.rnn(x[:, None])[1][0],
    "a maximum": lambda x, m: torch.max(x, 1),
    "a maximum's part": lambda x, m: torch.max(x, 1)[0],
    "means and deviations": lambda x, m: torch.std_mean(x, dim=1),
    "a mean": lambda x, m: torch.std_mean(x, dim=1)[1],
    "factors": lambda x, m: torch.linalg.qr(x),
    "columns": lambda x, m: x.unbind(1),
    "a choice": lambda x, m: torch.where(x > 0, x, x * 2),
    "a layer's": lambda x, m: m.layer(x),
    "a parameter": lambda x, m: m.layer.weight,
    "a buffer": lambda x, m: m.mean,
    "a shape": lambda x, m: x.shape,
    "a size": lambda x, m: x.size(),
    "a number": lambda x, m: x.shape[0],
    "a number of sizes": lambda x, m: x.size(0) * x.size(1) // 2,
    "a ratio": lambda x, m: x.size(0) / 2,
    "a comparison": lambda x, m: x.size(0) == 2,
    "a part of a shape": lambda x, m: x.shape[1:],
    "a dtype": lambda x, m: x.dtype,
    "a device": lambda x, m: x.device,
    "a flag": lambda x, m: x.is_floating_point(),
    "a name": lambda x, m: x.type(),
}
KINDS = {"Tensor": torch.Tensor, "Parameter": nn.Parameter, "tuple": (tuple, list), "number": int | float, "Size": torch.Size}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("shown", [False, True], ids=["bare", "example"])
def test_the_trace_goes_the_models_way(make: Callable[[Any, Any], Any], kinds: Any, shown: bool) -> None:
    model, x = Asks(make, kinds), torch.randn(2, 4)
    module: Any = graphreg.regularize(model, weight_l2=1e-3, example_inputs=x if shown else None, front_end="symbolic")
    assert torch.equal(module(x)[0], model(x))


@pytest.mark.parametrize("kinds", [torch.Tensor, tuple, list, dict])
def test_of_a_module_kept_whole_the_example_tells(kinds: type) -> None:
    model, x = Asks(lambda x, m: m.whole(x), kinds, Pair()), torch.randn(2, 4)
    with pytest.raises(graphreg.TraceError, match=r"isinstance is asked of 'whole', and the trace cannot tell what that is") as told:
        graphreg.trace(model, front_end="symbolic")
    assert "test_kinds.py" in str(told.value)
    module: Any = graphreg.regularize(model, weight_l2=1e-3, example_inputs=x)
    assert torch.equal(module(x)[0], model(x))


def test_a_submodule_that_asks_is_kept_whole_where_nothing_tells() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Asks(lambda x, m: m.whole(x), tuple, Pair()))
    traced = graphreg.trace(model)
    assert "isinstance is asked of" in traced.leaves["1"]
    x = torch.randn(2, 4)
    assert torch.equal(graphreg.regularize(model, weight_l2=1e-3)(x)[0], model(x))


class OfDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: Any, scale: Any = 1.0) -> Any:
        x = batch["x"] if isinstance(batch, dict) else batch
        return self.layer(x) * (2 if isinstance(scale, float) else scale)


def test_an_argument_without_an_example_is_a_tensor_and_that_is_said() -> None:
    model, x = OfDicts(), torch.randn(2, 4)
    bare = graphreg.regularize(model, weight_l2=1e-3)
    assert torch.equal(bare(x)[0], model(x))
    note = "taken for a tensor: batch, of which isinstance is asked (example_inputs tell if it is none)"
    assert note in str(graphreg.names(model)) and note in str(graphreg.report(bare)).replace("\n    ", " ")
    shown = graphreg.regularize(model, weight_l2=1e-3, example_inputs=({"x": x},))
    assert torch.equal(shown({"x": x})[0], model({"x": x}))
    assert "taken for" not in str(graphreg.report(shown))


class Helped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        if torch.is_tensor(x):
            x = F.relu(x)
        return self.layer(doubled(x))  # asks isinstance


def test_helpers_of_other_modules_and_is_tensor() -> None:
    model, x = Helped(), torch.randn(2, 4)
    assert torch.equal(graphreg.regularize(model, weight_l2=1e-3)(x)[0], model(x))


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor) and not isinstance(x, nn.Parameter)
        raise ValueError("no forward")


@pytest.mark.parametrize("model", [Helped(), Fails()], ids=["traced", "refused"])
def test_isinstance_is_pythons_own_again(model: nn.Module) -> None:
    homes = [vars(sys.modules[name]) for name in (__name__, HELPER.__name__, "torch")]
    try:
        graphreg.trace(model)
    except graphreg.TraceError as error:
        assert "no forward" in str(error)  # it came past its assertion
    assert all("isinstance" not in home for home in homes)
    assert isinstance is builtins.isinstance
