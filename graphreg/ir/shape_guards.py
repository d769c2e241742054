"""Adds assertions about the sizes of inputs to a graph of torch.export, so that inputs of other sizes raise an error with the reason.

A graph may depend on fixed sizes, on equal sizes, and on conditions that the model's code tested.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect
from torch.fx.proxy import GraphAppendingTracer, Proxy

from graphreg.errors import GraphRegError, OtherInputs
from graphreg.ir.metadata import label_site
from graphreg.torch_internals.export import evaluated, example_sizes

InputPlace = tuple[fx.Node, str]  # an input in the graph, and its name for messages


def how_to_use_both(like: str) -> str:
    """Return what to do if a call needs another graph, for the error. ``like``: what the example inputs must be like for that graph."""
    again = f"regularize the model once more, with example_inputs {like}"
    if torch.compiler.is_dynamo_compiling():
        return (
            f"Code that is compiled cannot trace the model for another graph: {again}; or compile a model that is regularized in place by "
            "itself (torch.compile(model) or model.compile()) instead of the code around it, because only then each call finds its graph."
        )
    return f"To use both, {again}, or use graphreg.regularize_, which traces the model again by itself."


@has_side_effect
def sized(value: Any, name: str, sizes: tuple[int | None, ...]) -> None:
    """Raise OtherInputs unless a tensor has the sizes that the graph was made for; None in ``sizes`` allows any size."""
    if not isinstance(value, Tensor):
        raise OtherInputs(f"{name} was a tensor in the example_inputs, and is {type(value).__name__} now. Give a tensor at each call.")
    if value.dim() != len(sizes):
        raise OtherInputs(
            f"{name} has {value.dim()} dimensions, and had {len(sizes)} in the example_inputs. Regularize with inputs like these."
        )
    for axis, size in enumerate(sizes):
        if size is not None and value.shape[axis] != size:
            raise OtherInputs(
                f"{name} has size {value.shape[axis]} in dimension {axis}. The graph works only for {size}, because the model's layers "
                f"or its code allow no other size. Give size {size}, or regularize with example_inputs that have the new size."
            )


@has_side_effect
def alike(value: Tensor, axis: int, other: Tensor, other_axis: int, names: tuple[str, str]) -> None:
    """Raise OtherInputs unless two inputs have the same size in the given dimensions, as the graph assumes."""
    if value.shape[axis] != other.shape[other_axis]:
        raise OtherInputs(
            f"{names[0]} has size {value.shape[axis]} in dimension {axis} and {names[1]} size {other.shape[other_axis]} in dimension "
            f"{other_axis}. In the example_inputs the two were equal, and the graph relies on that. Give equal sizes."
        )


@has_side_effect
def same_decision(condition: Any, text: str) -> None:
    """Raise OtherInputs if a condition on sizes is false. It was true for the example inputs, and the graph relies on it."""
    if not condition:
        raise OtherInputs(
            f"the model's code tests a condition on a shape: {text} held for the example_inputs, and does not hold for these inputs. "
            f"{how_to_use_both('of this size')}"
        )


@has_side_effect
def has_keys(value: Any, name: str, keys: tuple[Any, ...]) -> None:
    """Raise GraphRegError unless a dict, tuple or list has the same keys or length as in the example inputs."""
    there = tuple(value) if isinstance(value, Mapping) else tuple(range(len(value)))
    if sorted(map(str, there)) != sorted(map(str, keys)):
        now, then = (", ".join(map(str, each)) or "none" for each in (there, keys))
        raise GraphRegError(
            f"{name} has the parts {now}; in the example_inputs it had {then}. Call "
            "regularize with example_inputs that have the same parts as the calls."
        )


@has_side_effect
def specialized_to(value: Any, name: str, expected: Any) -> None:
    """Raise GraphRegError unless an argument that is not a tensor has the value that it had in the example inputs."""
    if value != expected:
        raise GraphRegError(f"{name} was {expected!r} in the example_inputs, and the graph is specialized to that. It is {value!r} now.")


_Dimension = tuple[fx.Node, int, str]  # an input, an axis of it, the name of the input
# appends assertions of conditions, which are sympy expressions in size symbols
Assert = Callable[[Iterable[Any]], None]
_Derived = tuple[fx.Node, int, str, Any]  # a dimension and the expression of its size

SIZE_ASSERTIONS = (sized, alike, same_decision)  # these raise OtherInputs
ASSERTIONS = (*SIZE_ASSERTIONS, has_keys, specialized_to)


def fixed(graph: fx.Graph) -> list[str]:
    """Return a line for each input with a fixed size and for each condition on sizes; ``names`` and ``report`` show these lines."""
    lines = []
    for node in graph.nodes:
        if node.target is sized and any(size is not None for size in node.args[2]):
            lines.append(f"fixed size: {node.args[1]} is {' x '.join('any' if s is None else str(s) for s in node.args[2])}")
        elif node.target is same_decision:
            lines.append(f"decided on a shape: {node.args[1]}")
    return lines


def assert_sizes(graph: fx.Graph, inputs: Sequence[InputPlace], guards: Iterable[Any], no_zero: bool = False) -> Assert:
    """Append to a graph assertions about the sizes of its inputs. Return a function that appends assertions of further conditions.

    ``guards``: conditions that must hold, as sympy expressions in size symbols. ``no_zero``:
    whether to assert that no variable size is 0.
    """
    first: dict[Any, tuple[fx.Node, int, str]] = {}
    derived = []
    for node, name in inputs:
        sizes: list[int | None] = []
        for axis, size in enumerate(node.meta["val"].shape):
            symbol = size.node.expr if isinstance(size, torch.SymInt) else size
            if isinstance(symbol, int) or symbol.is_number:
                sizes.append(int(symbol))
                continue

            sizes.append(None)
            if symbol in first:
                other, at, called = first[symbol]
                _unnamed(graph, alike, node, axis, other, at, (name, called))
            elif symbol.is_symbol:
                first[symbol] = node, axis, name
            else:
                derived.append((node, axis, name, symbol))
        _unnamed(graph, sized, node, name, tuple(sizes))

    for node, axis, name in first.values() if no_zero else ():
        size = _unnamed(graph, torch.ops.aten.sym_size.int, node, axis)
        _unnamed(graph, same_decision, _unnamed(graph, operator.ge, size, 1), f"{name}.shape[{axis}] >= 1")

    insert = _assert_derived(graph, first, derived)
    insert(guards)
    return insert


def _assert_derived(graph: fx.Graph, first: Mapping[Any, _Dimension], derived: Sequence[_Derived]) -> Assert:
    """Append an assertion that each size in ``derived`` equals its expression. Return a function that appends assertions of guards.

    A size is derived if torch.export expresses it by the symbol of another size: if the forward
    asks ``a.shape[0] == 2 * b.shape[0]``, the size of ``b`` has a symbol ``s``, and the size of
    ``a`` is the expression ``2*s``.
    """
    tracer, sizes = GraphAppendingTracer(graph), dict[Any, Proxy]()
    shown_as = {str(symbol): f"{name}.shape[{axis}]" for symbol, (_, axis, name) in first.items()}

    def value(expression: Any) -> Any:
        unknown = expression.free_symbols - first.keys()
        if unknown:
            raise GraphRegError(
                f"the forward decides on {shown(expression)}. No assertion can check that at a call, because it contains a size that is "
                "not the size of any dimension of an input. If it is the stride of an input that is a part of another tensor (x[:, :4]), "
                "give example_inputs that lie in memory by themselves: x[:, :4].contiguous()."
            )
        for symbol in expression.free_symbols - sizes.keys():
            node, axis, _ = first[symbol]
            sizes[symbol] = Proxy(_unnamed(graph, torch.ops.aten.sym_size.int, node, axis), tracer)
        # the evaluation appends nodes for the arithmetic of sizes, and none of them is a site
        before = set(graph.nodes)
        result = evaluated(expression, sizes)
        for made in set(graph.nodes) - before:
            label_site(made, "")
        return result

    def shown(expression: Any) -> str:
        relation = getattr(expression, "rel_op", "")
        # str() of "a != b" is "Ne(a, b)"
        text = f"{expression.lhs} {relation} {expression.rhs}" if relation else str(expression)
        return re.sub(r"\w+", lambda word: shown_as.get(word[0], word[0]), text)

    for node, axis, name, expression in derived:
        size = _unnamed(graph, torch.ops.aten.sym_size.int, node, axis)
        equal = _unnamed(graph, operator.eq, size, value(expression).node)
        _unnamed(graph, same_decision, equal, f"{name}.shape[{axis}] == {shown(expression)}")

    def insert(guards: Iterable[Any]) -> None:
        for guard in dict.fromkeys(guards):
            condition = value(guard)
            if isinstance(condition, Proxy):
                _unnamed(graph, same_decision, condition.node, shown(guard))

    return insert


def _unnamed(graph: fx.Graph, function: Any, *args: Any) -> fx.Node:
    """Append a call whose value is no site."""
    node = graph.call_function(function, args)
    label_site(node, "")
    return node


def describe_nodes(graph: fx.Graph, ones: Collection[fx.Node]) -> None:
    """Write each node's ``node.meta["value"]``: (shape, dtype) for a tensor, a list of these for a tuple, None for anything else.

    The entry is left out if a size depends on data. ``ones``: the inputs whose batch of one was
    widened to two for the trace; if there are any, all shapes are written for a batch of one.
    """
    batches = [node.meta["val"].shape[0] for node in ones if node.meta["val"].dim()]
    if any(not isinstance(size, torch.SymInt) for size in batches):
        raise GraphRegError("the batch is fixed at the size of the example_inputs.")
    one = {size.node.expr: 1 for size in batches}

    numbers = dict[Any, int | None]()

    def number(size: Any) -> int | None:
        if not isinstance(size, torch.SymInt):
            return int(size)
        if (expression := size.node.expr) not in numbers:
            known = expression.subs(one).xreplace(example_sizes(size.node.shape_env))
            numbers[expression] = int(known) if known.is_number else None
        return numbers[expression]

    def description(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [description(item) for item in value]
        if not isinstance(value, Tensor):
            return None
        shape = tuple(map(number, value.shape))
        return (shape, value.dtype) if None not in shape else ()

    for node in graph.nodes:
        value = description(node.meta.pop("val", None))
        if value != ():  # () stands for a size that depends on data
            node.meta["value"] = value
