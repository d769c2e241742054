"""Finds what each operation of a graph does to storage: which arguments its output may alias, and into which arguments it writes.

The answer comes from torch's schemas, or else from a call on tensors without data
(`operation_probes.py`). An operation that runs code outside torch is assumed to alias and write
into all its arguments; only a dropout, recognized by its name, is assumed not to write.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from graphreg.ir.dataflow import sizes_of
from graphreg.ir.made_objects import MadeObject
from graphreg.ir.metadata import is_added
from graphreg.ir.operation_probes import STATISTICS, TRIES, Hole, ProbedCall, joined_calls, probe
from graphreg.ir.operations import (  # fmt: skip
    DROPOUTS,
    IN_PLACE_OPERATORS,
    SIZE_ATTRIBUTES,
    Operations,
    argument_of,
    declared_effects,
    first_argument,
    function_name,
    in_place_argument,
    is_drop_path,
    is_of_einops,
    is_pythons,
    nodes_in,
    placed,
)
from graphreg.torch_internals.modules import drop_forward_hooks, forward_hooks
from graphreg.torch_internals.operators import HigherOrderOperator, OpOverload

M = TypeVar("M", bound=nn.Module)
_ARITHMETIC = {
    "abs", "add", "and_", "eq", "floordiv", "ge", "gt", "inv", "invert", "le", "lshift", "lt", "matmul", "mod", "mul", "ne", "neg",
    "or_", "pow", "rshift", "sub", "truediv", "xor",
}  # fmt: skip
# A key of ``node.meta`` for an operator that contains a graph: the positions of the arguments that
# its result aliases, and of those that it writes into.
REGION = "region"
# the results of probes, kept for the whole process
_SEEN: dict[tuple[Any, ...], ProbedCall | None] = {}


class ViewsAndWrites:
    """The aliases and writes of the nodes of one model's graphs. Each is computed when it is first asked for."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self._writes: dict[fx.Node, tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]] = {}
        self._shares: dict[fx.Node, tuple[tuple[fx.Node, ...], bool]] = {}
        # the nodes of all graphs seen so far, and which of them are sizes
        self._known, self._sizes = set[fx.Node](), set[fx.Node]()
        self._unknown: dict[fx.Node, bool] = {}

    def writes(self, node: fx.Node, is_definite: bool = False) -> tuple[fx.Node, ...]:
        """Return the arguments whose storage the operation may write into; with ``is_definite``, those that it definitely writes into.

        A write is definite if a schema, the operation's name (``add_``) or ``inplace=True``
        declares it, or if every probed call made it.
        """
        if node not in self._writes:
            self._writes[node] = self._written(node)
        return self._writes[node][is_definite]

    def shares(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the arguments whose storage the output may share."""
        return self._shared(node)[0]

    def is_dense(self, node: fx.Node) -> bool:
        """Return whether the output definitely has a storage that no argument shares, and fills this storage without gaps."""
        shares, dense = self._shared(node)
        return dense and not shares and node.op not in ("placeholder", "get_attr")

    def _shared(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], bool]:
        if node not in self._shares:
            shares, dense = self._sharing(node)
            kept = []
            for each in shares:
                owner, _, name = str(each.target).rpartition(".") if each.op == "get_attr" else ("", "", "")
                value = getattr(self.operations.modules.get(owner), name, None) if name else None
                # such an attribute, like ``training``, has no storage
                if not isinstance(value, (bool, int, float, str)):
                    kept.append(each)
            self._shares[node] = tuple(kept), dense
        return self._shares[node]

    # Writes

    def _written(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """Return the arguments that the operation may write into, and those that it definitely writes into."""
        if is_inert(node) or is_of_einops(node):
            return (), ()
        if self._is_unknown(node):
            # of a function with the name of a dropout, only ``inplace=True`` says that it writes
            is_dropout = function_name(node) in DROPOUTS and node.kwargs.get("inplace") is not True
            return (() if is_dropout else _inputs(node)), ()
        if node.op == "call_module":
            return self._written_by_module(node)
        if node.target in IN_PLACE_OPERATORS:
            return _twice(first_argument(node))
        if is_pythons(node):
            return (), ()
        if isinstance(node.target, HigherOrderOperator):
            return _operands(node, 1), ()
        known, out = declared_effects(node), nodes_in(node.kwargs.get("out"))
        written = _twice([*placed(node, known.writes), *out] if known is not None else out)
        return written if known is not None and not known.silent else self._seen_to_write(node, written)

    def _seen_to_write(
        self, node: fx.Node, declared: tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]
    ) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        seen = self._probed(node, quick=True)
        if seen is None:
            named, statistics = in_place_argument(node), nodes_in([argument_of(node, name) for name in STATISTICS])
            renormed = _inputs(node) if argument_of(node, "max_norm") is not None else ()
            return _distinct([*declared[0], *named, *statistics, *renormed]), _distinct([*declared[1], *named])
        inputs = node.all_input_nodes
        possible, definite = ([inputs[i] for i in sorted(places)] for places in (seen.writes, seen.definite_writes))
        return _distinct([*declared[0], *possible]), _distinct([*declared[1], *definite])

    def _written_by_module(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        module = self.operations.module(node)
        assert module is not None

        # most layers have no modules in them, and ``modules()`` is slow; so is ``getattr`` for an
        # attribute that is not there
        for inner in module.modules() if module._modules else (module,):
            own = vars(inner)
            if own["inplace"] if "inplace" in own else getattr(type(inner), "inplace", False):
                break
        else:
            return (), ()

        if isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout)):  # their forwards do not pass ``inplace`` on
            return (), ()
        if next(module.children(), None) is None:
            return _twice(first_argument(node))
        seen, inputs = self._probed(node, quick=True), node.all_input_nodes
        if seen is None:
            return tuple(inputs), ()
        return tuple(inputs[i] for i in sorted(seen.writes)), tuple(inputs[i] for i in sorted(seen.definite_writes))

    # Aliases

    def _sharing(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], bool]:
        if is_inert(node):
            return (), True
        # an instance keeps the arguments of the call that makes it
        if self._is_unknown(node) or isinstance(node.target, (type, MadeObject)) or is_of_einops(node, self.operations.module(node)):
            return _inputs(node), False
        if isinstance(node.target, HigherOrderOperator):
            return _operands(node, 0), False

        if node.op == "call_module":
            if self.writes(node):
                return self.writes(node), False
            return self._seen_to_share(node)

        if is_pythons(node):
            return self._of_python(node, function_name(node))

        # Operators of torch, as far as their schemas say what they do; the rest is tried out.
        known, out = declared_effects(node), tuple(nodes_in(node.kwargs.get("out")))
        if function_name(node) == "set_":
            return _inputs(node), False
        if known is not None:
            shares = [*placed(node, known.shares), *out]
            if shares or known.complete:
                return _distinct(shares), not shares and not function_name(node).endswith("_strided")
            if isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims"):
                return _inputs(node), False  # a custom operator, composed of other operators
        return self._seen_to_share(node, out)

    def _of_python(self, node: fx.Node, name: str) -> tuple[tuple[fx.Node, ...], bool]:
        """Return the arguments that the output may alias and whether it is dense, for functions of ``operator``, ``builtins``, ``math``."""
        first = tuple(first_argument(node))
        listed = any(self.operations.is_list(n) for n in first) or any(isinstance(value, (tuple, list)) for value in node.args[:1])
        if name == "getattr":
            return ((), True) if node.args[1] in SIZE_ATTRIBUTES else (first, False)
        if name in ("getitem", "__getitem__"):
            items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            # an index that contains a tensor or a list makes a copy
            copies = any(isinstance(i, list) or (isinstance(i, fx.Node) and isinstance(i.meta.get("value"), tuple)) for i in items)
            return ((), True) if copies and not listed else (first or _inputs(node), False)
        if node.target in IN_PLACE_OPERATORS:
            return (_inputs(node) if listed else first), False
        if getattr(node.target, "__module__", "") == "math" or (name in _ARITHMETIC and not listed):
            return (), True
        return _inputs(node), False

    def _seen_to_share(self, node: fx.Node, out: tuple[fx.Node, ...] = ()) -> tuple[tuple[fx.Node, ...], bool]:
        seen, inputs = self._probed(node), node.all_input_nodes
        if seen is None:
            return _inputs(node), False
        return _distinct([*out, *(inputs[i] for i in sorted(seen.shares))]), seen.dense

    # Probes

    def _is_unknown(self, node: fx.Node) -> bool:
        """Return whether the operation runs code outside torch."""
        if node not in self._unknown:
            self._unknown[node] = self._runs_others(node)
        return self._unknown[node]

    def _runs_others(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.operations.module(node)
            if module is None or self.operations.is_opaque(node):
                return True
            if is_of_einops(node, module):
                return False
            # parametrizations compute weights, and are not called on data
            inner = module.named_modules() if module._modules else [("", module)]
            return any(_is_foreign(m) for name, m in inner if "parametrizations" not in name.split("."))
        owner = getattr(node.target, "__self__", None)
        function = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
        if self.operations.is_opaque(node) or (function and not owner.__module__.startswith("torch.")):
            return True
        # a method of a dict, for example
        return node.op == "call_method" and not hasattr(Tensor, str(node.target))

    def _probed(self, node: fx.Node, quick: bool = False) -> ProbedCall | None:
        """Return what a probe of the call finds; None if every call raises. ``quick``: stop after a few calls, which suffice for writes.

        Guessed shapes are tried first, and the shapes of the example inputs only if every guess
        raises: later inputs may have other shapes, and nodes that share a guess share its cached
        result.
        """
        for known in (False, True):
            holes = {n: self._hole(n, i, known) for i, n in enumerate(node.all_input_nodes)}
            seen = self._looked_up(node, _with_holes(node.args, holes), _with_holes(node.kwargs, holes), quick)
            if seen is not None or all("value" not in n.meta for n in holes):
                return seen
        return None

    def _looked_up(self, node: fx.Node, args: Any, kwargs: Any, quick: bool) -> ProbedCall | None:
        module = self.operations.module(node)
        key = (_settings(module) if module is not None else node.target, repr((args, kwargs)))
        for cached in ((*key, False), (*key, quick)):
            if cached in _SEEN:
                return _SEEN[cached]
        if len(_SEEN) > 1 << 14:
            _SEEN.clear()
        enough = 2 if quick else TRIES
        if module is not None:
            seen = _of_module(module, args, kwargs, enough)
        elif node.op == "call_method":
            name = str(node.target)
            seen = probe(lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs), args, kwargs, (), enough)
        else:
            seen = probe(node.target, args, kwargs, (), enough)  # type: ignore[arg-type]
        _SEEN[*key, quick] = seen
        return seen

    def _hole(self, node: fx.Node, index: int, known: bool) -> Hole:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            tensor = getattr(self.operations.modules.get(owner), name, None)
            if not isinstance(tensor, Tensor):
                return Hole(index)
            return Hole(index, "tensor", ((tuple(tensor.shape), tensor.dtype),))
        if "value" not in node.meta:
            return Hole(index, "number" if self._is_size(node) else "list" if self.operations.is_list(node) else "tensor")
        value = node.meta["value"]
        if isinstance(value, list):
            return Hole(index, "list", tuple(filter(_is_spec, value)) if known else ())
        if value is None:
            return Hole(index, "number")
        if known and _is_spec(value):
            return Hole(index, "tensor", (value,))
        return Hole(index, "tensor", (), None if value[1].is_floating_point else value[1])

    def _is_size(self, node: fx.Node) -> bool:
        if node not in self._known:
            self._known.update(node.graph.nodes)
            self._sizes = self._sizes.difference(node.graph.nodes) | sizes_of(node.graph)
        return node in self._sizes


def is_inert(node: fx.Node) -> bool:
    """Return whether the node is an input, an attribute or the output, or graphreg added it. Such a node neither writes nor aliases."""
    return node.op in ("placeholder", "get_attr", "output") or is_added(node)


def _operands(node: fx.Node, which: int) -> tuple[fx.Node, ...]:
    """Return the arguments that a higher-order operator aliases or writes into; all arguments if the graph in it was not analysed.

    ``which``: 0 for aliases, 1 for writes.
    """
    if REGION not in node.meta:
        return _inputs(node)
    return tuple(nodes_in([node.args[i] for i in node.meta[REGION][which]]))


def _inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(node.all_input_nodes)


def _distinct(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(nodes))


def _twice(nodes: Iterable[fx.Node]) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """Return the nodes as both possible and definite writes."""
    return (distinct := _distinct(nodes)), distinct


def _with_holes(value: Any, holes: Mapping[fx.Node, Hole]) -> Any:
    return map_aggregate(value, lambda leaf: holes[leaf] if isinstance(leaf, fx.Node) else leaf)  # type: ignore[arg-type,return-value]


def _is_spec(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype) and min(value[0], default=0) >= 0


# Modules


def _of_module(module: nn.Module, args: Any, kwargs: Any, enough: int) -> ProbedCall | None:
    """Probe a layer of torch in train and eval mode, on a copy without data; None if it cannot be copied or every call raises."""
    try:
        twin = without_data(module).requires_grad_(False)
    except Exception:  # copying a module may raise anything
        return None
    for inner in twin.modules():
        drop_forward_hooks(inner)
    # without the states, which have other sizes and only enter products
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        args, kwargs = args[:1], {name: value for name, value in kwargs.items() if name != "hx"}
    settings = [value if isinstance(value, tuple) else (value,) for value in vars(module).values()]
    # what may be sizes
    sizes = [setting for setting in settings if setting and all(type(n) is int for n in setting)]
    sizes += [tuple(p.shape) for p in twin.parameters()]
    seen = list(filter(None, (probe(nn.Module.train(twin, mode), args, kwargs, sizes, enough) for mode in (True, False))))
    return joined_calls(seen) if seen else None


def without_data(module: M) -> M:
    """Return a copy of a module on the meta device. A tensor that occurs twice in the module is one tensor in the copy, too."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for value in (*inner._parameters.values(), *inner._buffers.values(), *vars(inner).values()):
            if isinstance(value, Tensor):
                empty = torch.empty_like(value, device="meta", requires_grad=False)
                memo[id(value)] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def _is_foreign(module: nn.Module) -> bool:
    """Return whether a call of the module runs code outside torch: its forward or a hook."""
    hooks = forward_hooks(module)
    if not hooks and type(module).__module__.startswith("torch."):
        return False
    homes = [type(module).__module__, *(str(getattr(hook, "__module__", None) or type(hook).__module__) for hook in hooks)]
    return not is_drop_path(module) and any(not home.startswith("torch.") for home in homes)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return a key for the cache: layers with equal classes, shapes, dtypes and attributes do the same to storage."""
    settings = list[Any]()
    for name, inner in module.named_modules():
        settings += [name, type(inner)]
        tensors = [(key, t) for key, t in (*inner._parameters.items(), *inner._buffers.items()) if t is not None]
        settings += [(key, tuple(t.shape), t.dtype) for key, t in tensors]
        plain = [(key, value) for key, value in vars(inner).items() if key[0] != "_"]
        settings += [(key, type(value), value if _is_hashable(value) else repr(value)) for key, value in plain]
    return tuple(settings)


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return not isinstance(value, Tensor)
