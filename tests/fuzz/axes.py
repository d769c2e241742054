"""What the axes of a model's values are: whether they are those of a convolution's output, worked out without the engine."""

from __future__ import annotations

from fuzz.names import Table, Value
from fuzz.program import DROPOUT

_EACH_ALONE = {  # operations that compute each element from those at its place
    "relu", "tanh", "sigmoid", "silu", "leaky_relu", "elu", "softplus", "mul", "add", "sub", "neg", "truediv", "pow",
    "abs", "square", "sin", "clamp", "hardtanh", "clone", "gelu",
}  # fmt: skip
_LAYERS = {"ReLU", "Tanh", "GELU", "Sigmoid", "SiLU", "BatchNorm1d", "LayerNorm"}
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
    return {value.names[0].text: known[key] for key, value in found.values.items() if value.names}


def behind(found: Table, kinds: set[str]) -> set[str]:
    """The sites whose values were computed by a layer of one of these classes, or from what one computed."""
    keys = set[int]()
    for key, value in found.values.items():
        node = value.node
        if node is not None and (node.kind in kinds or keys.intersection(node.reads)):
            keys.add(key)
    return {value.names[0].text for key, value in found.values.items() if value.names and key in keys}


def token_readers(found: Table) -> list[str]:
    """The paths of the embeddings that read the first input that one reads, in order."""
    inputs = {key for key, value in found.values.items() if value.node is None}
    reading = [
        (value.node.module, value.node.reads[0])
        for value in found.values.values()
        if value.node is not None and value.node.kind == "Embedding" and value.node.reads[0] in inputs
    ]
    return list(dict.fromkeys(path for path, read in reading if read == reading[0][1]))


__all__ = ["RECURRENT", "behind", "convolved", "token_readers"]
