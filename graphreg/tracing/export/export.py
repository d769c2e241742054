"""The export front end: torch.export runs the forward on tensors whose sizes vary, for what torch.fx cannot trace."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from graphreg.errors import GraphRegError, TraceError, first_line
from graphreg.ir import Graphs
from graphreg.torch_internals import FAKE_LOGGER, SOLVER_LOGGER, Changes, plain_transformers, pytree, quiet, raise_interrupt, silence_export
from graphreg.tracing.context import Answers, Asked, settled
from graphreg.tracing.export.op_record import Lost, Untold
from graphreg.tracing.export.recorder import Recorder
from graphreg.tracing.export.unlift import Unlifting
from graphreg.tracing.fake_inputs import Arguments, run_itself
from graphreg.tracing.modes import trace_keeping
from graphreg.tracing.side_effects.retrace import left_as_it_was, same_graph
from graphreg.tracing.symbolic.symbolic import where


def export(model: nn.Module, call: Arguments, leaves: dict[str, str], constants: dict[str, torch.Tensor], notes: list[str]) -> Graphs:
    """The graphs of both modes. ``leaves`` takes the submodules kept whole with the reason, ``notes`` what was switched off."""
    with without_caches(model, notes):
        try:
            call = _distinct(call)
            wide = _widened(call)
            if wide is not None:
                try:
                    return _both(model, wide, leaves, constants, wide=True)
                except Exception as error:  # the model wants one example at a time, or errs: then on what was given
                    raise_interrupt(error)
                    leaves.clear()
                    constants.clear()
            return _both(model, call, leaves, constants)
        except GraphRegError:
            raise
        except Exception as error:
            raise_interrupt(error)
            met = error
        if not isinstance(met, Lost):
            run_itself(model, call, {})  # its own error, if it has one
            check_works()
        raise TraceError(f"{type(model).__name__} cannot be exported{where(met)} ({first_line(met)}).") from met


class FrontEndError(TraceError):
    """The export front end itself fails, whatever the model."""


def check_works() -> None:
    """Raise where the front end fails on a model of one layer, too: then the fault is not the user's model, but the version of torch.

    It stands on parts of torch that no version promises to the next.
    """
    try:
        _both(nn.Sequential(nn.Linear(2, 2)), ((torch.ones(2, 2),), {}), {}, {})
    except Exception as error:
        raise FrontEndError(
            f"graphreg's export front end does not work with torch {torch.__version__} ({first_line(error)}). No model can be exported "
            "with it, so the cause is not your model. Please report this; meanwhile use another version of torch, or "
            "torch.compile(model, backend=graphreg.backend(...))."
        ) from error


def _both(model: nn.Module, call: Arguments, leaves: dict[str, str], constants: dict[str, torch.Tensor], wide: bool = False) -> Graphs:
    def told_as_one(into: dict[str, torch.Tensor], answers: Answers) -> tuple[fx.Graph, Recorder]:
        """Export again and again, until no more submodules must be opaque; the graph and the record of the last time."""
        while True:
            program, recorder = _program(model, call, leaves, answers)
            work = Unlifting(model, program, recorder.told, into)
            graph = work.run(wide)
            leaves.update(recorder.told.leaves)
            new = work.leaves.keys() - leaves.keys()
            if not new:
                for now, left in recorder.told.left:
                    now.update(left)
                return graph, recorder
            if "" in new:
                raise Untold(f"{work.leaves['']}; move that into a submodule of its own, which graphreg then keeps whole")
            leaves.update(work.leaves)

    modes = Asked()

    def once() -> fx.Graph:
        graph, recorder = told_as_one(constants, {})
        modes.update(recorder.questions.modes)

        def same(answers: Answers) -> bool:
            with left_as_it_was(model):
                return same_graph(graph, lambda: told_as_one(dict(constants), answers)[0])

        settled(graph, recorder.questions.asked, same, leaves)
        return graph

    return trace_keeping(model, once, leaves, modes, run=True)


def _program(model: nn.Module, call: Arguments, leaves: Mapping[str, str], answers: Answers) -> tuple[ExportedProgram, Recorder]:
    recorder = Recorder(model, leaves, answers)
    with recorder.at_work(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # of torch.export's own, about constants and attributes
        program = torch.export.export(model, *call, dynamic_shapes=_dynamic(model, call), strict=False)
    return program, recorder


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's solver of inequalities logs where it gives up, and without the graph that a failed torch.export prints to
    stderr: nothing is lost, for the error says what stopped it. And without the fused kernel of nn.TransformerEncoder: it has no sites."""
    with Changes() as changes, changes, quiet(SOLVER_LOGGER), quiet(FAKE_LOGGER, logging.CRITICAL):
        silence_export(changes)
        plain_transformers(changes)
        yield


def _dynamic(model: nn.Module, call: Arguments) -> Any:
    """Every dimension of every input varies, as far as the model lets it."""
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in pytree.tree_leaves(call):
        if isinstance(tensor, torch.Tensor):
            shapes[tensor] = dict.fromkeys(range(tensor.dim()), Dim.AUTO)
    return shapes.dynamic_shapes(model, *call)  # type: ignore[no-untyped-call]


def _widened(call: Arguments) -> Arguments | None:
    """A batch of one as a batch of two, for torch.export takes a size of 1 for fixed; None where it is no batch of one."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return None
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t, call)
    return args, kwargs


def _distinct(call: Arguments) -> Arguments:
    """A tensor that is given twice (labels that are the inputs) as two, for torch.export would take them for one value."""
    seen = set[int]()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in seen:
            return tensor.detach().clone()
        seen.add(id(tensor))
        return tensor

    args, kwargs = pytree.tree_map_only(torch.Tensor, own, call)
    return args, kwargs


@contextmanager
def without_caches(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """While this lasts no configuration asks for a cache, which a graph cannot give back."""
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    asked = {id(c): c for c in configs if getattr(c, "use_cache", None) is True}
    kinds = sorted({type(config).__name__ for config in asked.values()})
    notes += [f"switched off: {kind}.use_cache, for a graph returns no cache" for kind in kinds]
    with Changes() as changes, changes:
        for config in asked.values():
            changes.later(partial(setattr, config, "use_cache", True))
            config.use_cache = False
        yield
