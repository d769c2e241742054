"""Finds, for each operation of a pipeline stage, the same operation in the graph of the whole model.

A stage runs a part of the model's operations, by the model's own code. So an operation of the stage is that operation of the model which
has the same target and the same arguments. What a stage gets as its input may be any value of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from graphreg.ir.comparison import is_nan

Found = dict[fx.Node, list[fx.Node]]  # from a node of the stage to the nodes of the whole model that may be the same operation


def counterparts(
    stage: fx.Graph, whole: fx.Graph, path: Callable[[str], str], constants: Collection[str], chosen: Mapping[fx.Node, fx.Node | None]
) -> Found:
    """Return, for each operation of a stage, the operations of the whole model that may be the same operation.

    Args:
        stage: A graph of the stage.
        whole: The graph of the whole model for the same mode.
        path: Returns, for the path of a module or a tensor in the stage, its path in the whole model.
        constants: The names of tensors that the graphs read and that belong to no module. Each graph numbers them separately, so these
            names are not compared.
        chosen: Operations that the user has named, each with its counterpart; None if the whole model has no such operation.

    Returns:
        A dict. Each key is a node of the stage, in the order of its graph. The value is the list of its possible counterparts: a single one
        if it is certain, an empty list if the whole model has none. Placeholders and the output are left out.
    """
    search = _Search(whole, path, constants)
    for node in stage.nodes:
        if node.op not in ("placeholder", "output"):
            search.add(node, chosen)
    search.settle()
    return search.found


def read_in_whole(found: Found, placeholder: fx.Node) -> list[fx.Node]:
    """Return the values of the whole model that are in the place of an input of the stage, each once.

    They are what the counterparts of the input's readers read there. Readers whose counterpart is not certain are left out.
    """
    read: dict[fx.Node, None] = {}
    for user in placeholder.users:
        if len(theirs := found.get(user, [])) == 1:
            pairs = paired((user.args, user.kwargs), (theirs[0].args, theirs[0].kwargs)) or []
            read.update((other, None) for node, other in pairs if node is placeholder)
    return list(read)


class _Search:
    """The candidates for each node of the stage: the counterparts that are still possible.

    The lists in ``found`` only shrink, and none becomes empty after it was made.
    """

    def __init__(self, whole: fx.Graph, path: Callable[[str], str], constants: Collection[str]) -> None:
        self.path, self.constants, self.found = path, constants, Found()
        self.by_key: dict[Any, list[fx.Node]] = {}
        for node in whole.nodes:
            if node.op not in ("placeholder", "output"):
                self.by_key.setdefault(self._key(node, str), []).append(node)

    def _key(self, node: fx.Node, path: Callable[[str], str]) -> Any:
        if node.op == "get_attr" and node.target in self.constants:
            return "a constant"
        return node.op, path(str(node.target)) if node.op in ("call_module", "get_attr") else node.target

    def add(self, node: fx.Node, chosen: Mapping[fx.Node, fx.Node | None]) -> None:
        """Find the candidates for a node, given those for the nodes before it."""
        same = self.by_key.get(self._key(node, self.path), [])
        if node in chosen:
            same = [each for each in same if each is chosen[node]]
        self.found[node] = [each for each in same if self._fits(node, each)]

    def _fits(self, node: fx.Node, other: fx.Node) -> bool:
        pairs = paired((node.args, node.kwargs), (other.args, other.kwargs))
        # An argument without candidates is an input of the stage, which may be any value.
        return pairs is not None and all(not self.found.get(ours) or theirs in self.found[ours] for ours, theirs in pairs)

    def settle(self) -> None:
        """Remove candidates until nothing changes; then decide between equal candidates by the order of the operations.

        A candidate for a node is removed if one of its arguments is no candidate for the node's argument at the same place, if no candidate
        for a reader of the node reads it at the same place, or if it is certainly the counterpart of another node.
        """
        count = -1
        # Each round only removes candidates, so there is a last one.
        while count != (count := sum(map(len, self.found.values()))):
            for node in self.found:
                self._keep(node, [each for each in self.found[node] if self._fits(node, each)])
            # Readers first: then one round carries what is known of the last node up to the first.
            for node in reversed(self.found):
                self._read_by(node)
            # a node whose only candidate is this one has it; no other node can
            taken = {each[0]: node for node, each in self.found.items() if len(each) == 1}
            for node, each in self.found.items():
                self._keep(node, [other for other in each if taken.get(other, node) is node])
        self._in_order()

    def _read_by(self, user: fx.Node) -> None:
        """For each node that ``user`` reads, keep the candidates that a candidate for ``user`` reads at the same place."""
        read: dict[fx.Node, list[fx.Node]] = {}
        for each in self.found[user]:
            for ours, theirs in paired((user.args, user.kwargs), (each.args, each.kwargs)) or []:
                read.setdefault(ours, []).append(theirs)
        for ours, theirs_read in read.items():
            self._keep(ours, [each for each in self.found.get(ours, []) if each in theirs_read])

    def _in_order(self) -> None:
        """If several nodes have the same candidates, as many as there are nodes, pair them in the order of the two graphs."""
        alike = Counter(tuple(each) for each in self.found.values())
        turn: Counter[tuple[fx.Node, ...]] = Counter()
        for node, each in self.found.items():
            if len(each) > 1 and alike[group := tuple(each)] == len(each):
                self.found[node] = [each[turn[group]]]
                turn[group] += 1

    def _keep(self, node: fx.Node, kept: list[fx.Node]) -> None:
        if kept:
            self.found[node] = kept


def paired(ours: Any, theirs: Any) -> list[tuple[fx.Node, fx.Node]] | None:
    """Return the pairs of nodes at the same places in two nested structures of arguments; None if these differ in anything else."""
    try:
        return list(_pairs(ours, theirs))
    except _DifferentError:
        return None


class _DifferentError(Exception):
    """The arguments of two nodes differ."""


def _pairs(ours: Any, theirs: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    if isinstance(ours, fx.Node) and isinstance(theirs, fx.Node):
        yield ours, theirs
    elif isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)) and len(ours) == len(theirs):
        for one, other in zip(ours, theirs, strict=True):
            yield from _pairs(one, other)
    elif isinstance(ours, Mapping) and isinstance(theirs, Mapping) and ours.keys() == theirs.keys():
        for name, one in ours.items():
            yield from _pairs(one, theirs[name])
    elif isinstance(ours, slice) and isinstance(theirs, slice):
        yield from _pairs((ours.start, ours.stop, ours.step), (theirs.start, theirs.stop, theirs.step))
    elif isinstance(ours, torch.device) and isinstance(theirs, torch.device):
        return  # the whole model may be on the meta device
    elif type(ours) is not type(theirs) or not (ours == theirs or (is_nan(ours) and is_nan(theirs))):
        raise _DifferentError
