"""Finds native dropout: every operation of the model itself that draws random numbers. Nothing here changes a graph.

torch's dropouts, stochastic depth and attention dropout can be moved: they
can draw from graphreg's streams instead of torch's generator. Any other random operation is listed
with the reason why it cannot be moved.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphreg.ir.metadata import draw_labels, scope_of
from graphreg.ir.operations import Operations, function_name, is_drop_path
from graphreg.ir.site import Label, Site
from graphreg.ir.train_eval import ModeGraphs, choose
from graphreg.torch_internals.modules import OWN_ATTRIBUTES, forward_hooks
from graphreg.torch_internals.operators import OpOverload, OpOverloadPacket, overloads_of, schema_of
from graphreg.torch_internals.random_state import with_draws_restored
from graphreg.torch_internals.torch_modes import without_modes

DropoutKind = Literal["element", "channel", "alpha", "channel alpha", "depth", "attention", "heads", "layer"]
When = Literal["mode", "always", "never"]

ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_VF = ("input", "p", "train")
FUNCTIONS: dict[Callable[..., Any], tuple[DropoutKind, tuple[str, ...]]] = {
    F.dropout: ("element", ("input", "p", "training", "inplace")),
    F.dropout1d: ("channel", ("input", "p", "training", "inplace")),
    F.dropout2d: ("channel", ("input", "p", "training", "inplace")),
    F.dropout3d: ("channel", ("input", "p", "training", "inplace")),
    F.alpha_dropout: ("alpha", ("input", "p", "training", "inplace")),
    F.feature_alpha_dropout: ("channel alpha", ("input", "p", "training", "inplace")),
    torch.dropout: ("element", _VF), torch.dropout_: ("element", _VF),
    torch.feature_dropout: ("channel", _VF), torch.feature_dropout_: ("channel", _VF),
    torch.alpha_dropout: ("alpha", _VF), torch.alpha_dropout_: ("alpha", _VF),
    torch.feature_alpha_dropout: ("channel alpha", _VF), torch.feature_alpha_dropout_: ("channel alpha", _VF),
    F.scaled_dot_product_attention: ("attention", ATTENTION),
    F.multi_head_attention_forward: ("heads", tuple(inspect.signature(F.multi_head_attention_forward).parameters)),
}  # fmt: skip
MODULES: dict[type, DropoutKind] = {
    nn.Dropout: "element", nn.Dropout1d: "channel", nn.Dropout2d: "channel", nn.Dropout3d: "channel",
    nn.AlphaDropout: "alpha", nn.FeatureAlphaDropout: "channel alpha", nn.MultiheadAttention: "heads",
}  # fmt: skip
# Functions that draw and that are no operators of torch, so that no tag says it.
COMPOSED = {
    "gumbel_softmax", "drop_block2d", "drop_block3d", "fractional_max_pool2d", "fractional_max_pool3d",
    "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices", "svd_lowrank", "pca_lowrank", "lobpcg",
}  # fmt: skip
DEPTH = ("input", "p", "mode", "training")


@dataclass(frozen=True)
class NativeDropout:
    """One native dropout: an operation of the model that draws random numbers.

    Attributes:
        site: The operation's output.
        kind: What it drops. ``"layer"`` stands for dropout inside a recurrent layer, for other
            random operations, and for an opaque module that draws random numbers.
        rate: The rate, in [0, 1]; None if the graph does not show it, or if there is none.
        when: ``"mode"`` if it acts when the module at ``path`` is in train mode, else ``"always"``
            or ``"never"``.
        path: The path of the module whose mode it follows.
        why_not: Why it cannot be moved to graphreg's streams; ``""`` if it can.
        function: The bare name of the function, if the dropout is a function call that can be
            moved; else ``""``.
        names: The names of that function's parameters.
    """

    site: Site
    kind: DropoutKind
    rate: float | None
    when: When = "mode"
    path: str = ""
    why_not: str = ""
    function: str = ""
    names: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The dropout in one line: name, operation and rate, then why it cannot be moved, or that it always or never acts."""
        rate = "" if self.rate is None else f" {self.rate:g}"
        more = f" cannot be moved: {self.why_not}" if self.why_not else "" if self.when == "mode" else f", {self.when} acts"
        return f"{self.site.name} ({self.site.op}{rate}){more}"


