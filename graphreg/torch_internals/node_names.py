"""The rule by which torch.fx names the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx.graph import _illegal_names, _Namespace


def node_namer(taken: Iterable[str]) -> Callable[[str], str]:
    """Return a function that returns the name of a new node in a graph whose nodes were named ``taken``, in that order.

    Each name that it returns counts as taken from then on. ``fx.Graph`` chooses a name only when it makes the node, but graphreg needs the
    names of a list of nodes before it makes them.
    """
    names_taken, names = dict.fromkeys(taken), list[_Namespace]()

    def name(candidate: str) -> str:
        free = candidate not in names_taken and candidate not in _illegal_names and candidate.isascii() and candidate.isidentifier()
        if names:
            free_name = names[0].create_name(candidate, None)
        elif free:
            free_name = candidate
        else:  # torch appends a number that depends on all names before; replaying those takes as long as making the nodes, so only here
            names.append(_Namespace())
            for each in names_taken:
                names[0].create_name(each, None)
            free_name = names[0].create_name(candidate, None)
        names_taken[free_name] = None
        return free_name

    return name
