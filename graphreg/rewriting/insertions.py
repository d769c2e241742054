"""Insertions: the nodes that the rewrite makes, in one ordered list for each traced graph, with everything decided about them.

``plan_lowering.py`` finds out what they are, ``rewrite.py`` makes them while it copies the graph.

Splices on parameters need no kind more: they are a ``READ`` and a ``SPLICE`` before the first reader, which replace the parameter
for chosen readers, and the call of a layer that reads it by itself, made ``INSTEAD`` of the layer's own. State that a regularizer
owns lives in its runtime module and inserts nothing. Blocks group the insertions of a graph by the site that they are at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from torch import fx

from graphreg.ir import Kind


class Position(Enum):
    """Where an insertion stands, by a node of the traced graph: its anchor."""

    BEFORE = "before"
    INSTEAD = "instead of"  # under the anchor's name, with its arguments and those of the insertion
    AFTER = "after"


@dataclass(frozen=True, eq=False)
class Insertion:
    """A node that the rewrite makes.

    Attributes:
        name: The node's name in the emitted graph; no other node has it.
        kind: What it is there for.
        position: Whether it stands before, after or instead of its anchor.
        anchor: A node of the traced graph. Several insertions at one place stand in the order of the list.
        op: ``call_module``, ``call_function`` or ``get_attr``, as in torch.fx.
        target: The path of the runtime module, the function, or the path of the parameter.
        args: What it is called with. A node of the traced graph stands for the value that this node itself makes, not for what
            replaces it; an insertion for the value of that insertion.
        kwargs: The same, by name.
        regularizer: The name of the regularizer whose it is; "" where it is that of several or of none.
        site: The name of the site that it is at; "" where it is at none.
        replaces: The node of the traced graph whose readers read this insertion instead, from its place on.
        readers: Which of them do; None for all.
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


Value = fx.Node | Insertion


def _text(arg: Any) -> str:
    """An argument as text, its nodes and insertions by name."""
    if isinstance(arg, (fx.Node, Insertion)):
        return arg.name
    if isinstance(arg, tuple):
        return f"({', '.join(map(_text, arg))}{',' * (len(arg) == 1)})"
    return f"{{{', '.join(f'{name!r}: {_text(value)}' for name, value in arg.items())}}}" if isinstance(arg, dict) else repr(arg)


@dataclass(frozen=True)
class Insertions:
    """What the plan comes to in one traced graph.

    Attributes:
        ordered: The insertions in the order in which they stand in the emitted graph.
        totals: The penalties of the graph, by name, in the plan's order.
        returns: Whether the output carries the penalties; else they are attached to it.
        recomputed: The runtime modules of splices and native dropouts whose result is computed again in backward, when compiled.
        overwritten: Those of splices into whose value the model may write.
        apart: Those of which it does, while a penalty measures what they give.
    """

    ordered: tuple[Insertion, ...]
    totals: Mapping[str, Insertion]
    returns: bool = True
    recomputed: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

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
