"""Step time, forward and backward, however a model is compiled; ratios to the unregularized step.

The ways: ``module.compile()`` and ``torch.compile(module)`` after ``regularize()``, graphreg's backend, and hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from page import arguments, chosen, progress, row
from steps import measure
from torch import Tensor, nn

import graphreg
from workloads import L1, L2, RATE, WORKLOADS, ByGraphreg, ByHooks, Compiled, Outcome, Plain


class ByBackend(nn.Module):
    """The model as it is, compiled with the backend; the penalties are read behind the call."""

    def __init__(self, model: nn.Module, **keywords: float) -> None:
        super().__init__()
        self.backend = graphreg.backend(rng=0, **(keywords or {"hidden_dropout": RATE, "hidden_l1": L1, "weight_l2": L2}))
        self.model = model
        self.run = [torch.compile(model, backend=self.backend, fullgraph=True)]  # in a list: the model is no submodule twice

    def compile(self, *args: Any, **options: Any) -> None:
        """It is compiled already: by the backend."""

    def forward(self, x: Tensor) -> Outcome:
        output = self.run[0](x)
        return output, sum(self.backend.penalties().values(), output.new_zeros(()))


FORMS = {"unregularized": Plain, "hooks": ByHooks, "graphreg": ByGraphreg, "torch.compile": Compiled, "backend": ByBackend}


def main() -> None:
    options = arguments(__doc__, ("--rounds", 20), names=WORKLOADS)
    torch.set_num_threads(1)
    print(f"1 thread, {options.rounds} interleaved rounds.\n")
    print("The goal is that `torch.compile(module)` is as fast as `module.compile()`.\n")
    print(row("workload", "unregularized, ms", "hooks", "`module.compile()`", "`torch.compile(module)`", "backend"))
    print(row(*["---"] * 6))
    for workload in chosen(WORKLOADS, options.only):
        progress(f"backend: {workload}")
        found = measure(workload, True, options.rounds, FORMS)
        cells = [f"{found[name][0]:.2f} ± {found[name][1]:.2f}" for name in list(FORMS)[1:]]
        print(row(workload, f"{found['ms'][0]:.1f}", *cells), flush=True)


if __name__ == "__main__":
    main()
