"""What Inductor compiles in processes of their own: the code from its cache, and the memory layout of a mask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TRAINED = """
import json, torch
from torch import nn
import graphreg
from torch._dynamo.utils import counters
from graphreg.compiler import inductor_passes

passed, unfuse = [], inductor_passes.unfuse
inductor_passes.unfuse = lambda graph: passed.append(unfuse(graph))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
module = graphreg.regularize(model, hidden_dropout=0.5, hidden_l1=0.1, weight_l2=0.1, rng=1)
compiled = torch.compile(module, fullgraph=True)
losses = []
for step in range(3):
    output, penalties = compiled(torch.ones(4, 8))
    loss = output.square().mean() + sum(penalties.values())
    loss.backward()
    losses.append(float(loss))
print(json.dumps({
    "losses": losses, "gradient": model[0].weight.grad.tolist(), "passed": len(passed), "hits": counters["inductor"]["fxgraph_cache_hit"]
}))
"""

WRITTEN = """
import json, torch
from torch import nn
from torch._inductor.utils import run_and_get_code
import graphreg

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3))

torch.manual_seed(0)
module = graphreg.regularize(Net(), hidden_dropout=0.5, rng=1, penalties="attach")
x, kept = torch.randn(2, 3, 12, 12), []
with graphreg.frozen_noise(module):
    eager = module(x)
    eager.square().sum().backward()
    gradient = module.get_submodule("a").weight.grad.clone()
    module.zero_grad()
    compiled = torch.compile(module, fullgraph=True)
    output, code = run_and_get_code(lambda: compiled(x))
    output.square().sum().backward()
torch.testing.assert_close(output, eager)
torch.testing.assert_close(module.get_submodule("a").weight.grad, gradient)
print(json.dumps([line.strip() for line in "".join(code).splitlines() if "empty_strided" in line and "int8" in line]))
"""


def printed(code: str, **environment: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_has_the_code_from_the_cache(tmp_path: Path) -> None:
    """The passes have a key, so that Inductor can store what it compiled with them; the second process does not run them."""
    first, second = (printed(TRAINED, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first["hits"] == 0 and first["passed"] > 0
    assert second["hits"] > 0 and second["passed"] == 0
    assert (second["losses"], second["gradient"]) == (first["losses"], first["gradient"])


def test_a_mask_is_stored_in_the_layout_of_the_convolution_that_reads_it() -> None:
    """Channels last, with the values that eager draws; in another layout, a kernel of its own would transpose it."""
    (stored,) = printed(WRITTEN)
    assert "(2, 16, 10, 10), (1600, 1, 160, 16), torch.int8" in stored
