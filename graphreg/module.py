"""The module that comes back: the user's model as far as a graph can be it, with both modes in it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from graphreg.derivatives import Derivative
from graphreg.errors import GraphRegError
from graphreg.forward import chosen, guarded, signature
from graphreg.inductor import with_our_pass
from graphreg.lowering import LOWERED, Lowering
from graphreg.rules import Rules
from graphreg.storage import freeze, thaw

RULES = "graphreg_rules"
_REMADE = ("_graph", "_graphs", "_code", "codes", "compiled_codes", LOWERED, "_compiled_call_impl", "_root")  # not copied, not pickled
_EMPTY = frozenset(nn.Module().__dict__)
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class Regularized(NamedTuple):
    """What a rewritten module returns: the model's own output, and the penalties, already weighted."""

    output: Any
    penalties: dict[str, Tensor]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this is (output, penalties), which has no {name!r}. Write output, penalties = module(x), or regularize with "
            "penalties='attach' to get the output alone."
        )


class RewrittenModule(fx.GraphModule):
    """A GraphModule that shares the model's layers and holds one forward for both modes, or one for each."""

    def __init__(
        self,
        model: nn.Module,
        graphs: Mapping[str, fx.Graph],
        rules: Rules | None,
        held: Mapping[str, Any],
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), type(model).__name__.removesuffix("Impl"))
        self._adopt(model)
        if rules is not None:
            self.add_module(RULES, rules)
            # DDP would broadcast rank 0's buffers over all ranks' at every step
            self._ddp_params_and_buffers_to_ignore = [f"{RULES}.{name}" for name, _ in rules.named_buffers(remove_duplicate=False)]
        self.__dict__.update(constants or {})
        self.held = dict(held)
        self._set_graphs(dict(graphs))

    def _adopt(self, model: nn.Module) -> None:
        """Take over what the model has. The dicts of parameters and buffers are shared, so that ``.to()`` reaches both."""
        own = isinstance(model, RewrittenModule)
        kind = type(model)
        methods = frozenset(n for n in dir(kind) if not n.startswith("__") and n not in dir(nn.Module))
        self._source: tuple[str, frozenset[str]] = model.__dict__["_source"] if own else (kind.__name__, methods)
        self._root = (model,)  # its mode is this module's mode
        # A root that overrides train() (to keep a backbone frozen) is still asked: a graph cannot carry its method.
        own_train = kind.train is not nn.Module.train and not own
        self._trainer: tuple[nn.Module, ...] = (model,) if own_train else getattr(model, "_trainer", ())
        taken = {*_EMPTY, *self.__dict__, *dir(fx.GraphModule), "forward"}
        if not isinstance(model, fx.GraphModule):  # plain attributes of the class, which methods would have read
            values = {name: inspect.getattr_static(kind, name) for name in methods}
            self.__dict__.update({n: v for n, v in values.items() if n not in taken and not hasattr(type(v), "__get__")})
        self.__dict__.update({name: value for name, value in model.__dict__.items() if name not in taken})
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = model.__dict__[name]
        self.__dict__["_modules"] = {name: child for name, child in model._modules.items() if name != RULES}
        self._brought = isinstance(model, fx.GraphModule) and model.__dict__.get("_brought", True)  # a graph of the user's
        self.meta = dict(model.meta) if isinstance(model, fx.GraphModule) else {}
        for name in _STATE_HOOKS:
            self.__dict__[name] = copy.copy(model.__dict__[name])
        self._version = model._version  # GraphModule's own would go into state_dict()._metadata

    @property
    def training(self) -> bool:
        """The mode: that of the model, as long as both live, so that ``.train()`` and ``.eval()`` of either reach both."""
        root = self.__dict__.get("_root")
        return bool(root[0].training if root else self.__dict__.get("_mode", True))

    @training.setter
    def training(self, mode: bool) -> None:
        root = self.__dict__.get("_root")
        if root:
            root[0].training = mode
        self.__dict__["_mode"] = mode

    def _set_graphs(self, graphs: dict[str, fx.Graph]) -> None:
        self.__dict__["_graphs"] = graphs
        self.recompile()

    @property
    def graph(self) -> fx.Graph:
        """The graph that runs: of the two, that of the mode the module is in. Edit it in place, then ``recompile()``."""
        graphs = self.__dict__.get("_graphs")
        return graphs[self._running()] if graphs else self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        if "_graphs" in self.__dict__:
            self.graphs[self._running()] = graph
        self._graph = graph
        self.recompile()

    @property
    def code(self) -> str:
        """The emitted Python of ``graph``."""
        return str(self.codes[self._running()])

    @property
    def compiled_code(self) -> str:
        """The emitted Python that torch.compile is given: that of ``graph``, with an operator for each recurrent layer."""
        return str((self.compiled_codes or self.codes)[self._running()])

    def lowering(self) -> Lowering:
        """What becomes of the module's recurrent layers when it is compiled."""
        return Lowering(self, (self.__dict__.get("_graphs") or {"both": self._graph}).values())

    def _running(self) -> str:
        return "both" if "both" in self.graphs else "train" if self.training else "eval"

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """The graphs by mode: ``both``, or ``train`` and ``eval``."""
        graphs: dict[str, fx.Graph] = self.__dict__["_graphs"]
        return graphs

    def recompile(self) -> Any:
        """Generate the forward of each graph anew, and the one that chooses between them."""
        graphs = self.__dict__.get("_graphs") or {"both": self._graph}
        forwards, codes, compiled, compiled_codes = {}, {}, {}, {}
        lowering = self.lowering()
        self.__dict__[LOWERED] = lowering.stand_ins
        for mode, graph in reversed(graphs.items()):  # the first stays as ``_graph``, which torch.fx prints
            if lowering.layers:
                self._graph = lowering.lowered(graph)
                super().recompile()
                compiled[mode], compiled_codes[mode] = type(self).forward, self._code
            self._graph = graph
            graph.owning_module = self
            python_code = super().recompile()
            forwards[mode], codes[mode] = type(self).forward, self._code
        self.codes, self.compiled_codes = dict(reversed(codes.items())), dict(reversed(compiled_codes.items()))
        held = self.__dict__.get("held", {})
        optional = [str(n.target) for n in self._graph.nodes if n.op == "placeholder" and n.args and not self.__dict__.get("_brought")]
        carried, derivatives = [name for name in optional if name not in held], list[str]()
        if isinstance(rules := self._modules.get(RULES), Rules):
            rules.own(self)
            derivatives = [name for name, leaf in rules.named_children() if isinstance(leaf, Derivative)]
        type(self).forward = chosen(forwards, compiled or forwards, held, carried, RULES, derivatives)
        type(self).forward.__signature__ = signature(type(self).forward, self._graph)  # type: ignore[attr-defined]
        type(self).__call__ = guarded(RULES)  # type: ignore[method-assign]
        return python_code

    def train(self, mode: bool = True) -> RewrittenModule:
        if not self._trainer:
            return super().train(mode)
        self._trainer[0].train(mode)
        self.training = mode
        return self

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile in place, as ``nn.Module.compile`` does; under Inductor with the passes of ``graphreg/inductor.py``.

        Raises GraphRegError for fullgraph=True and a recurrent layer that is not lowered.
        """
        if options.get("fullgraph") and (refused := self.lowering().refused()):
            raise GraphRegError(refused)
        rules = self._modules.get(RULES)
        differentiates = rules is not None and any(isinstance(leaf, Derivative) for leaf in rules.children())
        super().compile(*args, **(options if args else with_our_pass(options, differentiates)))

    def penalties(self) -> dict[str, Tensor]:
        """The values of the last call's penalties, detached; for ``penalties="attach"``."""
        attach = getattr(getattr(self, RULES, None), "attach", None)
        if attach is None:
            raise GraphRegError("this module returns its penalties with its output; penalties() is for penalties='attach'.")
        return dict(attach.last)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model, known = self.__dict__.get("_source", ("", ()))
            if name in known:
                raise AttributeError(_no_method(name, model)) from None
            raise

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in _REMADE}
        state["_mode"] = self.training
        state["_frozen"] = {mode: freeze(graph) for mode, graph in self.graphs.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        frozen = state.pop("_frozen")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_graphs({mode: thaw(records) for mode, records in frozen.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self).__name__,), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        twin = _blank(type(self).__name__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __copy__(self) -> RewrittenModule:
        twin = _blank(type(self).__name__)
        twin.__setstate__(self.__getstate__())
        return twin


def _no_method(name: str, model: str) -> str:
    """What to do about a method of the model: the layers are shared, the forward is not."""
    if "checkpointing" in name and not name.startswith("is_"):  # a flag that a forward reads, when it is traced
        advice = (
            "Call it on the model before graphreg.regularize: blocks that checkpoint in their own forward (transformers') are then called "
            "as they are, and their insides are no sites; a root that checkpoints its blocks (timm's) is refused. Called now it would "
            "change nothing here."
        )
    else:
        advice = (
            f"Call it on the model itself, which shares its layers with this module. If {name} changes what the model's forward does, or "
            "which modules it has, this graph does not follow: then regularize the model again."
        )
    return f"{name!r} belongs to {model}, and a graph has no method but its forward. {advice}"


def _blank(class_name: str) -> RewrittenModule:
    module = RewrittenModule.__new__(RewrittenModule)
    type(module).__name__ = class_name
    return module
