"""Finds residual branches: values that a sum adds to the value that they were computed from. That value is the trunk of the sum.

In ``x + f(x)`` the trunk is ``x`` and the branch is ``f(x)``. A product of data with weights, such
as a linear layer, must lie between the two, or a pooling or Fourier transform, with which
PoolFormer and FNet mix positions: ``x + 0.04 * x ** 3`` has no branch. In
``shortcut(x) + f(x)`` the trunk is projected: the shortcut is a chain of operations with at most
one product, ``f`` has more products and is not linear, and the operations of both lie in the module
whose forward computes the sum.

A value is on the trunk if a later sum adds a branch to it, or if it lies between such a value and
that sum, or the sum before it. So the last sum is not: no later block gets what is lost there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from graphreg.ir.convolution_axes import shape_of
from graphreg.ir.dataflow import has_options_only
from graphreg.ir.metadata import scope_of
from graphreg.ir.operations import SPLITS, SUMS, Operations, function_name, is_integer, is_port, nodes_in

# operations that pick a step of a sequence; such a step is no trunk: W x_t + U h is not residual
_PICKS = {"select", "unbind"}

# operations that take a part of a value
_PARTS = {"getitem", "__getitem__", "narrow", "select", *SPLITS}

# in the names of operations that combine positions without weights
_MIXERS = ("pool", "fft")

# a sum with more summands gets no branches; otherwise, a loop that adds to one value would be
# searched again at each step
_MOST = 32
# a shortcut with a projection has at most so many nodes; this keeps the search linear in the size
# of the graph
_LONGEST = 32


@dataclass(frozen=True)
class Residuals:
    """The residual branches of a graph, and the trunks that they are added to.

    Attributes:
        branches: The branches.
        trunk: The nodes on a trunk, each with the first node of its trunk.
    """

    branches: Collection[fx.Node]
    trunk: Mapping[fx.Node, fx.Node]


def residuals(
    graph: fx.Graph, operations: Operations, sizes: Collection[fx.Node], signals: Collection[fx.Node], products: Collection[fx.Node],
    learned: Collection[fx.Node],
) -> Residuals:  # fmt: skip
    """Return the nodes of a graph whose values are residual branches, and those whose values are on the trunk.

    Args:
        graph: A traced graph.
        operations: The operations of the graph's model.
        sizes: The nodes whose values are numbers, shapes or flags.
        signals: The nodes that ``signals`` returns.
        products: The nodes that multiply data by weights.
        learned: The nodes that are computed from parameters alone and that layers read, such as the queries of a decoder.
    """
    return _Finder(graph, operations, sizes, signals, products, learned).find()


def signals(graph: fx.Graph, sizes: Collection[fx.Node], products: Collection[fx.Node], filled: Collection[fx.Node]) -> set[fx.Node]:
    """Return the signals: nodes that depend on a floating-point input or on a product. Masks, positions and parameters are no signals.

    ``filled``: the nodes into whose values data is written.
    """
    found = set[fx.Node]()
    for node in graph.nodes:
        if node.op == "placeholder":
            known = node.meta.get("value")
            is_signal = not isinstance(known, tuple) or bool(known[1].is_floating_point)
        elif node in sizes or node.op in ("get_attr", "output") or is_integer(node):
            is_signal = False
        elif has_options_only(node):
            is_signal = node in filled
        else:
            is_signal = node in products or not found.isdisjoint(node.all_input_nodes)
        if is_signal:
            found.add(node)
    return found


@dataclass(frozen=True)
class _SummandChain:
    """The nodes from a summand back to an earlier value, where each node but the last has the next node as its only signal operand.

    Attributes:
        nodes: The nodes of the chain; the summand comes first.
        direct: How many nodes, counted from the summand, have the same value as the summand up to
            views and dropout.
    """

    nodes: tuple[fx.Node, ...]
    direct: int


class _Finder:
    """Finds the branches and the trunk of each sum of a graph, in order."""

    def __init__(
        self, graph: fx.Graph, operations: Operations, sizes: Collection[fx.Node], signals: Collection[fx.Node],
        products: Collection[fx.Node], learned: Collection[fx.Node],
    ) -> None:  # fmt: skip
        self.graph, self.operations, self.sizes, self.signals = graph, operations, sizes, {*signals, *learned}
        self.products = {*products, *(node for node in learned if operations.is_product(node))}
        self.learned = learned
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.residual = set[fx.Node]()  # the sums that have a branch
        self.branches, self.trunk = set[fx.Node](), set[fx.Node]()

    def find(self) -> Residuals:
        for node in self.graph.nodes:
            if self._is_sum(node):
                self._judge(node)
        # a value to which a later sum adds a branch is a state, and what was added to it before, such as positions, is no trunk
        self.branches -= {branch for branch in self.branches if not self.trunk.isdisjoint(self._peeled(branch))}
        for node in list(self.trunk):
            self.trunk.update(self._since_the_sum(node))
        return Residuals(self.branches, self._firsts())

    def _firsts(self) -> dict[fx.Node, fx.Node]:
        firsts = dict[fx.Node, fx.Node]()
        for node in sorted(self.trunk, key=self.order.__getitem__):
            firsts[node] = next((firsts[operand] for operand in self._operands(node) if operand in firsts), node)
        return firsts

    def _is_sum(self, node: fx.Node) -> bool:
        is_sum = function_name(node) in SUMS and not self.operations.is_opaque(node) and node not in self.sizes
        return is_sum and not self.operations.is_list(node)  # tuples are joined by ``+``, too

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        return [operand for operand in nodes_in((node.args, node.kwargs)) if operand in self.signals]

    def _judge(self, node: fx.Node) -> None:
        """Record the branches of a sum, and what of its trunk is known: back to the value that a branch was computed from.

        An inner sum that only this sum reads is replaced by its summands. The first attempt does so
        only if the inner sum has no branch itself. If no branch is found, the second attempt does
        so in any case.
        """
        for through in (False, True):
            inner = list[fx.Node]()
            summands = self._summands(node, through, inner)
            if len(summands) == 2:
                # The branch is the one with more products on the way from a common value, which may
                # be the other summand itself.
                one, two = summands
                tried = {branch: self._trunk(node, trunk, branch) for trunk, branch in ((one, two), (two, one))}
                trunks = {branch: trunk for branch, trunk in tried.items() if trunk}
            else:
                trunks = self._of_several(node, summands)
            if trunks:
                self.branches.update(trunks)
                self.residual.add(node)
                self.trunk.update(*trunks.values())
                for each in sorted(inner, key=self.order.__getitem__):
                    if not self.trunk.isdisjoint(self._operands(each)):
                        self.trunk.add(each)
                return

    def _summands(self, node: fx.Node, through: bool, inner: list[fx.Node]) -> list[fx.Node]:
        """Return the summands of a sum; an empty list if there are too many.

        ``through``: whether inner sums that have a branch are also replaced by their summands.
        ``inner``: gets the inner sums that were replaced.
        """
        summands, waiting = dict[fx.Node, None](), self._operands(node)[::-1]
        while waiting:
            operand = waiting.pop()
            if self._is_sum(operand) and len(operand.users) == 1 and (through or operand not in self.residual):
                inner.append(operand)
                waiting += self._operands(operand)[::-1]
            else:
                summands[operand] = None
            if len(summands) + len(waiting) > _MOST:
                return []
        return list(summands)

    def _of_several(self, node: fx.Node, summands: Sequence[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """Return the branches of a sum of several values, each with the nodes of the trunk.

        The trunk is the summand that was computed first. Views and dropout at the end of a
        summand's computation do not count.
        """
        peeled = {summand: tuple(self._peeled(summand)) for summand in summands}
        if len(peeled) < 2:
            return {}
        first = min(peeled, key=lambda summand: self.order[peeled[summand][-1]])
        trunk = peeled[first][-1]
        if not self._may_be_trunk(peeled[first], node):
            return {}

        branches = {}
        for other in summands:
            if other is first:
                continue
            before = self._before(other, self.order[trunk])
            # a product or more on the way from the trunk makes a summand a branch; without one, it
            # is another trunk
            if trunk not in before or not any(each in self.products for each in _from(trunk, before)) or _is_repeated(other, node):
                continue
            if not self._is_added(trunk, before) and not self._reads_other_parts(peeled[first], before):
                branches[other] = peeled[first]
        return branches

    def _trunk(self, node: fx.Node, summand: fx.Node, branch: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes from a summand back to the value that the other summand, the branch, was computed from.

        Return () if the other summand is no branch: it was not computed from any node of the
        summand's chain, or through no more products than the chain has before that node.
        """
        chain = self._chain(summand, scope_of(node))
        before = self._before(branch, min(map(self.order.__getitem__, chain.nodes)))
        way = next((i for i, each in enumerate(chain.nodes) if each in before), None)
        if way is None or self._reads_other_parts(chain.nodes, before) or not self._may_be_trunk(chain.nodes[: way + 1], node):
            return ()
        if _is_repeated(branch, node):  # as the query of additive attention, which a decoder computes from the keys of the step before
            return ()
        between = _from(chain.nodes[way], before)
        passed = sum(each in self.products for each in chain.nodes[:way])
        inside = way < chain.direct or all(_is_within(scope_of(each), scope_of(node)) for each in between)
        inside = inside and not self._is_added(chain.nodes[way], between)
        is_branch = inside and sum(each in self.products for each in between) > passed
        # no block: two convolutions that read from blocks of one trunk, as those of WaveNet's sum of skips
        summed = (operand for each in self.residual.intersection(between) for operand in self._operands(each))
        is_branch = is_branch and (way < chain.direct or {chain.nodes[way], *between}.issuperset(summed))
        # the branch of a block that mixes positions without weights: ``x + scale(pool(x) - x)``
        is_branch = is_branch or (way < chain.direct and not passed and any(map(self._mixes, between)))
        # ``W x + B A x`` is one layer with a change of low rank, as of LoRA
        is_branch = is_branch and not (passed and all(map(self._is_linear, between)))
        return chain.nodes[: max(way + 1, chain.direct)] if is_branch else ()

    def _is_added(self, trunk: fx.Node, before: Sequence[fx.Node]) -> bool:
        """Return whether a learned value is added to data on the way to a branch, as positions are in each layer, and so is no trunk."""
        sums = (each for each in before if trunk in each.all_input_nodes and self._is_sum(each))
        return trunk in self.learned and any(each not in self.learned for each in sums)

    def _may_be_trunk(self, chain: Sequence[fx.Node], node: fx.Node) -> bool:
        """Return whether a summand may be a trunk: it has a gradient, and is not repeated, as a mean that was subtracted before."""
        return not _is_repeated(chain[0], node) and not any(function_name(each) == "detach" for each in chain)

    def _reads_other_parts(self, chain: Sequence[fx.Node], before: Sequence[fx.Node]) -> bool:
        """Return whether a chain and the other summand take different parts of their common value, as a layer's share of a condition."""
        way = next(i for i, each in enumerate(chain) if each in before)
        readers = [*chain[max(way - 1, 0) : way], *(each for each in before if chain[way] in each.all_input_nodes)]
        return way > 0 and all(is_port(each, self.operations) or function_name(each) in _PARTS for each in readers)

    def _mixes(self, node: fx.Node) -> bool:
        """Return whether an operation without weights combines positions: a pooling, or a Fourier transform."""
        module = self.operations.module(node)
        name = function_name(node) if module is None else type(module).__name__.lower()
        return any(part in name for part in _MIXERS)

    def _is_linear(self, node: fx.Node) -> bool:
        """Return whether an operation only multiplies one signal by weights or numbers, or moves elements."""
        is_scaled = function_name(node) in ("mul", "div", "truediv")
        return (node in self.products or self.operations.passes_through(node) or is_scaled) and len(self._operands(node)) == 1

    def _since_the_sum(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes from a node of the trunk back to the residual sum that it was computed from without a product."""
        between = list[fx.Node]()
        while len(operands := self._operands(node)) == 1 and node not in self.products and len(between) < _LONGEST:
            (node,) = operands
            between.append(node)
            if node in self.residual:
                return between
        return []

    def _peeled(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield a node, then the earlier nodes that have the same value up to views and dropout."""
        yield node
        while self.operations.passes_through(node) and not self._picks(node) and len(operands := self._operands(node)) == 1:
            node = operands[0]
            yield node

    def _chain(self, summand: fx.Node, scope: str) -> _SummandChain:
        nodes = list(self._peeled(summand))
        direct, passed = len(nodes), 0
        while len(nodes) < _LONGEST and len(operands := self._operands(nodes[-1])) == 1:
            passed += nodes[-1] in self.products
            if passed > 1 or not _is_within(scope_of(nodes[-1]), scope) or self._picks(nodes[-1]) or self.operations.is_loss(nodes[-1]):
                break
            nodes.append(operands[0])
        return _SummandChain(tuple(nodes), direct)

    def _picks(self, node: fx.Node) -> bool:
        """Return whether an operation takes an element out of a tuple or along an axis."""
        name = function_name(node)
        if name not in ("getitem", "__getitem__"):
            return name in _PICKS
        index = node.args[1]
        return any(not isinstance(part, slice) and part not in (None, ...) for part in (index if isinstance(index, tuple) else (index,)))

    def _before(self, value: fx.Node, first: int) -> list[fx.Node]:
        """Return the value's node and the nodes that it was computed from, in graph order, without those before position ``first``."""
        waiting, visited = [value], {value}
        while waiting:
            for operand in waiting.pop().all_input_nodes:
                if operand in self.signals and operand not in visited and self.order[operand] >= first:
                    visited.add(operand)
                    waiting.append(operand)
        return sorted(visited, key=self.order.__getitem__)


def _from(trunk: fx.Node, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return those of ``nodes`` that were computed from the trunk. ``nodes`` must be in graph order."""
    reached = {trunk}
    for node in nodes:
        if any(operand in reached for operand in node.all_input_nodes):
            reached.add(node)
    return [node for node in nodes if node in reached and node is not trunk]


def _is_repeated(summand: fx.Node, node: fx.Node) -> bool:
    """Return whether a summand has another shape than the sum; False if these are not known."""
    return len({shape_of(summand), shape_of(node)} - {None}) > 1


def _is_within(scope: str, outer: str) -> bool:
    return not outer or scope == outer or scope.startswith(f"{outer}.")
