"""Insertions: descriptions of the nodes that the rewrite makes, in one ordered list for each traced graph.

``plan_lowering.py`` decides everything about them; ``rewrite.py`` makes the nodes while it copies the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from torch import fx

from graphreg.ir.metadata import Kind


class Position(Enum):
    """Where an insertion stands, relative to its anchor, a node of the traced graph."""

    BEFORE = "before"
    INSTEAD = "instead of"  # the node has the anchor's name, and the anchor's arguments before its own
    AFTER = "after"


@dataclass(frozen=True, eq=False)
class Insertion:
    """A node that the rewrite makes.

    Attributes:
        name: The node's name in the emitted graph; no other node has it.
        kind: The purpose of the node.
        position: Whether it stands before, after or instead of its anchor.
        anchor: A node of the traced graph. Insertions with the same anchor and position stand in the order of the list.
        op: ``call_module``, ``call_function`` or ``get_attr``, as in torch.fx.
        target: The path of the runtime module, the function, or the path of the parameter.
        args: The node's positional arguments. An argument that is a node of the traced graph stands for the value of that node, even if
            another insertion replaces this value. An argument that is an insertion stands for the value of that insertion.
        kwargs: The node's keyword arguments, in the same form as ``args``.
        regularizer: The name of the regularizer that the node belongs to; "" if it belongs to several or to none.
        site: The name of its site; "" if it has none.
        replaces: The node of the traced graph that the insertion replaces: nodes of the model that come later read the insertion instead.
            None if it replaces nothing.
        readers: The nodes that read the insertion instead of ``replaces``; None for all nodes of the model that come later.
    """

    name: str
    kind: Kind
    position: Position
    anchor: fx.Node
    op: str
    target: str | Callable[..., Any]
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    regularizer: str = ""
    site: str = ""
    replaces: fx.Node | None = None
    readers: frozenset[fx.Node] | None = None

    def __str__(self) -> str:
        target = self.target if isinstance(self.target, str) else self.target.__name__
        arguments = [_text(arg) for arg in self.args] + [f"{name}={_text(arg)}" for name, arg in self.kwargs.items()]
        text = f"{self.position.value} {self.anchor.name}: {self.kind.value} {self.name} = {target}"
        text += "" if self.op == "get_attr" else f"({', '.join(arguments)})"
        only = f" for {', '.join(sorted(reader.name for reader in self.readers))}" if self.readers is not None else ""
        return text + (f", replaces {self.replaces.name}{only}" if self.replaces is not None else "")


ValueSource = fx.Node | Insertion


def _text(arg: Any) -> str:
    """Return an argument as text, in which nodes and insertions have their names."""
    if isinstance(arg, (fx.Node, Insertion)):
        return arg.name
    if isinstance(arg, tuple):
        return f"({', '.join(map(_text, arg))}{',' * (len(arg) == 1)})"
    return f"{{{', '.join(f'{name!r}: {_text(value)}' for name, value in arg.items())}}}" if isinstance(arg, dict) else repr(arg)


@dataclass(frozen=True)
class Insertions:
    """All insertions that a plan needs in one traced graph.

    Attributes:
        ordered: The insertions in the order in which they stand in the emitted graph.
        totals: The insertion that computes each penalty, by the penalty's name, in the plan's order.
        returns: Whether the graph returns the penalties with the output (``penalties="return"``); if not, they are attached to it.
        recomputed: The names of runtime modules (of splices and native dropouts) whose result a compiled backward recomputes.
        overwritten: The names of runtime modules of splices at sites whose value the model may write into later.
        apart: The names of runtime modules that return a copy of the value and not the value itself. Of splices they are those of the
            first splice at each site that has penalties and whose value the model writes into, unless the value's storage may belong
            to the caller or to the model; they return a copy at a call at which the splice does not act. The others track values
            that the model may write into; they return a copy at a call at which a derivative is taken.
        reads: With ``penalties="attach"``, the names of the inputs of the model on which the value depends to which the penalties are
            attached: the output's loss, or, if it has none, any value in the output.
        kept: The values that the graph returns beside output and penalties, by name; None if the plan has no ``keep``.
    """

    ordered: tuple[Insertion, ...]
    totals: Mapping[str, Insertion]
    returns: bool = True
    recomputed: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    kept: Mapping[str, fx.Node | Insertion] | None = None

    def __iter__(self) -> Iterator[Insertion]:
        return iter(self.ordered)

    def __len__(self) -> int:
        return len(self.ordered)

    def __str__(self) -> str:
        return "\n".join(map(str, self.ordered))

    @cached_property
    def by_place(self) -> dict[tuple[Position, fx.Node], list[Insertion]]:
        """The insertions at each place, in their order."""
        by_place: dict[tuple[Position, fx.Node], list[Insertion]] = {}
        for insertion in self.ordered:
            by_place.setdefault((insertion.position, insertion.anchor), []).append(insertion)
        return by_place
