"""Faults that are put into the engine, to see that the fuzzer finds them.

Each is a context in which one function or method of graphreg does something wrong. What is patched must be there: where a name has
gone, this raises rather than injecting nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.tracing.trace import parameter_site

Inject = Callable[[], Any]
FAULTS: dict[str, Inject] = {}


def fault(inject: Callable[[], Iterator[None]]) -> Callable[[], Any]:
    """Register one under the words of its name."""
    made = contextmanager(inject)
    FAULTS[inject.__name__.replace("_", " ")] = made
    return made


@contextmanager
def patched(place: str, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """``graphreg.<place>.<name>`` replaced by what ``wrap`` makes of it.

    The place is a module, ``rng.noise``, or a class in one, ``rng.noise:Noise``.
    """
    module, _, inner = place.partition(":")
    owner: Any = importlib.import_module(f"graphreg.{module}")
    if inner:
        owner = getattr(owner, inner)
    was = owner.__dict__[name]  # KeyError: what this fault is put into is no longer there
    setattr(owner, name, wrap(was))
    try:
        yield
    finally:
        setattr(owner, name, was)


def _planned(change: Callable[[Any], Any]) -> Any:
    """The rewrite gets another plan than was asked for."""

    def wrap(rewrite: Any) -> Any:
        return lambda traced, plan, *rest, **more: rewrite(traced, change(plan), *rest, **more)

    return patched("rewriting.rewrite", "rewrite", wrap)


def _rewritten(change: Callable[[nn.Module], None]) -> Any:
    """Something happens to the graphs of the rewritten module."""

    def wrap(rewrite: Any) -> Any:
        def changed(*args: Any, **more: Any) -> Any:
            module = rewrite(*args, **more)
            change(module)
            module.recompile()
            return module

        return changed

    return patched("rewriting.rewrite", "rewrite", wrap)


def _is_splice(edit: Any) -> bool:
    return type(edit.regularizer).__name__ in ("BernoulliDropout", "GaussianNoise")


@fault
def a_sum_for_a_mean() -> Iterator[None]:
    def wrap(forward: Any) -> Any:
        def wrong(self: Any, *values: Any) -> Tensor:
            total: Tensor = forward(self, *values)
            return total * max(len(values), 1)

        return wrong

    with patched("runtime.penalty:Total", "forward", wrap):
        yield


@fault
def splices_in_the_wrong_order() -> Iterator[None]:
    def change(plan: Any) -> Any:
        splices = [edit for edit in plan.edits if _is_splice(edit)]
        return replace(plan, edits=(*reversed(splices), *(edit for edit in plan.edits if not _is_splice(edit))))

    with _planned(change):
        yield


@fault
def noise_in_eval_mode() -> Iterator[None]:
    acts = patched("runtime.splice:SpliceRule", "acts", lambda was: lambda self: True)
    with acts, patched("runtime.noise_keys:KeyRule", "draws", lambda was: lambda *a: True):
        yield


@fault
def no_copy_before_a_later_write() -> Iterator[None]:
    with patched("ir.aliasing:Aliases", "written_later", lambda was: lambda self, node, is_definite=False: False):
        yield


@fault
def what_a_write_has_left_is_not_read() -> Iterator[None]:
    with patched("tracing.settled_reads:_Work", "follow", lambda was: lambda self, write: None):
        yield


@fault
def views_not_known_as_views() -> Iterator[None]:
    def wrap(init: Any) -> Any:
        def wrong(self: Any, *args: Any, **more: Any) -> None:
            init(self, *args, **more)
            writes = self.written_later
            self.written_later = lambda node, is_definite=False: bool(
                writes(node, is_definite) and any(node in user.args[:1] for user in node.users if _writes_by_name(user))
            )
            self.written_aside = lambda node: None

        return wrong

    with patched("ir.aliasing:Aliases", "__init__", wrap):
        yield


def _writes_by_name(node: Any) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return name.endswith("_") or name in ("iadd", "imul", "isub", "itruediv", "setitem")


@fault
def a_write_past_the_splice_is_accepted() -> Iterator[None]:
    with patched("ir.aliasing:Aliases", "written_aside", lambda was: lambda self, node: None):
        yield


@fault
def a_frozen_factory() -> Iterator[None]:
    makers = {torch.zeros, torch.ones, torch.full, torch.arange, torch.eye, torch.linspace}

    def change(module: Any) -> None:
        for graph in module.graphs.values():
            for node in list(graph.nodes):
                if node.op == "call_function" and node.target in makers and not node.all_input_nodes:
                    name = f"_frozen_{node.name}"
                    module.__dict__[name] = node.target(*node.args, **node.kwargs)
                    with graph.inserting_before(node):
                        constant = graph.create_node("get_attr", name)
                    constant.meta.update(node.meta)
                    node.replace_all_uses_with(constant)
                    graph.erase_node(node)

    with _rewritten(change):
        yield


@fault
def a_moved_generator() -> Iterator[None]:
    with patched("rng.noise:Noise", "keep", lambda keep: lambda self, z, p: keep(type(self)(self.key + 1), z, p)):
        yield


@fault
def a_call_number_too_far() -> Iterator[None]:
    def wrap(forward: Any) -> Any:
        def wrong(self: Any, *args: Any) -> Tensor:
            keys: Tensor = forward(self, *args)
            return torch.where(self.step > 1, self.keys, keys)

        return wrong

    with patched("runtime.noise_keys:KeyRule", "forward", wrap):
        yield


@fault
def one_key_for_all_splices() -> Iterator[None]:
    def wrap(forward: Any) -> Any:
        return lambda self, z, key: forward(self, z, key[:1].expand_as(key))

    with patched("runtime.splice:SpliceRule", "forward", wrap):
        yield


@fault
def another_mask_in_backward() -> Iterator[None]:
    def wrap(forward: Any) -> Any:
        def wrong(self: Any, z: Tensor, key: Tensor) -> Tensor:
            y: Tensor = forward(self, z, key)
            if not self.acts():
                return y
            other: Tensor = forward(self, z, key + 1)
            return other + (y - other).detach()

        return wrong

    with patched("runtime.splice:SpliceRule", "forward", wrap):
        yield


@fault
def a_lost_penalty() -> Iterator[None]:
    def change(plan: Any) -> Any:
        penalties = [name for name, r in plan.regularizers.items() if hasattr(r, "clean")]
        if len(penalties) < 2:
            return plan
        kept = {name: r for name, r in plan.regularizers.items() if name != penalties[-1]}
        slices = {name: slice_ for name, slice_ in plan.slices.items() if name in kept}
        return replace(plan, regularizers=kept, slices=slices, edits=tuple(edit for edit in plan.edits if edit.name in kept))

    with _planned(change):
        yield


@fault
def a_clean_penalty_reads_the_splice() -> Iterator[None]:
    def change(plan: Any) -> Any:
        regularizers = {n: replace(r, clean=False) if getattr(r, "clean", False) else r for n, r in plan.regularizers.items()}
        edits = tuple(replace(edit, regularizer=regularizers[edit.name]) for edit in plan.edits)
        return replace(plan, regularizers=regularizers, edits=edits)

    with _planned(change):
        yield


@fault
def a_penalty_reads_before_the_splice() -> Iterator[None]:
    def change(plan: Any) -> Any:
        regularizers = {n: replace(r, clean=True) if hasattr(r, "clean") and r.on == "values" else r for n, r in plan.regularizers.items()}
        edits = tuple(replace(edit, regularizer=regularizers[edit.name]) for edit in plan.edits)
        return replace(plan, regularizers=regularizers, edits=edits)

    with _planned(change):
        yield


@fault
def a_site_one_off_among_repeats() -> Iterator[None]:
    def wrap(site_nodes: Any) -> Any:
        def wrong(*args: Any) -> Any:
            found = dict(site_nodes(*args))
            for name in [name for name in found if f"{name}_1" in found]:
                found[name], found[f"{name}_1"] = found[f"{name}_1"], found[name]
            return found

        return wrong

    with patched("rewriting.plan_lowering", "site_nodes", wrap):
        yield


@fault
def repeats_counted_from_two() -> Iterator[None]:
    def wrap(count: Any) -> Any:
        def wrong(self: Any, base: str) -> Any:
            self._next.setdefault(base, 2)
            return count(self, base)

        return wrong

    with patched("ir.naming:Namer", "_count", wrap):
        yield


@fault
def a_strength_not_applied() -> Iterator[None]:
    def wrap(forward: Any) -> Any:
        def wrong(self: Any, *values: Any) -> Tensor:
            total: Tensor = forward(self, *values)
            weight: Tensor = self.weight(total.dtype)
            return total / weight.clamp(min=1e-9)

        return wrong

    with patched("runtime.penalty:Total", "forward", wrap):
        yield


@fault
def a_strength_applied_twice() -> Iterator[None]:
    def wrap(forward: Any) -> Any:
        def wrong(self: Any, *values: Any) -> Tensor:
            total: Tensor = forward(self, *values)
            weight: Tensor = self.weight(total.dtype)
            return total * weight

        return wrong

    with patched("runtime.penalty:Total", "forward", wrap):
        yield


@fault
def a_penalty_without_gradient() -> Iterator[None]:
    with patched("runtime.penalty", "measured", lambda measured: lambda *args, **more: measured(*args, **more).detach()):
        yield


@fault
def buffers_updated_twice() -> Iterator[None]:
    def change(module: Any) -> None:
        for graph in module.graphs.values():
            for node in list(graph.nodes):
                if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.BatchNorm1d):
                    with graph.inserting_before(node):
                        graph.create_node("call_module", node.target, node.args)

    with _rewritten(change):
        yield


@fault
def the_eval_graph_in_train_mode() -> Iterator[None]:
    def change(module: Any) -> None:
        if "eval" in module.graphs:
            module.graphs["train"] = module.graphs["eval"]

    with _rewritten(change):
        yield


@fault
def a_tied_parameter_counted_twice() -> Iterator[None]:
    def wrap(was: Any) -> Any:
        def parameters(self: Any) -> Any:
            modules = self.operations.modules
            return tuple(parameter_site(modules, [name], p) for name, p in self.model.named_parameters(remove_duplicate=False))

        return property(parameters)

    with patched("tracing.trace:Traced", "parameters", wrap):
        yield


@fault
def native_dropout_left_to_torch() -> Iterator[None]:
    def wrap(replaced: Any) -> Any:
        return lambda self, z, p, noise, given: torch.nn.functional.dropout(z, p, True)

    with patched("runtime.dropout:NativeDropoutRule", "_replaced", wrap):
        yield


@fault
def attached_twice() -> Iterator[None]:
    def wrap(forward: Any) -> Any:
        def wrong(self: Any, outputs: Any, penalties: Any, to_loss: bool) -> Any:
            last = forward(self, outputs, tuple(2 * p for p in penalties), to_loss)
            self.last = {name: value / 2 for name, value in self.last.items()}
            return last

        return wrong

    with patched("runtime.attach:AttachRule", "forward", wrap):
        yield


@fault
def time_and_batch_exchanged() -> Iterator[None]:
    def wrap(of: Any) -> Any:
        def wrong(self: Any, *args: Any) -> Any:
            steps, lengths = of(self, *args)
            return steps.transpose(0, 1), lengths

        return wrong

    with patched("ir.time_steps:Steps", "of", wrap):
        yield


@fault
def hidden_values_not_seen_through_views() -> Iterator[None]:
    with patched("ir.operations:Operations", "passes_through", lambda was: lambda self, node: False):
        yield


@fault
def a_contraction_not_divided_by_the_batch() -> Iterator[None]:
    def wrap(squared: Any) -> Any:
        def wrong(rows: Any) -> Any:
            return squared(rows) * 3

        return wrong

    with patched("passes.contractive", "_squared", wrap):
        yield


@fault
def a_copy_of_another_layout() -> Iterator[None]:
    copies = patched("ir.aliasing:Aliases", "clone_of", lambda was: lambda self, node: packed)
    places = [patched(place, "clone", lambda was: packed) for place in ("ir.layout", "runtime.splice")]
    with copies, places[0], places[1]:
        yield


@fault
def a_splice_of_another_layout() -> Iterator[None]:
    def wrap(forward: Any) -> Any:
        def wrong(self: Any, z: Tensor, key: Tensor) -> Tensor:
            y: Tensor = forward(self, z, key)
            return y if y is z else y.contiguous()

        return wrong

    with patched("runtime.splice:SpliceRule", "forward", wrap):
        yield


def packed(z: Tensor) -> Tensor:
    """A copy that does not keep the strides."""
    return z.clone(memory_format=torch.contiguous_format)
