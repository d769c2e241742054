"""``prove`` runs a traced graph and the model's own forward on the inputs at hand, and raises unless both give the same.

A trace replaces tensors by stand-ins, and the forward may ask a stand-in something that it answers
wrongly. Then the graph is another function than the model. No list of such questions is complete,
so the graph is compared with the model itself before it is used.

Both run on the model's parameters and on copies of everything else that they may write into, from
equal random states. What they change (buffers, attributes, containers, generators, parameters) is
put back. The user's hooks do not run.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from graphreg.errors import OtherInputs, TraceError, first_line
from graphreg.ir.module_record import ORIGINAL, RESTS
from graphreg.ir.train_eval import ModeGraphs, why_not_in_eval
from graphreg.torch_internals import pytree
from graphreg.torch_internals.autograd import storage_number
from graphreg.torch_internals.distributed import communicates, is_distributed
from graphreg.torch_internals.fake_tensors import is_fake
from graphreg.torch_internals.functorch import leaving_no_level
from graphreg.torch_internals.modules import (
    CALL_HOOKS,
    buffers_by_name,
    collecting_hooks,
    has_users_global_hook,
    modules_by_path,
    own_hooks,
    parameters_by_name,
    put_global_hooks_aside,
)
from graphreg.torch_internals.operators import schema_of
from graphreg.torch_internals.patching import Changes, raise_interrupt
from graphreg.torch_internals.random_state import regions
from graphreg.torch_internals.torch_modes import TorchDispatchMode, uncompiled
from graphreg.tracing.fake_inputs import Arguments
from graphreg.tracing.proof.copies import copied_call, tensor_copies
from graphreg.tracing.proof.first_difference import GraphRun, culprit, steps_of_graph, steps_of_model
from graphreg.tracing.proof.other_sizes import other_sizes
from graphreg.tracing.proof.surroundings import Generators, comparable_state
from graphreg.tracing.proof.values import NO_GRADIENT, detached_copy, difference, leaves_with_places
from graphreg.tracing.reads import not_recorded
from graphreg.tracing.side_effects.reachable_state import is_foreign_class
from graphreg.tracing.side_effects.retrace import StatefulForward, model_restored
from graphreg.tracing.side_effects.snapshot import Snapshot
from graphreg.tracing.train_eval_graphs import modes_set

MODES = ("train", "eval")
NO_INPUTS = "no eager call with inputs has been seen yet"
TRACED = "its calls so far ran within a tracer or a transform"
NO_VALUES = "the model or its inputs have no values (device meta)"
PROVABLE = frozenset((NO_INPUTS, TRACED, NO_VALUES))  # the reasons that a later call removes
NOT_ASKED = "prove=False"
_RANDOM_STATE = "the state of torch's random generator after the call"
_AUTOCAST = (torch.bfloat16, torch.float16)  # all dtypes that torch.autocast takes, but for float32 on CUDA
MODEL_RAISES = "the model itself raises "  # and the error
COMMUNICATES = "its forward communicates with other ranks, and one rank cannot know whether the others prove it, too"

CURE = (
    "Move that step into a function at the top of its file that is marked with torch.fx.wrap, which the graph calls as a whole; or use the "
    "backend, which regularizes a model graph by graph: torch.compile(model, backend=graphreg.backend(...))."
)
CURE_OF_THE_BACKEND = "Use graphreg.regularize, which does not go by Dynamo's graph."


def proof_key(mode: str, asks_autocast: bool) -> str:
    """Return the key of ``unproved`` for a call in a mode: another one for each dtype of autocast, if the forward depends on that."""
    on = next(filter(None, regions()[2:4]), None) if asks_autocast else None
    return mode if on is None else f"{mode} mode under autocast to {on}"


def proof_keys(mode: str, asks_autocast: bool) -> set[str]:
    """Return all keys of ``unproved`` for calls in a mode."""
    return {mode, *(f"{mode} mode under autocast to {dtype}" for dtype in _AUTOCAST)} if asks_autocast else {mode}


@dataclass(frozen=True)
class Claim:
    """The claim that graphs compute what a model computes.

    Attributes:
        model: The model.
        graphs: The graphs by mode, without additions.
        constants: The tensors that the graphs read and the model does not have, by name.
        specialized: The specialized arguments by name.
        front_end: The front end that made the graphs. Those of torch.export may differ by rounding.
        captured: The graph that Dynamo captured, if the claim is about it and not about the model's
            own forward: its call takes the values of its placeholders.
    """

    model: nn.Module
    graphs: ModeGraphs
    constants: Mapping[str, Tensor]
    specialized: Mapping[str, Any]
    front_end: str
    captured: fx.GraphModule | None = None

    @property
    def title(self) -> str:
        return type(self.model).__name__.removesuffix("Impl")


@dataclass(frozen=True)
class Proving:
    """How a trace is to be proved.

    Attributes:
        modes: The modes to prove.
        asked: Whether to prove at all.
        eval_runs: Whether the graph runs in eval mode. If not, as in place, a trace of train mode is enough.
        around: Opens the block in which both run, for example with the autocast of the caller.
        at_call: Whether a call of the module is running. Other ranks may then not prove their
            graphs now, so nothing may communicate.
    """

    modes: Sequence[str] = MODES
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    at_call: bool = False
    asked: bool = True
    eval_runs: bool = True


class NotTheModel(TraceError):
    """A graph does not compute what the model computes."""


def prove(claim: Claim, call: Arguments, proving: Proving, earlier: Snapshot | None = None) -> dict[str, str]:
    """Prove a claim on the arguments of a call. ``earlier``: as in ``model_restored``.

    Returns:
        For each mode that could not be proved, the reason.

    Raises:
        NotTheModel: A graph does not give what the model gives.
        StatefulForward: It does not give what the model gives at its next call.
    """
    if reason := _unprovable(claim, call):
        return dict.fromkeys(proving.modes, reason)
    reasons = {}
    # the snapshot is taken within ``around``, since each run begins in torch's state of that time
    with uncompiled(), comparable_state(claim.model) as generators, proving.around(), model_restored(claim.model, earlier) as before:
        if before.irreversible:
            return dict.fromkeys(proving.modes, f"its forward changes {next(iter(before.irreversible))}, which cannot be put back")
        for mode in proving.modes:
            trial = _Trial(claim, mode, call, before, generators, proving.at_call)
            if reason := (mode == "eval" and why_not_in_eval(claim.graphs)) or trial.run():
                reasons[mode] = reason
            elif proving.eval_runs:  # in place, the model is traced again when it has changed
                trial.require_same_after_switches()
        before.nothing_ran()  # since each run put back what it had changed
    return reasons


def accepts(claim: Claim, call: Arguments, proving: Proving) -> bool:
    """Return whether the graphs run on the arguments of a call, so that none of their assertions fails. Where that cannot be tried: True.

    Like a proof, this puts back what the graphs change.
    """
    if _unprovable(claim, call):
        return True
    with uncompiled(), comparable_state(claim.model) as generators, proving.around(), model_restored(claim.model) as before:
        return all(_Trial(claim, mode, call, before, generators, proving.at_call).accepts() for mode in proving.modes)


def _unprovable(claim: Claim, call: Arguments) -> str:
    """Return why a claim cannot be proved; ``""`` if it can be tried."""
    model = claim.model
    if has_users_global_hook():
        return "hooks are registered for all modules, and a proof would run them once more"
    if claim.captured is None and (hooked := _hooked_and_opened(claim)):
        return f"{hooked} has a hook, which is part of the graph, and a proof would run it once more"
    given = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    owned = [*parameters_by_name(model).values(), *buffers_by_name(model).values()]
    if any(tensor.device.type == "meta" or is_fake(tensor) for tensor in (*owned, *given)):
        return NO_VALUES
    if any(map(is_distributed, owned)):
        return "its parameters are spread over ranks (DTensor)"
    return ""


def _hooked_and_opened(claim: Claim) -> str:
    """Return the path of a module whose hooks the graph contains, because the graph does not call the module; ``""`` if there is none."""
    called = tuple(f"{node.target}." for graph in claim.graphs.values() for node in graph.nodes if node.op == "call_module")
    paths: dict[nn.Module, list[str]] = {}
    for path, module in modules_by_path(claim.model).items():
        paths.setdefault(module, []).append(path)
    for module, names in paths.items():
        # a module runs its own hooks if the graph calls it, or a module around it, as a whole
        is_called = any(f"{path}.".startswith(called) for path in names)
        if not is_called and any(own_hooks(vars(module)[name]) for name in CALL_HOOKS if name in vars(module)):
            return names[0] or f"the whole {claim.title}"
    return ""


_OWN_SWITCH = (
    "A train() or eval() of the model's own sets what its forward reads, and a graph cannot follow that. graphreg.regularize_ traces the "
    "model anew when it has changed."
)
_BUFFER = "the buffer "
_ATTRIBUTE = "the attribute "
_ATTEMPTS = 4
# by place: the dict that holds a tensor, its key there, and the tensor
TensorPlaces = dict[str, tuple[dict[str, Any], str, Tensor]]
Forward = Callable[[Arguments], Any]
# what is done with the state that a call has left, before the next call
Between = Callable[[Snapshot], Any]


def _parameters_moved(before: Snapshot) -> None:
    """Change all parameters, as a step of an optimizer does: each element by another factor, so that their order changes, too."""
    for data in (place.data for place in before.parameters):
        if data.is_floating_point() and data.layout is torch.strided and not is_distributed(data):
            data.mul_(torch.linspace(0.25, 1.75, data.numel(), dtype=data.dtype, device=data.device).reshape(data.shape)).add_(0.0078125)


_COUNTERS: tuple[Between, ...] = (Snapshot.note, Snapshot.mark_counters)


@dataclass
class Run:
    """What a forward gave: its output, and what it wrote into arguments, buffers, attributes and parameters, by place.

    ``left``: for the model itself, the names of other state that it left changed.
    """

    values: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    error: Exception | None = None


class _Communicates(Exception):
    """Raised in place of a collective operation."""


def _is_written(argument: Any) -> bool:
    """Return whether an operator may write into an argument. The schemas of batch norms leave that out."""
    return (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in ("running_mean", "running_var")


class _WriteWatch(TorchDispatchMode):
    """Saves each watched tensor before an operation first writes into it, so that it can be put back. Refuses collectives if asked."""

    supports_higher_order_operators = True
    # for each operator: "" if it only computes, "writes", or "communicates"
    _kinds: dict[Any, str] = {}

    def __init__(self, watched: Mapping[str, Tensor], alone: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # by name: the tensor, and its content before the run
        self.saved: dict[str, tuple[Tensor, Tensor]] = {}
        self._alone, self._names = alone, dict[int, str]()
        for name, tensor in watched.items():
            # by storage, because an operation may write into a view of a parameter
            if tensor.layout is torch.strided and not is_distributed(tensor):
                self._names.setdefault(storage_number(tensor), name)
        self._watched = watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self._kinds.get(func)
        if kind is None:
            schema = schema_of(func)
            writes = schema is not None and (schema.is_mutable or any(map(_is_written, schema.arguments)))
            kind = "communicates" if communicates(func) else "writes" if writes else ""
            self._kinds[func] = kind
        if kind == "writes":
            self._save(func, args, kwargs or {})
        elif kind == "communicates" and self._alone:
            raise _Communicates
        return func(*args, **(kwargs or {}))

    def _save(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        for i, argument in enumerate(schema_of(func).arguments):
            if not _is_written(argument):
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in pytree.tree_leaves(value):
                if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                    continue
                name = self._names.get(storage_number(tensor))
                if name is not None and name not in self.saved:
                    watched = self._watched[name]
                    self.saved[name] = watched, watched.detach().clone()

    def put_back(self) -> dict[str, Tensor]:
        """Put the tensors back, and return by name what had been written into them."""
        written = {}
        for name, (tensor, before) in self.saved.items():
            if not torch.equal(tensor.detach(), before):
                written[name] = tensor.detach().clone()
                # by ``.data``, so that autograd does not count this as one more write
                tensor.data.copy_(before)
        return written


class _Trial:
    """Runs the model and its graph in one mode, one after the other, from the same state."""

    def __init__(self, claim: Claim, mode: str, call: Arguments, before: Snapshot, generators: Generators, alone: bool) -> None:
        self.claim, self.mode, self.call, self.before, self.generators, self.alone = claim, mode, call, before, generators, alone
        self.near = claim.front_end == "export"
        self.graph = claim.graphs.get("both") or claim.graphs[mode]
        model: nn.Module = claim.model
        # whether a method of the model's own switches to this mode, which may set more than ``training``
        own = any(type(each).train is not nn.Module.train or type(each).eval is not nn.Module.eval for each in model.modules())
        self._own_switch = own
        self._switches = own and model.training != (mode == "train")
        # whether the forward reads what autograd has saved, because it computes gradients itself
        self._takes_apart = False

    def run(self) -> str:
        """Compare the two. Return why that is not possible, or ``""``. Raise NotTheModel or StatefulForward if they differ."""
        theirs = self._ran(self._call_model)
        if isinstance(theirs.error, _Communicates):
            return COMMUNICATES
        if theirs.error is not None:
            return MODEL_RAISES + first_line(theirs.error)

        ours = self._ran(self._run_graph)
        if any(isinstance(value, Tensor) and is_fake(value) for value in (*theirs.values.values(), *ours.values.values())):
            raise NotTheModel(
                f"{self.claim.title} cannot be traced: its forward keeps a tensor where no name in its code leads to, and a trace has left "
                "one without values there. Make the tensor a buffer (register_buffer) that is changed in place, and make the model anew."
            )
        if not (what := _differing(theirs, ours, self.near)):
            # the graph calls these opaque modules, which find at the next call what they left themselves
            paths = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
            called = tuple(f"self.{path}." for path in paths if not is_foreign_class(type(self.claim.model.get_submodule(path))))
            if left := [name for name in theirs.left if not f"{name}.".startswith(called)]:
                self._require_next_call(left, called)
                self._require_other_calls(left)
            return ""

        # They differ. That is a fault of the trace unless the model differs from itself from run to run.
        reason = f"on these inputs, in {self.mode} mode, its graph does not give the model's result ({what})."
        cause = "The forward does something that a trace cannot follow."
        same, unlike = list[bool](), ""
        # other threads may draw from the same generators meanwhile, so a difference counts if it
        # stays the same
        for _ in range(_ATTEMPTS):
            again, ours_again = self._ran(self._call_model), self._ran(self._run_graph)
            same.append(not _differing(again, ours_again, self.near))
            unlike, moved = _differing(theirs, again, False), _differing(ours, ours_again, False)
            if same[-1] and moved:  # the graph follows what changed
                return ""
            if unlike and not same[-1] and not _differing(theirs, ours, True):
                return f"from run to run, {unlike}, so the graph was compared within rounding"
            # the model gives the same again, and so does the graph: the difference is here to stay
            if not unlike and (ours_again.error is not None or not moved):
                break

        # only the first comparison failed, as it does if another thread has drawn meanwhile
        if all(same):
            return ""
        if unlike and _differing(theirs, again, True):
            if ours.error is None and moved:
                return f"the model is not the same from run to run: {unlike}"
            reason = f"in {self.mode} mode, its result is another one from run to run ({unlike}), and that of its graph is not."
            cause = "The forward reads what changes at each call and no name in its code leads to, such as a file or os.environ."
        if what.endswith(NO_GRADIENT):
            cause = "Something in the model cuts the gradient, such as checkpoint(use_reentrant=True) whose inputs need none (use False)."
        if self._switches:
            cause = _OWN_SWITCH
        if what.startswith(_RANDOM_STATE):
            cause = "The forward draws within torch.random.fork_rng(), or sets the generator back itself."
        kind = type(self.claim.model)
        kind = getattr(kind, ORIGINAL, getattr(kind, RESTS, kind))
        if kind.__call__ is not nn.Module.__call__ and not isinstance(self.claim.model, fx.GraphModule):
            cause = f"{self.claim.title} has a __call__ of its own, which no graph has: do in the forward what it does."

        how = "by torch.export" if self.near else "symbolically"
        raise NotTheModel(
            f"{self.claim.title} cannot be traced {how}: {reason}{self._first_difference()} {cause} "
            f"{CURE if self.claim.captured is None else CURE_OF_THE_BACKEND}"
        ) from ours.error

    def require_same_after_switches(self) -> None:
        """Raise NotTheModel if the graph does not follow what the model's own ``train()`` and ``eval()`` change, as a count of epochs."""
        if not self._own_switch:
            return
        model: nn.Module = self.claim.model

        def switch(before: Snapshot) -> None:
            for mode in (self.mode != "train", self.mode == "train"):
                model.train(mode)

        with modes_set({module: module.training for module in model.modules()}, lambda module: module.training):
            idle, alone = self._ran(lambda call: None), self._ran(lambda call: switch(self.before))
            if not alone.left and not _differing(idle, alone, False):
                return  # the methods set the mode alone, as those of transformers do
            theirs, ours = (self._ran(forward, (self.call, self.call), [switch]) for forward in (self._call_model, self._run_graph))
        if theirs.error is None and (what := _differing(theirs, ours, True)):
            raise NotTheModel(f"{self.claim.title} cannot be traced: {what} after eval() and train(). {_OWN_SWITCH}")

    def accepts(self) -> bool:
        """Return whether the graph runs without an error. If it communicates with other ranks, it is not tried."""
        error = self._ran(self._run_graph).error
        return error is None or isinstance(error, _Communicates)

    def _require_next_call(self, left: Sequence[str], called: tuple[str, ...]) -> None:
        """Raise StatefulForward if the model gives another result than its graph in a call after another one.

        The second call is tried with stand-ins for what the first one ``left``: if nothing reads them, there is no difference. Otherwise
        it is tried with equal inputs, with other parameters (as after a step of an optimizer), with inputs of other sizes, and after a
        third call with stand-ins for what each call changes: it may decide something later. ``called``: the beginnings of the names of what
        opaque modules keep.
        """
        near, twice = True, (self.call, self.call)
        hidden, ours = self._ran(self._call_model, twice, [lambda left: left.hide(called)]), self._ran(self._run_graph, twice)
        if hidden.error is None and not _differing(hidden, ours, near):
            return

        sequences: list[tuple[Sequence[Arguments], Sequence[Between]]] = [
            (twice, ()), (twice, [_parameters_moved]), ((*twice, self.call), _COUNTERS),
        ]  # fmt: skip
        # with several items more if one more takes another branch
        for one, several in zip(other_sizes(self.call), other_sizes(self.call, 4), strict=True):
            takes = not isinstance(self._ran(self._run_graph, (one,)).error, OtherInputs)
            other = one if takes else several
            sequences += [((self.call, other), ()), ((other, self.call), ())]
        for calls, between in sequences:
            theirs, ours = self._ran(self._call_model, calls, between), self._ran(self._run_graph, calls, between)
            # the model does not take such inputs, or code that the graph calls decides by the stand-ins; or another graph would run
            if (theirs.error is not None and (ours.error is not None or not between)) or isinstance(ours.error, OtherInputs):
                continue
            what = _differing(theirs, ours, near)
            if not what and theirs.error is None:
                continue
            again = self._ran(self._call_model, calls, between)
            if theirs.error is not None and again.error is not None:
                raise StatefulForward.of(self.claim.model, left, {}, f" ({first_line(theirs.error)})")
            if what and not _differing(theirs, again, near):
                raise StatefulForward.of(self.claim.model, left, {}, f" ({what})")

    def _require_other_calls(self, left: Sequence[str]) -> None:
        """Raise StatefulForward if the model's call of another kind gives another result after the graph's call than after its own.

        The graph does not leave all that the model has ``left``. The other call is in the other mode, after a step of an optimizer; or it
        lacks an optional argument, or some items.
        """
        model: nn.Module = self.claim.model
        other_mode = "eval" if self.mode == "train" else "train"

        def step(before: Snapshot) -> None:
            model.train(other_mode == "train")
            _parameters_moved(before)

        tried: list[tuple[str, Arguments, Sequence[Between]]] = [(f"in {other_mode} mode", self.call, [step])]
        tried += [(f"without {name}", call, ()) for name, call in _without_options(model, self.call)]
        tried += [("with fewer items", call, ()) for call in other_sizes(self.call, -1)]
        with modes_set({module: module.training for module in model.modules()}, lambda module: module.training):
            for kind, call, between in tried:
                ran = partial(self._ran, self._call_model, (self.call, call), between)
                theirs, ours = ran(), ran(self._run_graph)
                errors = [first_line(each.error) for each in (theirs, ours) if each.error is not None]
                what = errors[0] if len(errors) == 1 else "" if errors else _differing(_output(theirs), _output(ours), True)
                if what and not _differing(_output(theirs), _output(ran()), True):  # the model gives the same again
                    raise StatefulForward.of(model, left, {}, f" ({kind}: {what})")

    def _call_model(self, call: Arguments) -> Any:
        return (self.claim.captured or self.claim.model)(*call[0], **call[1])

    def _run_graph(self, call: Arguments) -> Any:
        with torch.enable_grad():  # an error in a block of ``torch.no_grad`` would leave gradients off
            return leaving_no_level(GraphRun(self.claim.model, self.graph).on, self._inputs(call))

    def _inputs(self, call: Arguments) -> list[Any]:
        """Return the value of each placeholder of the graph."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        if self.claim.captured is not None:
            given = [node.name for node in self.claim.captured.graph.nodes if node.op == "placeholder"]
            values = dict(zip(given, call[0], strict=True))
            return [values[node.name] for node in placeholders]
        bound = inspect.signature(self.claim.model.forward).bind(*call[0], **call[1])
        bound.apply_defaults()
        known = {**self.claim.specialized, **bound.arguments}
        return [known[str(node.target).lstrip("*")] for node in placeholders]

    def _ran(
        self, forward: Forward, calls: Sequence[Arguments] = (), between: Sequence[Between] = (), first: Forward | None = None
    ) -> Run:
        """Run a forward, and put back what it changed.

        ``calls``: the calls, one after the other, of which the last one counts; by default the one at hand. ``between``: what to do
        before the second call, the third, and so on, with a snapshot from before the first one. ``first``: what runs in place of the
        forward in the first call.
        """
        with not_recorded():
            ran, read_saved = self._ran_once(forward, not self._takes_apart, calls or [self.call], between, first)
            # once more, and autograd keeps what this forward takes from it
            if read_saved:
                self._takes_apart = True
                ran, _ = self._ran_once(forward, False, calls or [self.call], between, first)
        return ran

    def _ran_once(
        self, forward: Forward, forgets: bool, calls: Sequence[Arguments], between: Sequence[Between], first: Forward | None
    ) -> tuple[Run, bool]:
        """Run a forward. ``calls``, ``between``, ``first``: as in ``_ran``.

        ``forgets``: whether autograd keeps nothing for a backward pass, which saves memory. If the
        forward computes gradients itself, it reads what was kept: then the second item of the
        result is True, and the first one is worth nothing.
        """
        ran, read_saved = Run(), list[bool]()
        watch = _WriteWatch(self.before.watched(), self.alone)

        def refuse(nothing: Any) -> Any:
            read_saved.append(True)
            raise RuntimeError("the forward computes gradients itself")

        forgetting = saved_tensors_hooks(lambda tensor: None, refuse) if forgets else nullcontext()
        with self._apart(*calls) as (copies, places):
            before = Snapshot(self.claim.model) if between else self.before
            try:
                with watch, forgetting:
                    if self._switches:  # on parameters, too, so that a branch with a low rank may be merged into them
                        self.claim.model.train() if self.mode == "train" else self.claim.model.eval()
                    for i, call in enumerate(copies):
                        if 0 < i <= len(between):
                            between[i - 1](before)
                        output = (first if first and i == 0 else forward)(call)
                if forward != self._run_graph:
                    ran.left = self._left(places)
                ran.values = {place: detached_copy(leaf) for place, leaf in leaves_with_places(output, "output")}
                for place, leaf in (*leaves_with_places(call[0], "args"), *leaves_with_places(call[1], "kwargs")):
                    if isinstance(leaf, Tensor):
                        ran.values[f"{place} after the call"] = detached_copy(leaf.detach())
                for place, (space, name, copied) in places.items():
                    now = space.get(name) if place.startswith(_BUFFER) else copied
                    ran.values[f"{place} after the call"] = detached_copy(now.detach() if isinstance(now, Tensor) else now)
                    if now is not copied:  # the forward assigned another tensor, and somebody may have the one that was there
                        ran.values[f"the tensor that was {place}"] = detached_copy(copied.detach())
                ran.values[_RANDOM_STATE] = torch.get_rng_state()
                # what is left changed there, the code after the call computes in
                ran.values |= {f"the change of torch's {name}": repr(value) for name, value in self.before.torchs.changed().items()}
            except Exception as error:
                raise_interrupt(error)
                ran.error = error
            finally:
                # after an error, too, since the next run begins with these parameters
                found = watch.put_back()
                for parameter in self.before.parameters:
                    found |= parameter.facts()
                ran.values |= {f"{name} after the call": value for name, value in found.items()}
        return ran, bool(read_saved)

    def _left(self, places: TensorPlaces) -> list[str]:
        """Return the names of the state that a forward has changed: attributes, variables and containers, but not what it wrote into."""
        if self.claim.captured is not None:  # Dynamo's graph does not change any
            return []
        own = {f"self.{place.removeprefix(_ATTRIBUTE)}": space.get(name) is copied for place, (space, name, copied) in places.items()}
        put = {f"self.{name}" for name in self.claim.constants} | own.keys()
        left = self.before.left()
        self.before.nothing_ran()
        return [*(name for name in left if name not in put), *(name for name, same in own.items() if not same)]

    @contextmanager
    def _apart(self, *calls: Arguments) -> Iterator[tuple[list[Arguments], TensorPlaces]]:
        """Open a block in which the model may run: what it changes is put back.

        The context manager yields copies of the arguments of ``calls``, and the model's tensors that it may
        write into, by place.
        """
        model, mode = self.claim.model, self.mode == "train"
        # in the mode that the model has, each submodule keeps its own
        modes = {} if model.training == mode else {module: module.training for module in model.modules()}
        try:
            with modes_set(modes, lambda module: mode), _on_copies(model, self.claim.constants) as (places, copies), _without_hooks(model):
                yield [copied_call(call, copies) for call in calls], places
        finally:
            self.before.restore()
            self.generators.rewind()

    def _first_difference(self) -> str:
        """Return a sentence that names the first node whose value differs, with its line; ``""`` if it cannot be found."""
        try:
            with self._apart(self.call) as ([call], _):
                expected = steps_of_model(self.claim.captured or self.claim.model, call)
            with self._apart(self.call) as ([call], _):
                actual = steps_of_graph(self.claim.model, self.graph, self._inputs(call))
            return culprit(expected, actual, self.graph, self.near)
        except Exception as error:
            # this adds detail to an error: a failure here must not replace that error
            raise_interrupt(error)
            return ""


def _differing(expected: Run, ours: Run, near: bool) -> str:
    """Describe the first difference between two runs; ``""`` if there is none."""
    if ours.error is not None:
        return f"it raises {first_line(ours.error)}, and the model does not"
    for place in {**expected.values, **ours.values}:
        if place not in ours.values or place not in expected.values:
            return f"{place} is {'missing' if place in expected.values else 'there, and not in the model'}"
        if how := difference(expected.values[place], ours.values[place], near):
            return f"{place} {how}"
    return ""


def _output(ran: Run) -> Run:
    """Return a run without what it wrote."""
    return Run({place: value for place, value in ran.values.items() if place.startswith("output") and "after the call" not in place})


def _without_options(model: nn.Module, call: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Yield, for each optional argument of a call, its name and the call without it."""
    given = inspect.signature(model.forward).bind(*call[0], **call[1])
    for name in [*given.arguments]:
        if given.signature.parameters[name].default is not inspect.Parameter.empty:
            arguments = OrderedDict((other, value) for other, value in given.arguments.items() if other != name)
            fewer = inspect.BoundArguments(given.signature, arguments)
            yield name, (fewer.args, fewer.kwargs)


