"""Which modules are one operation: the layers of torch, and not what holds layers."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx, nn

from graphreg.dropouts import is_drop_path

# Layers made of layers. torch.fx takes each for one operation and cannot see into it, for they look at masks; torch.export can.
STACKS = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
TUPLES = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)  # layers that return a tuple


def is_stack(m: nn.Module) -> bool:
    """One of torch's own; a subclass of another's is a module like any other."""
    return isinstance(m, STACKS) and _is_torchs(m)


def is_leaf(m: nn.Module) -> bool:
    """Whether torch.export is told of the module as one operation."""
    return is_drop_path(m) or (_is_torchs(m) and not isinstance(m, (nn.Sequential, *STACKS)))


def stacks(model: nn.Module) -> list[str]:
    """The paths of those that no other holds, save the model itself."""
    found = [path for path, m in model.named_modules() if path and is_stack(m)]
    return [path for path in found if not any(path.startswith(f"{outer}.") for outer in found)]


def gives_tuple(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a value of torch's layers is a tuple, which a forward may ask (``isinstance(state, tuple)``)."""
    source = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    if isinstance(source, fx.Node):  # the two states of an LSTM
        return source.op == "call_module" and isinstance(modules[str(source.target)], nn.LSTM)
    return node.op == "call_module" and isinstance(modules[str(node.target)], TUPLES)


def _is_torchs(m: nn.Module) -> bool:
    return type(m).__module__.startswith(("torch.nn", "torch.ao.nn"))
