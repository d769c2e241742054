"""Turns a flat graph into a graph that calls blocks, and a graph for each call of a block. The flat graph stays unchanged.

A block is a module that ``blocks=`` selects; the flat graph contains its operations, but does not call it. The names in a block's code are
relative to the block. So equal blocks have equal code, and torch.compile compiles the code once.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import networkx as nx
from torch import fx, nn
from torch.fx.node import map_arg

from graphreg.blocks.homes import homes
from graphreg.blocks.shown_call import KEYS, VARIANT, CallElement, Shape, ShownCall
from graphreg.errors import TraceError
from graphreg.ir.call_records import Leaf, in_containers, recorded_calls
from graphreg.ir.metadata import Kind, ModuleCalls, is_kind, own_labels
from graphreg.ir.module_record import PREFIX, RULES
from graphreg.ir.naming import COUNTED
from graphreg.ir.serialize import blank_like
from graphreg.torch_internals import pytree

OUTSIDE = "graphreg_outside"  # the attribute of a block that holds the outside modules that its code calls


@dataclass(frozen=True)
class BlockCall:
    """A call of a block.

    Attributes:
        path: The path of the block.
        graph: The graph of the operations in this call.
        node: The node that calls the block, in the graph of the whole model or of an outer block.
        shown: What hooks of the block get; None if that was not recorded.
    """

    path: str
    graph: fx.Graph
    node: fx.Node
    shown: ShownCall | None


@dataclass(frozen=True)
class BlockNames:
    """The names by which a block's code calls modules outside of the block.

    Attributes:
        rules: A dict for runtime modules. Each key is a name in the block's code; the value is the name of the runtime module in the
            container of the whole model (``graphreg_rules``).
        outside: A dict for all other modules. Each key is a name in the block's code; the value is the path of the module.
    """

    rules: dict[str, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)


class Outliner:
    """Outlines the graphs of one rewritten module. Outlining is the reverse of inlining: operations become calls of blocks.

    Attributes:
        names: The ``BlockNames`` of each block, by path. All calls of a block, in all graphs, use the same names.
    """

    def __init__(self, root: nn.Module, blocks: Iterable[str]) -> None:
        self.root, self.blocks = root, frozenset(blocks)
        self.names = {path: BlockNames() for path in sorted(self.blocks)}
        self._paths: dict[int, list[str]] = {}  # for the id of each module: all paths of the module
        for path, module in root.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(path)

    def outline(self, graph: fx.Graph) -> tuple[fx.Graph, list[BlockCall]]:
        """Return a graph of the whole model that calls the blocks, and a ``BlockCall`` for each call of a block.

        Raises:
            TraceError: An operation outside of a block reads a value from inside, and the same call of the block reads the result of the
                operation. Then the block cannot be one call.
        """
        work = _Outlining(self, graph)
        level = work.level(work.members(), (), blank_like(graph))
        return level.graph, work.calls

    def relative(self, path: str, block: str) -> str | None:
        """Return the path of a module relative to a block; None if the block does not contain the module."""
        for known in (path, *self._paths.get(id(self.module(path)), ())):
            if not block or known == block or known.startswith(f"{block}."):
                return str(known).removeprefix(block).removeprefix(".")
        return None

    def module(self, path: str) -> Any:
        return self.root.get_submodule(path)


@dataclass
class _Level:
    """A graph that is being made: the graph of the whole model, or of a call of a block.

    Attributes:
        path: The block's path; "" for the whole model.
        graph: The graph.
        made: A dict. Each key is a node of the flat graph; the value is the node of ``graph`` that has the same value.
        rows: A dict. Each key is a node of the flat graph that draws random numbers; the value is the node of ``graph`` that has the noise
            key for this draw (a row of the tensor with all keys).
    """

    path: str
    graph: fx.Graph
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    rows: dict[fx.Node, fx.Node] = field(default_factory=dict)


class _Outlining:
    """Does the work of ``Outliner.outline`` for one flat graph."""

    def __init__(self, outliner: Outliner, flat: fx.Graph) -> None:
        self.outliner, self.flat = outliner, flat
        self.homes = homes(flat, outliner.blocks)
        self.order = {node: i for i, node in enumerate(flat.nodes)}
        self.calls: list[BlockCall] = []
        self.named = {node.name: node for node in flat.nodes}
        self.records = recorded_calls(flat)
        for node in flat.nodes:
            if node.op == "get_attr" and not all(self._readable(node, reader) for reader in node.users):
                self.homes[node] = ()  # the whole model reads the attribute, and passes its value to the blocks
        # for each value that hooks get as an input of a block's call: those calls, each with the calls around it
        self.given_to: dict[fx.Node, list[ModuleCalls]] = {}
        for call, around in {call: home[: i + 1] for home in self.homes.values() for i, call in enumerate(home)}.items():
            for node in self._recorded(call, "inputs"):
                self.given_to.setdefault(node, []).append(around)

    def members(self) -> list[fx.Node]:
        """Return all nodes of the flat graph, except those ``get_attr`` nodes that each level with a reader makes for itself."""
        return [node for node in self.flat.nodes if node in self.homes]

    def _readable(self, read: fx.Node, reader: fx.Node) -> bool:
        """Return whether the block that contains ``reader`` can read an attribute itself; True if no block contains the reader.

        A block can read any parameter itself, also one from outside of the block. It has to, because FSDP would free the memory of a
        parameter that the whole model read and passed to the block.
        """
        calls = self.homes.get(reader, ())
        owner, _, name = str(read.target).rpartition(".")
        if not calls or self.outliner.relative(owner, calls[-1][0]) is not None:
            return True
        return isinstance(getattr(self.outliner.module(owner), name, None), nn.Parameter)

    def level(self, members: Sequence[fx.Node], calls: ModuleCalls, graph: fx.Graph, inputs: _Border | None = None) -> _Level:
        """Make the graph of a level.

        Args:
            members: The nodes of the flat graph in this level, including those in calls of inner blocks.
            calls: The block calls that contain the level, outermost first; () for the whole model.
            graph: The empty graph to fill.
            inputs: The values that cross the border of the block's call; None for the whole model.
        """
        level = _Level(calls[-1][0] if calls else "", graph)
        if inputs is not None:
            # Named by position and not after the value, so that equal blocks have equal code.
            level.made |= {node: graph.placeholder(f"value_{i}" if i else "value") for i, node in enumerate(inputs.reads)}
            # Only hooks get these. The code has the argument, and does not read it.
            for i in range(len(inputs.attributes)):
                graph.placeholder(f"attribute_{i}" if i else "attribute")
            level.rows |= {node: graph.placeholder(f"key_{i}" if i else "key") for i, node in enumerate(inputs.draws)}
        for item in self._ordered(members, calls):
            if isinstance(item, fx.Node):
                level.made[item] = self._copy(level, item)
            else:
                self._call(level, item, calls)
        return level

    def _ordered(self, members: Sequence[fx.Node], calls: ModuleCalls) -> list[fx.Node | tuple[fx.Node, ...]]:
        """Return the parts of a level in an order in which they can run: nodes, and a tuple of nodes for each call of an inner block."""
        inside: dict[tuple[str, int], list[fx.Node]] = {}
        item_of: dict[fx.Node, Any] = {}
        for node in members:
            home = self.homes[node]
            # All nodes of a call of an inner block are one item, which is placed as a whole.
            item_of[node] = node if len(home) == len(calls) else home[len(calls)]
            if item_of[node] is not node:
                inside.setdefault(item_of[node], []).append(node)
        flow: nx.DiGraph[Any] = nx.DiGraph()
        flow.add_nodes_from(dict.fromkeys(item_of.values()))
        for node in members:
            # A block waits for what its hooks get, too, even if none of its operations reads that.
            given = (source for call in self.homes[node][len(calls) :] for source in self._recorded(call, "inputs"))
            sources = {item_of[source] for source in (*node.all_input_nodes, *given) if source in item_of} - {item_of[node]}
            flow.add_edges_from((source, item_of[node]) for source in sources)
        if not nx.is_directed_acyclic_graph(flow):
            path = next(step[0] for edge in nx.find_cycle(flow) for step in edge if isinstance(step, tuple))
            raise TraceError(
                f"the block {path!r} cannot be one call: operations outside of it read values from inside, and their results are read "
                "inside again. Leave the block out of blocks=, or select a module that contains the block and these operations."
            )
        # Where several orders are possible, items stay in the order of the flat graph.
        first = {item: self.order[inside[item][0] if item in inside else item] for item in flow}
        return [tuple(inside[item]) if item in inside else item for item in nx.lexicographical_topological_sort(flow, first.__getitem__)]

    def _copy(self, level: _Level, node: fx.Node) -> fx.Node:
        """Copy a node of the flat graph to a level."""

        def present(source: fx.Node) -> fx.Node:
            return self._value(level, source, node)

        if node.op == "output":
            returned: fx.Node = level.graph.output(map_arg(node.args[0], present))
            return returned
        if not level.path:
            return level.graph.node_copy(node, present)
        args, kwargs = map_arg((node.args, node.kwargs), present)
        target: Any = self._target(level.path, str(node.target)) if node.op == "call_module" else node.target
        # Without the block's path and torch.fx's number, so that equal blocks have equal code.
        name = (
            target.removeprefix(f"{RULES}.")
            if node.op == "call_module"
            else COUNTED.sub("", node.name).removeprefix(f"{_identifier(level.path)}_")
        )
        return level.graph.create_node(node.op, target, args, kwargs, _identifier(name))

    def _value(self, level: _Level, source: fx.Node, reader: fx.Node) -> fx.Node:
        """Return the node of a level that has the value of ``source``. Both ``source`` and its reader are nodes of the flat graph."""
        if reader in level.rows and is_kind(source, Kind.KEY):
            return level.rows[reader]
        if source not in level.made:  # ``source`` reads an attribute, and ``reader`` is its first reader at this level
            level.made[source] = self._attribute(level, str(source.target))
        return level.made[source]

    def _attribute(self, level: _Level, target: str) -> fx.Node:
        """Make the node of a level that reads an attribute of the model."""
        owner, _, attribute = target.rpartition(".")
        if level.path:
            within = self._target(level.path, owner)
            target = f"{within}.{attribute}" if within else attribute
        return level.graph.create_node("get_attr", target, name=_identifier(target))

    def _target(self, block: str, path: str) -> str:
        """Return the target by which the code of a block calls the module at a path."""
        room, _, name = path.partition(".")
        names = self.outliner.names.get(block, BlockNames())
        # The name of a runtime module begins with its site's path, which would tell equal blocks
        # apart.
        if room == RULES:
            return f"{RULES}.{_take(names.rules, name.removeprefix(f'{_identifier(block)}_'), name)}"
        if room.startswith(PREFIX):  # a stand-in for a recurrent layer
            return path
        relative = self.outliner.relative(path, block)
        return relative if relative is not None else f"{OUTSIDE}.{_take(names.outside, _identifier(path), path)}"

    def _call(self, level: _Level, members: tuple[fx.Node, ...], calls: ModuleCalls) -> None:
        """Make the graph of a call of a block, and the node of ``level`` that calls the block.

        ``members``: the nodes of the flat graph that belong to the call.
        """
        call = self.homes[members[0]][len(calls)]
        border = self._border(members, calls, call)
        inner = self.level(members, (*calls, call), fx.Graph(), border)
        values = tuple(inner.made[node] for node in border.leaves)
        inner.graph.output(values[0] if len(values) == 1 else values)
        target = self._target(level.path, call[0]) if level.path else call[0]
        args = tuple(self._value(level, node, members[0]) for node in border.reads)
        args += tuple(self._attribute(level, target) for target in border.attributes)
        # The whole model takes rows from the tensor of all keys; a block gets its rows as
        # arguments.
        keys = tuple(level.rows[node] if level.path else self._row(level, node) for node in border.draws)
        node = level.graph.create_node("call_module", target, args, {KEYS: keys, VARIANT: 0}, _identifier(target))
        self.calls.append(BlockCall(call[0], inner.graph, node, self._shown(call, border)))
        if len(border.leaves) == 1:
            level.made[border.leaves[0]] = node
            return
        for i, leaving in enumerate(border.leaves):
            level.made[leaving] = level.graph.create_node("call_function", operator.getitem, (node, i), name=_identifier(leaving.name))

    def _row(self, level: _Level, node: fx.Node) -> fx.Node:
        """Make the node that gets the noise key with which ``node`` draws: a row of the tensor with all keys."""
        key = next(source for source in node.all_input_nodes if is_kind(source, Kind.KEY))
        slot = self.outliner.module(str(node.target)).slot
        return level.graph.create_node("call_function", operator.getitem, (level.made[key], slot), name=f"{node.name}_key")

    def _border(self, members: Sequence[fx.Node], calls: ModuleCalls, call: tuple[str, int]) -> _Border:
        """Find the values that cross the border of a call of a block. ``calls``: the block calls that contain it, outermost first."""
        within, path = set(members), call[0]
        reads: dict[fx.Node, None] = {}
        draws: list[fx.Node] = []
        for node in members:
            for source in node.all_input_nodes:
                if is_kind(source, Kind.KEY):
                    draws.append(node)
                # An attribute without a home does not cross the border: each level reads it for
                # itself.
                elif source not in within and source in self.homes:
                    reads[source] = None
        # Hooks of blocks inside this one need their values here, too.
        for each in dict.fromkeys(each for node in members for each in self.homes[node][len(calls) :]):
            reads |= dict.fromkeys(node for node in self._recorded(each, "inputs") if node not in within and node in self.homes)
        shown = set(self._recorded(call, "output"))
        leaving = [
            node
            for node in members
            if node in shown
            or any(reader not in within for reader in node.users)
            or any(call not in around for around in self.given_to.get(node, ()))
        ]
        if not leaving and call not in self.records:  # nobody reads the block's result, but its hooks get it
            leaving = [node for node in members if _is_output(node, path)][-1:]
        leaves = tuple(sorted(leaving, key=lambda node: not _is_output(node, path)))
        return _Border(tuple(reads), self._attributes(call, calls), tuple(draws), leaves)

    def _recorded(self, call: tuple[str, int], part: str) -> list[fx.Node]:
        """Return the nodes of the values that a call of a block takes (``inputs``) or returns (``output``), after splices."""
        leaves: list[Leaf] = pytree.tree_leaves(getattr(self.records[call], part)) if call in self.records else []
        return [node for leaf in leaves if (node := self._present(leaf)) is not None]

    def _present(self, leaf: Leaf) -> fx.Node | None:
        """Return the node that has a recorded value, after splices; None if there is none."""
        node = self.named.get(leaf.node)
        takes_its_place = (Kind.SPLICE, Kind.CLONE, Kind.TRACK)  # each takes a value, and the nodes after it read its result instead
        while node is not None:
            later = next((user for user in node.users if is_kind(user, *takes_its_place) and user.args[0] is node), None)
            if later is None:
                break
            node = later
        return node

    def _attributes(self, call: tuple[str, int], calls: ModuleCalls) -> tuple[str, ...]:
        """Return the attributes of the model that a call of a block takes or returns, and that no node of the whole model reads for it."""
        record = self.records.get(call)
        leaves: list[Leaf] = pytree.tree_leaves((record.inputs, record.output)) if record is not None else []
        targets = dict.fromkeys(target for leaf in leaves if (target := self._read_by(leaf)))
        outer = calls[-1][0] if calls else ""
        return tuple(target for target in targets if self.outliner.relative(target.rpartition(".")[0], outer) is not None)

    def _read_by(self, leaf: Leaf) -> str:
        """Return the path of the attribute that a recorded value is, if each level reads it for itself; else ``""``."""
        node = self._present(leaf)
        return leaf.read or (str(node.target) if node is not None and node.op == "get_attr" and node not in self.homes else "")

    def _shown(self, call: tuple[str, int], border: _Border) -> ShownCall | None:
        """Return what hooks get of a call of a block; None if that was not recorded."""
        if call not in self.records:
            return None
        given: dict[Any, int] = {value: i for i, value in enumerate((*border.reads, *border.attributes))}
        left = {node: i for i, node in enumerate(border.leaves)}

        def element(leaf: Leaf, returned: bool) -> CallElement:
            node, target = self._present(leaf), self._read_by(leaf)
            if returned and node in left:
                return CallElement(left=left[node])
            if (place := given.get(target or node)) is not None:
                return CallElement(given=place, fixed=returned or bool(target))
            return CallElement(plain=leaf.plain, kind=leaf.kind or ("a value" if leaf.node or leaf.read else ""))

        record = self.records[call]
        inputs, output = (
            in_containers(record.inputs, partial(element, returned=False)),
            in_containers(record.output, partial(element, returned=True)),
        )
        return ShownCall(Shape.of(inputs), Shape.of(inputs[0]), Shape.of(output), len(border.leaves) == 1)


@dataclass(frozen=True)
class _Border:
    """The values that cross the border of a block's call.

    Attributes:
        reads: The nodes outside of the call whose values the call reads, in the order of the reads, then those that only hooks get.
        attributes: Paths of buffers and parameters that only hooks get.
        draws: The nodes in the call that draw random numbers. Each needs a noise key from outside.
        leaves: The nodes in the call whose values are read outside of the call, or that hooks get; the block's own output comes first.
    """

    reads: tuple[fx.Node, ...]
    attributes: tuple[str, ...]
    draws: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]


def _is_output(node: fx.Node, path: str) -> bool:
    """Return whether a value is the output of the module at a path, or an element of the output, possibly after splices."""
    while is_kind(node, Kind.SPLICE, Kind.CLONE, Kind.TRACK) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return any(label.module == path for label in own_labels(node))


def _identifier(path: str) -> str:
    text = re.sub(r"\W", "_", path)
    return f"_{text}" if text[:1].isdigit() else text


def _take(names: dict[str, str], wanted: str, path: str) -> str:
    """Return the name of ``path`` in ``names``. A new path gets the name ``wanted``, with ``_`` appended until no other path has it."""
    name = _identifier(wanted)
    while names.setdefault(name, path) != path:
        name += "_"
    return name