@contextmanager
def _on_copies(model: nn.Module, constants: Mapping[str, Tensor]) -> Iterator[tuple[TensorPlaces, dict[int, Tensor]]]:
    """Within the block, the model has copies of its buffers and tensor attributes, and also the constants of its graph.

    The context manager yields by place where each copy is, and the copy, for the comparison, and
    what stands for each of the model's tensors, by the tensor's id.
    """
    found: list[tuple[dict[str, Any], str, str]] = []  # (dict that holds the tensor, key, place)
    for path, module in modules_by_path(model, once=True).items():
        prefix = f"{path}." if path else ""
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Tensor):
                found.append((module._buffers, name, f"{_BUFFER}{prefix}{name}"))
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                found.append((vars(module), name, f"{_ATTRIBUTE}{prefix}{name}"))
    copies = tensor_copies(space[name] for space, name, _ in found)
    places: TensorPlaces = {}
    with Changes() as changes, changes:
        for name, constant in constants.items():
            changes.put(vars(model), name, constant)
        for space, name, place in found:
            copied = copies[id(space[name])]
            places[place] = space, name, copied
            changes.put(space, name, copied)
        # Parameters stand for themselves: copies would take the memory of the model once more, so
        # ``_WriteWatch`` puts back what is written into them.
        yield places, {**copies, **{id(parameter): parameter for parameter in parameters_by_name(model).values()}}


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Within the block, no module has hooks of the user's: they may print, log or capture, and do not run an extra time.

    Those by which transformers collects outputs stay. A call may install more of them, in dicts
    that last as long as the block.
    """
    with Changes() as changes, changes:
        put_global_hooks_aside(changes)
        for module in model.modules():
            for name in CALL_HOOKS:
                if name in vars(module):
                    changes.put(vars(module), name, collecting_hooks(vars(module)[name]))
        yield
