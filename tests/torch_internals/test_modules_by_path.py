"""``modules_by_path`` finds what ``named_modules`` finds."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from graphreg.torch_internals.modules import modules_by_path


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
