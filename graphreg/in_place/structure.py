"""``StructureGraph``, the graph for one structure of arguments (see ``calls.py``), and ``traced_for``, which traces the model for it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from graphreg.blocks.block import CALLS, is_sharded
from graphreg.blocks.homes import inlined
from graphreg.blocks.placed_block import is_placed, leave, place, place_again, require_own_forward, unwrapped, unwrapped_block
from graphreg.errors import GraphRegError, NoMatchError, OtherInputs, RegularizerError, TraceError, listed
from graphreg.in_place.fingerprint import Fingerprint
from graphreg.in_place.shared_session import SharedSession
from graphreg.in_place.turns import resting_class
from graphreg.ir.contents import copied_contents
from graphreg.ir.metadata import may_be_caught
from graphreg.ir.module_record import ORIGINAL, PLACED, RULES, ModuleRecord, state_of
from graphreg.ir.operations import is_in_place, is_pythons
from graphreg.ir.selector import Missing, Selector
from graphreg.ir.shape_guards import SIZE_ASSERTIONS
from graphreg.ir.train_eval import modes_asked
from graphreg.planning.blocks import matching_modules
from graphreg.planning.native_dropout import OwnDropout
from graphreg.planning.plan import Plan, plan
from graphreg.regularizer.base import Regularizer
from graphreg.rewriting.first_call import claim_of, is_eager, may_be_proved, prove_mode
from graphreg.rewriting.rewrite import rewrite_with
from graphreg.runtime.attach import Penalties, Scale
from graphreg.runtime.clock import CLOCK
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.runtime_module import Rules
from graphreg.runtime.unfinished import begin_counting, end_counting, take_back
from graphreg.session.hosts import graphs_of, rules_of
from graphreg.session.strengths import Row
from graphreg.torch_internals import pytree
from graphreg.torch_internals.autograd import has_saved_tensor_hooks, version_of
from graphreg.torch_internals.checkpointing import WRAPPED_MODULE
from graphreg.torch_internals.interpreter import at_rest
from graphreg.torch_internals.modules import (
    CALL_HOOKS,
    COMPILED_CALL,
    buffers_by_name,
    collecting_hooks,
    compiles_itself,
    has_users_global_hook,
    original_of,
    own_hooks,
    parameters_by_name,
)
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.checkpoints import checkpoints_itself
from graphreg.tracing.export.inputs import spelled_out
from graphreg.tracing.fake_inputs import arguments
from graphreg.tracing.proof.proof import NO_INPUTS, Claim, NotTheModel, Proving, accepts, prove
from graphreg.tracing.proof.surroundings import autocast_again, plainly
from graphreg.tracing.reads import Reads
from graphreg.tracing.shape_decisions import DECISIONS, attribute_of, decided, decided_flag
from graphreg.tracing.trace import FrontEnd, Traced, traced_for_proof

log = logging.getLogger("graphreg")
_FROZEN = "all parameters are frozen"
_ASKS = (*SIZE_ASSERTIONS, *DECISIONS, modes_asked)  # the targets of nodes that may raise OtherInputs

_MOST_KNOWN = 4096  # the most calls of which a graph remembers that it takes them


@dataclass(frozen=True)
class InPlaceOptions:
    """The options of ``regularize_``, from which each graph is made. The strengths and the noise are in the ``Session``.

    Attributes:
        regularizers: The regularizers by their final names. A splice with a generator has a seed in place of the generator.
        front_end: As in ``regularize``. The same holds for ``missing``, ``penalties``, ``scale`` and ``own_dropout``.
        eval_penalties: Whether the graph runs in eval mode, too.
        blocks: As in ``regularize``.
        prove: Whether each graph is proved before it is used.
    """

    regularizers: Mapping[str, Regularizer]
    front_end: FrontEnd
    missing: Missing
    penalties: Penalties
    scale: Scale | None
    own_dropout: OwnDropout
    eval_penalties: bool
    blocks: Selector | None = None
    prove: bool = True


@dataclass(frozen=True)
class Numbers:
    """The arguments that a graph must take as numbers that may change.

    Attributes:
        other: For each, by its name, another value than in the call for which the graph is traced.
        like: The plan of a graph for a structure that differs in these numbers alone; None if there is none.
    """

    other: Mapping[str, Any]
    like: Plan | None = None

    def require_same(self, decided: Plan) -> None:
        """Raise OtherInputs unless a plan does what ``like`` does: arithmetic with a number may shift the names of values."""
        if (self.other and decided.unmovable) if self.like is None else _what(decided) != _what(self.like):
            raise OtherInputs("a graph that takes these arguments as numbers that may change has other sites.")


def _what(decided: Plan) -> list[tuple[str, ...]]:
    """Return what a plan does, and what it leaves alone."""
    edits = [(edit.name, site.name, edit.matched) for edit in decided.edits for site in edit.sites]
    native = [(edit.dropout.site.name, edit.action) for edit in decided.native_dropout]
    return [*edits, *native, *((each.site.name,) for each in decided.unmovable)]


@dataclass(eq=False)
class StructureGraph:
    """A graph for one structure of arguments.

    Attributes:
        module: The rewritten module, which shares the model's layers.
        plan: The plan by which the module was rewritten.
        fingerprint: The state of the model at the trace, to notice changes.
        asks: Whether the graph has assertions about sizes, flags or modes. If an assertion fails, the graph raises OtherInputs.
        late: Whether such an assertion comes after the first operation that may change buffers or draw random numbers.
        hooks: The hook dicts of the inlined modules, each with the path of its module. The graph contains the operations of an inlined
            module, but does not call the module.
        blocks: The blocks of the model that the graph calls.
        held: A copy of the arguments without their tensors. The copy keeps alive the objects whose ids are in the structure's text, so that
            no other object gets these ids.
        models_hooks: Hooks of the model's own on inlined modules: methods of objects that a module of the model holds. What they do is in
            the graph.
        rules: The container of the module's runtime modules.
        frozen: The parameters whose ``requires_grad`` the graph asserts.
        parts: The submodules whose modes it asserts.
        known: The inputs with which the graph has run. An element has what ``shapes_of`` returns for a call, and the flags of ``frozen``
            and modes of ``parts``.
    """

    module: RewrittenModule
    plan: Plan
    fingerprint: Fingerprint
    asks: bool
    late: bool
    hooks: list[tuple[dict[int, Any], str]]
    blocks: tuple[nn.Module, ...]
    held: Any
    models_hooks: tuple[Any, ...] = ()
    frozen: tuple[Tensor, ...] = ()
    parts: tuple[nn.Module, ...] = ()
    rules: Rules = field(init=False)
    known: set[tuple[Any, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rules = rules_of(self.module)

    def is_present(self) -> bool:
        """Return whether the model is as at the trace."""
        thawed = self.plan.resting == _FROZEN and any(parameter.requires_grad for parameter in parameters_by_name(self.module).values())
        return not thawed and self.fingerprint.same()

    def know(self, shapes: tuple[Any, ...]) -> None:
        """Remember that the graph takes inputs of these shapes."""
        if len(self.known) == _MOST_KNOWN:
            self.known.clear()
        self.known.add(self._with_flags(shapes))

    def has_run(self, shapes: tuple[Any, ...]) -> bool:
        """Return whether the graph takes inputs of these shapes, since it has run with such ones."""
        return self._with_flags(shapes) in self.known

    def _with_flags(self, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*shapes, *(parameter.requires_grad for parameter in self.frozen), *(part.training for part in self.parts))

    def refuse_hooks(self) -> None:
        """Raise GraphRegError if an inlined module has a hook: the graph does not call the module, so the hook would not run."""
        if self.hooks and has_users_global_hook():
            raise GraphRegError(
                "a hook is registered for all modules (by torch.nn.modules.module.register_module_forward_hook and the like, or by a tool "
                f"that counts or profiles), and in train mode the model runs as a graph, which does not call {self.hooks[0][1]}: the hook "
                "would not run there. Remove the hook, or call the model in eval mode."
            )
        for hooks, path in self.hooks:
            if not all(hook in self.models_hooks for hook in own_hooks(hooks)):
                raise GraphRegError(
                    f"{path} has a hook, and in train mode the model runs as a graph, which contains the operations of {path} but does not "
                    f"call it: the hook would not run. Make it a block that is called: graphreg.regularize_(model, ..., blocks={path!r}), "
                    "unless it computes nothing itself (a quantization stub); or register the hook on the model itself, or on a layer that "
                    "the graph calls, such as an nn.Linear; or use graphreg.regularize, whose graph contains what the hook computes."
                )

    def follow(self, model: nn.Module) -> None:
        """Take over wrappers that were put around blocks after the trace, such as those of activation checkpointing.

        Raise GraphRegError if the forward of a block was replaced by one that the graph cannot call.

        This concerns direct children of the model. For all other modules, model and graph share the dict of submodules.
        """
        for block in self.blocks:
            require_own_forward(block)
        for path in self.plan.blocks:
            if "." not in path and self.module._modules[path] is not model._modules[path]:
                self.module._modules[path] = model._modules[path]

    def leave(self) -> None:
        """Remove the code of this graph from the blocks. A block that no other graph calls gets its own class back."""
        for block in self.blocks:
            leave(block, _record(self.module).owner)


def traced_for(
    model: nn.Module, example: Any, options: InPlaceOptions, session: SharedSession, at_call: bool, reads: Reads, numbers: Numbers
) -> StructureGraph:  # fmt: skip
    """Trace the model for a call with the arguments ``example``, add the regularizers, and return the graph.

    Args:
        model: The model.
        example: The arguments of the call.
        options: The options of ``regularize_``.
        session: The session of the model, which all graphs share.
        at_call: Whether such a call is running.
        reads: Filled with what the trace reads of the model, even if it fails.
        numbers: The arguments that the graph must take as numbers that may change.

    Raises:
        GraphRegError: The model cannot be traced, or no graph takes these arguments as numbers that may change.
    """
    # A user may have given a block another class since the last trace.
    for inner in model.modules():
        place_again(inner)
    proving = _proving(model, options, at_call)
    held = copied_contents([leaf for leaf in pytree.tree_leaves(arguments(example)) if not isinstance(leaf, Tensor)])
    _refuse_sharded(model)
    _place_before_trace(model, options.blocks)
    with bare(model), spelled_out(model, example):
        with reads.recorded(model, arguments(example)):
            traced = _traced(model, example, options.front_end, replace(proving, asked=options.prove and is_eager()), numbers.other)
        if options.prove and not is_eager():
            # Within a transform there are no plain values to compare; the next plain call does it.
            traced = replace(traced, unproved=dict.fromkeys(proving.modes, NO_INPUTS), asks_autocast=False)
        fingerprint = Fingerprint(model, reads, _tensors_read(model, traced), traced.opaque_modules, traced.of_opaque)
        decided, whole = _planned(model, example, traced, options, session.has_acted)
        numbers.require_same(decided)
        chosen = [(path, unwrapped(model.get_submodule(path))) for path in decided.blocks]
        if not (acting := [block for path, block in chosen if not is_placed(block) and _acts_on_calls(model, path, block)]):
            for line in session.follow(model):
                log.warning(line)
            session.learn(whole)
            session.settle(options.missing, _waited_in_vain)
            module = rewrite_with(traced, decided, session, options.penalties, session.scale)
            if (owner := next((state for state in session.states.values() if state.owns_parameters), None)) is not None:
                raise owner_refused(owner.name, owner.regularizer)
            hooks = _hooks(model, module)
    if acting:  # the trace contains operations of hooks and wrappers of these blocks; a trace after ``place`` does not
        for block in acting:
            place(block)
        return traced_for(model, example, options, session, at_call, reads, numbers)
    graphs = graphs_of(module).values()
    asks = [[node.target in _ASKS or may_be_caught(node) for node in graph.nodes] for graph in graphs]
    # A call that fails at a late assertion must be undone before another graph may run it.
    late = any(True in asked[_first_effect(graph) :] for graph, asked in zip(graphs, asks, strict=True))
    blocks = tuple(block for path, block in chosen if path in _record(module).blocks)
    made = StructureGraph(module, decided, fingerprint, any(map(any, asks)), late, hooks, blocks, held, _models_hooks(model, hooks, reads))
    flags = [node for graph in graphs for node in graph.nodes if node.target is decided_flag]
    # those of inputs are among what ``shapes_of`` returns
    paths = {str(node.args[2]) for node in flags if node.all_input_nodes[0].all_input_nodes[0].op == "get_attr"}
    made.frozen = tuple(attribute_of(model, path) for path in paths)
    parts = [path for graph in graphs for node in graph.nodes if node.target is modes_asked for path in node.args[2]]
    made.parts = tuple(map(model.get_submodule, dict.fromkeys(parts)))
    made.refuse_hooks()
    return made


def _waited_in_vain(row: Row, selector: str) -> str:
    """Return the text of the error for a selector of ``set_strength`` that waited for a trace, and matches no site."""
    return (
        f"set_strength, before the model was traced: {row.no_site(selector)} To forget the selectors that wait, set a number for all "
        f"sites: graphreg.set_strength(model, {row.name!r}, number). "
        "If only calls with other arguments have the site, make such a call first, or give missing='warn'."
    )


def _planned(model: nn.Module, example: Any, traced: Traced, options: InPlaceOptions, again: bool) -> tuple[Plan, Plan]:
    """Return the plan for a trace, and the plan that has all the sites that selectors of strengths must match.

    They are one, except while adapters are disabled or, if there was a graph before (``again``), all parameters are frozen: a teacher, or
    a discriminator while the generator trains. Then a regularizer may have no site, or frozen parameters alone, and adds nothing, if it
    acts in the model as it trains. The second plan is that for this model. So a selector that matches in neither of the two, or an error
    of another kind, is an error as always.
    """
    asked: tuple[Any, Any, Any, Any] = list(options.regularizers.values()), options.missing, options.own_dropout, options.blocks
    modules: Iterable[Any] = model.modules()  # of PEFT's layers, which are known by these attributes alone
    layers = [each for each in modules if getattr(each, "disable_adapters", None) is True and hasattr(each, "enable_adapters")]
    parameters = parameters_by_name(model).values()
    frozen = [] if not again or any(parameter.requires_grad for parameter in parameters) else [*parameters]
    resting = "adapters are disabled" if layers else _FROZEN if frozen else ""
    try:
        made = plan(traced, *asked)
        return replace(made, resting=resting), made
    except (NoMatchError, RegularizerError):
        if not resting:
            raise
    with _as_it_trains(layers, frozen):
        whole = plan(_traced(model, example, options.front_end, Proving(asked=False, eval_runs=options.eval_penalties), {}), *asked)
    return plan(traced, *asked, resting=resting), whole


@contextlib.contextmanager
def _as_it_trains(layers: Sequence[Any], frozen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the context, enable the adapters of PEFT's layers and unfreeze parameters. Afterwards, all is as it was before."""
    flags = {parameter: parameter.requires_grad for parameter in (*frozen, *(each for layer in layers for each in layer.parameters()))}
    states = [dict(vars(layer)) for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in frozen:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            vars(layer).update(state)
        for parameter, flag in flags.items():  # enable_adapters has frozen those of the adapters that are not active
            parameter.requires_grad_(flag)


def _proving(model: nn.Module, options: InPlaceOptions, at_call: bool) -> Proving:
    """Return how graphs of the model are proved: in the modes in which they may run, and with the autocast of the caller."""
    modes = [mode for mode in ("train", "eval") if options.eval_penalties or mode == "train" or not model.training]
    return Proving(modes, autocast_again(model), at_call, eval_runs=options.eval_penalties)


def prove_later(model: nn.Module, graph: StructureGraph, example: Any, options: InPlaceOptions) -> None:
    """Prove the graph on the arguments of a call, if it was traced within a transform of torch.func, and no call has proved it since."""
    proving = _proving(model, options, at_call=True)
    call = arguments(example)
    assert call is not None
    for mode in proving.modes:
        if may_be_proved(graph.module, mode):
            with bare(model), spelled_out(model, example):
                try:
                    prove_mode(graph.module, model, mode, call, replace(proving, modes=(mode,)))
                except NotTheModel as error:
                    if not isinstance(error.__cause__, OtherInputs):  # the graph is not for these inputs, and the call says so itself
                        raise


def accepts_call(model: nn.Module, graph: StructureGraph, example: Any, options: InPlaceOptions) -> bool:
    """Return whether a call fulfils the assertions of a graph, so that no other graph must run. Where that cannot be tried: True."""
    if not is_eager() or any(map(is_sharded, model.modules())):
        return True
    mode = "train" if model.training else "eval"
    proving, call = replace(_proving(model, options, at_call=True), modes=(mode,)), arguments(example)
    assert call is not None
    with bare(model), spelled_out(model, example):
        return accepts(claim_of(graph.module, model, mode), call, proving)


def _traced(model: nn.Module, example: Any, front_end: FrontEnd, proving: Proving, numbers: Mapping[str, Any]) -> Traced:
    """Trace the model. If this fails and the model checkpoints activations, raise a TraceError that says how to switch that off."""
    try:
        traced = traced_for_proof(model, example, front_end, proving, numbers)
        if numbers:
            _require_free(traced, example, proving, numbers)
        return traced
    except TraceError as error:
        title = type(model).__name__
        if any(map(checkpoints_itself, model.modules())):  # a trace ignores these checkpoints, so they are not why it failed
            raise
        on = [path or title for path, inner in model.named_modules() if getattr(inner, "gradient_checkpointing", False) is True]
        if not on:
            raise
        raise TraceError(
            f"activation checkpointing is on ({listed(on, 3)}), and a trace of {title} would lose the checkpoints. Switch checkpointing "
            "off: model.gradient_checkpointing_disable(), or leave it out of the Trainer's arguments. To save memory, name the blocks in "
            "blocks= and put checkpoint_wrapper around them, or compile the model and set torch._functorch.config.activation_memory_budget."
        ) from error


def _require_free(traced: Traced, example: Any, proving: Proving, numbers: Mapping[str, Any]) -> None:
    """Raise OtherInputs or NotTheModel unless the graphs are right for other values of the arguments ``numbers``, too.

    The graphs of torch.export fix numbers. Those of torch.fx assert the value of a number where the forward needs it. They are compared
    with the model at a second value, too.
    """
    nodes = [node for graph in traced.graphs.values() for node in graph.nodes]
    asserted = [node for node in nodes if node.target is decided and not isinstance(node.args[1], bool)]  # a bool: a comparison with it
    if traced.front_end != "symbolic" or any(_reads(node, numbers) for node in asserted):
        raise OtherInputs(f"the graph is for one value of {listed(tuple(numbers))}.")
    if proving.asked:
        args, kwargs = arguments(example) or ((), {})
        bound = inspect.signature(traced.model.forward).bind(*args, **kwargs)
        # The second value of each number.
        bound.arguments.update(numbers)
        claim = Claim(traced.model, traced.graphs, traced.constants, traced.specialized, traced.front_end)
        try:
            prove(claim, (bound.args, bound.kwargs), proving)
        except NotTheModel as error:
            if not isinstance(error.__cause__, OtherInputs):  # the graph asserts a comparison that does not hold for the second value
                raise


def _reads(node: fx.Node, names: Collection[str]) -> bool:
    """Return whether a node is computed from one of these arguments of the forward."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        each = waiting.pop()
        if each.op == "placeholder" and each.target in names:
            return True
        waiting += [before for before in each.all_input_nodes if before not in seen]
        seen.update(each.all_input_nodes)
    return False


def _tensors_read(model: nn.Module, traced: Traced) -> list[Tensor]:
    """Return the tensors in plain attributes of modules that the graphs read at each call."""
    paths = {str(node.target) for graph in traced.graphs.values() for node in graph.nodes if node.op == "get_attr"}
    modules = dict(model.named_modules(remove_duplicate=False))
    values = [vars(modules[path]).get(name) for path, _, name in (each.rpartition(".") for each in paths) if path in modules]
    return [value for value in values if isinstance(value, Tensor)]


def owner_refused(name: str, regularizer: Regularizer) -> RegularizerError:
    """Return the error for a regularizer that has parameters of its own."""
    return RegularizerError(
        f"{name}: {type(regularizer).__name__} keeps tensors of its own, and regularize_ adds none to the model. Use graphreg.regularize: "
        "what it returns has them in parameters() and state_dict()."
    )


def told_of_change(error: GraphRegError) -> GraphRegError:
    """Return an error of a later trace; if a selector matches nothing, say that the model may have changed since, and what to do then."""
    if not isinstance(error, NoMatchError):
        return error
    return NoMatchError(
        f"{error} The model had such a site before, and this call traces it once more. If the model has changed, for example because its "
        "adapters are merged, call graphreg.strip_(model), and regularize it again with selectors that match, if at all. If the arguments "
        "of this call lead to another graph, in which there is no such site, give missing='ignore'."
    )


def _refuse_sharded(model: nn.Module) -> None:
    """Raise TraceError if FSDP2 was applied to the model or to a submodule, because a trace needs whole parameters."""
    if (sharded := next((path for path, inner in model.named_modules() if is_sharded(inner)), None)) is not None:
        raise TraceError(
            f"fully_shard was applied to {repr(sharded) if sharded else 'the model'}, and the model has no graph for the arguments of this "
            "call: it can be traced only while its parameters are whole. Before fully_shard, give graphreg.regularize_ example_inputs of "
            "this structure, or call the model once with such arguments."
        )


def _first_effect(graph: fx.Graph) -> int:
    """Return the position of the first node that may write into a tensor or draw random numbers; the number of nodes if there is none.

    Any tensor operation counts, and any call of a module other than the key and the clock, although many write and draw nothing. If this
    makes ``StructureGraph.late`` True, calls with new sizes save buffers and random state, perhaps without need. That costs little.
    """
    return next((i for i, node in enumerate(graph.nodes) if _may_act(node)), len(graph.nodes))


def _may_act(node: fx.Node) -> bool:
    if node.op == "call_module":
        return node.target not in (f"{RULES}.key", f"{RULES}.{CLOCK}")
    if is_pythons(node):  # reads of sizes and arithmetic with them, but also ``x += y`` and ``x[i] = y``
        return node.target is operator.setitem or is_in_place(node)
    return node.op in ("call_function", "call_method") and node.target not in _ASKS


def _hooks(model: nn.Module, module: RewrittenModule) -> list[tuple[dict[int, Any], str]]:
    """Return the hook dicts of the inlined modules (see ``StructureGraph.hooks``), each with the path of its module."""
    paths = {path for path, _ in model.named_modules() if path} - {*_record(module).blocks}
    inside = inlined(graphs_of(module).values(), paths)
    places = [(path, inner) for path, inner in model.named_modules() if path in inside]
    return [(getattr(inner, name), path) for path, inner in places for name in CALL_HOOKS]


def _models_hooks(model: nn.Module, hooks: Sequence[tuple[Mapping[int, Any], str]], reads: Reads) -> tuple[Any, ...]:
    """Return the hooks that are methods of objects that a module of the model holds and its code reads, as timm's ``FeatureHookNet`` does.

    Such a hook is a part of the model: it tells the forward something. A trace contains what it does.
    """
    names = reads.code.mentioned | reads.names()
    held = {id(value) for module in model.modules() for name, value in vars(module).items() if name in names}
    every = [hook for found, _ in hooks for hook in own_hooks(found)]
    functions = [(hook, hook.func if isinstance(hook, partial) else hook) for hook in every]
    return tuple(hook for hook, function in functions if id(getattr(function, "__self__", None)) in held)


def _record(module: RewrittenModule) -> ModuleRecord:
    record = state_of(module)
    assert record is not None
    return record


def _place_before_trace(model: nn.Module, selector: Selector | None) -> None:
    """Give blocks the class of placed blocks (``place``) if they have a hook or a wrapper, or if ``block.compile()`` was called.

    ``bare`` puts hooks, wrappers and compiled calls of placed blocks aside, so that the trace does not contain their operations.
    """
    if selector is None:
        return
    modules = {path: unwrapped(inner) for path, inner in model.named_modules() if WRAPPED_MODULE not in path}
    for path in matching_modules(modules, selector):
        if not is_placed(modules[path]) and _acts_on_calls(model, path, modules[path]):
            place(modules[path])


def _acts_on_calls(model: nn.Module, path: str, block: nn.Module) -> bool:
    """Return whether a call of a block does more than run its forward: it has a hook or a wrapper, or ``block.compile()`` was called.

    Raises:
        TraceError: The block's forward was replaced on the object, or torch.compile has wrapped the block.
    """
    if original_of(block) is not None:
        raise TraceError(
            f"{path!r} is a block (blocks=), and torch.compile has wrapped it in another module. Put the block itself in its place, and "
            f"compile it there: model.get_submodule({path!r}).compile()."
        )
    if "forward" in vars(block):
        raise TraceError(
            f"the forward of {path!r}, which is a block (blocks=), was replaced on the object, but regularize_ replaces the forward of the "
            "class. Regularize first."
        )
    return compiles_itself(block) or any(own_hooks(getattr(block, name)) for name in CALL_HOOKS) or block is not model.get_submodule(path)


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Within the context, model and placed blocks are as before ``regularize_``, but without hooks; autocast and inference mode are off.

    The context also removes wrappers around placed blocks, and functions that replaced a forward, such as accelerate's. A call of the model
    runs hooks and wrappers around the graph, so the graph must not contain their operations.
    """
    blocks = [inner for inner in model.modules() if is_placed(inner)]
    with Changes() as changes, changes, contextlib.ExitStack() as stack:
        at_rest(changes)
        # The loop changes what ``modules`` walks through.
        for inner in list(model.modules()):
            for name, child in inner._modules.items():
                if child is not None and (block := unwrapped_block(child)) is not child:
                    changes.put(inner._modules, name, block)
        for inner in (model, *blocks):
            _put_aside(inner, changes)
        stack.enter_context(plainly(model))
        if has_saved_tensor_hooks():  # the user's hooks would get tensors of the trace, which have no data
            stack.enter_context(saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        yield


def _put_aside(module: nn.Module, changes: Changes) -> None:
    """Remove from a module, until ``changes`` ends, all that graphreg gave it, and all that acts on its calls (hooks, ``compile()``)."""
    kind, space = type(module), vars(module)
    is_model = PLACED in space
    for name in (PLACED, CALLS, "forward", COMPILED_CALL):
        if name in space and (name != "forward" or kind.forward is not nn.Module.forward):  # else it is the only one
            changes.keep(space, name)
            del space[name]
    for name in CALL_HOOKS:
        changes.put(space, name, collecting_hooks(space[name]))
    if (original := getattr(kind, ORIGINAL, None)) is not None:
        changes.later(partial(object.__setattr__, module, "__class__", kind))
        object.__setattr__(module, "__class__", resting_class(kind, original) if is_model else original)


@contextlib.contextmanager
def restored_unless_done(model: nn.Module, late: bool, arguments: Any) -> Iterator[None]:
    """If the with-block, which runs a graph, raises: take back what it has counted.

    If ``late``, also restore the model's buffers and torch's random state. So another graph can run the call.

    Raises:
        GraphRegError: The graph wrote into an argument, and then raised OtherInputs. Another graph would write into the argument again.
    """
    saved = list[tuple[Tensor, Tensor]]()
    if late:
        saved = [(buffer, buffer.detach().clone()) for buffer in buffers_by_name(model, once=True).values()]
        given = [(leaf, version_of(leaf)) for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        state = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    outer = begin_counting()
    try:
        yield
    except BaseException as error:
        take_back()
        if late:
            torch.set_rng_state(state)
            torch.cuda.set_rng_state_all(cuda)
            with torch.no_grad():
                for buffer, content in saved:
                    buffer.copy_(content)
            if isinstance(error, OtherInputs) and any(version_of(leaf) != version for leaf, version in given):
                raise GraphRegError(
                    f"{type(model).__name__} writes into an argument, and then tests a condition on a shape that is new. The argument has "
                    "changed already. Test the condition first in the forward, or call the model with a copy of the argument."
                ) from error
        raise
    finally:
        end_counting(outer, as_part=True)
