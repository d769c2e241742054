"""What leaves for a place without graphreg: pickles and programs that need none of it, and an error for what torch.jit cannot take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphreg
from lacking import needs_own_globals

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
LOADED = """
import sys
class Blocked:
    def find_spec(self, name, *more):
        if name.partition(".")[0] == "graphreg":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
x, expected, pickled, program = (torch.load(f"{sys.argv[1]}/{name}", weights_only=False) for name in ("x", "expected", "pickled", "x"))
program = torch.export.load(f"{sys.argv[1]}/program.pt2").module()
assert torch.equal(pickled(x), expected[0]) and torch.equal(program(x), expected[1])
"""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))


def gated() -> Any:
    module: Any = graphreg.regularize(net(), l0_gates=0.01, penalties="attach", scale=1, example_inputs=X, rng=0)
    with torch.no_grad():
        module.get_parameter("graphreg_rules.l0_gates.state._1.log_alpha").copy_(torch.linspace(-5, 5, 8))
    return module.eval()


@needs_own_globals
def test_both_are_loaded_without_graphreg(tmp_path: Path) -> None:
    """A stripped module in torch's own class, and a program of a module whose gates act in eval mode."""
    plain = graphreg.strip(graphreg.regularize(net(), hidden_dropout=0.5)).eval()
    module = gated()
    assert not torch.equal(module(X), net().eval()(X))
    torch.save(X, tmp_path / "x")
    torch.save([net().eval()(X), module(X)], tmp_path / "expected")
    torch.save(torch.fx.GraphModule(plain, plain.graph), tmp_path / "pickled")
    torch.export.save(torch.export.export(module, (X,)), tmp_path / "program.pt2")
    subprocess.run([sys.executable, "-c", LOADED, str(tmp_path)], check=True, timeout=300)


def test_an_export_leaves_no_fake_penalties() -> None:
    module = gated()
    module(X)
    before = module.penalties()
    torch.export.export(module, (X,))
    assert module.penalties() == before


@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning", "ignore:.torch.jit:DeprecationWarning")
def test_torch_jit_is_told_what_it_can_take() -> None:
    module = graphreg.regularize(net(), hidden_dropout=0.5)
    plain = graphreg.strip(module).eval()
    for each in (module, plain):
        with pytest.raises(graphreg.GraphRegError, match=r"torch\.jit\.script cannot .*torch\.fx\.GraphModule\(plain, plain\.graph"):
            torch.jit.script(each)
    assert torch.equal(torch.jit.script(torch.fx.GraphModule(plain, plain.graph))(X), net().eval()(X))
