"""The symbolic tracer: a torch.fx tracer that also names every value, and makes a submodule opaque if its code cannot be traced.

``node.meta["site"]`` has the names of a node: the path of its module and its labels. These are plain data, so that they survive pickling
and no later stage needs the tracer.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import getitem, is_
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.overrides import is_tensor_method_or_property

from graphreg.errors import GraphRegError, TraceError, first_line
from graphreg.ir.autograd_functions import function_call
from graphreg.ir.buffer_constants import BufferConstants
from graphreg.ir.call_records import CallRecord, call_key, in_containers, record_module_calls, replaced_leaf
from graphreg.ir.containers import building
from graphreg.ir.made_objects import held_objects, is_record, making
from graphreg.ir.metadata import is_labelled, label_site, mark_caught, scope_of
from graphreg.ir.naming import Namer, label_node, label_output
from graphreg.ir.operations import WRAPPED, Operations, is_drop_path, is_size, is_stack
from graphreg.ir.source_location import origin_now
from graphreg.torch_internals import pytree
from graphreg.torch_internals.checkpointing import through_checkpoints
from graphreg.torch_internals.fake_tensors import instead_of_importing_dynamo
from graphreg.torch_internals.fx import take_as_one, take_checks, take_shapes_of_samples
from graphreg.torch_internals.global_state import autocast_depth
from graphreg.torch_internals.modules import (
    FORWARD_HOOKS,
    bound_call,
    buffers_by_name,
    collecting_hooks,
    has_backward_hooks,
    has_pre_hooks,
    parameters_by_name,
)
from graphreg.torch_internals.patching import Changes, raise_interrupt
from graphreg.torch_internals.random_state import ModuleStack, randomness, regions, restore_randomness
from graphreg.torch_internals.torch_modes import gradients_switched
from graphreg.torch_internals.trace_state import restore_fx_patches
from graphreg.tracing.checkpoints import CHECKPOINTS
from graphreg.tracing.defaults import keep_default, placeholder_default, plain_value
from graphreg.tracing.frames import caught_here, discards_result
from graphreg.tracing.global_queries import Answers, EnvironmentQueries
from graphreg.tracing.isinstance_patch import Namespaces, answer_isinstance, model_globals, recorded_class
from graphreg.tracing.shape_decisions import DecisionTracer, decided, no_singleton
from graphreg.tracing.side_effects.opaque_modules import FunctionNeeded, function_of, leave_stale_values
from graphreg.tracing.side_effects.reachable_state import names_in_methods
from graphreg.tracing.symbolic.factories import settle_factories
from graphreg.tracing.symbolic.factory_tape import Tape
from graphreg.tracing.symbolic.holders import LEAF, stand_in
from graphreg.tracing.symbolic.opaque_functions import Tried, can_be_recorded, function_to_blame, functions_of_einops, record_function
from graphreg.tracing.symbolic.proxies import BufferProxy, SequenceValue, UnknownMapping, Value
from graphreg.tracing.symbolic.tuple_items import assert_guesses, settle_ports
from graphreg.tracing.tensors import require_own_parameters, storage_key
from graphreg.tracing.type_inference import definite_type, fixed_count, is_shape

STACKED = "torch.fx cannot see into it; torch.export can, with example_inputs"
SEEDS = "seeds torch's generator (torch.manual_seed, torch.seed) or sets its state, which a graph cannot do"
PLAIN = (float, int, bool, str, type(None), torch.dtype, torch.device)


class DrawsRandomly(BaseException):
    """Ends a trace that drew random numbers without noting which module drew them. The caller traces again with ``watch_draws``.

    This is a BaseException, so that no ``except Exception`` between the tracer and its caller catches it.
    """


class SiteTracer(DecisionTracer):
    """Traces a module and names every value.

    Attributes:
        opaque: The opaque modules by path, and the opaque functions by key (``key_of``), with reasons; a trace may add some.
        specialized: The specialized arguments by name.
        environment: The queries of global state that the forward made, such as ``torch.is_grad_enabled()``.
        region: Whether grad mode, inference mode and autocast were on when the trace began.
        switches_autocast: Whether the forward ran in a block of autocast of its own. One that changes nothing here does at other calls.
        operations: Facts about the operations of the model.
        tape: Records the operations on tensors that the forward makes during the trace.
        watch_draws: Whether to note which module draws random numbers. Few forwards draw any, and to look after each call of a module
            takes long, so a trace without it only finds out whether anything was drawn, and then raises ``DrawsRandomly``.
        asked: What the model's code may ask of values in a way that calls no method of them (``asks``).
    """

    def __init__(
        self, opaque: dict[str, str], specialized: dict[str, Any], examples: Mapping[str, Any], answers: Answers, watch_draws: bool,
        shares: bool | None, asked: Set[str], tried: Tried,
    ) -> None:  # fmt: skip
        """Prepare a trace.

        Args:
            opaque: Opaque modules by path and opaque functions by key, with reasons.
            specialized: Specialized arguments by name.
            examples: The example inputs by argument name. Where the forward decides on a shape, it gets the shape of the examples.
            answers: Answers that queries of global state get in place of torch's own.
            watch_draws: As the attribute.
            shares: Whether arguments that are one tensor in the examples have one proxy. None if there are no such arguments.
            asked: As the attribute.
            tried: As in ``function_to_blame``.
        """
        # Record each function of torchvision.ops as one node, as torchvision's feature extraction does, to give nodes the same names.
        ops = sys.modules.get("torchvision.ops")
        super().__init__(examples, autowrap_modules=(math, ops) if ops else (math,))
        take_as_one(self, WRAPPED, (torch, torch.nn.utils.rnn))
        self.opaque, self.specialized, self.tried = dict(opaque), specialized, tried
        self.notes_leaves, self.shares, self._leaves = shares is not None, bool(shares), dict[int, fx.Proxy]()
        self.watch_draws, self._drawn, self.asked = watch_draws, randomness(), asked
        self.thread = threading.get_ident()  # torch.fx patches nn.Module for all threads; only this one traces
        self.environment = EnvironmentQueries(lambda: None if self.evaluating else self.scope_path, answers)
        self._namer = Namer(())
        self._outputs: list[tuple[str, str, str, Any]] = []  # (name, module path, class, value) of each module call
        self._records: list[tuple[str, CallRecord]] = []
        self._parameter_cache: dict[str, fx.Proxy] = {}
        self._buffers: dict[int, str] = {}
        self._parameters: dict[int, str] = {}
        self._own_names = frozenset[str]()
        self.region, self._autocasts, self.switches_autocast = regions(), autocast_depth(), False
        self._functions = 0  # how many functions of torch with derivatives of their own (``torch.autograd.Function``) run
        self._gradients_were: fx.Node | None = None  # in a block of ``torch.no_grad``, the node that switches gradients off
        self._constants = BufferConstants()
        self._calls: list[str] = []  # the paths of the called modules in order, to roll ``num_calls`` back: copying that would cost more
        self._caught = [set[str]()]  # for each module whose forward runs, which errors its callers catch, by the names of their classes
        self.operations = Operations(nn.Module())
        self.tape = Tape(self, nn.Module())
        self.module_stack = ModuleStack()
        self.ended = False
        self._indices = dict[fx.Node, tuple[int, int]]()  # assertions of sizes taken for indices, and where in the code
        self.intercept: Callable[[str], None] = lambda key: None  # records calls of one more opaque function
        self._places = Namespaces([], [])
        self._made: list[fx.Node] = []  # the nodes that the forward made
        self.checkpoints: dict[str, bool] = {}  # the modules whose callers checkpoint them, by path: whether the checkpoint is reentrant
        self._checkpoints: list[_Checkpointed] = []  # the checkpointed functions that run now
        self._returned: dict[int, Any] | None = None  # when the forward has returned: the objects that were there before
        self._objects: dict[int, fx.Node] = {}  # the nodes of objects that the forward returns, by the ids of the objects

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """Trace a module in its present mode and label each value.

        Raises:
            TraceError: A trace would lose something that the forward does.
        """
        self.operations = Operations(root)
        self._namer = Namer(self.operations.modules.keys() - {""})
        self._buffers = {id(buffer): name for name, buffer in buffers_by_name(root, once=True).items()}
        self._own_names = frozenset(parameters_by_name(root))
        self._parameters = {id(parameter): name for name, parameter in parameters_by_name(root, once=True).items()}
        self._constants = BufferConstants(set(self._buffers.values()))
        self.tape = Tape(self, root)
        self._drawn = randomness()
        self._places = model_globals(root)

        try:
            with self._answering(root):
                graph = super().trace(root)
                # the forward has caught the error of a question without an answer, and gone on
                if self.refused:
                    raise self.refused[-1]
        except Exception as error:  # with its drawing submodules opaque, the forward may not raise
            self._require_no_draws()
            if isinstance(error, (GraphRegError, RecursionError)):
                raise
            self._require_no_missing_state(error)
            if (key := function_to_blame(error, type(root), self.opaque, self.tried)) is None:
                raise
            self.tried.error = self.tried.error or error
            raise FunctionNeeded(self.opaque | {key: first_line(error)}) from error
        self._require_no_draws()

        now = randomness()
        if now.seeds != self._drawn.seeds:
            raise TraceError(
                f"{type(root).__name__}.forward {SEEDS}. Seed before you call the module, or move that step into a submodule, which then "
                "becomes an opaque module."
            )
        if now != self._drawn:
            raise TraceError(
                f"{type(root).__name__}.forward draws random numbers itself (random, torch.rand), and a trace would freeze them. "
                "Move the draw into a submodule, which then becomes an opaque module, or draw from the input (torch.rand_like)."
            )
        if (assigned := _assigned_buffer(root)) is not None:
            raise TraceError(
                f"{type(root).__name__}.forward assigns the buffer self.{assigned}, which a graph cannot carry. Update it in "
                "place (self.x.copy_(...), self.x.mul_(...)), or move it into a submodule, which then becomes an opaque module."
            )

        self._made = list(graph.nodes)
        settle_factories(graph, self.tape)
        self.tape.states.clear()  # they are in cycles of references, so that the tensors would stay for long
        for name, path, kind, value in self._outputs:
            label_output(value, name, path, kind)
        unwrap_functions(graph)
        settle_ports(graph, self.operations)
        if not self.examples:  # with examples the types are known
            assert_guesses(graph, self.operations)
        record_module_calls(graph, self._records)
        return graph

    def is_plain(self) -> bool:
        """Return whether the graph has just the nodes that the forward made, and the forward made no tensors."""
        same = len(self._made) == len(self.graph.nodes) and all(map(is_, self._made, self.graph.nodes))
        return same and not self.tape.entries and not self.tape.known.read

    def _require_no_missing_state(self, error: Exception) -> None:
        """Raise TraceError if the model's own forward reads an attribute that an opaque module assigns when it runs."""
        owner, name = (error.obj, error.name) if isinstance(error, AttributeError) else (None, "")
        path = next((path for path, module in self.operations.modules.items() if module is owner), "")
        if path and (holder := next((each for each in self.opaque if f"{path}.".startswith(f"{each}.")), "")):
            raise TraceError(
                f"{type(self.root).__name__}.forward reads self.{path}.{name}, which the opaque module {holder} ({self.opaque[holder]}) "
                "assigns when it runs. Return it from that module's forward, or read it in a submodule of its own, which then becomes an "
                "opaque module."
            ) from error

    def _require_no_draws(self) -> None:
        """Without ``watch_draws``, raise DrawsRandomly if the forward has drawn random numbers."""
        if not self.watch_draws and randomness() != self._drawn:
            raise DrawsRandomly

    @contextmanager
    def _answering(self, root: nn.Module) -> Iterator[None]:
        """Within the block, what the forward asks and calls beside operations is answered or recorded for traced values."""
        with Changes() as changes, changes:
            self._follow_checkpoints(changes)
            self._record_functions(changes)
            self._record_questions(changes)
            answer_isinstance(changes, self._places.all)
            self.environment.intercept(changes, root, self._places.asking)
            instead_of_importing_dynamo(changes, self.require_table)
            take_checks(changes, self.passes)
            take_shapes_of_samples(changes)
            yield

    def _follow_checkpoints(self, changes: Changes) -> None:
        """Run checkpointed functions without the checkpoint, and note the modules that they call, until the block of ``changes`` ends.

        These modules become blocks, whose code runs with a checkpoint. A function that does more than call modules raises, so that the
        module that checkpoints it becomes opaque, because a graph would lose the checkpoint.
        """

        def begin(reentrant: bool) -> Callable[[], None] | None:
            if threading.get_ident() != self.thread:
                return None
            region = _Checkpointed(len(self._scopes), self._last_node())
            self._checkpoints.append(region)

            def end() -> None:
                # with those inside it, which do not end if they raise
                del self._checkpoints[self._checkpoints.index(region) :]
                made = list[fx.Node]()
                for node in reversed(self.graph.nodes):
                    if node is region.last:
                        break
                    made.append(node)
                own = any(node.op != "get_attr" and scope_of(node) == self._scopes[-1] for node in made if is_labelled(node))
                if own or any(path in self.opaque for path in region.paths):
                    raise RuntimeError(CHECKPOINTS)
                self.checkpoints.update(dict.fromkeys(region.paths, reentrant))

            return end

        through_checkpoints(changes, begin)

    def _record_functions(self, changes: Changes) -> None:
        """Record some calls with traced values as one node each: those of a ``torch.autograd.Function``, and of opaque functions.

        The code of a ``torch.autograd.Function`` runs without gradients, so not here.
        """
        # a Python classmethod up to torch 2.14 and a C one from 2.15 on; both are descriptors
        inherited = inspect.getattr_static(torch.autograd.Function, "apply")

        def is_traced(arguments: Any) -> bool:
            here = threading.get_ident() == self.thread and not self.evaluating
            return here and any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(arguments))

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            # torch.fx writes a function of torch's by its name, which is that of its class
            if cls.__module__.partition(".")[0] != "torch" and is_traced((args, kwargs)):
                return self.create_proxy("call_function", function_call(cls), args, kwargs)
            self._functions += 1
            try:
                return inherited.__get__(None, cls)(*args, **kwargs)
            finally:
                self._functions -= 1

        def is_recorded(key: str, arguments: Any) -> bool:
            def is_plain(value: Any) -> bool:
                return _is_traced(value) or type(value) in PLAIN

            given = (*arguments[0], *arguments[1].values())
            return key in self.opaque and is_traced(arguments) and can_be_recorded(given, is_plain)

        def intercept(key: str) -> None:
            if (function := function_of(key)) is not None:
                record_function(changes, function, self._opaque_call, partial(is_recorded, key))

        changes.put(torch.autograd.Function, "apply", classmethod(apply))
        for function in functions_of_einops():
            record_function(changes, function, self._created, is_traced)
        for key in self.opaque:
            intercept(key)
        self.intercept = intercept

    def _record_questions(self, changes: Changes) -> None:
        """Record ``torch.finfo(x.dtype)`` and ``torch.iinfo`` of a traced value, which masks of attention ask, as a value of the graph."""
        # torch.fx asks this for each function that it traces. torch lists its functions at the first time, and keeps the list for good:
        # it must not have what replaces them here, which would keep the model.
        is_tensor_method_or_property(torch.finfo)
        for asked in (torch.finfo, torch.iinfo):
            changes.put(torch, asked.__name__, recorded_class(asked, partial(self._created, asked)))
        changes.put(torch, "broadcast_shapes", partial(self._broadcast, torch.broadcast_shapes))

    def _broadcast(self, original: Callable[..., Any], *shapes: Any) -> Any:
        """Record ``torch.broadcast_shapes`` of traced sizes, as a distribution calls it."""
        traced = any(issubclass(type(each), fx.Proxy) for shape in shapes for each in (shape, *(shape if type(shape) is tuple else ())))
        return self._created(original, *shapes) if traced else original(*shapes)

    def _created(self, function: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.create_proxy("call_function", function, args, kwargs)

    def _opaque_call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Record a call of an opaque function, whose result the model's code may compare by identity (``mask is None``)."""
        value = self._created(function, *args, **kwargs)
        if not discards_result(3):  # the frames between are those of ``record_function``
            self._add_unnamed(no_singleton, value.node, function.__name__)
        return value

    def _last_node(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Return the function that torch.fx calls to trace the root, and its arguments: proxies, and values of specialized arguments.

        The function calls the root as a user does: its hooks run, and so does a forward that was assigned to the instance. torch.fx itself
        calls ``type(root).forward``, and would lose both.
        """
        root, values, keywords, variadic = self.root, list[Any](), list[str | None](), dict[int, str]()
        parameters = inspect.signature(root.forward).parameters
        # Optional arguments are passed by keyword, as most callers do: decorators such as those of transformers look for them there.
        in_order = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
        for name, parameter in parameters.items():
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
            proxy = self.create_proxy("placeholder", star + name, placeholder_default(parameter), {})
            keep_default(proxy.node, parameter)
            if star:
                variadic[len(values)] = star
            example = self.examples.get(name, {} if star == "**" else None)
            values.append(self.specialized[name] if name in self.specialized else stand_in(proxy, example))
            optional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty and not in_order
            keywords.append(name if optional or parameter.kind is parameter.KEYWORD_ONLY else None)

        held = held_objects(root, self.specialized)

        def call(*arguments: Any) -> Any:
            restore_fx_patches()
            flat = [(k, v) for i, (k, v) in enumerate(zip(keywords, arguments, strict=True)) if i not in variadic]
            more = next((arguments[i] for i, star in variadic.items() if star == "*"), ())
            named: Any = next((arguments[i] for i, star in variadic.items() if star == "**"), {})
            with self.tape:
                output = bound_call(root)(
                    *(v for k, v in flat if k is None), *more, **{k: v for k, v in flat if k is not None},
                    **{name: named[name] for name in named.keys()},  # noqa: SIM118  # of a proxy
                )  # fmt: skip
            self._returned = held
            return output

        return call, values

    def input_leaf(self, proxy: fx.Proxy, example: torch.Tensor) -> fx.Proxy:
        """Return the proxy of a tensor in the example inputs. With ``shares``, it is the same for all places that hold the same tensor."""
        if not self.notes_leaves:
            return proxy
        proxy.node.meta[LEAF] = id(example)
        return self._leaves.setdefault(id(example), proxy) if self.shares else proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one node of the graph: a layer of torch or einops, a drop path or an opaque module."""
        known = is_drop_path(m) or type(m).__module__.startswith("einops.layers.")
        return module_qualified_name in self.opaque or known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace a call of a module, or make the module opaque if that raises. Name the result. torch.fx calls this method."""
        if self.evaluating or threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:  # a forward made the module, so it is no submodule: its code counts as the caller's
            return forward(*args, **kwargs)

        if has_backward_hooks(m):
            self.opaque.setdefault(path, "it has backward hooks")
        if getattr(m, "graphreg_rules", None) is not None:
            raise GraphRegError(f"the submodule {path!r} is a rewritten module. Call graphreg.strip on it, then regularize the model.")
        # only what the checkpointed function itself calls, and not what runs inside of that
        if self._checkpoints and self._checkpoints[-1].depth == len(self._scopes) and not super().is_leaf_module(m, path):
            self._checkpoints[-1].paths.append(path)
        with self._scope(path):
            if self.is_leaf_module(m, path):
                if is_stack(m):
                    self.opaque.setdefault(path, STACKED)
                return self._called_whole(path, m, forward, args, kwargs)

            mark, buffers, drawn = self._mark(), dict(m._buffers), randomness() if self.watch_draws else self._drawn
            number, inputs = self.num_calls.get(path, 0), in_containers((args, kwargs), replaced_leaf if has_pre_hooks(m) else _node_in)
            added, reason = list[str](), ""
            while True:
                try:
                    value = self._record_call(path, m, forward, args, kwargs)
                    if (assigned := _assigned_buffer(m)) is not None:
                        raise AttributeError(f"its forward assigns the buffer {assigned}")
                    if len(self.refused) > mark.refused:
                        raise self.refused[-1]
                    if self.watch_draws and (now := randomness()) != drawn:
                        seeds = now.seeds != drawn.seeds
                        raise AttributeError(f"its forward {SEEDS if seeds else 'draws random numbers, which a trace would freeze'}")
                    break
                except (GraphRegError, RecursionError):
                    raise  # a GraphRegError is for the user; after a RecursionError, the trace would go on at the same depth
                except Exception as error:  # a forward may raise anything on proxies
                    raise_interrupt(error)
                    self._require_no_draws()
                    self._roll_back(mark)
                    m._buffers.update(buffers)
                    restore_randomness(drawn)
                    reason = reason or first_line(error)
                    # once more, with a function opaque; the module becomes opaque if none helps
                    if (key := function_to_blame(error, type(m), self.opaque, self.tried)) is not None:
                        self.opaque[key] = first_line(error)
                        added.append(key)
                        self.intercept(key)
                        continue
                    for key in added:
                        del self.opaque[key]
                    self.opaque[path] = reason
                    return self._called_whole(path, m, forward, args, kwargs)

        value = self.tape.module_output(value)
        self._outputs.append((self._namer.module(path), path, type(m).__name__, value))
        self._records.append((call_key(path, f"@{number}"), CallRecord(inputs, in_containers(value, _node_in), origin_now())))
        return value

    def _called_whole(self, path: str, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a module one node. What collects its output collects the node's, because a trace does not run the module's hooks."""
        if super().is_leaf_module(m, path):
            _require_own_attributes(m)
        require_own_parameters(m, path, self._parameters, self._own_names)
        value = self._record_call(path, m, forward, args, kwargs)
        if path in self.opaque and not is_stack(m):
            self._add_unnamed(no_singleton, value.node, path)
        for hook in collecting_hooks(vars(m)[FORWARD_HOOKS]).values():
            hook(m, args, value)
        leave_stale_values(m)
        return value

    def _record_call(self, path: str, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module as torch.fx does.

        Its path is noted, so that ``_roll_back`` can subtract the call from torch.fx's ``num_calls``, and so are the errors that its
        callers catch: they are many frames up the stack of each operation in the module.
        """
        self._calls.append(path)
        self._caught.append(self._caught[-1] | caught_here(within=SiteTracer._record_call.__code__, depth=1))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._caught.pop()

    def create_proxy(self, kind: str, target: Any, *rest: Any, **more: Any) -> fx.Proxy:
        """Make a node and its proxy, and label the node."""
        proxy = super().create_proxy(kind, target, *rest, **more)
        node = proxy.node
        if self._indices:
            self._take_back_indices(node, sys._getframe(1))
        self.tape.node_created(node)
        if is_size(node, self.sizes.__contains__):
            self.sizes.add(node)
        if kind not in ("placeholder", "call_module") and self._constants.take(node):
            label_site(node, self._scopes[-1])
            return proxy
        label_node(node, self._scopes[-1], self.operations.modules, self._namer)
        return self._as_its_kind(proxy)

    def index_asked(self, node: fx.Node, frame: FrameType) -> None:
        last = self._last_node()
        if last is not None and last.target is decided and last.args[0] is node:
            self._indices[last] = (id(frame), frame.f_lasti)

    def _take_back_indices(self, node: fx.Node, frame: FrameType | None) -> None:
        """Erase the assertions of sizes that torch asked for only to choose an overload, and that the new node has as arguments.

        torch's parser of arguments takes what has ``__index__`` for a whole number, and calls it, before it calls ``__torch_function__``:
        as for ``F.avg_pool1d(h, h.size(2))``. The instruction that runs in the model's code is then the same.
        """
        indices, self._indices = self._indices, {}
        places = set[tuple[int, int]]()
        while frame is not None:
            places.add((id(frame), frame.f_lasti))
            frame = frame.f_back
        for each, place in indices.items():
            if place in places and each.args[0] in node.all_input_nodes:
                self.graph.erase_node(each)

    def _as_its_kind(self, proxy: fx.Proxy) -> fx.Proxy:
        """Return a proxy as one of the class that suits its value, for code that compares values with patterns."""
        if "sequence" in self.asked or "mapping" in self.asked:
            kind = definite_type(proxy.node, self) or self.kind_for_examples(proxy.node)
            if kind is None or issubclass(kind, (tuple, list)):
                return SequenceValue(proxy.node, self) if kind or "sequence" in self.asked else UnknownMapping(proxy.node, self)
        return proxy

    def fixed_count(self, node: fx.Node) -> int | None:
        """Return how many items a value has whatever the inputs, or else fewer; None if that is not certain."""
        count = fixed_count(node, self.operations)
        if count is None and node.target is getitem and isinstance(part := node.args[1], slice) and part.step is None:
            source: Any = node.args[0]
            start, stop = part.start or 0, part.stop or 0
            # the first or the last sizes of a shape
            if is_shape(source) and type(start) is type(stop) is int and (0 <= start < stop or start < stop <= 0):
                count = stop - start
        return count

    def create_arg(self, a: Any) -> Any:
        """Turn an argument of an operation into an argument of a node: nodes replace proxies. torch.fx calls this method."""
        kind = type(a)  # the most common types come first, because torch.fx makes twenty checks of each argument
        if kind in PLAIN:
            return a
        if kind is Value:
            return a.node
        if kind is tuple:
            return tuple(map(self.create_arg, a))
        if kind is dict and not a:
            return {}
        if kind is complex and not math.isfinite(a.imag):  # Python writes ``(1+nanj)``, and knows no ``nanj``
            raise TypeError(f"the code of a graph cannot have the number {a}; make it a tensor, in a buffer")
        if (written := plain_value(a)) is not None:
            return written
        # torch.fx would turn an OrderedDict into a plain dict; here the graph makes an object of the model's own type.
        if (construction := building(a)) is not None:
            target, args, kwargs = construction
            return self.create_node("call_function", target, self.create_arg(args), {k: self.create_arg(v) for k, v in kwargs.items()})
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            node: Any = super().create_arg(a)
            if not self.evaluating:
                self.tape.constant_read(node, a)
                # a tensor of the model that may hold a traced value is no site; nor is a buffer
                if (key := storage_key(a)) in self.tape.known.traced and key in self.tape.owned:
                    self._constants.add(node)
            return node
        # of the output: an object that the forward has made is to be made at each call
        if self._returned is not None and not is_record(a) and (made := making(a, _is_traced, self._returned)) is not None:
            if id(a) not in self._objects:
                self._objects[id(a)] = self.create_node("call_function", made[0], tuple(map(self.create_arg, made[1])), {})
            return self._objects[id(a)]
        if a is self.root:
            raise TypeError("it passes the model itself to an operation; pass the tensors and numbers that the operation needs")
        if isinstance(a, types.FunctionType):  # of which torch.fx says only the type
            raise TypeError(f"it passes a function ({a.__qualname__}) to an operation, and a graph has no arguments that are functions")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node. torch.fx calls this method."""
        return Value.of(node, self)

    def create_node(self, kind: str, *rest: Any, **more: Any) -> fx.Node:
        """Make a node. Raise RuntimeError if it would run under another grad mode or autocast than the rest of the graph.

        In the model's own forward, a block of ``torch.no_grad`` is recorded; a submodule that has one becomes opaque.
        """
        if kind == "output":
            self._follow_gradients(True)
        elif kind not in ("placeholder", "get_attr"):
            now = regions()
            # A module that is called as a whole is in its own scope already. A function with a derivative of its own runs without
            # gradients, but not because of a block.
            inside = self._functions or any(self._scopes[:-1] if kind == "call_module" or rest[0] is no_singleton else self._scopes)
            if now != self.region and (inside or now != (False, *self.region[1:])):
                raise RuntimeError(
                    "this runs under torch.no_grad, autocast, hooks on saved tensors or the like, and a trace would lose that; move it "
                    "into a submodule of its own"
                )
            self._follow_gradients(now[0])
        self.note_autocast()
        node = super().create_node(kind, *rest, **more)
        if kind.startswith("call") and (caught := self._caught[-1] | caught_here(within=SiteTracer._record_call.__code__)):
            mark_caught(node, tuple(sorted(caught)))
        return node

    def follow_gradients(self) -> None:
        """Note in the graph whether gradients are on, for an operation of the model's own forward that is no node yet."""
        if not self._functions and not self.scope_path and regions()[1:] == self.region[1:]:
            self._follow_gradients(regions()[0])

    def _follow_gradients(self, on: bool) -> None:
        """Add a node that switches gradients off, or back to what they were, if the forward has done so since the last node."""
        if on == (self._gradients_were is None):
            return
        before, self._gradients_were = self._gradients_were, None
        node = self.graph.create_node("call_function", gradients_switched, (False,) if before is None else (before,))
        label_site(node, "")
        self._gradients_were = node if before is None else None

    def note_autocast(self) -> None:
        """Note whether the forward is in a block of autocast."""
        self.switches_autocast |= autocast_depth() != self._autocasts

    def alias(self, tensor: torch.Tensor) -> fx.Proxy:
        """Add a node that is an alias of a tensor and has no label, and return its proxy."""
        node = self.create_node("call_function", torch.ops.aten.alias.default, (self.create_arg(tensor),), {})
        label_site(node, self.scope_path)
        self.tape.node_created(node)
        return self.proxy(node)

    @property
    def scope_path(self) -> str:
        """The path of the module whose code runs."""
        return self._scopes[-1]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return an attribute that the model's code reads from a module: a proxy for a parameter or buffer, other values as they are."""
        self._parameter_cache = parameter_proxy_cache
        if self.evaluating or threading.get_ident() != self.thread:
            return attr_val
        name = self._buffers.get(id(attr_val))
        if name is not None and isinstance(attr_val, torch.Tensor):
            # torch.fx would use the buffer itself: an in-place update would change the user's buffer in the trace, and not in later calls.
            if name not in parameter_proxy_cache:
                parameter_proxy_cache[name] = BufferProxy(self.create_proxy("get_attr", name, (), {}).node, self, attr_val)
            return parameter_proxy_cache[name]
        # as torch.fx does it, which would search all parameters of the model at each read of one
        if (name := self._parameters.get(id(attr_val))) is not None:
            if name not in parameter_proxy_cache:
                parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
            return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    @contextmanager
    def _scope(self, path: str) -> Iterator[None]:
        """Set the path of the module whose code runs within the block."""
        depth = len(self._scopes)
        self._scopes.append(path)
        try:
            yield
        finally:
            del self._scopes[depth:]

    def _mark(self) -> _Mark:
        return _Mark(
            self._last_node(), self._namer.mark(), len(self._outputs), dict(self.module_stack), len(self._records), len(self._calls),
            self.tape.mark(), len(self.refused), self._gradients_were,
        )  # fmt: skip

    def _roll_back(self, mark: _Mark) -> None:
        """Remove everything that was traced after a mark."""
        del self.refused[mark.refused :]
        self._gradients_were = mark.gradients_were
        self.tape.roll_back(mark.tape)

        for node in reversed(self.graph.nodes):
            if node is mark.last:
                break
            self.graph.erase_node(node)
            cached = self._parameter_cache.get(str(node.target))
            if cached is not None and cached.node is node:
                del self._parameter_cache[str(node.target)]
            if (leaf := self._leaves.get(node.meta.get(LEAF, 0))) is not None and leaf.node is node:
                del self._leaves[node.meta[LEAF]]

        self._namer.roll_back(mark.names)
        del self._outputs[mark.outputs :]
        del self._records[mark.records :]
        self.module_stack.clear()
        self.module_stack.update(mark.stack)
        for path in self._calls[mark.calls :]:
            self.num_calls[path] -= 1
        del self._calls[mark.calls :]


class _Mark(NamedTuple):
    """A state of a trace, to which ``_roll_back`` returns: the last node, and how much of everything else there was."""

    last: fx.Node | None
    names: int
    outputs: int
    stack: dict[str, Any]
    records: int
    calls: int
    tape: tuple[int, int]
    refused: int
    gradients_were: fx.Node | None


@dataclass(frozen=True, eq=False)
class _Checkpointed:
    """A checkpointed function that runs: how deep in calls of modules, the node before it, and the paths of the modules that it calls."""

    depth: int
    last: fx.Node | None
    paths: list[str] = field(default_factory=list)


def unwrap_functions(graph: fx.Graph) -> None:
    """Forget that torch.fx wraps functions of torch: emitted code would ask it to wrap "torch.full", and no later trace would run."""
    for node in graph.nodes:
        if node.target in WRAPPED or str(getattr(node.target, "__module__", "")).startswith("torch."):
            node.meta.pop("is_wrapped", None)


def _node_in(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value


def _require_own_attributes(layer: nn.Module) -> None:
    """Raise RuntimeError if a traced forward has assigned a proxy to an attribute that a layer reads, or has put one into a list there."""
    for module in layer.modules():
        for name, value in vars(module).items():
            items = value if type(value) is list else (value,)
            if any(issubclass(type(each), fx.Proxy) for each in items) and name in names_in_methods(type(module)):
                raise RuntimeError(
                    f"it assigns a traced value to .{name.removeprefix('_')} of a layer of torch, which reads that itself; call a function "
                    "with that value instead, such as torch.nn.functional.linear"
                )


def _is_traced(value: object) -> bool:
    return isinstance(value, (fx.Proxy, torch.Tensor))


def _assigned_buffer(module: nn.Module) -> str | None:
    """Return the name of a buffer to which a traced forward assigned a proxy, or None."""
    return next((name for name, value in module._buffers.items() if isinstance(value, fx.Proxy)), None)
