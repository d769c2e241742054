"""A model of the zoo in hand: what several columns need of it is made once."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import nn

import graphreg
from zoo.providers import Inputs

WEIGHTS = {"hidden_dropout": 0.1, "hidden_l1": 1e-3, "weight_l2": 1e-4}


class Subject:
    """A model and its inputs, the regularized module and the stripped one."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model.train(), inputs
        leaves = [m for m in model.modules() if type(m).__module__.startswith("torch.nn.") and not list(m.children())]
        self.set_apart = leaves[-1] if leaves else None
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}

    @cached_property
    def examples(self) -> Inputs | None:
        """The inputs, where graphreg cannot see all of the model without them; most need none."""
        try:
            return self.inputs if graphreg.trace(self.model).leaves else None
        except graphreg.TraceError:
            return self.inputs

    @cached_property
    def traced(self) -> graphreg.Traced:
        return graphreg.trace(self.model, self.examples)

    @cached_property
    def rewritten(self) -> tuple[nn.Module, float, Mapping[str, object], Mapping[str, object]]:
        """The regularized module, the seconds it took, and what the model was before and after."""
        if self.set_apart is not None:
            self.set_apart.eval()
        examples = self.examples
        before, start = fingerprint(self.model), time.perf_counter()
        module = graphreg.regularize(self.model, example_inputs=examples, rng=0, **WEIGHTS)
        seconds = time.perf_counter() - start
        after = fingerprint(self.model)
        self.model.train()
        return module, seconds, before, after

    @property
    def module(self) -> nn.Module:
        return self.rewritten[0]

    @cached_property
    def stripped(self) -> nn.Module:
        return graphreg.strip(self.module)

    def output(self, module: nn.Module, training: bool) -> object:
        """The output from the same buffers and the same generators each time."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
            return self.call(module.train(training))

    def call(self, module: nn.Module) -> object:
        torch.manual_seed(3)
        random.seed(3)
        return module(*(x.clone() for x in self.inputs))  # a forward may write into what it is given


def fingerprint(model: nn.Module) -> dict[str, object]:
    """What tracing and rewriting must leave as it was, each under its own name."""
    return {
        "modes": {name: m.training for name, m in model.named_modules(remove_duplicate=False)},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: id(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "keys": list(model.state_dict()),
        "metadata": dict(model.state_dict()._metadata),  # type: ignore[attr-defined]
        "attributes": [list(m.__dict__) for m in model.modules()],
    }
