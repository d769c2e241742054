"""Decisions on shapes: if a forward needs a size as a Python number (``if h != w``, ``range(n)``), it gets that of the example inputs.

The graph asserts the value that Python got. For inputs that give another value, it raises an error
instead of taking the wrong branch.
"""

from __future__ import annotations

import logging
import operator
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import cached_property
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import fx
from torch.func import functional_call
from torch.fx.node import has_side_effect, map_arg

from graphreg.errors import GraphRegError, OtherInputs
from graphreg.ir.containers import plain_containers
from graphreg.ir.metadata import label_site, scope_of
from graphreg.ir.operations import is_torchs
from graphreg.ir.shape_guards import how_to_use_both
from graphreg.ir.source_location import origin_now, short
from graphreg.ir.train_eval import modes_asked
from graphreg.torch_internals import pytree
from graphreg.torch_internals.bytecode import Unpacked, spares_an_error
from graphreg.torch_internals.fake_tensors import FAKE_LOGGER, FakeTensorMode, has_function_table, is_shape_alone
from graphreg.torch_internals.modules import buffers_by_name, forward_hooks, parameters_by_name
from graphreg.torch_internals.operators import assert_async
from graphreg.torch_internals.random_state import quiet
from graphreg.torch_internals.torch_modes import gradients_switched, uncompiled
from graphreg.tracing.frames import home_of, is_caught
from graphreg.tracing.likeness import frozen, is_pure, layout_key, likeness_of_module, likeness_of_tensor
from graphreg.tracing.tensors import fake_copy, with_attributes

UNKNOWN = object()  # stands for a value that is not known
KINDS: dict[str, type] = {
    "Tensor": torch.Tensor, "NoneType": type(None), "bool": bool, "int": int, "float": float, "str": str, "tuple": tuple, "list": list,
    "dict": dict,
}  # fmt: skip


class NeedsFunctionTable(BaseException):
    """Ends a trace that imports Dynamo, or needs fake tensors, before Dynamo's function table exists.

    The caller makes the table and traces again; ``make_function_table`` says why. This is a BaseException,
    so that an ``except Exception`` in the forward does not catch it.
    """


@has_side_effect  # otherwise a pass would remove the call as dead code
def decided(value: Any, expected: Any) -> None:
    """Raise unless a size, or a value computed from sizes, has the value that it had when the model was traced."""
    if isinstance(expected, bool) and torch.compiler.is_dynamo_compiling():
        value = True if value else False  # noqa: SIM210  # it may be a symbol, which cannot be compared with a bool; bool() keeps it one
    if value != expected:
        raise OtherInputs(
            f"the model decides something on a shape, dtype or the like, and these inputs give {value} where the example_inputs gave "
            f"{expected}. graphreg.report says in which module. {how_to_use_both('like these')}"
        )


@has_side_effect
def decided_kind(value: Any, expected: str) -> None:
    """Raise unless a value has the type by which ``isinstance`` was answered when the model was traced."""
    if not isinstance(value, KINDS[expected]):
        raise OtherInputs(
            f"the model's forward asks for the type of a value, and these inputs make it a {type(value).__name__} where it was traced with "
            f"a {expected}. {how_to_use_both('of this type')}"
        )


@has_side_effect
def decided_count(value: Any, expected: int, more: bool = False) -> None:
    """Raise unless a value has as many items as the forward expects. ``more``: whether it may have more (``a, *_ = x``)."""
    if len(value) < expected or (len(value) > expected and not more):
        number = f"at least {expected}" if more else expected
        raise OtherInputs(
            f"the model's forward expects {number} items in a value (as in a, b = x), and with these inputs it has {len(value)}. "
            f"Give inputs with which it has {number}."
        )


