"""The record that graphreg attaches to a rewritten module, and a check that no name in the model conflicts with a reserved name.

A rewritten module is a GraphModule with all attributes of the model. GraphModule and graphreg add attributes, too, and an attribute of
the model may have the same name as one of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import fx, nn

from graphreg.errors import TraceError
from graphreg.ir.call_structures import CallStructures
from graphreg.torch_internals.modules import REGISTERED

PREFIX = "graphreg_"  # begins the name of each attribute that graphreg adds
STATE = "graphreg_state"
RULES = "graphreg_rules"
ORIGINAL = "graphreg_original"  # an attribute of the class that ``regularize_`` generates for a model: the model's own class
MEMBERS = "graphreg_members"  # an attribute of the same class: the names of its attributes when it was made
RESTS = "__graphreg_rests__"  # the same, of the class that a model in place has during a trace
PLACED = "graphreg_in_place"  # the attribute of a model that is regularized in place
IGNORED = "_ddp_params_and_buffers_to_ignore"  # an attribute that DistributedDataParallel reads
_EMPTY = frozenset((*dir(nn.Module()), "_abc_impl"))  # the latter is Python's, of each class that derives from ``abc.ABC``
# Reserved names that a model may use for values of these types.
_CARRIED: dict[str, tuple[type, ...]] = {"meta": (dict,), IGNORED: (list, tuple, set)}


@dataclass(frozen=True)
class ModelFacts:
    """What a rewritten module records about the model it was made from.

    Attributes:
        class_name: The name of the model's class.
        methods: The names of that class's methods, which the rewritten module does not have.
        specialized: The specialized arguments by name, with the values at which the graph fixes them.
        acting: A tuple that contains the model, if its class overrides a method that acts on all modules, such as ``train()``; else ().
    """

    class_name: str
    methods: frozenset[str]
    specialized: dict[str, Any]
    acting: tuple[nn.Module, ...]


@dataclass
class ModuleRecord:
    """The record that graphreg stores in the ``__dict__`` of a rewritten module.

    Attributes:
        model: Facts about the model.
        root: A tuple that contains the model, whose mode the module shares; an empty tuple in a copy and after unpickling.
        mode: Whether the module is in train mode. Used only if ``root`` is empty.
        graphs: The graphs by mode: ``both``, or ``train`` and ``eval``.
        codes: The emitted Python of each graph, by mode.
        compiled_codes: The emitted Python that torch.compile gets for each graph, by mode; empty if it is the same as ``codes``.
        blocks: The paths of the blocks: the modules that the emitted code still calls as modules.
        structures: The structures of arguments that the module accepts; None if it accepts all, as a module of a GraphModule does.
        checkpoints: The blocks that run with activation checkpointing because the model checkpoints their calls: by path, whether the
            checkpoint is reentrant.
        owner: In place, where the blocks are the model's own modules, the name by which they know this rewritten module; else ``""``.
    """

    model: ModelFacts
    root: tuple[nn.Module, ...]
    mode: bool = True
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    compiled_codes: dict[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    owner: str = ""
    structures: CallStructures | None = None
    checkpoints: Mapping[str, bool] = field(default_factory=dict)

    def running(self, training: bool) -> str:
        """Return the key in ``graphs`` of the graph that runs in the mode ``training`` (True for train mode, False for eval mode)."""
        return "both" if "both" in self.graphs else "train" if training else "eval"


def state_of(module: nn.Module) -> ModuleRecord | None:
    """Return the record of a rewritten module; None for any other module."""
    state = module.__dict__.get(STATE)
    return state if isinstance(state, ModuleRecord) else None


def specialized_arguments(module: nn.Module) -> dict[str, Any]:
    """Return the specialized arguments of a rewritten module by name; an empty dict for any other module."""
    state = state_of(module)
    return dict(state.model.specialized) if state is not None else {}


def traced_model(module: nn.Module) -> nn.Module | None:
    """Return the model that a rewritten module was traced from, or that what it was made from was; None after pickling or copying."""
    while (state := state_of(module)) is not None:
        if not state.root:
            return None
        module = state.root[0]
    return module


@cache
def reserved() -> frozenset[str]:
    """Return ``IGNORED`` and the names of the attributes that every GraphModule has, but not every nn.Module."""
    blank = fx.GraphModule(nn.Module(), fx.Graph())
    return frozenset({*dir(blank), *vars(blank), IGNORED} - _EMPTY)


def registered_names(model: nn.Module) -> Iterator[str]:
    """Yield the names of a module's own parameters, buffers and submodules, but not the names of those in its submodules."""
    for kind in REGISTERED:
        yield from model.__dict__.get(kind, ())


def plain(model: nn.Module) -> Mapping[str, Any]:
    """Return the plain attributes of a model: the constants of its class, and the instance's own attributes.

    A method reads both by ``self``. For a GraphModule, return the instance's attributes alone.
    """
    attributes: dict[str, Any] = {}
    if not isinstance(model, fx.GraphModule):
        for name in set(dir(type(model))) - _EMPTY:
            value = inspect.getattr_static(type(model), name)
            if not name.startswith("__") and not hasattr(type(value), "__get__"):
                attributes[name] = value
    return attributes | {name: value for name, value in model.__dict__.items() if name not in _EMPTY}


def check_model_names(model: nn.Module, plain_too: bool = True) -> None:
    """Raise TraceError if the model has a name that a rewritten module cannot have, because torch.fx or graphreg uses it.

    ``plain_too``: whether to check the names of plain attributes as well as of parameters, buffers and submodules.
    """
    allowed = (STATE, RULES) if isinstance(model, fx.GraphModule) else ()
    attributes = plain(model) if plain_too and not isinstance(model, fx.GraphModule) else {}
    for name in (*registered_names(model), *attributes):
        value = attributes.get(name)
        if name in reserved() and not isinstance(value, _CARRIED.get(name, ())):
            raise TraceError(
                f"{type(model).__name__} has something called {name!r}, and a rewritten module is a torch.fx.GraphModule, which has an "
                "attribute of that name itself. Rename it in the model."
            )
        if name == "self":
            raise TraceError(
                f"{type(model).__name__} has something called 'self', and in the code that torch.fx emits that is the module itself. "
                "Rename it in the model."
            )
        if name.startswith(PREFIX) and name not in allowed:
            raise TraceError(
                f"{type(model).__name__} has something called {name!r}, and names that begin with {PREFIX} are reserved for what graphreg "
                "adds to a model. Rename it in the model."
            )
