"""A model of the zoo in hand: what several columns need of it is made once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import graphreg
from graphreg.errors import OtherInputs
from zoo.providers import Inputs, call, one_line, tensors
from zoo.ways import EVERY_HIDDEN, Captured, Penalized, Rewritten, Way

Gradients = dict[str, Tensor]
FEW = 5_000_000  # up to so many elements, parameters are kept to be restored


MARKS = ("_is_torch_compile", "_compile_kwargs")  # torch.compile's, on a model itself, and that of lightning's wrapper of it


class Failed(Exception):
    """A model that does not come out as it should; says how."""


class Subject:
    """A model and its inputs, and the way it is regularized; ``before`` and ``after``: what the model was on both sides of that."""

    def __init__(self, model: nn.Module, inputs: Inputs, inners: Sequence[str] = ("aot_eager",)) -> None:
        self.model, self.inputs, self.inners = model.train(), inputs, inners  # inners: what torch.compile compiles with
        leaves = [m for m in model.modules() if type(m).__module__.startswith("torch.nn.") and not list(m.children())]
        self.set_apart = leaves[-1] if leaves else None
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}
        few = sum(p.numel() for p in model.parameters()) <= FEW
        self.parameters = {name: p.detach().clone() for name, p in model.named_parameters()} if few else {}  # a forward may write them
        self.expected: dict[bool, object] = {}
        self.before: Mapping[str, object] = {}
        self.after: Mapping[str, object] = {}
        self.bare = False  # whether it can be traced without inputs

    @cached_property
    def way(self) -> Way:
        """A graph, without inputs where these are not needed; else what torch.compile captures."""
        if self.set_apart is not None:
            self.set_apart.eval()
        self.before = fingerprint(self.model)
        try:
            return self._way()
        finally:
            self.after = fingerprint(self.model)
            self.model.train()

    def _way(self) -> Way:
        try:
            bare = Rewritten(self.model, None)
            self.bare = True
            if not bare.traced.opaque_modules and self._takes(bare):
                return bare
        except (graphreg.TraceError, graphreg.NoMatchError):  # without inputs; with them it may go, and no module hide its sites
            pass
        try:
            return self._shown()
        except graphreg.TraceError as error:
            self.seed()
            return Captured(self.model, self.inputs, one_line(error))

    def _takes(self, bare: Rewritten) -> bool:
        """Whether the graph takes these inputs: without them, an argument with a default has it."""
        self.seed()
        try:
            bare(self.inputs)
        except OtherInputs:
            return False
        finally:
            self.restore()
        return True

    def _shown(self) -> Rewritten:
        """With inputs; where a regularizer has no default site, it is given a selector, as the error asks."""
        try:
            return Rewritten(self.model, self.inputs)
        except graphreg.NoMatchError as error:
            if "HiddenL1" not in str(error):
                raise
            return Rewritten(self.model, self.inputs, hidden_l1=EVERY_HIDDEN)

    def original(self, training: bool) -> object:
        if training not in self.expected:
            self.expected[training] = self.run(self.model, lambda: call(self.model, self.inputs), training)
        return self.expected[training]

    def ours(self, training: bool) -> Penalized:
        found: Penalized = self.run(self.way, lambda: self.way(self.inputs), training)
        return found

    def run(self, of: Any, forward: Callable[[], Any], training: bool) -> Any:
        """The output from the same buffers and the same generators each time."""
        self.restore()
        of.train(training)
        self.seed()
        with torch.set_grad_enabled(isinstance(self.way, Captured)):  # a mode of autograd's own would have Dynamo capture again
            return forward()

    def restore(self) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
            for name, before in self.parameters.items():
                if not torch.equal(parameter := self.model.get_parameter(name), before):
                    parameter.copy_(before)

    def seed(self) -> None:
        torch.manual_seed(3)
        random.seed(3)
        numpy.random.seed(3)

    @contextmanager
    def at_zero(self) -> Iterator[None]:
        """All strengths zero meanwhile."""
        handle = self.way.handle
        before = graphreg.strengths(handle)
        for name in before:
            graphreg.set_strength(handle, name, 0.0)
        try:
            yield
        finally:
            for name, value in before.items():
                graphreg.set_strength(handle, name, value)

    def gradients(self, of: Any, forward: Callable[[], Penalized], penalized: bool = True) -> Gradients:
        """Of one step in train mode, from the same buffers and generators: the parameters that have a gradient, with it."""
        self.restore()
        of.train(True)
        self.seed()
        output, penalties = forward()
        loss = loss_of(output, penalties if penalized else {})
        if not loss.isfinite():
            raise Failed(f"the loss is {loss.item()}")
        loss.backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found

    @cached_property
    def reached(self) -> Gradients:
        """The gradients of the model as it is."""
        return self.gradients(self.model, lambda: (call(self.model, self.inputs), {}))

    def forget_gradients(self) -> None:
        """Free ``reached``; who asks for it again has it computed again."""
        vars(self).pop("reached", None)


def loss_of(output: object, penalties: Mapping[str, Tensor]) -> Tensor:
    floating = [t for t in tensors(output) if t.is_floating_point() and t.numel()]
    return sum((t.square().mean() for t in floating), torch.zeros(())) + sum(penalties.values())


def fingerprint(model: nn.Module) -> dict[str, object]:
    """What tracing and rewriting must leave as it was, each under its own name."""
    config: Any = getattr(model, "config", None)
    return {
        "modes": {name: m.training for name, m in model.named_modules(remove_duplicate=False)},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: id(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "keys": list(model.state_dict()),
        "metadata": dict(model.state_dict()._metadata),  # type: ignore[attr-defined]
        "attributes": [[name for name in m.__dict__ if name not in MARKS] for m in model.modules()],
        "config": config.to_dict() if hasattr(config, "to_dict") else None,
    }