@has_side_effect
def has_passed(value: Any, expected: bool, place: str) -> None:
    """Raise unless a check, of shapes or of values, comes out so that the model's forward does not raise an error behind it."""
    failed = f"these inputs fail a check of the model's own ({place}), where its forward raises an error."
    if torch.compiler.is_dynamo_compiling():
        if isinstance(value, torch.Tensor):  # Dynamo cannot branch on its value; without a text, torch would drop the assertion
            assert_async(value if expected else torch.logical_not(value), failed)
            return
        value = True if value else False  # noqa: SIM210  # as in ``decided``
    if bool(value) != expected:
        raise OtherInputs(failed)


@has_side_effect
def no_singleton(value: Any, name: str) -> None:
    """Raise if what an opaque function or module returned is None or a bool: the trace had a stand-in for it, which is neither."""
    if value is None or value is True or value is False:
        raise OtherInputs(
            f"{name} is opaque, and returned {value} for these inputs. The model's code may ask for that (is None), and the graph does "
            "what the model does for another result. Move the question into a function of its own, together with the call."
        )


@has_side_effect
def decided_attribute(value: Any, name: str, expected: bool) -> None:
    """Raise unless a value has an attribute, or has none of this name, as when the model was traced."""
    if hasattr(value, name) != expected:
        raise OtherInputs(
            f"the model's forward asks whether a value has the attribute {name!r}, and these inputs make it a {type(value).__name__} "
            f"with{'out' if expected else ''} it, where it was traced with{'' if expected else 'out'} it. {how_to_use_both('of this type')}"
        )


@has_side_effect
def decided_flag(value: Any, expected: bool, name: str) -> None:
    """Raise unless ``requires_grad`` of a parameter or an input has the value that it had when the model was traced."""
    if value != expected:
        raise OtherInputs(
            f"the model's forward reads {name}.requires_grad and branches on it. It was {expected} when the model was traced, and is "
            f"{value} now. Freeze or unfreeze parameters first, then regularize; of an input, give example_inputs like those of the call."
        )


@has_side_effect
def decided_layout(value: Any, expected: tuple[tuple[int, ...], bool], name: str, exactly: bool = False) -> None:
    """Raise unless an input lies in memory as it did when the model was traced, because the forward asks how a value lies there.

    ``exactly``: whether the forward asks for the strides of this input, so that those of axes of size 1 count, too.
    """
    (axes, dense), (axes_now, dense_now) = expected, layout_of(value)
    dense_now = layout_of(value, axes)[1] if exactly else dense_now
    both = set(axes) & set(axes_now)  # an axis of size 1 has no place in the order
    contiguous, contiguous_now = dense and list(axes) == sorted(axes), dense_now and list(axes_now) == sorted(axes_now)
    if (dense, contiguous) != (dense_now, contiguous_now) or [a for a in axes if a in both] != [a for a in axes_now if a in both]:
        raise OtherInputs(
            f"the model's forward asks how a value lies in memory (is_contiguous or stride). The strides of {name} are now "
            f"{tuple(value.stride())}, in another order or with other gaps than when the model was traced. Give the call inputs like "
            "x.clone(memory_format=torch.contiguous_format), or regularize with example_inputs that lie in memory as these do."
        )


def layout_of(tensor: torch.Tensor, order: tuple[int, ...] = ()) -> tuple[tuple[int, ...], bool]:
    """Return the axes of a tensor, those of size 1 left out, in the order of their strides, and whether there are no gaps between them.

    ``order``: whether there are gaps is told for the axes in this order, in which those of size 1 may be.
    """
    sizes, strides = ([known(each) for each in numbers] for numbers in (tensor.shape, tensor.stride()))
    axes = tuple(sorted((a for a, size in enumerate(sizes) if size != 1), key=lambda a: -strides[a]))
    # without gaps, the stride of each axis is the product of the sizes of the axes inside it
    step = 1
    for axis in reversed(order or axes):
        if strides[axis] != step:
            return axes, False
        step *= sizes[axis]
    return axes, True


