"""The rule by which torch.fx names the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx.graph import _illegal_names, _Namespace


def node_namer(taken: Iterable[str]) -> Callable[[str], str]:
    """A function that gives the name a new node would get, in a graph whose nodes were named ``taken``, in that order.

    A name that was given is taken from then on. ``fx.Graph`` applies the rule only while it makes the node, and a list of nodes that
    are still to be made needs their names before.
    """
    names_taken, names = dict.fromkeys(taken), list[_Namespace]()

    def name(candidate: str) -> str:
        free = candidate not in names_taken and candidate not in _illegal_names and candidate.isascii() and candidate.isidentifier()
        if names:
            free_name = names[0].create_name(candidate, None)
        elif free:
            free_name = candidate
        else:  # a number is added, which depends on all names before; torch's own count of them takes as long as making the nodes
            names.append(_Namespace())
            for each in names_taken:
                names[0].create_name(each, None)
            free_name = names[0].create_name(candidate, None)
        names_taken[free_name] = None
        return free_name

    return name
