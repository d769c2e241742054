"""``RewrittenModule``: the class of the modules that ``graphreg.regularize`` returns.

A rewritten module shares the model's layers, parameters and buffers, and has emitted Python for both modes. This file also copies the
model's other attributes, generates the module's forward, and defines how it is copied, pickled and saved in a ``state_dict``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, fx, nn

from graphreg.blocks.block import Block, with_blocks
from graphreg.blocks.homes import opened_paths
from graphreg.blocks.install import outlined
from graphreg.blocks.placed_block import new_owner
from graphreg.compiler.recurrent_lowering import LOWERED, LayerLowering
from graphreg.errors import GraphRegError, TraceError, listed
from graphreg.ir.call_structures import CallStructures, CallText
from graphreg.ir.codegen_fixes import check_argument_names, spelled
from graphreg.ir.metadata import caught_errors
from graphreg.ir.module_record import (
    IGNORED,
    PREFIX,
    RULES,
    STATE,
    ModelFacts,
    ModuleRecord,
    check_model_names,
    plain,
    registered_names,
    reserved,
    state_of,
)
from graphreg.ir.serialize import freeze, thaw
from graphreg.regularizer.base import Regularizer
from graphreg.runtime.build_record import PICKLE_VERSION, VERSION, require_readable
from graphreg.runtime.derivative_penalty import Derivative
from graphreg.runtime.forward import SCRIPTED, chosen, guarded, no_method, signature
from graphreg.runtime.owned_state import watch_optimizers
from graphreg.runtime.result import Kept, Regularized
from graphreg.runtime.runtime_module import Rules
from graphreg.torch_internals import pytree
from graphreg.torch_internals.emitted_code import generate_forward
from graphreg.torch_internals.functorch import enters_levels
from graphreg.torch_internals.fx import define_in_copies, define_named_tuples
from graphreg.torch_internals.modules import COMPILED_CALL, STATE_HOOKS, TENSOR_REGISTRIES, modules_by_path, take_state_version
from graphreg.torch_internals.torch_modes import gradients_switched
from graphreg.tracing.symbolic.tracer import PLAIN

_REMADE = ("_graph", "_code", LOWERED, COMPILED_CALL)  # left out of copies and pickles
_OPTIONS = (*PLAIN, Regularizer)
_COMMON = frozenset(PLAIN)  # to look up exact types, which is quick
# The methods of nn.Module that act on all modules, parameters and buffers, and return the module.
_MODES = ("train", "eval")
_CONVERSIONS = (
    "bfloat16", "cpu", "cuda", "double", "float", "half", "ipu", "mtia", "share_memory", "to", "to_empty", "type", "xpu",
)  # fmt: skip
_OF_ALL = (*_MODES, *_CONVERSIONS, "_apply", "apply", "requires_grad_", "zero_grad")
_NAMED = 6  # how many methods a note lists
OTHER_METHODS = "not the model's methods"  # how the note on other methods that the model's class overrides begins
_OWN = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))  # what every module has
_common: WeakValueDictionary[bytes, type[RewrittenModule]] = WeakValueDictionary()  # shared classes, by a digest of code and structure

for _result in (Regularized, Kept):
    pytree.register_namedtuple(_result, serialized_type_name=f"graphreg.{_result.__name__}")  # torch.export.save writes the name down
    define_in_copies(_result)


class RewrittenModule(fx.GraphModule):
    """The regularized model: a GraphModule that shares the model's layers and has one forward for both modes, or one for each.

    A call returns ``Regularized(output, penalties)``, ``Kept(output, penalties, values)`` if it keeps values, or the output alone where
    penalties attach. Parameters, buffers, ``state_dict`` and the mode are the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        graphs: Mapping[str, fx.Graph],
        rules: Rules | None,
        specialized: Mapping[str, Any],
        constants: Mapping[str, Tensor] | None = None,
        whole_model: bool = True,
        blocks: Collection[str] = (),
        owner: str = "",
        structures: CallStructures | None = None,
        checkpoints: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        """``owner``, ``structures`` and ``checkpoints`` are as in ``ModuleRecord``.

        If ``owner`` is ``""``, the module has block objects in place of the modules that ``blocks`` names."""
        check_model_names(model, plain_too=whole_model)
        # Empty, because torch.fx would copy modules, and they are shared below. ``Impl`` ends the
        # name that torch.fx gives the class of a GraphModule.
        super().__init__(nn.Module(), fx.Graph(), type(model).__name__.removesuffix("Impl"))
        self.__dict__[STATE] = _state(model, dict(specialized))
        self.__dict__[STATE].blocks = tuple(path for path in blocks if path in opened_paths(graphs.values(), blocks))
        self.__dict__[STATE].owner = owner
        self.__dict__[STATE].structures = structures
        self.__dict__[STATE].checkpoints = dict(checkpoints)
        _adopt(self, model)
        if rules is not None:
            self.add_module(RULES, rules)
            # otherwise DDP would overwrite these buffers on every rank with those of rank 0, at every step
            ignored = [name for name in self.__dict__.get(IGNORED, ()) if not name.startswith(f"{RULES}.")]
            self.__dict__[IGNORED] = ignored + [f"{RULES}.{name}" for name, _ in rules.named_buffers(remove_duplicate=False)]
            watch_optimizers(self)
        self.__dict__.update(constants or {})
        _set_graphs(self, dict(graphs))

    @property
    def training(self) -> bool:
        """The mode. A module and its model have one mode, so ``.train()`` and ``.eval()`` of either reach both; a copy has its own."""
        state = self.__dict__.get(STATE)
        if state is None:  # torch.fx is constructing it
            return True
        return bool(state.root[0].training if state.root else state.mode)

    @training.setter
    def training(self, mode: bool) -> None:
        state = self.__dict__.get(STATE)
        if state is not None:
            if state.root:
                state.root[0].training = mode
            state.mode = mode

    @property
    def graph(self) -> fx.Graph:
        """The graph of the mode that the module is in. Edit it in place, then call ``recompile()``."""
        state = self.__dict__.get(STATE)
        return state.graphs[state.running(self.training)] if state is not None and state.graphs else self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        state = self.__dict__.get(STATE)
        if state is not None and state.graphs:
            state.graphs[state.running(self.training)] = graph
        self._graph = graph
        self.recompile()

    @property
    def code(self) -> str:
        """The emitted Python of ``graph``."""
        state = _known(self)
        return state.codes[state.running(self.training)]

    @property
    def compiled_code(self) -> str:
        """The emitted Python that torch.compile gets: like ``code``, but with operators for recurrent layers, and with calls of blocks."""
        state = _known(self)
        return (state.compiled_codes or state.codes)[state.running(self.training)]

    def lowering(self) -> LayerLowering:
        """Return how the module's recurrent layers are lowered when it is compiled."""
        return lowering(self)

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """The graphs by mode: ``both``, or ``train`` and ``eval``."""
        return _known(self).graphs

    def recompile(self) -> Any:
        """Generate the forward of each graph anew, and the forward that chooses between them. Call it after editing a graph."""
        state = self.__dict__.get(STATE)
        if state is None or not state.graphs:  # torch.fx is constructing it
            return super().recompile()
        forwards, compiled = {}, {}

        # A new forward must not reach the modules that share the present class.
        _leave_class(self)
        _give_way(self)
        state.codes, state.compiled_codes, named = {}, {}, list[dict[str, Any]]()
        lowered = lowering(self)
        self.__dict__[LOWERED] = lowered.stand_ins
        sources = {mode: (graph, lowered.lowered(graph) if lowered.layers else None) for mode, graph in state.graphs.items()}
        if state.blocks:
            sources = outlined(self, sources, state.blocks, state.owner, state.checkpoints)
        for mode, graph in reversed(state.graphs.items()):  # so the first graph stays in ``_graph``, which torch.fx prints
            called, called_compiled = sources[mode]
            if called_compiled is not None:
                named.append(_emitted(self, called_compiled).globals)
                compiled[mode], state.compiled_codes[mode] = type(self).forward, self._code
            check_argument_names(graph, "", type(self).__name__)
            named.append((python_code := _emitted(self, called)).globals)
            # torch.fx puts the forward on the class and its text into ``_code``. The next graph
            # replaces both.
            forwards[mode], state.codes[mode] = type(self).forward, self._code
            if state.blocks:
                state.compiled_codes.setdefault(mode, self._code)
                define_named_tuples(graph)
                state.codes[mode] = str(spelled(graph).python_code("self").src)  # what users read has the blocks' operations, too
            check_argument_names(graph, state.codes[mode], type(self).__name__)
            self._graph, graph.owning_module = graph, self
        derivatives = list[str]()
        if isinstance(rules := self._modules.get(RULES), Rules):
            rules.is_edited = rules.build_record is not None  # it is noted at the end of the rewrite
            rules.find_owners(self)
            derivatives = [name for name, child in rules.named_children() if isinstance(child, Derivative)]
        levels = any(enters_levels(node.target) for graph in state.graphs.values() for node in graph.nodes)
        writer = CallText(next(iter(forwards.values())), state.model.specialized, state.structures) if state.structures else None

        caught = frozenset[str]().union(*map(caught_errors, state.graphs.values()))
        switches = any(node.target is gradients_switched for graph in state.graphs.values() for node in graph.nodes)

        # One forward that chooses among those that were generated takes their place.
        type(self).forward = chosen(forwards, compiled or forwards, writer, RULES, derivatives, levels, caught, switches)
        type(self).forward.__signature__ = signature(type(self).forward, self._graph)  # type: ignore[attr-defined]
        type(self).__call__ = guarded(RULES)  # type: ignore[method-assign]
        ids = [{name: id(value) for name, value in each.items()} for each in named]
        _join_class(self, (writer and writer.first, derivatives, sorted(caught), ids))
        return python_code

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile in place, as ``nn.Module.compile`` does.

        Raises GraphRegError for fullgraph=True if a recurrent layer cannot be lowered.
        """
        if options.get("fullgraph") and (refused := lowering(self).refused()):
            raise GraphRegError(refused)
        super().compile(*args, **options)

    def __prepare_scriptable__(self) -> Any:
        raise GraphRegError(SCRIPTED)

    def penalties(self) -> dict[str, Tensor]:
        """Return the values of the last call's penalties by name, detached.

        This is for modules with ``penalties="attach"``. Raises GraphRegError for a module that returns its penalties with its output.
        """
        rules = self._modules.get(RULES)
        attach = rules._modules.get("attach") if rules is not None else None
        if attach is not None:
            return dict(attach.last)  # type: ignore[arg-type]
        record = rules.build_record if isinstance(rules, Rules) else None
        if record is not None and record.penalties == "attach":  # and there is no penalty
            return {}
        raise GraphRegError("this module returns its penalties with its output; penalties() is for penalties='attach'.")

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:  # the emitted code asks for a child at each call of a layer
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            state = self.__dict__.get(STATE)
            if state is not None and name in state.model.methods:
                raise AttributeError(no_method(name, state.model.class_name)) from None
            raise

    def __getstate__(self) -> dict[str, Any]:
        known = _known(self)
        frozen: Any = {mode: freeze(graph) for mode, graph in known.graphs.items()}
        state = {k: v for k, v in self.__dict__.items() if k not in _REMADE}
        state[STATE] = dataclasses.replace(
            known,
            model=dataclasses.replace(known.model, specialized=dict(known.model.specialized)),
            root=(),
            mode=self.training,
            graphs=frozen,
            codes={},
            compiled_codes={},
        )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(dict(state))  # type: ignore[no-untyped-call]
        known = _known(self)
        frozen: Any = known.graphs
        known.graphs = {}
        _set_graphs(self, {mode: thaw(records) for mode, records in frozen.items()})
        watch_optimizers(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self).__name__, PICKLE_VERSION, VERSION), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        twin = _blank(type(self).__name__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __copy__(self) -> RewrittenModule:
        """Share the layers, but copy the runtime modules with strengths and noise: a runtime module follows the mode of one module only."""
        twin, state = _blank(type(self).__name__), self.__getstate__()
        if owner := _known(self).owner:
            owner, state["_modules"] = new_owner(), dict(self._modules)
        else:
            state["_modules"] = with_blocks(self._modules, _known(self).blocks)
        state[STATE].owner = owner
        if (rules := self._modules.get(RULES)) is not None:
            # deepcopy leaves alone what is in its memo: the layers, and what scales the penalties.
            shared: list[Any] = [module for name, child in self.named_children() if name != RULES for module in child.modules()]
            shared += [scale for child in rules.children() if (scale := vars(child).get("scale")) is not None]
            state["_modules"][RULES] = copy.deepcopy(rules, {id(self): twin, **{id(each): each for each in shared}})
        twin.__setstate__(state)
        return twin


def _blank(class_name: str) -> RewrittenModule:
    module = RewrittenModule.__new__(RewrittenModule)
    type(module).__name__ = class_name
    return module


def _unpickled(class_name: str, version: int, made_with: str) -> RewrittenModule:
    """Make the empty module that pickle fills; first refuse a pickle that another version of graphreg made."""
    require_readable(version, made_with)
    return _blank(class_name)


def lowering(module: RewrittenModule) -> LayerLowering:
    """Return how a module's recurrent layers are lowered when it is compiled."""
    return LayerLowering(module, _known(module).graphs.values())


