"""A training run that can be killed and resumed; test_resume.py starts it.

python killed_run.py CHECKPOINT LOSSES BACKEND STEPS STOP: forks a run that appends each loss to LOSSES as hexadecimal, and
stands still in the middle of step STOP (its batch drawn, its backward done) until it is killed. Given a line, the process
itself, which has run nothing before, goes on where CHECKPOINT stands.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which Adam would import in each process
from torch import Tensor, nn

import graphreg
from graphreg.passes import BernoulliDropout, GaussianNoise, HiddenL1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.2)
        self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.drop(torch.relu(self.norm(self.a(x)))))))


def main(checkpoint: Path, losses: Path, backend: str, steps: int, stop: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid() if checkpoint.exists() else 0)  # a resumed run knows the first one's seeds from its checkpoint alone
    regularizers = [BernoulliDropout("relu_1", 0.5), GaussianNoise("relu", 0.1), HiddenL1("relu", 0.01)]
    module = graphreg.regularize(Net(), regularizers, own_dropout="seeded")
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    run = module if backend == "eager" else torch.compile(module, fullgraph=True, backend=backend)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        graphreg.set_rng_state(module, saved["noise"])
        for name, value in saved["strengths"].items():
            graphreg.set_strength(module, name, value)
        start = saved["step"]
    for step in range(start, steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        output, penalties = run(x)
        loss = (output - x[:, :4]).square().mean() + sum(penalties.values())
        loss.backward()
        if step == stop:
            print("standing", os.getpid(), flush=True)
            time.sleep(600)
        optimizer.step()
        graphreg.set_strength(module, "hidden_l1", graphreg.strengths(module)["hidden_l1"] * 1.1)
        with losses.open("a") as file:
            file.write(f"{step} {loss.item().hex()}\n")
        part = checkpoint.with_suffix(".part")  # killed while it writes, it leaves the older one
        saved = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "noise": graphreg.rng_state(module), "step": step + 1}
        torch.save(saved | {"strengths": graphreg.strengths(module)}, part)
        part.replace(checkpoint)


if __name__ == "__main__":
    given: tuple[Any, ...] = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    _ = graphreg.regularize, graphreg.set_rng_state, graphreg.set_strength  # imported here, and not in each process
    run = os.fork()
    if not run:
        main(*given, int(sys.argv[5]))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]), flush=True)
    sys.stdin.readline()
    main(*given, -1)