def find_native_dropouts(
    graphs: ModeGraphs, operations: Operations, opaque: Mapping[str, str], constants: Mapping[str, Any] | None = None
) -> tuple[NativeDropout, ...]:
    """Return the native dropouts in graph order, each once.

    ``opaque``: path of each opaque module -> the reason why it is opaque. ``constants``: the attributes that the graphs read and that the
    model does not have, such as the bodies of checkpointed regions.
    """
    dropouts: dict[str, NativeDropout] = {}
    bodies = {**operations.modules, **(constants or {})}
    for graph in graphs.values():
        for node in graph.nodes:
            for dropout in _native_dropouts(node, operations, opaque, bodies):
                dropouts.setdefault(dropout.site.name, dropout)
    return tuple(dropouts.values())


def _native_dropouts(node: fx.Node, operations: Operations, opaque: Mapping[str, str], bodies: Mapping[str, Any]) -> list[NativeDropout]:
    module, name = operations.module(node), function_name(node)
    inside = _draws_in_bodies(node, bodies)
    if module is None and not inside and not is_random(node):
        return []
    known = node.meta.get("value")
    shape, dtype = known if isinstance(known, tuple) else (None, None)
    site = Site(draw_labels(node), module=scope_of(node), shape=shape, dtype=dtype)
    if module is not None:
        dropout = _of_module(site, str(node.target), module)
        return [dropout] if dropout else _inside(site, str(node.target), module, opaque)
    if inside:
        why_not = f"it draws random numbers by {', '.join(inside)}, in code that the graph calls as one operation, such as a checkpoint"
        return [NativeDropout(site, "layer", None, why_not=why_not)]
    if _is_depth(node):
        return _of_function(site, node, "depth", DEPTH)
    if _known_function(node) is not None:
        return _of_function(site, node, *FUNCTIONS[_known_function(node)])
    return _of_operator(site, node, name)


def is_random(node: fx.Node) -> bool:
    """Return whether a node calls a function or method that can draw random numbers: one of those above, or an operator that torch tags."""
    if node.op not in ("call_function", "call_method"):
        return False
    known = function_name(node) in COMPOSED or _is_depth(node) or _known_function(node) is not None
    return known or bool(_random_overloads(_operator(node)))


def _is_depth(node: fx.Node) -> bool:
    return function_name(node) == "stochastic_depth" and getattr(node.target, "__module__", "").startswith("torchvision.")