def _known(module: nn.Module) -> ModuleRecord:
    state = state_of(module)
    if state is None:
        raise GraphRegError("this module is incomplete: torch.fx or pickle is still constructing it.")
    return state


def _state(model: nn.Module, specialized: dict[str, Any]) -> ModuleRecord:
    if (existing := state_of(model)) is not None:
        return ModuleRecord(dataclasses.replace(existing.model, specialized=specialized), (model,))
    kind = type(model)
    methods = frozenset(name for name in {*dir(kind)} - {*dir(nn.Module)} if not name.startswith("__"))
    acting = (model,) if any(_overrides(kind, name) for name in _OF_ALL) else ()
    return ModuleRecord(ModelFacts(kind.__name__, methods, specialized, acting), (model,))


def _overrides(kind: type, name: str) -> bool:
    return getattr(kind, name) is not getattr(nn.Module, name)


def unlike_the_model(model: nn.Module) -> str:
    """Name the methods of nn.Module that a model's class overrides and that a rewritten module does not have; ``""`` if there are none."""
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "graphreg", "builtins")]
    known = {*_OF_ALL, "forward", "extra_repr"}
    found = dict.fromkeys(name for kind in kinds for name in vars(kind) if callable(getattr(nn.Module, name, None)))
    names = [name for name in found if not name.startswith("__") and name not in known]
    if not names:
        return ""
    return f"{OTHER_METHODS}: {listed(names, _NAMED)}. {type(model).__name__} overrides them, and this module has those of nn.Module"


