"""The export front end: torch.export runs the forward on fake tensors with varying sizes, for models that torch.fx cannot trace."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from graphreg.errors import GraphRegError, TraceError, first_line
from graphreg.ir.train_eval import ModeGraphs
from graphreg.torch_internals import pytree
from graphreg.torch_internals.export import SOLVER_LOGGER, SPECIALIZED_LOGGER, apart_from_compilation, on_data_dependence, silence_export
from graphreg.torch_internals.fake_tensors import FAKE_LOGGER, make_function_table
from graphreg.torch_internals.modules import plain_transformers
from graphreg.torch_internals.patching import Changes, raise_interrupt
from graphreg.torch_internals.random_state import quiet
from graphreg.tracing.export.batch_of_one import BatchOfOne
from graphreg.tracing.export.inputs import spelled_out
from graphreg.tracing.export.op_record import UnsupportedValue, UntraceableModel
from graphreg.tracing.export.recorder import Recorder
from graphreg.tracing.export.unlift import Unlifter
from graphreg.tracing.fake_inputs import Arguments, run_model
from graphreg.tracing.frames import note_caught
from graphreg.tracing.global_queries import Answers, ModeReads, settle_queries
from graphreg.tracing.refusals import location
from graphreg.tracing.side_effects.retrace import model_restored, same_graph
from graphreg.tracing.train_eval_graphs import trace_both_modes


def export(model: nn.Module, call: Arguments, opaque: dict[str, str], constants: dict[str, torch.Tensor]) -> ModeGraphs:
    """Trace a model with torch.export.

    Args:
        model: The model.
        call: The example inputs.
        opaque: The modules that must be opaque, with reasons. Filled with all that are.
        constants: Filled with the tensors that the forward makes.

    Returns:
        The graphs of both modes.

    Raises:
        TraceError: The model cannot be exported.
    """
    make_function_table()  # torch.export makes it, too, but while graphreg's stand-ins replace some of the functions
    try:
        call, given = _distinct(call), dict(opaque)
        wide = _widened(call)
        if wide is not None:
            try:
                return _export_modes(model, wide, opaque, constants, wide=True)
            except Exception as error:
                # the export with a batch of two fails: try the original batch
                raise_interrupt(error)
                opaque.clear()
                opaque.update(given)
                constants.clear()
        return _export_modes(model, call, opaque, constants)
    except GraphRegError:
        raise
    except Exception as error:
        raise_interrupt(error)
        failure = error

    if not isinstance(failure, UntraceableModel):
        run_model(model, call, {})  # raises the model's own error, if it has one
        check_works()

    why = str(failure) if isinstance(failure, UntraceableModel) else first_line(failure)
    raise TraceError(f"{type(model).__name__} cannot be exported{location(failure)} ({why}).") from failure


class FrontEndError(TraceError):
    """The export front end fails for every model."""


def check_works() -> None:
    """Raise FrontEndError if the front end fails even on a model of one layer: then the cause is the version of torch.

    The front end depends on private parts of torch, which may change from version to version.
    """
    try:
        _export_modes(nn.Sequential(nn.Linear(2, 2)), ((torch.ones(2, 2),), {}), {}, {})
    except Exception as error:
        raise FrontEndError(
            f"graphreg's export front end does not work with torch {torch.__version__} ({first_line(error)}). No model can be exported "
            "with it, so the cause is not your model. Please report this; meanwhile use another version of torch, or "
            "torch.compile(model, backend=graphreg.backend(...))."
        ) from error


def _export_modes(
    model: nn.Module, call: Arguments, opaque: dict[str, str], constants: dict[str, torch.Tensor], wide: bool = False
) -> ModeGraphs:
    """Trace both modes. ``wide``: whether a batch of one was widened to two."""
    # ``any=True``: both modes are always traced. The graphs differ where torch.export took a value
    # for a constant, such as a random number.
    mode_reads = ModeReads(any=True)
    batch = BatchOfOne(wide)

    def once() -> fx.Graph:
        recorder, made = export_until_stable(constants, {})
        mode_reads.add(recorder.environment.mode_reads)

        def again(answers: Answers, negated: Collection[str] = ()) -> Unlifter:
            with model_restored(model):
                return export_until_stable(dict(constants), answers, negated)[1]

        batch.settle(made, partial(again, {}))
        graph = made.graph

        def same(answers: Answers) -> bool:
            return same_graph(graph, lambda: again(answers).graph)

        settle_queries(model, graph, recorder.environment.queries, same, opaque, mode_reads)
        return graph

    def export_until_stable(into: dict[str, torch.Tensor], answers: Answers, negated: Collection[str] = ()) -> tuple[Recorder, Unlifter]:
        """Export again and again until no further submodule becomes opaque; return the last recorder and its ``Unlifter``."""
        while True:
            program, recorder = _exported_program(model, call, Recorder(model, opaque, answers, negated))
            unlifter = Unlifter(model, program, recorder.record, into)
            unlifter.run(wide)
            opaque.update(recorder.record.opaque)
            new = unlifter.opaque.keys() - opaque.keys()
            if not new:
                # torch.export has put these back, but the next trace must find what is left
                for attributes, final in recorder.record.final_attributes:
                    attributes.update(final)
                return recorder, unlifter
            if "" in new:
                raise UnsupportedValue(f"{unlifter.opaque['']}; move that into a submodule of its own, which then becomes an opaque module")
            opaque.update(unlifter.opaque)

    return trace_both_modes(model, once, opaque, mode_reads, run=True)


def _exported_program(model: nn.Module, call: Arguments, recorder: Recorder) -> tuple[ExportedProgram, Recorder]:
    """Run torch.export once, with a recorder."""
    # torch.export takes no dynamic shapes for arguments that ``**kwargs`` takes
    with apart_from_compilation(), spelled_out(model, call[1]), recorder.recording(), warnings.catch_warnings(), _quiet_and_unfused():
        warnings.simplefilter("ignore")  # torch.export warns about constants and attributes
        caught = list[str]()
        with Changes() as changes, changes:
            # the model's own code may catch this error, and go on as if it were the model's
            on_data_dependence(changes, partial(note_caught, caught))
            program = torch.export.export(model, *call, dynamic_shapes=_dynamic_shapes(model, call), strict=False)
    if caught:
        raise UnsupportedValue(f"the forward decides by values, and catches the error by which torch.export refuses that ({caught[0]})")
    return program, recorder


@contextmanager
def _quiet_and_unfused() -> Iterator[None]:
    """Silence torch.export, and disable the fused kernel of nn.TransformerEncoder, because values inside a kernel cannot be sites.

    torch's solver of inequalities logs a message where it gives up. torch.export logs each size
    that it fixes, and prints its graph to stderr if it fails. These messages are not needed: the
    error that is raised says what failed, and a listing says which sizes are fixed.
    """
    with Changes() as changes, changes, quiet(SOLVER_LOGGER), quiet(SPECIALIZED_LOGGER), quiet(FAKE_LOGGER, logging.CRITICAL):
        silence_export(changes)
        plain_transformers(changes)
        yield


def _dynamic_shapes(model: nn.Module, call: Arguments) -> Any:
    """Return dynamic shapes in which every dimension of every input varies as far as the model allows."""
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in pytree.tree_leaves(call):
        if isinstance(tensor, torch.Tensor):
            shapes[tensor] = dict.fromkeys(range(tensor.dim()), Dim.AUTO)
    return shapes.dynamic_shapes(model, *call)  # type: ignore[no-untyped-call]


def _widened(call: Arguments) -> Arguments | None:
    """If the inputs are a batch of one, return a batch of two, because torch.export fixes sizes of 1; else return None."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return None
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t, call)
    return args, kwargs


def _distinct(call: Arguments) -> Arguments:
    """Clone a tensor that is given twice (``input_ids`` and ``labels``), because torch.export would take both arguments for one value."""
    seen = set[int]()

    def distinct(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in seen:
            return tensor.detach().clone()
        seen.add(id(tensor))
        return tensor

    args, kwargs = pytree.tree_map_only(torch.Tensor, distinct, call)
    return args, kwargs
