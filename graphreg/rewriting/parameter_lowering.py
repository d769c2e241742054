"""Decides which nodes the rewrite inserts for splices on parameters.

``chain_at`` finds the chain of splices at one parameter in one graph, and the reads that get their
results. ``insert_chains`` makes the insertions for all chains. The call of a layer becomes a call
of the same layer with other tensors in place of some of its parameters (``ir/layer_calls.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphreg.errors import TraceError
from graphreg.ir.aliasing import Aliases
from graphreg.ir.layer_calls import LAYER, PARAMETERS, call_with, instead_of
from graphreg.ir.metadata import Kind
from graphreg.ir.module_record import RULES
from graphreg.ir.naming import identifier
from graphreg.ir.parameter_reads import ParameterRead
from graphreg.planning.plan import Edit
from graphreg.rewriting.insertions import Insertion, Position, ValueSource

# for each read: how many splices are applied to the parameter before this read
Ends = Mapping[ParameterRead, int]


@dataclass(frozen=True)
class ParameterChain:
    """The splices at one parameter, in order, and what reads their results.

    Attributes:
        site: The name of the parameter's site.
        edits: The splices that act in this graph, each with its index in the plan.
        ends: For each read that gets a replacement, the number of splices that are applied before
            this read: 1 if it gets the result of the first splice.
        first: The first node of the graph that reads a replaced parameter: the splices stand before
            it.
        source: A ``get_attr`` node before ``first`` from which a replaced read takes the parameter;
            the first splice reads this node. None if there is no such node.
    """

    site: str
    edits: tuple[tuple[int, Edit], ...]
    ends: Ends
    first: fx.Node
    source: fx.Node | None

    def calls(self) -> dict[fx.Node, dict[str, int]]:
        """Return a dict. Each key is a call of a layer; the value maps the replaced parameters' names in it to numbers in ``ends``."""
        calls: dict[fx.Node, dict[str, int]] = {}
        for read, end in self.ends.items():
            if read.source is None:
                calls.setdefault(read.node, {})[read.name] = end
        return calls

    def fetched(self) -> dict[tuple[fx.Node, int], list[fx.Node]]:
        """Return the nodes that read the parameter from a ``get_attr`` node, in the order of the graph.

        Each key of the dict is that ``get_attr`` node and the number in ``ends`` that the reads of
        these nodes have.
        """
        fetched: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        for read, end in self.ends.items():
            if read.source is not None:
                fetched.setdefault((read.source, end), []).append(read.node)
        return fetched


def chain_at(site: str, reads: Sequence[ParameterRead], edits: Sequence[tuple[int, Edit]]) -> ParameterChain | None:
    """Return the chain of splices at a parameter in one graph, given its reads in the order of the graph; None if no splice acts there."""
    acting = [(i, edit) for i, edit in edits if any(read.is_by(edit.readers) for read in reads)]
    counts = {read: sum(read.is_by(edit.readers) for _, edit in acting) for read in reads}
    ends = {read: count for read, count in counts.items() if count}
    if not ends:
        return None
    first = next(iter(ends)).node
    source = next((read.source for read in ends if read.source is not None and read.source < first), None)
    return ParameterChain(site, tuple(acting), ends, first, source)


# inserts directly before a node, after all insertions that stand there already
AddBefore = Callable[..., Insertion]


def insert_chains(
    chains: Sequence[ParameterChain], add_before: AddBefore, aliases: Aliases, names: Mapping[int | str, str], key: Insertion | None,
    read_by: Callable[[Edit], Mapping[str, Any]],
) -> Iterator[Insertion]:  # fmt: skip
    """Insert the splices on parameters. Yield the insertions that take the places of calls of layers.

    ``read_by``: returns the keyword arguments by which the runtime module of an edit gets the clock
    and inputs of the model.

    Raises TraceError if the forward writes into one of the parameters.
    """
    # for each call of a layer: by parameter name, the replacement
    calls: dict[fx.Node, dict[str, Insertion]] = {}
    for chain in chains:
        _require_unwritten(chain, aliases)
        results = _splices(chain, add_before, names, key, read_by)
        for node, ends in chain.calls().items():
            calls.setdefault(node, {}).update({name: results[end - 1] for name, end in ends.items()})
        for (source, end), readers in chain.fetched().items():
            if source is not chain.source:
                add_before(
                    readers[0], Kind.REPLACED, f"{source.name}_replaced", instead_of, (source, results[end - 1]), op="call_function",
                    site=chain.site, replaces=source, readers=frozenset(readers),
                )  # fmt: skip
    for node, replaced in calls.items():
        path = str(node.target)
        layer = add_before(node, Kind.LAYER, f"{identifier(path)}_layer", path, (), op="get_attr")
        arguments = {LAYER: layer, PARAMETERS: replaced}
        yield Insertion(node.name, Kind.CALL, Position.INSTEAD, node, "call_function", call_with, (), arguments)


def _splices(
    chain: ParameterChain, add_before: AddBefore, names: Mapping[int | str, str], key: Insertion | None,
    read_by: Callable[[Edit], Mapping[str, Any]],
) -> list[Insertion]:  # fmt: skip
    """Insert the splices at one parameter, each reading the result of the one before, and return them."""
    value: ValueSource
    if chain.source is not None:
        value = chain.source
    else:
        value = add_before(chain.first, Kind.PARAMETER, identifier(chain.site), chain.site, (), op="get_attr", site=chain.site)
    fetched, results = chain.fetched(), list[Insertion]()
    for end, (i, edit) in enumerate(chain.edits, 1):
        readers = fetched.get((chain.source, end), ()) if chain.source is not None else ()
        value = add_before(
            chain.first, Kind.SPLICE, names[i], f"{RULES}.{names[i]}", (value, key), regularizer=edit.name, site=chain.site,
            replaces=chain.source if readers else None, readers=frozenset(readers) if readers else None,
            kwargs=read_by(edit),
        )  # fmt: skip
        results.append(value)
    return results


def _require_unwritten(chain: ParameterChain, aliases: Aliases) -> None:
    for source, _ in chain.fetched():
        if aliases.written_later(source, is_definite=True):
            raise TraceError(
                f"{chain.edits[0][1].name} cannot replace the parameter {chain.site}: the forward writes into it, and the write would be "
                "lost. Leave the parameter out."
            )
