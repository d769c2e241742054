"""``KeyRule``, the runtime module at the top of a graph: it returns the noise keys of this call and makes those of the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphreg.compiler.inductor_passes import improve_graph
from graphreg.errors import GraphRegError, listed, warn
from graphreg.rng.ahead import CallsAhead
from graphreg.rng.noise import as_rank, call_keys, next_keys, of_process, rank
from graphreg.runtime.counter import Counter, SharedCounter
from graphreg.runtime.rank_layout import lead
from graphreg.torch_internals.dynamo_marks import assume_constant_result


@assume_constant_result
def _warn_of_export() -> None:
    """Warn, once per export, that the program draws the same masks at each call."""
    warn(
        "this module is exported while it draws noise, and the program will draw the same masks at each call. Export it in eval mode "
        "(module.eval()), or export graphreg.strip(module)."
    )


class KeyRule(Counter):
    """Returns the keys of this call and makes those of the next. It counts the calls that draw."""

    product = "keys"
    in_backward_text = (
        "this module runs inside a backward pass: activation checkpointing around the whole module would draw "
        "other masks than the forward did. Put forward and backward into one block of "
        "graphreg.frozen_noise(module), or checkpoint only blocks inside the model, and call torch.compile on the whole module."
    )
    jit_text = (
        "torch.jit.trace would freeze the masks of this call, and use them in every call. Trace the module in eval mode "
        "(module.eval()), or trace graphreg.strip(module)."
    )
    lent_text = (
        "torch.func.functional_call was given the counter of the module's noise: it would not advance, and each call would draw "
        "the same masks. Leave out the names that begin with 'graphreg_rules.': {n: b for n, b in module.named_buffers() if "
        "'graphreg_rules.' not in n}. To draw the same masks in each call, use graphreg.frozen_noise(module)."
    )
    streams: Tensor
    keys: Tensor

    def __init__(self, streams: Mapping[str, int]) -> None:
        super().__init__("the keys of the call")
        self.names = tuple(streams)
        self.ahead = CallsAhead()
        self.alike = False  # whether all ranks draw the same masks
        self.position: int | None = None  # the number that takes the place of the rank; None for the rank in torch.distributed
        # of the mesh of set_ranks: the dimensions along which ranks work on one value, and those along which they draw different masks
        self.meshed: tuple[str, ...] = ()
        self.differing: tuple[str, ...] = ()
        self.register_buffer("streams", torch.tensor(list(streams.values()), dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("keys", call_keys(self.streams, self.step), persistent=False)

    def made(self, step: Tensor) -> Tensor:
        return call_keys(self.streams, step)

    def made_unless_frozen(self, step: Tensor, present: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            improve_graph()
        return next_keys(self.streams, step, self.free, present)

    def warn_of_export(self) -> None:
        _warn_of_export()

    def draws(self, always: bool = False) -> bool:
        """Whether a call draws in the present modes; ``always`` as in ``forward``."""
        if always or self.forced or self.always:
            return True
        for owner in self.owner:  # noqa: SIM110, because ``any`` would call a generator at each call of a small net
            if owner.training:
                return True
        return False

    def forward(self, always: bool = False) -> Tensor:
        """Return the keys of this call, int32 [streams, 2], and make those of the next if the call draws.

        ``always``: whether the graph has a native dropout that acts in any mode.
        """
        return of_process(self.of_call(self.draws(always)), self.alike, self.position)

    def among(self, key: Tensor, mesh: Any) -> Tensor:
        """Return the key that all ranks of a mesh share: that of the lowest rank. ``key``: this rank's key of a stream, int32 [2]."""
        # These ranks have one key already.
        if self.alike or all(name in self.meshed for name in mesh.mesh_dim_names or (None,)):
            return key
        if self.position is not None:
            raise GraphRegError(
                f"a value is divided among the ranks of {listed(list(mesh.mesh_dim_names or ['a mesh without names']))}, and set_ranks "
                f"was told tensor={self.meshed!r}. Name each dimension along which ranks share a value: set_ranks(..., tensor=...)."
            )
        return as_rank(key, rank(), lead(mesh))


class SharedKeyRule(SharedCounter):
    """Stands in one graph for the key rule that several graphs share."""

    shared: tuple[KeyRule]

    def draws(self, always: bool = False) -> bool:
        """Whether a call of this graph draws in the present modes; ``always`` as in ``forward``."""
        return always or self.shared[0].forced or self.always or any(owner.training for owner in self.owner)

    def forward(self, always: bool = False) -> Tensor:
        """Return the keys of this call, int32 [streams, 2]; ``always`` as in ``KeyRule.forward``."""
        key = self.shared[0]
        return of_process(key.of_call(self.draws(always)), key.alike, key.position)


def key_rule_of(rules: Any) -> KeyRule | None:
    """Return the key rule that counts the calls of a graph, given the container of its runtime modules; None if the graph draws nothing."""
    key = rules._modules.get("key")
    if isinstance(key, SharedKeyRule):
        return key.shared[0]
    return key if isinstance(key, KeyRule) else None