def _of_all(name: str) -> Callable[..., Any]:
    """Return a method of RewrittenModule that calls the model's own, if the model's class overrides it.

    Layers that were replaced or added in the rewritten module follow, and what graphreg has added.
    """

    @functools.wraps(getattr(nn.Module, name))
    def method(self: RewrittenModule, *args: Any, **kwargs: Any) -> Any:
        acting = _known(self).model.acting
        # FSDP derives a class whose ``_apply`` must see each conversion
        is_derived = name in _CONVERSIONS and type(self)._apply is not RewrittenModule._apply
        if not acting or not _overrides(type(acting[0]), name) or is_derived:
            return getattr(super(RewrittenModule, self), name)(*args, **kwargs)

        (model,) = acting
        result = getattr(model, name)(*args, **kwargs)
        _act_on_others(self, model, set(model.modules()), name, args, kwargs)
        if name in _MODES:
            self.training = model.training
        return self if result is model else result

    return method


def _act_on_others(
    module: nn.Module, model: nn.Module | None, theirs: set[nn.Module], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Call a method that acts on all modules on those below ``module`` that the model does not have.

    ``model``: the model's module in the same place. In a mode that the model gives it, a layer that replaced it is, too. ``theirs``: all
    modules of the model.
    """
    for key, child in module._modules.items():
        if child is None or child in theirs:
            continue
        their = None if model is None else model._modules.get(key)
        if isinstance(child, Block):  # its parameters and buffers are those of the model's module
            if name in _MODES and their is not None:
                child.training = their.training
        elif theirs.isdisjoint(child.modules()):
            getattr(child, name)(*args, **kwargs)
            if name in _MODES and their is not None and child.training != their.training:
                child.train(their.training)
            continue
        else:  # it contains layers of the model, on which the model has acted
            alone = nn.Module()
            vars(alone).update({**vars(child), "_modules": {}})
            getattr(alone, name)(*args, **kwargs)
            child.training = alone.training
        _act_on_others(child, their, theirs, name, args, kwargs)


for _name in _OF_ALL:
    setattr(RewrittenModule, _name, _of_all(_name))


def _adopt(module: RewrittenModule, model: nn.Module) -> None:
    """Copy the model's attributes. The dicts of parameters and of buffers are shared instead, so that ``.to()`` of either moves both."""
    attributes = plain(model)
    module.__dict__.update({n: v for n, v in attributes.items() if (n not in reserved() or n == IGNORED) and not n.startswith(PREFIX)})
    for name in TENSOR_REGISTRIES:
        module.__dict__[name] = model.__dict__[name]
    # In place, graphs call the model's own modules as blocks, and need no objects in their place.
    children = {name: child for name, child in model._modules.items() if name != RULES}
    module.__dict__["_modules"] = children if _known(module).owner else with_blocks(children, _known(module).blocks)
    module.__dict__["meta"] = dict(meta) if isinstance(meta := attributes.get("meta"), dict) else {}
    for name in STATE_HOOKS:
        module.__dict__[name] = copy.copy(model.__dict__[name])
    take_state_version(module, model)  # otherwise the version of GraphModule would be in state_dict()._metadata


def _leave_class(module: RewrittenModule) -> None:
    """Give the module a class of its own, for a new forward; modules that shared the old class keep the old one."""
    kind = type(module)
    if "graphreg_common" in vars(kind):
        module.__class__ = type(_blank(kind.__name__))
    elif kind.__bases__ != (RewrittenModule,) and "graphreg_own_class" not in vars(kind):  # FSDP made it for all modules of a kind
        module.__class__ = type(kind.__name__, (kind,), {"graphreg_own_class": True})


def _join_class(module: RewrittenModule, references: tuple[Any, ...]) -> None:
    """Give modules of the same code and structure one class, which ``torch.func.stack_module_state`` requires.

    The same code alone is not enough: Dynamo compiles a code object for eight different structures, and then no more. ``references``
    includes the ids of the objects that the forward of the class refers to.
    """
    state, kind = _known(module), type(module)
    # Another library has derived a class of its own, such as FSDP.
    if kind.__bases__ != (RewrittenModule,):
        return
    ours = [name for name in vars(kind) if name in vars(RewrittenModule)]
    source = (state.model.class_name, sorted(state.model.methods))
    key = hashlib.blake2b(repr((kind.__name__, source, sorted(ours), references, _structure(module))).encode())
    for mode, code in (*state.codes.items(), *state.compiled_codes.items()):
        # With its length, so that two texts cannot run together to the same bytes as two others.
        key.update(f"\0{mode}\0{len(code)}\0{code}".encode())
    common = _common.setdefault(key.digest(), kind)
    if common is not kind:
        module.__class__ = common
    else:
        kind.graphreg_common = True  # type: ignore[attr-defined]


def _give_way(module: RewrittenModule) -> None:
    """If the model has an attribute with a name of this class (``penalties``, ``graphs``), let the name mean the model's attribute."""
    ours = {name for name in vars(RewrittenModule) if not name.startswith("_")} - reserved() - set(dir(nn.Module))
    for name in ours.intersection((*registered_names(module), *module.__dict__)):
        if name == "penalties" and getattr(module._modules.get(RULES), "attach", None) is not None:
            raise TraceError(
                f"{type(module).__name__} has something called 'penalties', but with penalties='attach', module.penalties() must return "
                "the last values. Rename it in the model, or give penalties='return'."
            )
        setattr(type(module), name, _theirs(name))


def _theirs(name: str) -> property:
    def get(module: nn.Module) -> Any:
        kinds = (module.__dict__, module._parameters, module._buffers, module._modules)
        return next(kind[name] for kind in kinds if name in kind)

    def put(module: nn.Module, value: Any) -> None:
        module.__dict__[name] = value

    return property(get, put)


def _set_graphs(module: RewrittenModule, graphs: dict[str, fx.Graph]) -> None:
    _known(module).graphs = graphs
    module.recompile()


def _emitted(module: RewrittenModule, graph: fx.Graph) -> Any:
    """Generate the class's forward from a graph. This function is not a method, because the model may have an attribute of any name."""
    define_named_tuples(graph)
    module._graph = spelled(graph)
    try:
        return generate_forward(module)
    except SyntaxError as error:
        raise TraceError(
            f"the code of {type(module).__name__}'s graph would be no Python: {(error.text or '').strip()}. The graph holds an object that "
            "torch.fx writes down by its repr. Make the object outside of the forward, in a submodule or in a function that is marked with "
            "torch.fx.wrap."
        ) from error


def _structure(module: nn.Module) -> list[Any]:
    """Describe what a compiled graph of a module depends on, besides its code: shapes, layers and their options."""
    structure: list[Any] = []
    regularizers: dict[str, int] = {}  # a number for each text: a regularizer's text may list many sites, and it is at each of them
    texts: dict[int, str] = {}  # by id of a regularizer

    def text(value: Regularizer) -> str:
        if id(value) not in texts:
            texts[id(value)] = f"regularizer {regularizers.setdefault(repr(value), len(regularizers))}"
        return texts[id(value)]

    for path, inner in modules_by_path(module).items():
        attributes = {} if inner is module or isinstance(inner, Rules) else vars(inner)  # the code reads only their tensors
        plain = [
            (name, value) for name, value in attributes.items()
            if (type(value) in _COMMON or (name not in _OWN and _is_option(value))) and name != "training"
        ]  # fmt: skip
        options = sorted((name, repr(text(value) if isinstance(value, Regularizer) else value)) for name, value in plain)
        named = (*inner._parameters.items(), *inner._buffers.items())
        tensors = [(name, x.shape, x.dtype, x.device, x.requires_grad) for name, x in named if x is not None]
        structure.append((path, type(inner) if inner is not module else None, options, tensors))
    return [*structure, list(regularizers)]


def _is_option(value: Any) -> bool:
    return all(map(_is_option, value)) if isinstance(value, tuple) else isinstance(value, _OPTIONS)
