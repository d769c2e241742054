"""``Backend``, the object that ``graphreg.backend`` returns: it rewrites each graph that Dynamo captures of a model, and runs the graph.

Dynamo may break a model into several graphs. These are treated as one model: a site has one name in all graphs of a call, a penalty is
computed over its sites in all graphs, and each noise stream counts its draws across the graphs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphreg.dynamo_backend.all_graphs import backend_report, check_selectors, for_compiled, union
from graphreg.dynamo_backend.capture_place import Functions, is_training, place_of, root_of, same_model, without_wrappers
from graphreg.dynamo_backend.guards import Watched, guard
from graphreg.dynamo_backend.model_call import Call, Measurer
from graphreg.dynamo_backend.strengths import CallStrengths
from graphreg.dynamo_backend.subgraph import Inner, Maker, Subgraph
from graphreg.errors import GraphRegError, RegularizerError, RenamedAttributes, TraceError, raising
from graphreg.ir.module_record import RULES
from graphreg.ir.selector import Missing
from graphreg.planning.matching import check_count, check_sites, check_trainable, matching_sites
from graphreg.planning.native_dropout import OwnDropout, rates_are_scheduled
from graphreg.planning.plan import Plan, named_once
from graphreg.planning.plan import plan as planned
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.regularizer.by_depth import ByDepth
from graphreg.reporting.records import Report
from graphreg.runtime.attach import Penalties, Scale
from graphreg.runtime.build_record import Asked, written_scale
from graphreg.session.controls import strengths_now
from graphreg.session.hosts import BackendHost
from graphreg.session.session import Session
from graphreg.session.streams import CallClock, CountedStreams
from graphreg.torch_internals.autograd import in_backward
from graphreg.torch_internals.dynamo import CompiledCall, compiled_call, splits_for_ddp, strict_limit, translator
from graphreg.torch_internals.modules import modules_in_wrappers
from graphreg.tracing.fake_inputs import arguments
from graphreg.tracing.proof.proof import Claim, Proving, prove
from graphreg.tracing.trace import Traced
from graphreg.verification.copies import copied_model

OTHERS = "graphreg.regularize or graphreg.regularize_"  # to use instead, for messages


class Backend(BackendHost, RenamedAttributes):
    """A backend of torch.compile for one model, as ``graphreg.backend`` returns it.

    Attributes:
        regularizers: The regularizers by name.
        model: The model without its wrappers (see ``unwrapped``); None until its first graph is captured.
        subgraphs: A ``Subgraph`` for each captured graph, in the order of capture.
        runs: How many times one of them has run.
    """

    __name__ = "graphreg"
    renamed: ClassVar[Mapping[str, str]] = {"parts": "subgraphs"}

    def __init__(
        self, regularizers: Mapping[str, Regularizer], seed: int, inner: Inner, missing: Missing, penalties: Penalties,
        scale: Scale | None, own_dropout: OwnDropout, prove: bool,
    ) -> None:  # fmt: skip
        self.regularizers, self.inner, self.missing, self.own_dropout = dict(regularizers), inner, missing, own_dropout
        self.proves, self._claims = prove, dict[int, Claim]()  # for a graph that has not run yet, by its number: what its first run proves
        # These draw from a seed of their own, not from the backend's.
        own = {name: r.rng for name, r in self.regularizers.items() if isinstance(r, Splice) and r.rng is not None}
        self.streams, self.clock = CountedStreams(seed, own), CallClock()
        self.session = session = Session(self.regularizers, self.streams)
        # A selector of set_strength may match a site of a graph that is captured later.
        session.keeps_selectors = True
        session.clock, session.attaches, session.scale = self.clock, penalties == "attach", scale
        session.asked = Asked(self.regularizers, {}, None, missing, own_dropout, penalties, written_scale(scale))
        self.model: nn.Module | None = None
        self._root: nn.Module | None = None  # the model that was compiled, with its wrappers
        self._wrappers: dict[int, str] = {}  # from the id of a wrapper to the path of the module in it
        self.title = ""
        self.subgraphs: list[Subgraph] = []
        self.runs = 0
        _refuse_impossible(self.regularizers, own_dropout)
        self._strengths: tuple[int, CallStrengths] | None = None  # those of every call that has no schedule, and the changes before them
        self._measurers: dict[str, Measurer] = {}
        self._maker: Maker | None = None
        self._contexts: list[Any] = []  # torch.compile's context objects that call _begin at each call
        self._call: Call | None = None
        self.last: dict[str, Tensor] | None = None  # the penalties of the last call
        self._apart = False  # whether the user was warned that backward from some output misses the attached penalties

    # called by torch.compile

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """Compile a graph that Dynamo captured. Return the function that runs it.

        A GraphRegError is raised when that function is called. If it were raised here, Dynamo would wrap it in an error of its own.
        """
        try:
            if options:
                raise RegularizerError(
                    f"torch.compile was given {', '.join(options)} beside graphreg's backend, which takes no options. "
                    "Options of the inner backend go to graphreg.backend(options=...)."
                )
            if splits_for_ddp():
                raise TraceError(
                    "torch._dynamo.config.optimize_ddp is on, so torch splits the graph of a model in DistributedDataParallel where a "
                    "bucket of gradients is full, and the parts do not tell which of their inputs are parameters. Set "
                    "torch._dynamo.config.optimize_ddp = False before the first call, or compile what graphreg.regularize returns."
                )
            with for_compiled():
                return self._compiled(gm, inputs)
        except GraphRegError as error:
            return raising(error)

    def _compiled(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        tracing = translator()
        call = self._current()
        assert self.model is not None and self._maker is not None
        # The code may be a method of a wrapper, which stands for the module in it.
        paths = self._wrappers | self._maker.paths()
        place = place_of(gm, tracing, self.model, paths)
        subgraph = self._maker.made(len(self.subgraphs) + 1, gm, inputs, place, call, self.session)
        # If a local variable holds the module, the guard is on that variable, and no path is
        # needed.
        guard(tracing, place, Watched(list(subgraph.owners), self._noise_state, paths if place.local is None else None))
        self.subgraphs.append(subgraph)
        if self.proves and subgraph.emitted is not None:
            traced = subgraph.traced
            self._claims[subgraph.number] = Claim(self.model, traced.graphs, traced.constants, {}, traced.front_end, gm)
        return lambda *values: self._run(subgraph, values)

    def _noise_state(self) -> bool | None:
        return self.session.noise.state

    # the beginning and the end of a call

    def _current(self) -> Call:
        """Return the running call of the model.

        torch.compile makes a context object for each model that it compiles, and the backend learns of a model only when the model's first
        graph is captured. So at the first call through a context object, this method runs ``_begin``, and has the context object run it at
        the beginning of each later call.
        """
        running = compiled_call()
        if running is None:
            raise TraceError(
                "graphreg's backend was called outside of a call of a compiled model, so it does not know the model. "
                "Compile with torch.compile(model, backend=graphreg.backend(...)) and call what that returns."
            )
        if not any(known is running.record for known in self._contexts):
            self._meet(running)
            running.at_each_call(self._begin)
            self._contexts.append(running.record)
        assert self._call is not None
        return self._call

    def _meet(self, running: CompiledCall) -> None:
        model = root_of(running)
        if self.model is None:
            self._adopt(model)
        elif self._root is not None and not same_model(model, self._root):
            raise GraphRegError(
                f"this backend regularizes {self.title} already, and one backend is for one model: its noise, its penalties and its "
                f"report are that model's. Make another backend for {type(model).__name__} with graphreg.backend."
            )

    def _adopt(self, root: nn.Module) -> None:
        model = without_wrappers(root)
        if getattr(model, RULES, None) is not None:
            raise TraceError("this model is rewritten already. Compile it with another backend, or compile what graphreg.strip returns.")
        # The model's parameters are known before any graph: what penalties on them select is
        # checked here.
        traced = Traced.untraced(model)
        title = model.title if isinstance(model, Functions) else traced.title
        penalties = {name: r for name, r in self.regularizers.items() if isinstance(r, Penalty) and r.on == "parameters"}
        weights = {name: list(matching_sites(traced, penalty, self.missing)) for name, penalty in penalties.items()}
        for name, sites in weights.items():
            check_sites(penalties[name], sites)
            check_count(penalties[name], sites)
            check_trainable(traced, penalties[name], sites)
        self._measurers = {
            name: Measurer(r, name, [site.name for site in weights.get(name, ())])
            for name, r in self.regularizers.items()
            if isinstance(r, Penalty)
        }
        # The session's rows get the parameters, so that set_strength finds them before the first
        # graph.
        CallStrengths(self.session.strengths, 0).learn((name, site) for name, sites in weights.items() for site in sites)
        self.model, self.title, self._root = model, title, root
        self._wrappers = {id(wrapper): path for path, _, wrappers in modules_in_wrappers(root) for wrapper in wrappers}
        # the graphs have no clock: a scheduled strength is an input, like any other strength
        acting = {n: dataclasses.replace(r, weight=float(r.weight)) for n, r in self.regularizers.items() if n not in penalties}
        self._maker = Maker(model, acting, self.own_dropout, self.inner, title)

    def _begin(self) -> Callable[[], None]:
        assert self.model is not None
        session, end_streams = self.session, self.streams.begin()
        number, end_clock = self.clock.begin(is_training(self.model) and session.noise.state is None)
        strengths = self._strengths_at(number)
        off = session.penalties.state is False
        outer, self._call = self._call, Call(self.model, strengths, self._measurers, session.attaches, session.scale, off)
        self.last = None
        # The call may run while the caller handles an exception: only another one than that is the
        # call's.
        call, before = self._call, sys.exc_info()[1]
        strict = strict_limit()  # without it, Dynamo would run code in eager at its recompile limit, without the regularizers
        strict.__enter__()

        def end() -> None:
            strict.__exit__(None, None, None)
            self._call = outer
            finished = False
            try:
                if sys.exc_info()[1] is before:  # the call has not failed
                    self._end(call)
                    finished = True
            finally:
                end_streams(finished)
                end_clock(finished)
                call.joins.end()

        return end

    def _strengths_at(self, call: int) -> CallStrengths:
        rows = self.session.strengths
        if any(row.is_scheduled for row in rows.values()):
            return CallStrengths(rows, call)
        if self._strengths is None or self._strengths[0] != self.session.changes:
            self._strengths = self.session.changes, CallStrengths(rows, call)
        return self._strengths[1]

    def _end(self, call: Call) -> None:
        self.last = call.totals()
        # Graphs came in since the last look, so selectors are compared with the sites of all
        # graphs.
        if not self.session.complete:
            with for_compiled():
                check_selectors(self.subgraphs, self.regularizers, self.own_dropout, self.missing)
                with self.session.unchanged_unless_done():
                    self.session.settle(self.missing, lambda row, selector: f"set_strength: {row.no_site(selector)}")
                    call.check()
        # Only torch's frame has what the call returns: an output may have come through no graph.
        found = compiled_call() if self.session.attaches and not self._apart else None
        if found is not None:
            self._apart = call.check_joined(found.result)

    # running a graph

    def _run(self, subgraph: Subgraph, values: Sequence[Any]) -> Any:
        call = self._call if self._call is not None else self._current()
        self._require_runnable(subgraph)
        self.runs += 1
        if (claim := self._claims.get(subgraph.number)) is not None:
            mode = "train" if is_training(call.model) else "eval"
            prove(claim, (tuple(values), {}), Proving((mode,), at_call=True))
            del self._claims[subgraph.number]
        extra, counts = subgraph.parameters(call.model)
        results = subgraph.run(*values, *self._added(subgraph, call), *extra)
        outputs = call.taken(results, subgraph.measured, subgraph.weighed, counts, values)
        self._ran(subgraph, call, outputs)
        return outputs

    def _require_runnable(self, subgraph: Subgraph) -> None:
        """Raise GraphRegError if a mode changed without a new capture, or if a graph with noise or a schedule runs inside a backward pass.

        Activation checkpointing runs a forward again in a backward pass. The second forward would have other masks and other strengths than
        the first, except in a block of ``frozen_noise``.
        """
        if any(owner.training != mode for owner, mode in zip(subgraph.owners, subgraph.modes, strict=True)):
            raise GraphRegError(
                "the mode of a module changed and torch.compile did not capture its graph again. Call torch.compiler.reset(): then the "
                "next call captures it."
            )
        scheduled = subgraph.emitted is not None and any(self.session.strengths[name].is_scheduled for name in subgraph.emitted.strengths)
        if scheduled and not self.streams.is_frozen and in_backward():
            raise GraphRegError(
                "a graph with scheduled strengths runs inside a backward pass, and the clock has moved on since the forward: activation "
                "checkpointing around it would compute with the strengths of another call. Put forward and backward under "
                "graphreg.frozen_noise(backend), or checkpoint inside what is compiled."
            )
        if any(subgraph.draws) and not self.streams.is_frozen and in_backward():
            raise GraphRegError(
                "a graph that draws masks runs inside a backward pass: activation checkpointing around it would draw other masks than "
                "the forward did. Put forward and backward under graphreg.frozen_noise(backend), or checkpoint inside what is compiled."
            )

    def _added(self, subgraph: Subgraph, call: Call) -> Iterator[Tensor]:
        if subgraph.emitted is None or subgraph.device is None:
            return
        if subgraph.emitted.draws:
            yield self.streams.keys(subgraph.rows, subgraph.draws, subgraph.device)
        for name in subgraph.emitted.strengths:
            yield call.strengths.tensor(name, subgraph.places[name], subgraph.device)

    def _ran(self, subgraph: Subgraph, call: Call, outputs: Sequence[Any]) -> None:
        call.names.update(dict.fromkeys(subgraph.claimed))
        # A graph after a break gets the value as an input, and must not act on it once more.
        for edit in subgraph.plan.edits:
            for site in edit.sites:
                call.acted.add((edit.name, site.name))
                call.occurrences[site.name, type(edit.regularizer)] += 1
        for place, known in subgraph.gives.items():
            if isinstance(outputs[place], Tensor):
                call.made[outputs[place]] = known

    # called by users

    def penalties(self) -> dict[str, Tensor]:
        """Return the penalties of the last call by name, 0-d and already multiplied by their strengths.

        A penalty covers its sites in all graphs of the call. The penalties can be differentiated, except with ``penalties="attach"``.

        Raises:
            GraphRegError: No call has ended yet.
        """
        if self.last is None:
            raise GraphRegError(
                "there are no penalties yet: penalties() returns those of the last call of the model that was compiled with this backend, "
                "and no call has ended, or none had a graph. Call the compiled model first, and read the penalties after that call."
            )
        return dict(self.last)

    def report(self) -> Report:
        """Report what acts in the graphs captured so far: see ``graphreg.report``."""
        given = {name: row.others for name, row in self.session.strengths.items()}
        return backend_report(self.title, self.subgraphs, self.regularizers, strengths_now(self), given)

    def traced(self) -> Traced:
        if not self.subgraphs:
            raise GraphRegError(
                "this backend has captured no graph yet: torch.compile captures them at calls. Call the compiled model once, or give "
                "graphreg.names the model itself, backend=graphreg.backend() and example_inputs."
            )
        return union(self.subgraphs)

    def traced_on(self, model: nn.Module, example_inputs: Any) -> Traced:
        """Return the sites of the graphs that Dynamo captures in one call of a copy of a model, in the mode in which the model is."""
        call = arguments(example_inputs)
        if call is None:
            raise GraphRegError("torch.compile captures graphs at calls, so backend= needs example_inputs, the arguments of one call.")
        # It adds nothing, and runs each graph as it is: only the names of the sites are wanted.
        watcher = Backend({}, 0, lambda graph, inputs: graph, "ignore", "return", None, "keep", prove=False)
        compiled = torch.compile(copied_model(without_wrappers(model)), backend=watcher)
        with torch.random.fork_rng():
            compiled(*call[0], **call[1])
        return watcher.traced()

    def planned(self, regularizers: Sequence[Regularizer], missing: Missing, own_dropout: OwnDropout) -> Plan:
        # Asked about no regularizers, it plans its own.
        if not regularizers and own_dropout == "keep":
            regularizers = [dataclasses.replace(each, name=name) for name, each in self.regularizers.items()]
            missing, own_dropout = self.missing, self.own_dropout
        _refuse_impossible(named_once(regularizers), own_dropout)
        with for_compiled():
            return dataclasses.replace(planned(self.traced(), regularizers, missing, own_dropout), traced=None)


def _refuse_impossible(regularizers: Mapping[str, Regularizer], own_dropout: OwnDropout) -> None:
    """Raise RegularizerError for what a backend cannot do, because it sees one graph at a time and not the whole model."""
    for name, regularizer in regularizers.items():
        if regularizer.takes_vjp:
            raise RegularizerError(
                f"{name}: {type(regularizer).__name__} differentiates the whole forward, and a backend sees one graph of it at a time. "
                "Use graphreg.regularize(model, ...), whose graph is the whole forward."
            )
        if "state" in regularizer.takes:
            raise RegularizerError(
                f"{type(regularizer).__name__} keeps a state from call to call, and a backend's graphs keep none. Compile what "
                "graphreg.regularize returns instead."
            )
        if regularizer.by_prox:
            raise RegularizerError(
                f"{name}: by='prox' is not possible in a backend, because graphreg.prox_ takes a regularized module. Use {OTHERS}."
            )
        if isinstance(regularizer.weight, ByDepth):
            raise RegularizerError(
                f"{name}: {regularizer.strength_option}={regularizer.weight!r} is not allowed in a backend, which sees one graph at a time "
                f"and not the order of all blocks. Give a number, or use {OTHERS}."
            )
        if {"module_input", "previous"}.intersection(regularizer.takes):
            kind = type(regularizer).__name__
            raise RegularizerError(f"{name}: {kind} is not possible in a backend: a graph may be a part of a module. Use {OTHERS}.")
        if regularizer.model_inputs and isinstance(regularizer, Penalty) and regularizer.on == "parameters":
            option, of = next(iter(regularizer.model_inputs.items()))
            raise RegularizerError(
                f"{name}: {option}={of!r} is not possible in a backend, which computes penalties on parameters whichever inputs the graphs "
                f"have. Use {OTHERS}."
            )
    if rates_are_scheduled(own_dropout):
        raise RegularizerError(
            f"own_dropout={own_dropout!r} is not allowed in a backend, where the rates of native dropout are fixed. Give numbers, or "
            f"use {OTHERS}."
        )
