"""What the axes of a model's values are: whether they are those of a convolution's output, worked out without the engine."""

from __future__ import annotations

from collections.abc import Mapping

from fuzz.names import Table, Value
from fuzz.program import DROPOUT, PRODUCT

_EACH_ALONE = {  # operations that compute each element from those at its place
    "relu", "tanh", "sigmoid", "silu", "leaky_relu", "elu", "softplus", "mul", "add", "sub", "neg", "truediv", "pow",
    "abs", "square", "sin", "clamp", "hardtanh", "clone", "gelu",
}  # fmt: skip
_LAYERS = {"ReLU", "Tanh", "GELU", "Sigmoid", "SiLU", "BatchNorm1d", "LayerNorm"}
# operations behind which the last axis of a value may be another one than before
_MOVES = {
    "transpose", "permute", "t", "swapaxes", "movedim", "einsum", "unfold", "diagonal", "as_strided", "meshgrid", "view", "reshape",
    "flatten", "unflatten", "ravel", "select", "getitem", "getattr", "expand", "unsqueeze", "stack", "roll",
}  # fmt: skip
RECURRENT = {"LSTM", "GRU", "RNN", "GRUCell", "RNNCell"}


def _base(value: Value) -> str:
    return "" if value.node is None else value.node.node.base.strip("_")


def convolved(found: Table) -> dict[str, bool | None]:
    """By site, whether the value has the axes of a convolution's output; None where that is not told here."""
    known: dict[int, bool | None] = {}
    for key, value in found.values.items():
        node = value.node
        if node is None:
            known[key] = False
            continue
        read = [known.get(each, False) for each in node.reads]
        if node.kind == "Conv1d":
            known[key] = True
        elif not any(each is not False for each in read):
            known[key] = False
        elif node.node.is_a(DROPOUT) or node.kind in _LAYERS or (not node.module and _base(value) in _EACH_ALONE):
            known[key] = True if True in read else None
        else:
            known[key] = None
    for key, value in reversed(found.values.items()):  # what a convolution reads may have its axes, too
        if value.node is not None and (value.node.kind == "Conv1d" or known[key] is None):
            known.update({read: None for read in value.node.reads if known.get(read) is False})
    return {value.names[0].text: known[key] for key, value in found.values.items() if value.names}


def moved(found: Table) -> set[str]:
    """The sites behind operations that may have moved the units of the layer that made the value."""
    keys = set[int]()
    for key, value in found.values.items():
        node = value.node
        if node is not None and (_base(value) in _MOVES or (keys.intersection(node.reads) and not node.node.is_a(PRODUCT))):
            keys.add(key)
    return {value.names[0].text for key, value in found.values.items() if value.names and key in keys}


def near_moved(found: Table, layers: set[str]) -> set[str]:
    """The sites between which and a recurrent layer a path leads, forward or back, if an operation among them may move the axis of time."""
    links: dict[int, set[int]] = {}
    for key, value in found.values.items():
        for read in value.node.reads if value.node is not None else ():
            links.setdefault(key, set()).add(read)
            links.setdefault(read, set()).add(key)
    near = {key for key, value in found.values.items() if value.node is not None and value.node.module in layers}
    waiting = list(near)
    while waiting:
        new = links.get(waiting.pop(), set()) - near
        near |= new
        waiting += new
    there = [value for key, value in found.values.items() if key in near]
    return {value.names[0].text for value in there if value.names} if any(_base(value) in _MOVES for value in there) else set()


def attended(found: Table) -> set[str]:
    """The sites of products that read what a softmax has made, which may count as attention, and of what is computed from them."""
    soft, products = set[int](), set[int]()
    for key, value in found.values.items():
        if value.node is None:
            continue
        if soft.intersection(value.node.reads) or _base(value) == "softmax":
            soft.add(key)
        if products.intersection(value.node.reads) or (key in soft and _base(value) in ("matmul", "bmm", "einsum")):
            products.add(key)
    return {value.names[0].text for key, value in found.values.items() if value.names and key in products}


def behind(found: Table, kinds: set[str]) -> set[str]:
    """The sites whose values were computed by a layer of one of these classes, or from what one computed."""
    keys = set[int]()
    for key, value in found.values.items():
        node = value.node
        if node is not None and (node.kind in kinds or keys.intersection(node.reads)):
            keys.add(key)
    return {value.names[0].text for key, value in found.values.items() if value.names and key in keys}


def near_time_first(found: Table, layers: set[str], dims: Mapping[str, int]) -> dict[str, int | None]:
    """By site near a recurrent layer of [time, batch, ...], the axis of time; None where that is not told here.

    ``layers``: the paths of these layers. Time is axis 0 of what such a layer reads and returns, and of all values that are computed
    from them, or from which they are computed, by operations that keep the axes.
    """
    values = found.values
    site = {key: value.names[0].text for key, value in values.items() if value.names}
    whole = {key for key, text in site.items() if dims.get(text, 0) >= 3}  # values that may be sequences
    sure, links = set[int](), {True: dict[int, set[int]](), False: dict[int, set[int]]()}
    for key, value in values.items():
        node = value.node
        if node is None:
            continue
        if node.module in layers:
            sure |= {*node.reads[:1], *([key] if value.names and value.names[0].ports[:1] == ("out",) else [])}
        keeps = node.node.is_a(DROPOUT) or node.kind in {*_LAYERS, "Linear"} or (not node.module and _base(value) in _EACH_ALONE)
        for read in node.reads[:1] if node.kind == "Linear" else node.reads:
            kind = keeps and key in whole and read in whole
            links[kind].setdefault(key, set()).add(read)
            links[kind].setdefault(read, set()).add(key)

    def reached(keys: set[int], *kinds: bool) -> set[int]:
        todo = list(keys)
        while todo:
            key = todo.pop()
            new = set[int]().union(*(links[kind].get(key, set()) for kind in kinds)) - keys
            keys |= new
            todo += new
        return keys

    sure = reached(sure, True)
    near = reached(set(sure), True, False)
    return {site[key]: 0 if key in sure else None for key in near if key in site}


def token_readers(found: Table) -> list[str]:
    """The paths of the embeddings that read the first input that one reads, in order."""
    inputs = {key for key, value in found.values.items() if value.node is None}
    reading = [
        (value.node.module, value.node.reads[0])
        for value in found.values.values()
        if value.node is not None and value.node.kind == "Embedding" and value.node.reads[0] in inputs
    ]
    return list(dict.fromkeys(path for path, read in reading if read == reading[0][1]))


__all__ = ["RECURRENT", "attended", "behind", "convolved", "moved", "near_moved", "near_time_first", "token_readers"]
