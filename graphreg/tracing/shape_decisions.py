"""Decisions on shapes: what a forward asks of a size (``if h != w``, ``range(n)``) is answered for the example inputs.

The answer is asserted in the graph, so that inputs which would decide otherwise raise instead of going the wrong way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.func import functional_call
from torch.fx.node import has_side_effect, map_arg

from graphreg.errors import GraphRegError
from graphreg.ir import label_site, scope_of
from graphreg.torch_internals import FakeTensorMode, has_function_table, pytree

_UNKNOWN = object()
KINDS: dict[str, type] = {
    "Tensor": torch.Tensor, "NoneType": type(None), "bool": bool, "int": int, "float": float, "str": str, "tuple": tuple, "list": list,
    "dict": dict,
}  # fmt: skip


class Unprepared(BaseException):
    """Ends a trace that needs fake tensors for the first time: ``make_function_table``, and trace again. No forward may catch it."""


@has_side_effect  # no pass may take it for dead code
def decided(value: Any, expected: Any) -> None:
    """Raises unless a size is what it was when the model was traced."""
    if value != expected:
        raise GraphRegError(
            f"the model decides something on a shape, and these inputs give {value} where the example_inputs gave {expected}. "
            "Regularize it with example_inputs of this size too."
        )


@has_side_effect
def decided_kind(value: Any, expected: str) -> None:
    """Raises unless a value is of the kind that ``isinstance`` was answered for when the model was traced."""
    if not isinstance(value, KINDS[expected]):
        raise GraphRegError(
            f"the model asks isinstance of a value, and these inputs make it a {type(value).__name__} where it was traced with a "
            f"{expected}. Regularize it with example_inputs of this kind too."
        )


@has_side_effect
def decided_flag(value: Any, expected: bool, name: str) -> None:
    """Raises unless a parameter requires gradients, or does not, as when the model was traced."""
    if value != expected:
        raise GraphRegError(
            f"the model's forward asks {name}.requires_grad and goes by the answer. It was {expected} when the model was traced, and is "
            f"{value} now. Freeze or unfreeze parameters first, then regularize."
        )


@has_side_effect
def in_parts(value: Any, name: str) -> None:
    """Raises where a tensor was taken for a tuple of values, for the forward only indexes it."""
    if isinstance(value, torch.Tensor):
        raise GraphRegError(
            f"{name} is kept whole, and was taken for a tuple, for the forward only indexes it. It gives a tensor. Regularize with "
            "example_inputs, or annotate what its forward returns (-> torch.Tensor)."
        )


def decisions(graph: fx.Graph) -> list[str]:
    """A line for each module that decides something on a shape or a type; for the listing and the report."""
    lines = []
    told = {decided: "the example's shapes", decided_kind: "the types it was traced with", decided_flag: "what requires gradients"}
    for target, what in told.items():
        places = Counter(scope_of(node) for node in graph.nodes if node.target is target)
        lines += [f"decided: {path or 'the model itself'} goes the way of {what} ({n} asserted)" for path, n in places.items()]
    return lines


class Answering(fx.Tracer):
    """A tracer that answers what Python asks of a size, from ``examples``: the inputs by argument name.

    The values of nodes are computed on fake tensors, and only of those that an answer needs.
    """

    def __init__(self, examples: Mapping[str, Any], **more: Any) -> None:
        super().__init__(**more)
        self.sizes: set[fx.Node] = set()  # numbers and shapes
        self.asking = False  # modules that run now run for an answer; they are not traced
        self._scopes = [""]
        self.examples, self._values = examples, dict[fx.Node, Any]()
        self._given: dict[fx.Node, bool] = {}  # whether an input is behind a value
        self._kinds: dict[fx.Node, type | None] = {}
        self.assumed: dict[str, None] = {}  # arguments without an example that were taken for tensors

    @cached_property
    def _fake(self) -> FakeTensorMode:
        if not has_function_table():
            raise Unprepared
        return FakeTensorMode(allow_non_fake_inputs=True)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self._answer(obj, (bool, int, float, tuple, list), lambda: super(Answering, self).to_bool(obj)))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        count = self._length(obj)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])  # type: ignore[index]  # fx sets its methods at run time

    def length(self, obj: fx.Proxy) -> int:
        if (count := self._length(obj)) is None:
            raise TypeError("the length of a traced value is not known")
        return count

    def ask(self, obj: fx.Proxy, what: str, kinds: tuple[type, ...]) -> Any:
        def refuse() -> None:
            raise TypeError(f"a traced value cannot be used as {what}")

        return self._answer(obj, kinds, refuse)

    def kind(self, node: fx.Node) -> type | None:
        """The type of what the node gives for the examples, None where that is not known; an argument without one is a tensor.

        The graph asserts it.
        """
        if node not in self._kinds:
            self._kinds[node] = kind = self._kind(node)
            told = next((name for name, each in KINDS.items() if kind is not None and issubclass(kind, each)), None)
            if told is not None and not str(node.target).startswith("*") and self._depends(node):
                self._unnamed(decided_kind, node, told)
        return self._kinds[node]

    def _kind(self, node: fx.Node) -> type | None:
        name = str(node.target)
        if node.op == "placeholder" and name.startswith("*"):
            return dict if name.startswith("**") else tuple
        if node.op == "placeholder" and name not in self.examples:
            self.assumed[name] = None
            return torch.Tensor
        value = self.examples[name] if node.op == "placeholder" else self._value(node) if self.examples else _UNKNOWN
        return None if value is _UNKNOWN else type(value)

    def flag(self, parameter: torch.nn.Parameter) -> bool:
        """Whether a parameter that the forward holds itself requires gradients."""
        node: Any = self.create_arg(parameter)
        return bool(self._flag(self._unnamed(getattr, node, "requires_grad"), parameter))

    def _flag(self, node: fx.Node, parameter: Any) -> bool:
        self._unnamed(decided_flag, node, parameter.requires_grad, str(node.all_input_nodes[0].target))
        return bool(parameter.requires_grad)

    def _answer(self, obj: fx.Proxy, kinds: tuple[type, ...], refuse: Callable[[], Any]) -> Any:
        if _asks_flag(obj.node):
            source: Any = obj.node.args[0]
            read = self._parameter(str(source.target)) if source.op == "get_attr" else None
            return refuse() if read is None else self._flag(obj.node, read)  # of other values it depends on the call
        value = self._value(obj.node)
        if not isinstance(value, kinds):
            return refuse()
        self._assert(obj.node, value)
        return value

    def _parameter(self, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        return self.root.get_submodule(owner)._parameters.get(name)

    def _length(self, obj: fx.Proxy) -> int | None:
        value = self._value(obj.node)
        if not isinstance(value, (tuple, list, torch.Tensor)) or (isinstance(value, torch.Tensor) and not value.dim()):
            return None
        self._assert(obj.node, len(value), count=True)
        return len(value)

    def _assert(self, node: fx.Node, value: Any, count: bool = False) -> None:
        """What was answered is asserted in the graph, save where no input is behind it."""
        if not self._depends(node):
            return
        if count:
            node = self._unnamed(len, node)
        self._unnamed(decided, node, value)

    def _depends(self, node: fx.Node) -> bool:
        for each in _needed(node, self._given):
            self._given[each] = each.op == "placeholder" or any(self._given[source] for source in each.all_input_nodes)
        return self._given[node]

    def _unnamed(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.create_node("call_function", function, args, {})
        label_site(node, self._scopes[-1])  # nobody's value: it has no name
        return node

    def _value(self, node: fx.Node) -> Any:
        """What the node gives for the examples; _UNKNOWN where that depends on data, or on inputs that are not given."""
        self.asking = True
        try:
            with self._fake, torch.no_grad():
                for each in _needed(node, self._values):  # kept, unknown or not: each is run once, however many ask
                    self._values[each] = self._attempt(each)
            return self._values[node]
        finally:
            self.asking = False

    def _attempt(self, node: fx.Node) -> Any:
        if _asks_flag(node) or any(self._values[source] is _UNKNOWN for source in node.all_input_nodes):
            return _UNKNOWN
        try:
            return self._run(node)
        except Exception:  # data-dependent, or no fake form: whoever asked is told that it cannot be traced
            return _UNKNOWN

    def _run(self, node: fx.Node) -> Any:
        target: Any = node.target
        args, kwargs = map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node.op == "placeholder":
            return self._faked(self.examples[str(target).lstrip("*")])
        if node.op == "call_module":
            module = self.root.get_submodule(target)
            tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
            return functional_call(module, self._faked(tensors), args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            return self._faked(getattr(self.root.get_submodule(owner), name))
        return target(*args, **kwargs)

    def _faked(self, value: Any) -> Any:
        """Fake tensors in place of the user's own, which a write would reach otherwise, in a fake mode too."""
        return pytree.tree_map_only(torch.Tensor, self._fake.from_tensor, value)


def _asks_flag(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1:] == ("requires_grad",)


def _needed(node: fx.Node, known: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """The node and what it is computed from, in order, without what is known; no recursion, for a graph may be deep."""
    order: dict[fx.Node, None] = {}
    waiting = [(node, False)]
    while waiting:
        each, done = waiting.pop()
        if done:
            order[each] = None
        elif each not in order and each not in known:
            waiting.append((each, True))
            waiting.extend((source, False) for source in each.all_input_nodes)
    return list(order)
