"""The rule by which torch.fx names the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx.graph import _illegal_names, _Namespace


def node_namer(taken: Iterable[str]) -> Callable[[str], str]:
    """Return a function that predicts the name of a new node: it takes a candidate, and returns the name that torch.fx would choose.

    ``fx.Graph`` chooses a name only when it makes the node. graphreg needs the names of several new nodes before it makes the first.
    So the function treats each name that it has returned as taken.

    Args:
        taken: The names of the nodes of the graph, in the order in which torch.fx chose them.
    """
    names_taken, names = dict.fromkeys(taken), list[_Namespace]()

    def name(candidate: str) -> str:
        free = candidate not in names_taken and candidate not in _illegal_names and candidate.isascii() and candidate.isidentifier()
        if names:
            free_name = names[0].create_name(candidate, None)
        elif free:
            free_name = candidate
        else:  # torch.fx appends a number that depends on all earlier names; replaying them takes long, so only this branch does so
            names.append(_Namespace())
            for each in names_taken:
                names[0].create_name(each, None)
            free_name = names[0].create_name(candidate, None)
        names_taken[free_name] = None
        return free_name

    return name
