"""``modules_by_path`` finds what ``named_modules`` finds; ``parameters_by_name`` and ``buffers_by_name`` find what is registered."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from graphreg.torch_internals.modules import buffers_by_name, modules_by_path, parameters_by_name


class Hiding(nn.Module):
    """Lists its modules under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        for path, module in super().named_modules(memo, prefix, remove_duplicate):
            yield path.replace("inner", "shown"), module


def nested() -> nn.Module:
    shared, model = nn.Sequential(nn.ReLU(), nn.Dropout()), nn.Module()
    model.first, model.again, model.none = shared, nn.ModuleList([shared, nn.Tanh(), shared[0]]), None
    model.register_module("nothing", None)
    return model


MODELS = {"one": nn.ReLU(), "nested": nested(), "own": nn.Sequential(Hiding(), nested(), Hiding()), "root": Hiding()}


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_same_modules_in_the_same_order(model: nn.Module, once: bool) -> None:
    assert list(modules_by_path(model, once).items()) == list(model.named_modules(remove_duplicate=once))


class HeadAlone(nn.Module):
    """Lists the parameters of one layer, and no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = self.again = nn.BatchNorm1d(1)
        self.head = nn.Linear(1, 1, bias=False)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        return self.head.named_parameters(prefix, recurse)

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        return iter(())


def test_parameters_and_buffers_are_those_that_are_registered() -> None:
    model = HeadAlone()
    assert [*parameters_by_name(model)] == ["norm.weight", "norm.bias", "again.weight", "again.bias", "head.weight"]
    assert [*parameters_by_name(model, once=True)] == ["norm.weight", "norm.bias", "head.weight"]
    assert [*buffers_by_name(model, once=True)] == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert len(buffers_by_name(model)) == 6
