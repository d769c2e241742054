"""Faults in what version 0.2 brought: splices on parameters, states, units, strengths by site, depth and schedule."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fuzz.faults import FAULTS, _rewritten, fault, patched

_BEFORE = {*FAULTS}


@fault
def a_parameter_splice_at_every_reader() -> Iterator[None]:
    """A tied weight is replaced where another module reads it, too."""
    with patched("planning.parameter_splices", "_readers", lambda was: lambda *args: None):
        yield


@fault
def a_draw_at_each_read_of_a_parameter() -> Iterator[None]:
    def change(module: Any) -> None:
        for graph in module.graphs.values():
            for node in list(graph.nodes):
                rule = module.get_submodule(str(node.target)) if node.op == "call_module" else None
                for reader in list(node.users)[1:] if getattr(rule, "on_parameter", False) else ():
                    with graph.inserting_before(reader):
                        key = graph.create_node("call_function", operator.add, (node.args[1], 1))
                        again = graph.create_node("call_module", node.target, (node.args[0], key), dict(node.kwargs))
                    reader.replace_input_with(node, again)

    with _rewritten(change):
        yield


@fault
def the_power_iteration_forgets() -> Iterator[None]:
    with patched("runtime.owned_state:SiteState", "replace", lambda was: lambda self, new: None):
        yield


@fault
def the_power_iteration_moves_in_eval_mode() -> Iterator[None]:
    with patched("runtime.penalty", "moves_on", lambda was: lambda *args: True):
        yield


@fault
def a_start_that_follows() -> Iterator[None]:
    def wrap(call: Any) -> Any:
        return lambda self, w, state: call(self, w, {"start": state["start"] / 2 + w.detach() / 2})

    with patched("passes.l2_sp:L2SP", "__call__", wrap):
        yield


@fault
def units_on_the_last_axis_of_a_convolution() -> Iterator[None]:
    def wrap(of: Any) -> Any:
        return lambda self, value, who: of(replace(self, axis=-1) if self.channels else self, value, who)

    with patched("ir.units:Units", "of", wrap):
        yield


@fault
def a_site_strength_at_the_neighbour() -> Iterator[None]:
    def wrap(values: Any) -> Any:
        def wrong(self: Any, planned: Any) -> list[float]:
            found: list[float] = values(self, planned)
            return [*found[1:], *found[:1]]

        return wrong

    with patched("session.strengths:Row", "elements", wrap):
        yield


@fault
def a_schedule_one_call_late() -> Iterator[None]:
    def wrap(strengths_at: Any) -> Any:
        return lambda numbers, step: strengths_at(numbers, (step - 1).clamp(min=0))

    with patched("runtime.clock", "strengths_at", wrap):
        yield


@fault
def a_schedule_that_counts_eval_mode() -> Iterator[None]:
    with patched("runtime.clock:ClockRule", "counts", lambda was: lambda self: True):
        yield


@fault
def parameters_by_depth_in_the_order_of_registration() -> Iterator[None]:
    with patched("planning.depth", "_first_reads", lambda was: lambda traced, order: {}):
        yield


@fault
def depth_from_the_other_end() -> Iterator[None]:
    def wrap(order: Any) -> Any:
        return lambda traced: {name: -place for name, place in order(traced).items()}

    with patched("planning.depth", "_order", wrap):
        yield


@fault
def the_first_strength_of_a_map_for_all() -> Iterator[None]:
    def wrap(mapped: Any) -> Any:
        def wrong(keyword: str, cls: Any, entries: Sequence[Any]) -> Any:
            return mapped(keyword, cls, [(selector, entries[0][1]) for selector, _ in entries])

        return wrong

    with patched("planning.keywords", "_mapped", wrap):
        yield


@fault
def axes_not_shared() -> Iterator[None]:
    with patched("runtime.splice", "shared_axes", lambda was: lambda *args: ()):
        yield


@fault
def time_for_the_batch_in_share_axes() -> Iterator[None]:
    with patched("regularizer.shared_axes", "_batch", lambda was: lambda steps, shape, who: 1 if len(shape) > 2 else 0):
        yield


@fault
def channels_dropped_element_by_element() -> Iterator[None]:
    def wrong(self: Any, z: Tensor, weight: Tensor, noise: Any) -> Tensor:
        dropped: Tensor = z * noise.keep(z, weight) / (1 - weight)
        return dropped

    with patched("passes.channel_dropout:ChannelDropout", "__call__", lambda was: wrong):
        yield


@fault
def a_branch_dropped_for_the_batch() -> Iterator[None]:
    def wrong(self: Any, z: Tensor, weight: Tensor, noise: Any) -> Tensor:
        dropped: Tensor = z * noise.keep(z, weight, shared=range(z.dim())) / (1 - weight)
        return dropped

    with patched("passes.drop_path:DropPath", "__call__", lambda was: wrong):
        yield


@fault
def a_skipped_layer_scaled() -> Iterator[None]:
    def wrap(call: Any) -> Any:
        return lambda self, z, weight, noise, module_input: call(self, z / (1 - weight).to(z.dtype), weight, noise, module_input)

    with patched("passes.layer_drop:LayerDrop", "__call__", wrap):
        yield


@fault
def noise_on_tokens_without_the_features() -> Iterator[None]:
    def wrap(call: Any) -> Any:
        return lambda self, z, weight, noise, lengths: call(self, z, weight * z.shape[2] ** 0.5, noise, lengths)

    with patched("passes.neftune:NEFTune", "__call__", wrap):
        yield


@fault
def elements_of_a_table_for_rows() -> Iterator[None]:
    def wrong(self: Any, w: Tensor, weight: Tensor, noise: Any) -> Tensor:
        dropped: Tensor = w * noise.keep(w, weight) * (1 / (1 - weight)).to(w.dtype)
        return dropped

    with patched("passes.embedding_dropout:EmbeddingDropout", "__call__", lambda was: wrong):
        yield


@fault
def a_biased_variance() -> Iterator[None]:
    def wrong(self: Any, units: Tensor) -> Tensor:
        return (self.gamma - (units.var(0, correction=0) + 1e-4).sqrt()).relu().mean()

    with patched("passes.variance_floor:VarianceFloor", "__call__", lambda was: wrong):
        yield


@fault
def orthogonal_on_the_longer_side() -> Iterator[None]:
    def wrong(self: Any, w: Tensor) -> Tensor:
        rows = w.flatten(1)
        rows = rows if len(rows) > rows.shape[1] else rows.T
        total: Tensor = (rows @ rows.T - torch.eye(len(rows), dtype=w.dtype)).square().sum()
        return total

    with patched("passes.orthogonality:Orthogonality", "__call__", lambda was: wrong):
        yield


@fault
def groups_of_rows_alone() -> Iterator[None]:
    def wrap(call: Any) -> Any:
        return lambda self, w: call(replace(self, axis=0), w)

    with patched("passes.group_lasso:GroupLasso", "__call__", wrap):
        yield


@fault
def a_block_that_draws_otherwise() -> Iterator[None]:
    def wrap(forward: Any) -> Any:
        def wrong(self: Any, *values: Any, graphreg_keys: Sequence[Any] = (), **more: Any) -> Any:
            return forward(self, *values, graphreg_keys=[key + 1 for key in graphreg_keys], **more)

        return wrong

    with patched("blocks.block:Block", "forward", wrap):
        yield


LATER = frozenset(FAULTS).difference(_BEFORE)  # are looked for in cases with what 0.2 brought, alone
