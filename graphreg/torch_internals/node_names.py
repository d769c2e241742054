"""The rule by which torch.fx names the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx.graph import _Namespace


def node_namer(taken: Iterable[str]) -> Callable[[str], str]:
    """A function that gives the name a new node would get, in a graph whose nodes were named ``taken``, in that order.

    A name that was given is taken from then on. ``fx.Graph`` applies the rule only while it makes the node, and a list of nodes that
    are still to be made needs their names before.
    """
    names = _Namespace()
    for name in taken:
        names.create_name(name, None)
    return lambda candidate: names.create_name(candidate, None)