def _draws_in_bodies(node: fx.Node, bodies: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the random operations in the graphs that a node gets as arguments, as a checkpointed region gets its body."""
    read = [bodies.get(str(each.target)) for each in node.all_input_nodes if each.op == "get_attr"] if node.op == "call_function" else []
    found = dict[str, None]()
    for body in read:
        if isinstance(body, fx.GraphModule):
            further = dict(body.named_modules())
            for inner in body.graph.nodes:
                found.update(dict.fromkeys(_draws_in_bodies(inner, further)))
                if is_random(inner) and _acts(inner):
                    found[function_name(inner)] = None
    return tuple(found)


def _known_function(node: fx.Node) -> Any:
    """Return the key of ``FUNCTIONS`` that a node calls, also as the operator of that name (``torch.ops.aten.dropout``); else None."""
    if node.op != "call_function":
        return None
    target: Any = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)) and str(target).startswith("aten."):
        name = function_name(node)
        target = getattr(torch, name, getattr(F, name, None))
    return target if target in FUNCTIONS else None


def _operator(node: fx.Node) -> OpOverload | OpOverloadPacket | str:
    return node.target if isinstance(node.target, (OpOverload, OpOverloadPacket)) else function_name(node)


@cache
def _random_overloads(operator: OpOverload | OpOverloadPacket | str) -> tuple[OpOverload, ...]:
    """Return the overloads of an operator, or of the aten operator with this name, that torch tags as drawing random numbers."""
    return tuple(overload for overload in overloads_of(operator) if torch.Tag.nondeterministic_seeded in overload.tags)


def _of_operator(site: Site, node: fx.Node, name: str) -> list[NativeDropout]:
    """Return the native dropout of a function that draws and that cannot be moved, unless its arguments say that it never draws."""
    if not _acts(node):
        return []
    modes = [_mode_of(_first_of(arguments, ("training", "train"))) for arguments in _arguments(node)]
    why_not = f"it draws random numbers by {name}, which is no dropout that graphreg knows"
    return [NativeDropout(site, "layer", None, path=next(filter(None, modes), ""), why_not=why_not)]


def _acts(node: fx.Node) -> bool:
    """Return whether a function that can draw may draw with the arguments that the graph shows."""
    rates = ("dropout_p", "dropout", "p") if "dropout" in function_name(node) else ("dropout_p", "dropout")
    acts = []
    for arguments in _arguments(node):
        rate, training, layers = _first_of(arguments, rates), _first_of(arguments, ("training", "train")), arguments.get("num_layers")
        # arguments of other types are those of another overload
        if not isinstance(rate, bool) and (isinstance(training, bool) or not isinstance(training, (int, float))):
            # a recurrent layer drops between its stacked layers
            acts.append(training is not False and (rate is None or (rate != 0 and layers != 1)))
    return any(acts) or not acts


def _arguments(node: fx.Node) -> list[dict[str, Any]]:
    """Return the arguments and defaults of a call by name: for a function once, for an operator by each of its overloads that draw."""
    if inspect.isfunction(node.target):
        signatures = [{name: each.default for name, each in inspect.signature(node.target).parameters.items()}]
    else:
        overloads = [schema_of(overload).arguments for overload in _random_overloads(_operator(node))]
        signatures = [{each.name: each.default_value for each in arguments} for arguments in overloads]
    return [{name: named_argument(node, tuple(names), name, names[name]) for name in names} for names in signatures]


def _first_of(arguments: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((arguments[name] for name in names if name in arguments), None)


def _of_module(site: Site, path: str, module: nn.Module) -> NativeDropout | None:
    kind = MODULES.get(type(module))
    if kind is None and is_drop_path(module):
        kind = "depth"
    if kind is None:
        return None
    why_not = "it has hooks, which would not be called" if forward_hooks(module) else ""
    if kind == "depth" and not why_not and not _drops_whole_examples(module):
        why_not = f"{type(module).__name__} does something else than to drop whole examples"
    return NativeDropout(site, kind, rate_of(module), path=path, why_not=why_not)


_tried: WeakKeyDictionary[type, dict[object, bool]] = WeakKeyDictionary()  # by class and options: whether it drops whole examples


def try_drop_paths(model: nn.Module) -> None:
    """Try the model's stochastic depths now, because the caller puts back what their forwards change. Each class is tried once."""
    for module in filter(is_drop_path, model.modules()):
        _drops_whole_examples(module)


def _drops_whole_examples(module: nn.Module) -> bool:
    """Return whether the module does what stochastic depth does. It is tried once for each class and its options, on examples of ones."""
    own = {name: value for name, value in vars(module).items() if name not in OWN_ATTRIBUTES and name != "drop_prob"}
    options = tuple(sorted((name, value) for name, value in own.items() if isinstance(value, (bool, int, float, str))))
    known = _tried.setdefault(type(module), {})
    if len(options) < len(own):
        return False  # it holds an object, which a trial might change
    if options not in known:
        with without_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            examples = (torch.ones(shape, device="cpu") for shape in ((256, 2), (256, 2, 1, 3)))
            known[options] = all(with_draws_restored(partial(_drops, module, ones)) for ones in examples)
    return known[options]


def _drops(module: nn.Module, ones: Tensor) -> bool:
    """Return whether a copy of the module with rate 0.25 drops about so many of these examples as a whole, and in eval mode none."""
    twin, forward = copy.copy(module), type(module).forward
    scale = 4 / 3 if getattr(module, "scale_by_keep", True) else 1.0
    try:
        vars(twin).update(drop_prob=0.25, training=True)
        rows = forward(twin, ones).flatten(1)
        vars(twin).update(training=False)
        is_unchanged = torch.equal(forward(twin, ones), ones)
    except Exception:  # it takes other values
        return False
    dropped = (rows == 0).all(1)
    return is_unchanged and 0.1 < dropped.float().mean().item() < 0.4 and torch.allclose(rows[~dropped], torch.full((), scale))


def rate_of(module: nn.Module) -> float:
    """Return the rate of a dropout module: ``p`` of torch's dropouts, ``drop_prob`` of timm's, ``dropout`` of attention; else 0."""
    names = [name for name in ("p", "drop_prob", "dropout") if isinstance(getattr(module, name, None), (int, float))]
    return float(getattr(module, names[0])) if names else 0.0


def _inside(site: Site, path: str, module: nn.Module, opaque: Mapping[str, str]) -> list[NativeDropout]:
    """Return the native dropouts inside a module that the graph calls as one operation."""
    if isinstance(module, nn.RNNBase) and module.num_layers > 1:
        why = "torch applies it between the stacked layers, inside one operator"
        return [NativeDropout(site, "layer", float(module.dropout), path=path, why_not=why)] if module.dropout else []
    if isinstance(module, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return [NativeDropout(site, "layer", None, path=path, why_not="it draws random numbers, and is no dropout")]
    reason = opaque.get(path, "a layer of torch that is not traced")
    dropouts = []
    for name, child in module.named_modules() if module._modules else ():
        label = Label(f"{path}.{name}", type(child).__name__, module=f"{path}.{name}")
        dropout = _of_module(Site((label,), module=label.name), label.name, child) if name else None
        if dropout:
            why = f"{path} is an opaque module ({reason})"
            dropouts.append(NativeDropout(dropout.site, dropout.kind, dropout.rate, path=label.name, why_not=why))
    # its own code draws, and no dropout in it explains that
    if not dropouts and "draws random numbers" in reason:
        return [NativeDropout(site, "layer", None, path=path, why_not=f"it is an opaque module ({reason})")]
    return dropouts


def _of_function(site: Site, node: fx.Node, kind: DropoutKind, names: tuple[str, ...]) -> list[NativeDropout]:
    if kind == "attention":
        return _of_attention(site, node)
    rate = named_argument(node, names, "dropout_p" if kind == "heads" else "p", 0.5)
    # False for torch's alpha dropouts, True for other dropouts
    default = bool(inspect.signature(node.target).parameters["training"].default) if inspect.isfunction(node.target) else True
    training = named_argument(node, names, "training", named_argument(node, names, "train", default))
    if isinstance(rate, fx.Node):
        return [NativeDropout(site, kind, None, why_not="its rate is computed in the graph")]
    path = _mode_of(training)
    if path is None and isinstance(training, fx.Node):
        return [NativeDropout(site, kind, float(rate), why_not="whether it acts is computed in the graph")]
    when: When = "mode" if path is not None else "always" if training else "never"
    return [NativeDropout(site, kind, float(rate), when, path or site.module, function=function_name(node), names=names)]


def _of_attention(site: Site, node: fx.Node) -> list[NativeDropout]:
    """Return the dropout of an attention call, if the call passes a rate, such as ``dropout_p=self.p if self.training else 0.0``."""
    rate = named_argument(node, ATTENTION, "dropout_p", None)
    if rate is None:
        return []
    if not isinstance(rate, fx.Node):
        when: When = "always" if rate else "mode"
        return [NativeDropout(site, "attention", float(rate), when, site.module, function=function_name(node), names=ATTENTION)]
    path = _mode_of(rate)
    # only ``p if self.training else 0.0`` can be moved: dropout that the mode turns off
    if path is None or rate.target is not choose or rate.args[2] != 0 or not isinstance(rate.args[1], (int, float)):
        return [NativeDropout(site, "attention", None, why_not="its rate is computed in the graph")]
    return [NativeDropout(site, "attention", float(rate.args[1]), "mode", path, function=function_name(node), names=ATTENTION)]


def named_argument(node: fx.Node, names: tuple[str, ...], name: str, default: Any) -> Any:
    """Return the argument of a call by its parameter name; ``default`` if the call does not pass it."""
    if name not in names:
        return default
    place = names.index(name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def _mode_of(value: Any) -> str | None:
    """Return the path of the module whose mode decides the value; None if no mode decides it."""
    if isinstance(value, fx.Node) and value.target is choose:
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    path, _, name = str(value.target).rpartition(".")
    return path if name == "training" else None
