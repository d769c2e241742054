"""``Placed`` traces a graph of a model for each structure of arguments (see ``calls.py``), and chooses the graph that a call runs."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.blocks.placed_block import check_class, is_placed, leave
from graphreg.errors import GraphRegError, OtherInputs, TraceError, listed
from graphreg.in_place.calls import CallForm, example_of, not_traced, shapes_of, structure_text
from graphreg.in_place.fingerprint import Fingerprint
from graphreg.in_place.shared_session import SharedSession
from graphreg.in_place.structure import (
    InPlaceOptions,
    Numbers,
    StructureGraph,
    accepts_call,
    prove_later,
    restored_unless_done,
    told_of_change,
    traced_for,
)
from graphreg.in_place.turns import RESTING, begin_turn, end_turn, tracing_turn
from graphreg.ir.contents import contents_of
from graphreg.ir.module_record import MEMBERS, ORIGINAL
from graphreg.ir.selector import strings
from graphreg.pipeline import log_notes, log_plan, warn_of_scale
from graphreg.regularizer.base import Splice
from graphreg.rewriting.instantiate import device_of
from graphreg.runtime.around_call import AroundCall
from graphreg.runtime.attach import fed
from graphreg.runtime.build_record import Asked, written_scale
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.runtime_module import DrawingRule, Rules
from graphreg.session.hosts import InPlaceHost, record_of, rules_of
from graphreg.session.session import Session
from graphreg.session.streams import GrowingStreams
from graphreg.torch_internals.dynamo import guard_value, runs_compiled, translator
from graphreg.torch_internals.dynamo_marks import disable, skip_frame
from graphreg.torch_internals.fake_tensors import is_fake
from graphreg.torch_internals.modules import has_pre_hooks, has_users_global_hook
from graphreg.torch_internals.torch_modes import tracer_here
from graphreg.tracing.proof.proof import NotTheModel
from graphreg.tracing.proof.values import tensors
from graphreg.tracing.reads import Reads
from graphreg.tracing.trace import refuse_arguments

log = logging.getLogger("graphreg")
# The most graphs that are kept for one structure. It gets another graph if the model changes, or if no graph accepts a call's sizes.
_MOST = 8
_MANY = 16  # the number of structures at which a warning is logged


class _ForOneValue(GraphRegError):
    """No graph was found that takes the loosened arguments of a call as numbers that may change."""


class _CallInThread(threading.local):
    """The call that runs in this thread."""

    # the state of the called model, the structure of the arguments, and the graphs that are not stale; None outside of ``Placed.call``
    call: tuple[Placed, str, list[StructureGraph]] | None = None


_thread = _CallInThread()


class Graphs:
    """Has an attribute for each structure. The attribute's name is the text of the structure, and its value is the rewritten module.

    Dynamo guards each attribute separately, so that a new structure makes no compiled code invalid.
    """


class Placed(InPlaceHost):
    """The state of a model that is regularized in place. The state is in the model's ``__dict__``, and is no submodule.

    Attributes:
        options: The options of ``regularize_``.
        session: The strengths and the noise, which all graphs share.
        graphs: For each structure, the rewritten module that was chosen last.
        in_eval: Whether the graph runs in eval mode, too.
        last: The text of the structure of the last call.
        loosened: The arguments that graphs take as numbers that may change, if they are numbers.
    """

    session: SharedSession

    def __init__(self, options: InPlaceOptions, session: SharedSession) -> None:
        self.options, self.session, self.graphs = options, session, Graphs()
        self.in_eval, self.last = options.eval_penalties, ""
        session.join(self)
        session.attaches = options.penalties == "attach"
        session.scale = options.scale if session.scale is None else session.scale
        session.may_draw = options.own_dropout != "keep" or any(
            isinstance(regularizer, Splice) or regularizer.takes_vjp for regularizer in options.regularizers.values()
        )
        if options.blocks is None or strings(options.blocks):
            session.asked = self._asked(() if options.blocks is None else strings(options.blocks))
        self._made: dict[str, list[StructureGraph]] = {}  # for each structure: its graphs, the most recently chosen one first
        # for a structure: the fingerprint, ``_beside(model)`` and the error of a failed trace
        self._failed: dict[str, tuple[Fingerprint, tuple[Any, ...], GraphRegError]] = {}
        self._told: frozenset[str] | None = None  # the notes that have been logged; None before the plan has been logged
        self.loosened: tuple[str, ...] = ()
        self._by_value: set[str] = set()  # arguments that are numbers, and of which a graph needs the value
        self._compared: set[str] = set()  # loosened arguments of graphs that have assertions
        # for a structure without the values of numbers: these values in its first call, by name, and the text with them
        self._numbers: dict[str, tuple[dict[str, Any], str]] = {}
        self._two_values: dict[str, tuple[Any, Any]] = {}  # two values of each argument that is or was loosened

    def _beside(self, model: nn.Module) -> tuple[Any, ...]:
        """Return why a trace may fail, besides the model: by a selector of ``set_strength``, by modes, or by a hook for all modules."""
        return self.session.changes, [module.training for module in model.modules()], has_users_global_hook()

    def _asked(self, blocks: tuple[str, ...]) -> Asked:
        given = self.options
        front_end = None if given.front_end == "auto" else given.front_end
        scale = written_scale(given.scale)
        return Asked(
            given.regularizers, {}, front_end, given.missing, given.own_dropout, given.penalties, scale, given.eval_penalties, blocks
        )

    # Calls of the model

    def call(self, model: nn.Module, form: CallForm, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Trace the model if no graph fits this call, then return ``run()``, which calls the model with its hooks.

        The trace must come before ``run``: if the model is compiled, Dynamo traces the forward in ``run``, and needs the graph there.
        """
        begin_turn(self)
        outer = _thread.call
        try:
            key, fitting = self._prepared(model, form, args, kwargs)
            if fitting[0].asks and runs_compiled(model):  # compiled code cannot run another graph where an assertion fails
                key, fitting = self._prepared_for_compiled(model, form, key, fitting, args, kwargs)
            _thread.call = self, key, fitting
            members = vars(type(model))
            if MEMBERS not in members:  # fully_shard and replicate make a subclass, which changes no operation
                added = itertools.takewhile(lambda kind: MEMBERS not in vars(kind), type(model).__mro__)
                if not all(kind.__module__.startswith("torch.distributed.") for kind in added):
                    refuse_other_class(model)
            elif len(members) != len(members[MEMBERS]) + (RESTING in members):
                _refuse_set_on_class(members, fitting[0])
            with AroundCall(fitting[0].module, fitting[0].rules, args, kwargs) as around:
                return around.after(run())
        finally:
            _thread.call = outer
            end_turn()

    # Dynamo must compile the model's forward, which ``run`` calls, but not this method. All else that it calls is disabled: Dynamo would
    # compile it once for each model, and no more after 8 models.
    skip_frame(call)

    @disable()
    def _prepared(self, model: nn.Module, form: CallForm, args: Any, kwargs: Any) -> tuple[str, list[StructureGraph]]:
        """Return the text of a call's structure and the graphs that fit it. See ``_loosen`` for arguments that are numbers."""
        if (key := form.key(args, kwargs, self.loosened)) not in self._made:
            self._loosen(form, args, kwargs)
            key = form.key(args, kwargs, self.loosened)
        try:
            return key, self.fitting(model, form, key, args, kwargs)
        except _ForOneValue:
            key = form.key(args, kwargs, self.loosened)
            return key, self.fitting(model, form, key, args, kwargs)

    @disable()
    def _prepared_for_compiled(
        self, model: nn.Module, form: CallForm, key: str, fitting: list[StructureGraph], args: Any, kwargs: Any
    ) -> tuple[str, list[StructureGraph]]:
        """Return, as ``_prepared`` does, the structure of a call and a graph all of whose assertions the call fulfils."""
        if self._compared:
            self._tighten(self._compared)
            key, fitting = self._prepared(model, form, args, kwargs)
        shapes, tried = shapes_of(args, kwargs), list[StructureGraph]()
        while True:
            for graph in fitting:
                if graph.has_run(shapes) or self._accepts(model, graph, args, kwargs):
                    graph.know(shapes)
                    self._choose(key, graph)
                    return key, [graph]
                tried.append(graph)
            fitting = [self._trace(model, form, key, args, kwargs, tried)[0]]

    def _accepts(self, model: nn.Module, graph: StructureGraph, args: Any, kwargs: Any) -> bool:
        with tracing_turn(self):
            return accepts_call(model, graph, _example_of(model, args, kwargs), self.options)

    def _loosen(self, form: CallForm, args: Any, kwargs: Any) -> None:
        """Loosen arguments that are numbers and differ from a call whose structure is the same otherwise.

        Of a loosened argument, only the type belongs to the structure. If a graph turns out to need the value, the argument counts by its
        value again, for good (``_tighten``).
        """
        numbers = form.numbers(args, kwargs)
        first = numbers, form.key(args, kwargs)
        known, key = self._numbers.setdefault(form.key(args, kwargs, tuple(numbers)), first)
        changed = [name for name in numbers.keys() - self._by_value if contents_of(numbers[name]) != contents_of(known[name])]
        if any(record_of(graph.module).front_end == "export" for graph in self._made.get(key, ())):  # whose graphs fix numbers
            self._by_value.update(changed)
            return
        self._two_values.update({name: (known[name], numbers[name]) for name in changed})
        self.loosened += tuple(name for name in changed if name not in self.loosened)

    @disable()
    def _tighten(self, names: Collection[str]) -> None:
        self._by_value.update(names)
        self.loosened = tuple(name for name in self.loosened if name not in self._by_value)
        self._compared -= self._by_value

    def _loose_numbers(self, form: CallForm, args: Any, kwargs: Any) -> Numbers:
        """Return the loosened arguments of a call that are numbers."""
        numbers = form.numbers(args, kwargs)
        other = {}
        for name in numbers.keys() & {*self.loosened}:
            first, second = self._two_values[name]
            other[name] = second if contents_of(numbers[name]) == contents_of(first) else first
        _, key = self._numbers.get(form.key(args, kwargs, tuple(numbers)), ({}, ""))
        like = next(iter(self._made.get(key, ())), None)
        return Numbers(other, like.plan if like is not None and other else None)

    def run(self, model: nn.Module, form: CallForm, args: Any, kwargs: Any) -> Any:
        """Run the graph of a call's structure, instead of the model's forward, in a call that Dynamo does not trace."""
        running = _thread.call
        if running is None or running[0] is not self:  # the user called ``model.forward``, not the model
            begin_turn(self)
            try:
                key, fitting = self._prepared(model, form, args, kwargs)
                with AroundCall(fitting[0].module, fitting[0].rules, args, kwargs) as around:
                    return around.after(self._run_graph(model, form, key, args, kwargs, fitting))
            finally:
                end_turn()
        if running[1] == (key := form.key(args, kwargs, self.loosened)):
            return self._run_graph(model, form, key, args, kwargs, running[2])
        return self._run_graph(model, form, *self._prepared(model, form, args, kwargs), args, kwargs)

    def _run_graph(self, model: nn.Module, form: CallForm, key: str, args: Any, kwargs: Any, fitting: list[StructureGraph]) -> Any:
        shapes, tried = shapes_of(args, kwargs) if fitting[0].asks else (), list[StructureGraph]()
        while True:
            for graph in fitting:
                try:
                    with restored_unless_done(model, graph.late and not graph.has_run(shapes), (args, kwargs)):
                        return self._forward(key, graph, shapes, args, kwargs)
                except OtherInputs:
                    tried.append(graph)
            try:
                graph, is_new = self._trace(model, form, key, args, kwargs, tried)
            except _ForOneValue:
                key, fitting = self._prepared(model, form, args, kwargs)
                continue
            if is_new:
                return self._forward(key, graph, shapes_of(args, kwargs), args, kwargs)
            fitting = [graph]

    def _forward(self, key: str, graph: StructureGraph, shapes: Any, args: Any, kwargs: Any) -> Any:
        with fed(graph.rules, args, kwargs):  # AroundCall feeds the first graph that fits, and another may have to run
            result = type(graph.module).forward(graph.module, *args, **kwargs)
        if graph.asks:
            graph.know(shapes)
        self._choose(key, graph)
        return result

    def fitting(self, model: nn.Module, form: CallForm, key: str, args: Any, kwargs: Any) -> list[StructureGraph]:
        """Return the graphs of a structure that are not stale. If there is none, trace. Graphs that ran with these shapes come first."""
        graphs = self._present(key) or [self._trace(model, form, key, args, kwargs)[0]]
        if len(graphs) > 1 and graphs[0].asks:
            shapes = shapes_of(args, kwargs)
            graphs.sort(key=lambda graph: not graph.has_run(shapes))
        if graphs[0].rules.is_unproved(model.training):
            try:
                with tracing_turn(self):
                    if graphs[0].rules.is_unproved(model.training):  # no other thread has proved it meanwhile
                        prove_later(model, graphs[0], _example_of(model, args, kwargs), self.options)
            except NotTheModel:
                if not graphs[0].rules.asks_autocast:
                    raise
                # it was right under another autocast; a trace under this one sees which parts switch it on or off
                graphs = [self._trace(model, form, key, args, kwargs, graphs)[0]]
        graphs[0].refuse_hooks()
        graphs[0].follow(model)
        self._choose(key, graphs[0])
        return graphs

    def _choose(self, key: str, graph: StructureGraph) -> None:
        self.last = key
        if getattr(self.graphs, key, None) is not graph.module:
            setattr(self.graphs, key, graph.module)
        made = self._made[key]
        if made[0] is not graph:  # another thread may read the list
            self._made[key] = [graph, *(each for each in made if each is not graph)]

    def _present(self, key: str) -> list[StructureGraph]:
        """Return the graphs of a structure that are not stale, up to the first one that accepts all calls of the structure."""
        graphs = list[StructureGraph]()
        for graph in tuple(self._made.get(key, ())):
            if graph.is_present():
                graphs.append(graph)
                if not graph.asks:
                    break
        return graphs

    @disable()
    def _trace(
        self, model: nn.Module, form: CallForm, key: str, args: Any, kwargs: Any, tried: Sequence[StructureGraph] = (), at_call: bool = True
    ) -> tuple[StructureGraph, bool]:
        """Trace the model for a call, and return the graph, and whether it is new. ``at_call``: whether the call is running.

        If another thread has traced the model for the same structure meanwhile, return its graph. ``tried``: graphs that do not fit.
        If graphreg raises an error, each later call of the same structure raises the stored error again, until the model changes. But if
        the call has loosened arguments, they count by their values from then on, and ``_ForOneValue`` is raised.
        """
        refuse_arguments(model, (args, kwargs))
        if at_call:
            _require_fit(model, args, kwargs)
        if tracer_here() or any(map(is_fake, tensors((args, kwargs)))):
            raise not_traced(key, type(model).__name__)
        with tracing_turn(self):
            if others := [graph for graph in self._present(key) if graph not in tried]:
                return others[0], False
            fingerprint, then, error = self._failed.get(key, (None, (), None))
            if error is not None and then == self._beside(model) and fingerprint is not None and fingerprint.same():
                raise type(error)(*error.args) from error
            self._log_change(key)
            # the model was made on the meta device, and has got its values
            if (device := device_of(model)) != self.session.streams.key.step.device:
                self.move(lambda tensor: tensor.to(device))
            reads, numbers = Reads(), self._loose_numbers(form, args, kwargs)
            try:
                with self.session.unchanged_unless_done():
                    example = _example_of(model, args, kwargs)
                    graph = traced_for(model, example, self.options, self.session, at_call, reads, numbers)
            except GraphRegError as failure:
                if numbers.other:
                    self._tighten(numbers.other)
                    raise _ForOneValue from failure
                told = told_of_change(failure) if self._made else failure
                self._failed[key] = Fingerprint(model, reads), self._beside(model), told
                raise told from failure.__cause__
            except Exception as failure:  # the model's own
                if at_call:
                    _fail_as_the_model(model, failure, args, kwargs)
                raise
            self._compared.update(numbers.other if graph.asks else ())
            graph.know(shapes_of(args, kwargs))
            self.session.join(graph.rules)
            self.session.has_acted = True
            self.session.may_draw = False  # what draws is known
            if self.session.asked is None:  # ``blocks=`` is a function: a recipe has what it selected
                self.session.asked = self._asked(graph.plan.asked_blocks)
            if self.session.streams.key.position is not None:  # ``set_ranks`` was called before this graph existed
                for child in graph.rules.children():  # it would draw whole masks: it raises until ``set_ranks`` is called again
                    if isinstance(child, DrawingRule):
                        child.cuts = None
            made = self._made.setdefault(key, [])
            if len(self._made) == _MANY and not made:
                log.warning("traced for arguments of %d structures so far; pass numbers that change from call to call as tensors.", _MANY)
            self._drop_outdated()
            made.insert(0, graph)
            for old in made[_MOST:]:
                self._drop(old)
            del made[_MOST:]
            self._choose(key, graph)
        self._tell(graph)
        return graph, True

    def _drop_outdated(self) -> None:
        """Drop the graphs whose regularizers own states of parameters as they were: these states have started anew."""
        for made in self._made.values():
            for graph in [each for each in made if self.session.is_outdated(each.rules)]:
                self._drop(graph)
                made.remove(graph)

    def _drop(self, graph: StructureGraph) -> None:
        self.session.readers.remove(graph.rules)
        graph.leave()

    def _log_change(self, key: str) -> None:
        """If the structure has a graph already, log why it gets another one, and warn if a monitor watches the earlier graph."""
        if not (made := self._made.get(key)):
            return
        what = made[0].fingerprint.changed() or "sizes, flags or modes that the graph asserts"
        log.info("traced once more for %s: other %s", structure_text(key), what)
        if made[0].rules.watching is not None:
            log.warning("the monitor watches the earlier graph; open another monitor to watch the new graph.")

    def _tell(self, graph: StructureGraph) -> None:
        notes = record.notes if (record := graph.rules.build_record) is not None else ()
        if self._told is None:
            log_plan(graph.plan, notes)
            warn_of_scale(graph.module, self.options.penalties, self.session.scale)
        else:
            log_notes(note for note in notes if note not in self._told)
        self._told = (self._told or frozenset()).union(notes)

    def trace_example(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Trace the model for the example inputs of ``regularize_``."""
        form = CallForm(inspect.signature(_own_forward(model)))
        self._loosen(form, args, kwargs)
        self._trace(model, form, form.key(args, kwargs), args, kwargs, at_call=False)

    def guard(self, key: str) -> bool:
        """Add a guard to the code that Dynamo is compiling, so that Dynamo compiles the code again once the structure's graph is stale.

        Return False, without adding a guard, if the graph is stale already.
        """
        graph = next(iter(self._made.get(key, ())), None)
        if graph is None or not graph.is_present():
            return False
        guard_value(translator(), "__graphreg_fingerprint", _Watched(graph.fingerprint), "same", by_module=False)
        return True

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply ``fn``, which moves the model's tensors (``nn.Module._apply``), to strengths, keys and buffers of the runtime modules."""
        moved: dict[int, Tensor] = {}
        for reader in self.session.readers:
            if isinstance(reader, Rules):
                reader.move(fn, moved)

    def fresh(self) -> Placed:
        """Return a state for a copy of the model, with the same strengths, seeds and call number, and without graphs."""
        return Placed(self.options, self.session.copied())

    def __copy__(self) -> Placed:
        return self.fresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> Placed:
        return self.fresh()

    def __reduce__(self) -> tuple[Any, ...]:
        session = self.session
        options = dataclasses.replace(self.options, scale=session.scale)
        return _unpickled, (options, {}, session.saved(), session.changed_strengths(), False, session.awaited())

    def leave(self, model: nn.Module) -> None:
        """Give the model's blocks their own classes back. Raise GraphRegError if another library has changed the class of a block."""
        graphs = [graph for made in self._made.values() for graph in made]
        for graph in graphs:
            for block in graph.blocks:
                check_class(block)
        for graph in graphs:
            graph.leave()
        for inner in model.modules():  # blocks that have a generated class, but no graph, because a trace failed
            if is_placed(inner):
                leave(inner)

    # The host of the session

    def modules(self) -> list[RewrittenModule]:
        last = self._made.get(self.last, [])
        return [graph.module for graph in (*last, *(graph for made in self._made.values() if made is not last for graph in made))]

    def graph_for(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> RewrittenModule:
        self.current()  # raises if nothing was traced
        key, shapes = CallForm(inspect.signature(_own_forward(model))).key(args, kwargs, self.loosened), shapes_of(args, kwargs)
        if graphs := [graph for graph in self._made.get(key, ()) if graph.is_present()]:
            return min(graphs, key=lambda graph: not graph.has_run(shapes)).module
        raise GraphRegError(
            f"{type(model).__name__} has no graph for arguments of the structure {structure_text(key)}, or only one from before a change "
            "of the model. Call it with them once in train mode, or give graphreg.regularize_ example_inputs of this structure."
        )

    def notes(self) -> list[str]:
        shown = [structure_text(key) + (", shown here" if key == self.last and len(self._made) > 1 else "") for key in self._made]
        return [f"in place: a graph for arguments of the structure {each}" for each in shown]

    def last_penalties(self) -> dict[str, Tensor]:
        """Return the penalties of the last call by name, detached from autograd; an empty dict before the first call."""
        if self.options.penalties == "return":
            raise GraphRegError("this model returns its penalties with its output; penalties() is for penalties='attach'.")
        return self.current().penalties() if self._made and "attach" in rules_of(self)._modules else {}

    def follow_original(self, original: Placed) -> None:
        """Copy the strengths and the noise of another model's state, whose average this model is."""
        self.session.restore_strengths(original.session.changed_strengths())
        self.session.load(original.session.saved())

    def on_switched(self, session: Session) -> None:
        self.in_eval = self.options.eval_penalties or session.noise.has_on


def _own_forward(model: nn.Module) -> Any:
    """Return the forward of the model's own class, also if something has wrapped the model's, as accelerate does."""
    return getattr(type(model), ORIGINAL).forward.__get__(model)


def _require_fit(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Raise the plain model's own TypeError for a call that does not fit its forward; TraceError if a decorator or a hook might fit it."""
    forward = _own_forward(model)
    signature = inspect.signature(forward)
    try:
        signature.bind(*args, **kwargs)
        return
    except TypeError as error:
        why = error
    if not has_pre_hooks(model):
        try:
            inspect.signature(forward, follow_wrapped=False).bind(*args, **kwargs)
        except TypeError:
            forward(*args, **kwargs)  # raises before any of its code runs
    raise TraceError(
        f"the call does not fit {type(model).__name__}.forward({', '.join(signature.parameters)}): {why}. A decorator of the forward, or a "
        "hook, takes other arguments than this signature shows, and a trace goes by the signature. Pass the arguments that it shows, or "
        "let the forward take those of the call itself, without the decorator or hook."
    )


@disable()
def refuse_other_class(model: nn.Module) -> None:
    """Raise, since the user has replaced the class of a model in place, or the forward of that class, which no trace sees."""
    raise GraphRegError(
        f"the class of this {type(model).__name__} in place, or the forward of that class, was replaced after graphreg.regularize_, and a "
        "trace does not see that. Undo it, graphreg.strip_ the model, make the change, and regularize the model again."
    )


@disable()
def _refuse_set_on_class(members: Mapping[str, Any], graph: StructureGraph) -> None:
    """Raise if the user has set an attribute of ``type(model)`` that the forward reads. A trace sees the model with its own class."""
    if others := sorted((members.keys() - members[MEMBERS]) & graph.fingerprint.names()):
        raise GraphRegError(
            f"{listed(others)} was set on type(model), a class that graphreg made for this model in place; a trace does not see that. "
            "Set it on the model's own class, type(model).__mro__[1], or on the model."
        )


def _example_of(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return the arguments of a call of the model as example inputs."""
    return example_of(inspect.signature(_own_forward(model)), args, kwargs)


def _fail_as_the_model(model: nn.Module, failure: Exception, args: Any, kwargs: Any) -> None:
    """Run the model's own forward, which raises: what it writes before that stays. A trace, which raised ``failure``, has put it back."""
    with restored_unless_done(model, True, (args, kwargs)):
        try:
            _own_forward(model)(*args, **kwargs)
        except Exception as error:
            failure = error
        else:
            raise failure
    raise failure


class _Watched:
    """Has the property ``same`` for the guard that ``Placed.guard`` adds. The guard reads the property at each call of compiled code."""

    def __init__(self, fingerprint: Fingerprint) -> None:
        self._fingerprint = weakref.ref(fingerprint)

    @property
    def same(self) -> bool:
        fingerprint = self._fingerprint()
        return fingerprint is not None and fingerprint.same()


def _unpickled(
    options: InPlaceOptions, strengths: Mapping[str, float], state: Mapping[str, Any], chosen: Mapping[str, Mapping[str, float]],
    unsettled: bool = False, awaited: Collection[tuple[str, str]] = (),
) -> Placed:  # fmt: skip
    """Make the state of an unpickled model. Its tensors are on the CPU until the model moves.

    ``strengths`` and ``unsettled`` are those of earlier versions; ``chosen`` has all that was set.
    """
    session = SharedSession(options.regularizers, GrowingStreams(state["seeds"], torch.device("cpu")), options.own_dropout)
    placed = Placed(options, session)
    session.take_strengths(chosen, awaited)
    session.load(state)
    return placed
