"""What graphreg writes to nodes: plain data, by functions with types, that goes through copies, pickles and other people's passes."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from torch import fx

from graphreg.ir.metadata import (
    Addition,
    Kind,
    add_label,
    addition_of,
    is_added,
    is_kind,
    is_labelled,
    is_marked,
    is_native_dropout,
    label_site,
    mark,
    own_labels,
    own_name,
    scope_of,
    unmark,
)
from graphreg.ir.serialize import copied_graph, freeze, thaw
from graphreg.ir.site import Label

FIRST, SECOND = Label("layer.relu", "relu"), Label("layer", "Layer", ("out", "0"), False, "layer")


def node() -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(x)
    return x


def test_a_node_that_nobody_labelled() -> None:
    x = node()
    assert not is_labelled(x) and (scope_of(x), own_labels(x), own_name(x)) == ("", (), "")
    assert addition_of(x) is None and not is_marked(x) and not is_added(x) and not is_native_dropout(x) and not is_kind(x, *Kind)


def test_labels_are_plain_data() -> None:
    x = node()
    label_site(x, "layer", FIRST)
    add_label(x, SECOND)
    add_label(x, SECOND)
    assert x.meta["site"] == ("layer", (FIRST, SECOND)) and type(x.meta["site"]) is tuple
    assert is_labelled(x) and scope_of(x) == "layer" and own_labels(x) == (FIRST, SECOND) and own_name(x) == "layer.relu"
    label_site(x, "layer")
    assert is_labelled(x) and own_labels(x) == ()


@pytest.mark.parametrize(
    ("addition", "stored"),
    [
        (Addition(Kind.KEY), {"kind": "key"}),
        (Addition(Kind.CLONE, site="relu"), {"kind": "clone", "site": "relu"}),
        (Addition(Kind.WATCH, site=""), {"kind": "watch", "site": ""}),
        (Addition(Kind.TOTAL, "weight_l2"), {"kind": "total", "regularizer": "weight_l2"}),
        (Addition(Kind.SPLICE, "dropout", "relu"), {"kind": "splice", "regularizer": "dropout", "site": "relu"}),
        (Addition(Kind.NATIVE, site="drop", was=("call_module", "drop")), {"kind": "own", "site": "drop", "was": ("call_module", "drop")}),
    ],
)
def test_additions_are_plain_data(addition: Addition, stored: dict[str, object]) -> None:
    x = node()
    mark(x, addition)
    assert x.meta["graphreg"] == stored and type(x.meta["graphreg"]["kind"]) is str
    assert json.loads(json.dumps(x.meta["graphreg"])).keys() == stored.keys()
    assert addition_of(x) == addition and is_kind(x, addition.kind) and is_marked(x)
    assert is_native_dropout(x) is (addition.kind == Kind.NATIVE) is not is_added(x)
    assert unmark(x) == addition and not is_marked(x)


def test_they_go_through_copies_and_pickles() -> None:
    x = node()
    label_site(x, "layer", FIRST)
    mark(x, Addition(Kind.SPLICE, "dropout", "relu"))
    for graph in (copy.deepcopy(x.graph), copied_graph(x.graph), thaw(pickle.loads(pickle.dumps(freeze(x.graph))))):
        first = next(iter(graph.nodes))
        assert own_labels(first) == (FIRST,) and addition_of(first) == Addition(Kind.SPLICE, "dropout", "relu")


def test_what_another_wrote_by_hand_is_read() -> None:
    """A pass that copies ``node.meta``, or a front end that writes it, needs nothing of graphreg."""
    x = node()
    x.meta |= {"site": ("layer", (FIRST,)), "graphreg": {"kind": "measure", "regularizer": "l1", "site": "relu"}}
    assert own_name(x) == "layer.relu" and addition_of(x) == Addition(Kind.MEASURE, "l1", "relu")


def test_an_unknown_kind_is_refused() -> None:
    x = node()
    x.meta["graphreg"] = {"kind": "unknown"}
    with pytest.raises(ValueError, match="unknown"):
        addition_of(x)