def known(size: Any) -> int:
    """Return a size as a number; of a symbolic one, that of the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) and isinstance(size.node.hint, int) else size


@has_side_effect
def in_parts(value: Any, name: str) -> None:
    """Raise if a value is a tensor. The trace assumed a tuple, because the forward does nothing but index the value."""
    if isinstance(value, torch.Tensor):
        raise GraphRegError(
            f"{name} is an opaque module, and its result was assumed to be a tuple, because the forward only indexes it. But it is a "
            "tensor. Regularize with example_inputs, or annotate what its forward returns (-> torch.Tensor)."
        )


@has_side_effect
def decided_keys(value: Any, expected: list[Any]) -> None:
    """Raise unless a dict has the keys, in the order, that it had when the model was traced."""
    if list(value) != expected:
        raise OtherInputs(
            f"the model's forward reads the keys of a dict, and these inputs give {list(value)} where it was traced with {expected}. "
            f"{how_to_use_both('with these keys')}"
        )


# these raise OtherInputs
DECISIONS = (decided, decided_kind, decided_flag, decided_layout, decided_count, decided_keys, decided_attribute, has_passed, no_singleton)


def decisions(graph: fx.Graph) -> list[str]:
    """Return a line for each module that decides something on a shape, a type or ``requires_grad``, for listings and reports."""
    lines = []
    reasons = {
        decided: "follows the example's shapes", decided_kind: "follows the types it was traced with",
        decided_flag: "follows what requires gradients", decided_layout: "follows how the example lies in memory",
        decided_attribute: "follows the attributes of the types it was traced with", has_passed: "assumes that its own checks pass",
    }  # fmt: skip
    for target, what in reasons.items():
        places = Counter(scope_of(node) for node in graph.nodes if node.target is target)
        lines += [f"decided: {path or 'the model itself'} {what} ({n} asserted)" for path, n in places.items()]
    return lines


class DecisionTracer(fx.Tracer):
    """A tracer that tells Python the sizes, lengths and types that traced values have for the example inputs. The graph asserts them.

    It computes values on fake tensors, and only the values that an answer needs.

    Attributes:
        examples: The example inputs by argument name.
        sizes: The nodes whose values are numbers or shapes.
        evaluating: Whether operations and modules run now to compute an answer, so that they must
            not be traced.
        values: The values that nodes have for the examples, as far as they were needed; UNKNOWN for those that depend on data.
        refused: The errors for questions that the trace could not answer, where the model's code
            may have caught them.
        assumed_tensors: The names of arguments without an example that were assumed to be tensors,
            as the keys of a dict, in order.
        needs_table: Whether ``NeedsFunctionTable`` was raised, which a block of the forward may have swallowed.
    """

    def __init__(self, examples: Mapping[str, Any], **more: Any) -> None:
        super().__init__(**more)
        self.sizes: set[fx.Node] = set()
        self.evaluating = False
        self._scopes = [""]
        self.examples, self.values = examples, dict[fx.Node, Any]()
        self._reshaped = False  # whether a method has changed the shape of the tensor that it was called on
        self._constants_made: Mapping[str, torch.Tensor] = {}
        self._known = dict[fx.Node, Any]()
        self._twins: dict[str, torch.nn.Module] = {}  # copies of modules with code of the user's, on fake tensors
        self._alike: dict[Hashable, Any] = {}  # the values of nodes by ``_likeness``
        self._reads_input: dict[fx.Node, bool] = {}  # whether a value is computed from an input
        self._kinds: dict[fx.Node, type | None] = {}
        self.assumed_tensors: dict[str, None] = {}
        self.refused: list[Exception] = []
        self.needs_table = False

    @cached_property
    def _fake(self) -> FakeTensorMode:
        """The fake tensor mode in which answers are computed."""
        if not has_function_table():
            self.require_table()
        # a module may hold tensors that are neither parameters nor buffers, and these stay real
        return FakeTensorMode(allow_non_fake_inputs=True)

    def require_table(self) -> NoReturn:
        """End this trace, to trace again when Dynamo's function table exists."""
        self.needs_table = True
        raise NeedsFunctionTable

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return the truth value of a traced number, bool, tuple or list. torch.fx calls this method for ``if`` and ``while``."""
        kinds = (bool, int, float, tuple, list)

        def unknown() -> bool:
            # of a check that raises an error, the answer is the other one
            spared = self._spared()
            if spared is None:
                return bool(self._unless_refused(super(DecisionTracer, self).to_bool, obj))
            origin = origin_now()
            self._add_unnamed(has_passed, obj.node, spared, short(origin) if origin else "")
            return spared

        return bool(self._answer(obj, kinds, unknown))

    def passes(self, obj: fx.Proxy) -> bool:
        """Return whether a condition of ``torch._check`` holds. If the trace cannot know, it is taken to hold. The graph checks it."""
        if is_caught(sys._getframe(1)):  # what the forward does next depends on it
            return bool(obj)
        value = self._value(obj.node)
        if value is not UNKNOWN and not value:
            return False
        origin = origin_now()
        self._add_unnamed(has_passed, obj.node, True, short(origin) if origin else "")
        return True

    def _spared(self) -> bool | None:
        """Return the answer after which the code that asks for a truth value raises no error; None if that is not certain."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and home_of(frame).startswith(("graphreg.", "torch.fx.")):
            frame = frame.f_back
        return None if frame is None or is_caught(frame) else spares_an_error(frame)

    def refuse(self, error: Exception) -> NoReturn:
        """Raise an error for a question that the trace cannot answer. If the model's code catches it, it is raised again later."""
        if is_caught(sys._getframe(1)):
            self.refused.append(error)
        raise error

    def _unless_refused(self, function: Callable[[fx.Proxy], Any], obj: fx.Proxy) -> Any:
        """Call a function of torch.fx, which raises if the trace cannot answer."""
        try:
            return function(obj)
        except Exception as error:
            self.refuse(error)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over a value whose length is known for the examples; over the keys of a dict, such as an opaque module returns."""
        if (keys := self.keys_of(obj)) is not None:
            return iter(keys)
        count = self._length(obj)
        if count is None and (count := self.fixed_count(obj.node)) is not None and self._depends_on_input(obj.node):
            # of ``x.chunk(3)``, which may give fewer
            self._add_unnamed(decided_count, obj.node, count)
        if count is None:
            found: Iterator[Any] = self._unless_refused(super().iter, obj)
            return found
        return iter([obj[i] for i in range(count)])  # type: ignore[index]  # fx sets its methods at run time

    def keys_of(self, obj: fx.Proxy) -> list[Any] | None:
        """Return the keys that a value has for the examples; the graph asserts them. None if it is no dict."""
        if not isinstance(value := self._value(obj.node), dict):
            return None
        keys = list(value)
        if self._depends_on_input(obj.node):
            self._add_unnamed(decided_keys, obj.node, keys)
        return keys

    def unpack(self, obj: fx.Proxy, taken: Unpacked, is_caught: bool) -> Iterator[Any]:
        """Return the items of a value that the forward unpacks. The graph asserts that there are as many, or enough.

        ``is_caught``: whether the forward may catch the error for another number, so that it
        decides something by it.
        """
        item: Any = obj  # fx sets the methods of proxies at run time
        if is_caught or (taken.rest and self._length(obj) is not None):
            return iter([item[i] for i in range(self.length(obj))])
        count = taken.first + taken.last
        if self.fixed_count(obj.node) != count and self._depends_on_input(obj.node):
            self._add_unnamed(decided_count, obj.node, count, *([True] if taken.rest else []))
        return iter([*(item[i] for i in range(taken.first)), *([None] * taken.rest), *(item[-i] for i in range(taken.last, 0, -1))])

    def fixed_count(self, node: fx.Node) -> int | None:
        """Return how many items a value has whatever the inputs; None if that is not certain."""
        return None

    def length(self, obj: fx.Proxy) -> int:
        """Return the length of a value; raise TypeError if it is not known."""
        if (count := self._length(obj)) is None:
            self.refuse(TypeError("the length of a traced value is not known"))
        return count

    def concrete(self, obj: fx.Proxy, what: str, kinds: tuple[type, ...]) -> Any:
        """Return the value that a proxy has for the examples. The graph asserts it.

        Args:
            obj: The proxy.
            what: What Python needs the value for, such as ``an index``, for the error.
            kinds: The types that the value may have.

        Raises:
            TypeError: The value is not known, or has another type.
        """

        def refuse() -> None:
            self.refuse(TypeError(f"a traced value cannot be used as {what}"))

        return self._answer(obj, kinds, refuse)

    def kind(self, node: fx.Node) -> type | None:
        """Return the type of a node's value for the examples, or None if it is not known. The graph asserts the type.

        An argument without an example is assumed to be a tensor.
        """
        if node not in self._kinds:
            self._kinds[node] = kind = self._kind(node)
            type_name = next((name for name, each in KINDS.items() if kind is not None and issubclass(kind, each)), None)
            # ``*args`` is a tuple and ``**kwargs`` a dict at every call
            if type_name is not None and not str(node.target).startswith("*") and self._depends_on_input(node):
                self._add_unnamed(decided_kind, node, type_name)
        return self._kinds[node]

    def _kind(self, node: fx.Node) -> type | None:
        kind, name = self.kind_for_examples(node), str(node.target)
        if kind is None and node.op == "placeholder":
            self.assumed_tensors[name] = None
            return torch.Tensor
        return kind

    def kind_for_examples(self, node: fx.Node) -> type | None:
        """Return the type of a node's value for the examples, or None if it is not known. The graph asserts nothing."""
        name = str(node.target)
        if node.op == "placeholder" and name.startswith("*"):
            return dict if name.startswith("**") else tuple
        value = self.known(node)
        if value is UNKNOWN and node.op != "placeholder" and self.examples:
            value = self._value(node)
        return None if value is UNKNOWN else type(value)

    def known(self, node: fx.Node) -> Any:
        """Return the value of the example for an argument, or for what lies in one (``batch["mask"]``); UNKNOWN for all other nodes."""
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def _find(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.examples.get(str(node.target).lstrip("*"), UNKNOWN)
        if node.target not in (operator.getitem, getattr) or len(node.all_input_nodes) != 1 or not isinstance(node.args[0], fx.Node):
            return UNKNOWN
        source: Any = self.known(node.args[0])
        if source is UNKNOWN or isinstance(source, torch.Tensor):
            return UNKNOWN
        target: Any = node.target
        try:
            return target(source, node.args[1])
        except Exception:  # there is no such item or attribute: the graph raises at the same place
            return UNKNOWN

    def assert_attribute(self, node: fx.Node, name: str, expected: bool) -> None:
        """Make the graph assert whether a value has an attribute."""
        # somebody may set it on a tensor of the model later
        if node.op == "get_attr" or self._depends_on_input(node):
            self._add_unnamed(decided_attribute, node, name, expected)

    def requires_grad_of(self, parameter: torch.nn.Parameter) -> bool:
        """Return whether a parameter requires gradients. The graph asserts the answer."""
        node: Any = self.create_arg(parameter)
        return self._asserted_flag(self._add_unnamed(getattr, node, "requires_grad"), parameter)

    def _asserted_flag(self, node: fx.Node, tensor: torch.Tensor) -> bool:
        """Make the graph assert the value of a node that reads ``requires_grad``, and return the value."""
        read = node.all_input_nodes[0]
        self._add_unnamed(decided_flag, node, tensor.requires_grad, str(read.target if read.op == "get_attr" else read))
        return tensor.requires_grad

    def _answer(self, obj: fx.Proxy, kinds: tuple[type, ...], refuse: Callable[[], Any]) -> Any:
        """Return the value that a proxy has for the examples; the graph asserts it. Call ``refuse`` if it is unknown or of another type."""
        if _reads_flag(obj.node):
            source: Any = obj.node.args[0]
            owner, _, name = str(source.target).rpartition(".")
            read = self.root.get_submodule(owner)._parameters.get(name) if source.op == "get_attr" else self.known(source)
            # whether another value requires gradients depends on more than the inputs
            return self._asserted_flag(obj.node, read) if isinstance(read, torch.Tensor) else refuse()
        value = self._value(obj.node)
        if not isinstance(value, kinds):
            return refuse()
        self._assert(obj.node, value)
        return value

    def index_asked(self, node: fx.Node, frame: FrameType) -> None:
        """Note where Python has asked for a node's value as an index."""

    def _length(self, obj: fx.Proxy) -> int | None:
        """Return the length of a proxy's value; the graph asserts it. None if the value has no length or is not known."""
        if (keys := self.keys_of(obj)) is not None:
            return len(keys)
        value = self._value(obj.node)
        if not isinstance(value, (tuple, list, torch.Tensor)) or (isinstance(value, torch.Tensor) and not value.dim()):
            return None
        self._assert(obj.node, len(value), count=True)
        return len(value)

    def _assert(self, node: fx.Node, value: Any, count: bool = False) -> None:
        """If a node depends on an input, make the graph assert its value. ``count``: whether to assert the length of the value instead."""
        if not self._depends_on_input(node):
            return
        if count:
            node = self._add_unnamed(len, node)
        self._add_unnamed(decided, node, value)

    def _depends_on_input(self, node: fx.Node) -> bool:
        """Return whether a value is computed from an input."""
        for each in needed(node, self._reads_input):
            self._reads_input[each] = each.op == "placeholder" or any(self._reads_input[source] for source in each.all_input_nodes)
        return self._reads_input[node]

    def _add_unnamed(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a node that is no operation of the model, and has no name."""
        node = self.create_node("call_function", function, args, {})
        label_site(node, self._scopes[-1])
        return node

    def _value(self, node: fx.Node) -> Any:
        """Return a node's value for the examples; UNKNOWN if it depends on data, or on inputs that the examples do not include."""
        if node not in self.values:
            self._evaluate(needed(node, self.values))
        return self.values[node]

    def all_values(self, graph: fx.Graph, constants: Mapping[str, torch.Tensor]) -> Mapping[fx.Node, Any] | None:
        """Return the value that each node of the finished graph has for the examples, on fake tensors.

        Return None if a value is not known, or if the trace needed no values: then it costs less to run the whole graph at once.
        """
        nodes = [node for node in graph.nodes if node.op != "output"]
        if not self.values or self._reshaped:
            return None
        self._constants_made = constants
        self._evaluate([node for node in nodes if node not in self.values])
        return None if self._reshaped or any(self.values[node] is UNKNOWN for node in nodes) else self.values

    def _evaluate(self, nodes: Iterable[fx.Node]) -> None:
        """Run nodes in this order. UNKNOWN is stored, too, so that each node runs only once."""
        self.evaluating = True
        try:
            with uncompiled(), self._fake, torch.no_grad(), quiet(FAKE_LOGGER, logging.CRITICAL):
                for node in nodes:
                    self.values[node] = self._attempt(node)
                if self._reshaped and self._alike:  # values that were one object have another shape now: each gets its own
                    self._alike.clear()
                    for node in list(self.values):
                        self.values[node] = self._attempt(node)
        finally:
            self.evaluating = False

    def _attempt(self, node: fx.Node) -> Any:
        """Run a node and return its value; UNKNOWN if the node fails, or if a value that it reads is not known."""
        if node.target in (gradients_switched, modes_asked):  # not here: grad mode is off, and modules may have another mode by now
            return True
        if _reads_flag(node) or any(self.values[source] is UNKNOWN for source in node.all_input_nodes):
            return UNKNOWN
        try:
            likeness = self._likeness(node)
            if likeness is None:
                return self._run(node)
            if likeness not in self._alike:
                self._alike[likeness] = self._first_of_its_kind(self._run(node))
            return self._alike[likeness]
        except Exception:
            # the node depends on data, or has no fake kernel: the trace fails only if the user's
            # code needs the value
            return UNKNOWN

    def _first_of_its_kind(self, value: Any) -> Any:
        """Return the first tensor that had the same shape, dtype and so on as a value, or for a tuple of tensors, that of each."""
        if type(value) in (tuple, list):
            return type(value)(map(self._first_of_its_kind, value))
        return self._alike.setdefault(layout_key(value), value) if isinstance(value, torch.Tensor) and is_shape_alone(value) else value

    def _likeness(self, node: fx.Node) -> Hashable:
        """Return what two nodes have in common only if their values have the same types, shapes and dtypes; None if that is not certain.

        The layers of a deep model are alike, so that only the first of them is run. Values that are alike are one object, by
        which those that are computed from them are told to be alike, too.
        """
        if self._reshaped:
            return None
        target: Any = node.target
        if node.op == "get_attr" and target not in self._constants_made:
            return likeness_of_tensor(attribute_of(self.root, target))
        if node.op == "call_module":
            called = likeness_of_module(self.root.get_submodule(target))
        elif node.op == "call_method":
            writes = target.startswith(("__i", "__set")) or (target.endswith("_") and not target.endswith("__"))
            called = target if not writes and isinstance(self.values.get(node.args[0]), (torch.Tensor, tuple)) else None  # type: ignore[arg-type]
        else:
            called = target if node.op == "call_function" and is_pure(target) else None
        return None if called is None else (node.op, called, frozen((node.args, node.kwargs), self.values))

    def _run(self, node: fx.Node) -> Any:
        """Run a node on fake tensors."""
        target: Any = node.target
        args, kwargs = plain_containers(map_arg((node.args, dict(node.kwargs)), self.values.__getitem__))
        if node.op == "placeholder":
            return self._as_fake(self.examples[str(target).lstrip("*")])
        if node.op == "call_module":
            module = self.root.get_submodule(target)
            if not is_torchs(module) or forward_hooks(module):  # the user's code may change state of the module
                module = self._twin(target, module)
            tensors: dict[str, torch.Tensor] = {**parameters_by_name(module), **buffers_by_name(module)}
            return functional_call(module, self._as_fake(tensors), args, kwargs)
        if node.op in ("call_method", "call_function") and args:
            before = getattr(args[0], "shape", None)
            result = getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
            # as by ``x.t_()``: what reads the value and has not run yet would get another shape
            self._reshaped |= isinstance(args[0], torch.Tensor) and args[0].shape != before
            return result
        if node.op == "get_attr" and target in self._constants_made:
            return self._as_fake(self._constants_made[target])
        if node.op == "get_attr":
            return self._as_fake(attribute_of(self.root, target))
        return target(*args, **kwargs)

    def _twin(self, path: str, module: torch.nn.Module) -> torch.nn.Module:
        """Return a copy of a module on fake tensors; the module itself if it holds a computed value, which cannot be copied."""
        try:
            if path not in self._twins:
                self._twins[path] = fake_copy(module, self._fake)
        except (RuntimeError, TypeError) as error:
            if "pickle" in str(error):  # a generator, from which a call would take items
                raise
            self._twins[path] = module
        return self._twins[path]

    def _as_fake(self, value: Any) -> Any:
        """Replace the user's tensors by fake ones. An operation could write into the user's tensors, even in a fake mode."""
        return pytree.tree_map_only(torch.Tensor, lambda tensor: with_attributes(self._fake.from_tensor(tensor), tensor), value)


def attribute_of(root: torch.nn.Module, path: str) -> Any:
    """Return what a path such as ``layer.weight`` names in a module."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _reads_flag(node: fx.Node) -> bool:
    """Return whether a node reads ``requires_grad``."""
    return node.target is getattr and node.args[1:] == ("requires_grad",)


def needed(node: fx.Node, known: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Return the nodes that must be computed for a node and are not in ``known``, in order; the node itself is the last.

    The search is not recursive, because graphs may be deep.
    """
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
