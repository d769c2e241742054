"""The inputs of an exported graph: the arguments of the model's forward, the tensors in them, and assertions on both."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from keyword import iskeyword
from typing import Any

from torch import fx, nn

from graphreg.ir.metadata import label_site
from graphreg.ir.shape_guards import Assert, InputPlace, assert_sizes, has_keys, specialized_to
from graphreg.ir.site import Label
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.defaults import keep_default, placeholder_default
from graphreg.tracing.export.conditions import Conditions
from graphreg.tracing.export.op_record import AT, PLAIN, Built, OpRecord
from graphreg.tracing.fake_inputs import arguments


class Inputs:
    """Makes a placeholder for each argument, and nodes that take tensors out of nested arguments.

    Attributes:
        graph: The graph.
        made: The nodes of input tensors, by the place (``meta[AT]``) of torch.export's node for the
            same tensor.
        places: The nodes of input tensors, each with the name that errors use.
        conditions: The conditions on sizes that the graph asserts; None if there are no tensors.
    """

    conditions: Conditions | None = None
    _assert: Assert
    _last: fx.Node  # the last assertion

    def __init__(self, graph: fx.Graph, model: nn.Module, record: OpRecord, label: Callable[[fx.Node], None], wide: bool) -> None:
        """Add the nodes to the graph, and the assertions on the inputs.

        Args:
            graph: The graph, still empty.
            model: The model.
            record: What was recorded while torch.export ran.
            label: Labels a placeholder.
            wide: Whether the example was a batch of one that was widened to two.

        Raises:
            GraphRegError: The graph of the batch of two does not hold for the batch of one.
        """
        self.graph, self.made, self.places = graph, dict[int, fx.Node](), list[InputPlace]()
        signature = inspect.signature(model.forward)
        args, kwargs = record.arguments
        bound = signature.bind(*args, **kwargs).arguments

        # all of them first, because the placeholders of a graph precede its other nodes
        placeholders = {}
        for name, parameter in signature.parameters.items():
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
            placeholders[name] = graph.create_node("placeholder", star + name, placeholder_default(parameter))
            keep_default(placeholders[name], parameter)
            label(placeholders[name])

        for name, parameter in signature.parameters.items():
            if name in bound or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                # also if the call passes none: the graph asserts that others pass none either
                nothing: Any = {} if parameter.kind is parameter.VAR_KEYWORD else ()
                self._take(placeholders[name], bound.get(name, nothing), name, ())

        # all inputs have the symbols of one environment
        environment = next((node.meta["val"].fake_mode.shape_env for node, _ in self.places), None)
        if environment is None:
            assert_sizes(graph, self.places, ())
            return
        batches = [node.meta["val"].shape[0] for node, _ in self.places if node.meta["val"].dim()]
        self.conditions = Conditions(environment, record, batches, wide)
        self._assert = assert_sizes(graph, self.places, self.conditions.asserted, self.conditions.assumes_no_zero)
        self._last = next(iter(reversed(graph.nodes)))

    def assert_more(self, conditions: Iterable[Any]) -> None:
        """Insert assertions of more conditions after the existing assertions."""
        with self.graph.inserting_before(self._last.next):
            self._assert(conditions)

    def _take(self, holder: fx.Node, value: Any, name: str, path: tuple[str, ...]) -> None:
        """Add nodes that take the tensors out of an argument, and assertions on its other parts."""
        full_name = ".".join((name, *path))
        if isinstance(value, fx.Node):
            self.made[value.meta[AT]] = holder
            holder.meta["val"] = value.meta.get("val")
            if path:
                label_site(holder, "", Label(name, "input", (".".join(path),), default=False))
            self.places.append((holder, full_name))
            return
        # only of what is in a container: an argument that is plain itself is specialized
        if path and isinstance(value, PLAIN):
            self._unnamed(specialized_to, holder, full_name, value)
        if not isinstance(value, (dict, tuple, list, Built)):
            return
        parts = value.parts if isinstance(value, Built) else value if isinstance(value, dict) else dict(enumerate(value))
        function = getattr if isinstance(value, Built) and not value.keyed else operator.getitem
        if function is operator.getitem and (path or str(holder.target).startswith("*") or _holds_nodes(value)):
            self._unnamed(has_keys, holder, full_name, tuple(parts))
        for key, part in parts.items() if _holds_nodes(value) else ():
            self._take(self._unnamed(function, holder, key), part, name, (*path, str(key)))

    def _unnamed(self, function: Any, *args: Any) -> fx.Node:
        """Add a node that has no name."""
        node = self.graph.call_function(function, args)
        label_site(node, "")
        return node


@contextmanager
def spelled_out(model: nn.Module, example: Any) -> Iterator[None]:
    """Within the context, the signature of the forward has a parameter for each argument of the example that ``**kwargs`` would take.

    If one of their names is no name of a parameter (``model(**{"side-input": x})``), the forward keeps its own signature.
    """
    signature = inspect.signature(model.forward)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [name for name in (arguments(example) or ((), {}))[1] if name not in signature.parameters]
    if not more or len(kept) == len(signature.parameters) or not all(name.isidentifier() and not iskeyword(name) for name in more):
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    original = model.forward
    # torch.export asks the model's forward for its signature, and here finds this one
    own: Any = forward
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
    own.__signature__ = signature.replace(parameters=[*kept, *added])
    with Changes() as changes, changes:
        changes.put(vars(model), "forward", forward)
        yield


def _holds_nodes(value: Any) -> bool:
    """Return whether a nested argument holds a tensor."""
    if isinstance(value, Built):
        value = value.parts
    if isinstance(value, Mapping):
        return any(map(_holds_nodes, value.values()))
    return isinstance(value, fx.Node) or (isinstance(value, (tuple, list)) and any(map(_holds_nodes, value)))
