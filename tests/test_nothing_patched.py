"""Nothing of torch stays changed: neither when graphreg is imported, nor after traces, calls and averages.

The same process shows that torch is imported when it is asked for, and that a public name is the same whatever was imported before.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys

places = {"meta_path": sys.meta_path, "path_hooks": sys.path_hooks}
lists = {name: list(value) for name, value in places.items()}
import graphreg, graphreg.cli.main, graphreg.errors
print("torch", "torch" in sys.modules, [name for name in places if places[name] != lists[name]])

import torch, torch.export, torch._dynamo, torch.utils.checkpoint, torch.optim.swa_utils
from torch import nn

def members():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "torch" or not hasattr(module, "__dict__"):
            continue
        places = [module, *(each for each in vars(module).values() if isinstance(each, type) and each.__module__ == name)]
        for place in places:
            for attribute, value in list(vars(place).items()):
                if callable(value) or isinstance(value, (property, classmethod, staticmethod)) or attribute == "_is_fx_tracing_flag":
                    found[getattr(place, "__name__", name), attribute] = value
    return found

def changed(before):
    now = members()
    missing = object()
    return sorted(place for place in before if now.get(place, missing) is not before[place]) + sorted(
        place for place in now.keys() - before.keys() if place[0] == "Module" or place[0] == "torch"
    )

before, lists = members(), {name: list(value) for name, value in places.items()}
from graphreg.planning.plan import Plan
import graphreg.tracing.trace, graphreg.rewriting.rewrite, graphreg.reporting.report, graphreg.diagnosis.doctor, graphreg.passes
import graphreg.runtime
print(*(type(getattr(graphreg, name)).__name__ for name in ("plan", "trace", "rewrite", "report", "doctor", "passes", "errors")))
print("import", changed(before), [name for name in places if places[name] != lists[name]])

class Checkpointed(nn.Module):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(torch.sigmoid, x, use_reentrant=False)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 2), Checkpointed()

    def forward(self, x):
        x = torch.relu(self.a(x))
        if self.training and torch.is_grad_enabled():
            x = self.c(x)
        return self.b(x)

x = torch.ones(3, 4)
torch.compile(Net(), backend="eager")(x)  # Dynamo makes patches of its own at its first use
before = members()
for front_end in ("symbolic", "export"):
    module = graphreg.regularize(Net(), example_inputs=x, front_end=front_end, hidden_dropout=0.5)
    module(x)
    torch.optim.swa_utils.AveragedModel(module, use_buffers=True).update_parameters(module)
model = graphreg.regularize_(Net(), hidden_dropout=0.5)
model(x)
torch.optim.swa_utils.AveragedModel(model).update_parameters(model)
torch.compile(Net(), backend=graphreg.backend(hidden_dropout=0.5, inner="eager"))(x)
print("trace", changed(before), [name for name in places if places[name] != lists[name]])
"""


def test_nothing_of_torch_is_changed_after_import_and_after_a_trace_and_nothing_needs_it_before_it_is_asked_for() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    names = "function function function function function module module"
    assert run.stdout.splitlines() == ["torch False []", names, "import [] []", "trace [] []"], run.stdout + run.stderr[-2000:]
