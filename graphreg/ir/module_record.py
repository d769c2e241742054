"""The record that graphreg attaches to a rewritten module, and the check that the model's own names leave room for it.

A rewritten module is a GraphModule that has everything the model has, so each attribute more is a name that a model may have too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import fx, nn

from graphreg.errors import TraceError

PREFIX = "graphreg_"  # what begins so is ours
STATE = "graphreg_state"
RULES = "graphreg_rules"
IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel asks a module for
_EMPTY = frozenset(dir(nn.Module()))
_CARRIED: dict[str, tuple[type, ...]] = {"meta": (dict,), IGNORED: (list, tuple, set)}  # the model's own, of the type that torch has there
_REGISTERED = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class ModelFacts:
    """What a module that graphreg made remembers of the model.

    Attributes:
        class_name: The name of the model's class.
        methods: The names of its methods, which a graph does not have.
        specialized: The arguments that were fixed at their value.
        is_graph: Whether the graph is the user's own, of a GraphModule that was given.
        trainer: The model, where its class overrides ``train()``; else nothing.
    """

    class_name: str
    methods: frozenset[str]
    specialized: dict[str, Any]
    is_graph: bool
    trainer: tuple[nn.Module, ...]


@dataclass
class State:
    """What graphreg keeps on a module that it made, in one entry of its ``__dict__``.

    Attributes:
        model: what is known of the model.
        root: the model, whose mode the module shares, as long as both live.
        mode: whether the module is in train mode, where there is no root.
        graphs: by mode: ``both``, or ``train`` and ``eval``.
        codes: the emitted Python of each graph.
        compiled_codes: the Python that torch.compile is given for each.
    """

    model: ModelFacts
    root: tuple[nn.Module, ...]
    mode: bool = True
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    compiled_codes: dict[str, str] = field(default_factory=dict)

    def running(self, training: bool) -> str:
        """The name of the graph that runs in a mode."""
        return "both" if "both" in self.graphs else "train" if training else "eval"


def state_of(module: nn.Module) -> State | None:
    """The record of a module that graphreg made; None for any other."""
    state = module.__dict__.get(STATE)
    return state if isinstance(state, State) else None


def specialized_arguments(module: nn.Module) -> dict[str, Any]:
    """The specialized arguments of a module, by name; none for a module that graphreg did not make."""
    state = state_of(module)
    return dict(state.model.specialized) if state is not None else {}


@cache
def reserved() -> frozenset[str]:
    """The attribute names that torch itself uses in every GraphModule."""
    blank = fx.GraphModule(nn.Module(), fx.Graph())
    return frozenset({*dir(blank), *vars(blank), IGNORED} - _EMPTY)


def registered(model: nn.Module) -> Iterator[str]:
    """The names of the parameters, buffers and submodules of a module itself."""
    for kind in _REGISTERED:
        yield from model.__dict__.get(kind, ())


def plain(model: nn.Module) -> Mapping[str, Any]:
    """The plain attributes of a model: those of its class, which methods would have read, and its own."""
    attributes: dict[str, Any] = {}
    if not isinstance(model, fx.GraphModule):
        for name in set(dir(type(model))) - _EMPTY:
            value = inspect.getattr_static(type(model), name)
            if not name.startswith("__") and not hasattr(type(value), "__get__"):
                attributes[name] = value
    return attributes | {name: value for name, value in model.__dict__.items() if name not in _EMPTY}


def check_names(model: nn.Module, plain_too: bool = True) -> None:
    """Refuse what the rewritten module could not have under the model's name for it: torch.fx has another meaning for that name, or
    graphreg has."""
    allowed = (STATE, RULES) if isinstance(model, fx.GraphModule) else ()
    attributes = plain(model) if plain_too and not isinstance(model, fx.GraphModule) else {}
    for name in (*registered(model), *attributes):
        value = attributes.get(name)
        if name in reserved() and not isinstance(value, _CARRIED.get(name, ())):
            raise TraceError(
                f"{type(model).__name__} has something called {name!r}, and a rewritten module is a torch.fx.GraphModule, where "
                f"torch has something of its own under that name. Rename it in the model."
            )
        if name == "self":
            raise TraceError(
                f"{type(model).__name__} has something called 'self', and in the code that torch.fx emits that is the module itself. "
                "Rename it in the model."
            )
        if name.startswith(PREFIX) and name not in allowed:
            raise TraceError(
                f"{type(model).__name__} has something called {name!r}, and names that begin with {PREFIX} are those of what graphreg "
                "adds to a model. Rename it in the model."
            )
