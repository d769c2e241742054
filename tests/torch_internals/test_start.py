"""What a process imports: eager use imports no Dynamo, which takes a second, and torch.compile works afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

EAGER = """
import copy, pickle, sys
import torch
from torch import nn

import graphreg

def keeps_out(what):
    assert "torch._dynamo" not in sys.modules, what

nets = {
    "mlp": (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 8)),
    "conv": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.1),
                      nn.LayerNorm(8), nn.Linear(8, 2)),
        torch.randn(2, 3, 8, 8),
    ),
}
options = {"hidden_dropout": 0.1, "hidden_l1": 1e-3, "weight_l2": 1e-3}
modules = {}
for name, (net, x) in nets.items():
    graphreg.names(net)
    keeps_out("names")
    modules[name] = module = graphreg.regularize(net, **options)
    keeps_out("regularize")
    output, penalties = module(x)
    (output.sum() + sum(penalties.values())).backward()
    keeps_out("a step")
    graphreg.set_strength(module, "hidden_l1", 2e-3)
    graphreg.set_rng_state(module, graphreg.rng_state(pickle.loads(pickle.dumps(copy.deepcopy(module)))))
    keeps_out("state")
attached = graphreg.regularize(nets["mlp"][0], **options, penalties="attach", scale=1)
attached(nets["mlp"][1]).sum().backward()
keeps_out("attached penalties")
differentiating = graphreg.regularize(nets["mlp"][0], contractive=0.1)
sum(differentiating(nets["mlp"][1])[1].values()).backward()
keeps_out("a penalty on derivatives")
"""
COMPILED = """
for module in (modules["mlp"], attached, differentiating):
    module.zero_grad()
    x, state, graphs = nets["mlp"][1], graphreg.rng_state(module), []

    def step(module):
        result = module(x)
        output, penalties = (result, {}) if module is attached else result
        (output.sum() + sum(penalties.values())).backward()
        taken = [output.detach()] + [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
        module.zero_grad()
        return taken

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager = step(module)
    graphreg.set_rng_state(module, state)
    module.compile(backend=count, fullgraph=True)
    torch.testing.assert_close(step(module), eager, rtol=1e-6, atol=1e-7)
    step(module)
    assert len(graphs) == 1
"""


def test_eager_use_imports_no_dynamo_and_torch_compile_works_afterwards() -> None:
    result = subprocess.run([sys.executable, "-c", EAGER + COMPILED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


TRACED_FIRST = """
import sys
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphreg

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(self.layer, x.relu(), use_reentrant=False)

net, x = nn.Sequential(nn.Linear(4, 4), Inner(), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 4)
assert "torch._dynamo" not in sys.modules
finders = list(sys.meta_path)
module = graphreg.regularize(net, hidden_l1=1.0, **OPTIONS)
assert "torch._dynamo" in sys.modules and sys.meta_path == finders
eager = module(x)
compiled = torch.compile(module, backend="eager", fullgraph=True)(x)
assert torch.equal(eager.output, compiled.output) and torch.equal(eager.penalties["hidden_l1"], compiled.penalties["hidden_l1"])
"""


@pytest.mark.parametrize("options", ["{'front_end': 'export', 'example_inputs': x}", "{}"])
def test_torch_compile_works_if_a_trace_was_the_first_to_import_dynamo(options: str) -> None:
    code = TRACED_FIRST.replace("OPTIONS", options)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
