"""The rule by which torch.fx names the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx.graph import _illegal_names, _Namespace


def node_namer(taken: Iterable[str]) -> Callable[[str], str]:
    """Return a function that takes a candidate for a name, and returns the name that torch.fx would give a new node.

    ``taken``: the names of the graph's nodes, in the order in which they were given. Each name that the function returns counts as taken
    from then on. ``fx.Graph`` chooses a name only when it makes the node, but graphreg needs the names of a list of nodes before it makes
    them.
    """
    names_taken, names = dict.fromkeys(taken), list[_Namespace]()

    def name(candidate: str) -> str:
        free = candidate not in names_taken and candidate not in _illegal_names and candidate.isascii() and candidate.isidentifier()
        if names:
            free_name = names[0].create_name(candidate, None)
        elif free:
            free_name = candidate
        else:  # torch appends a number that depends on all earlier names; replaying these takes long, so it is done only here
            names.append(_Namespace())
            for each in names_taken:
                names[0].create_name(each, None)
            free_name = names[0].create_name(candidate, None)
        names_taken[free_name] = None
        return free_name

    return name
