"""Records what an exported forward leaves in attributes for its next call, in a form that outlives the export; assigns buffers at calls.

torch.export restores the attributes of modules. Once it has ended, its tensors do not show what
they were computed from. But the next trace must find what the forward left in attributes, because
that trace shows whether the next call would compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from graphreg.errors import GraphRegError
from graphreg.torch_internals.modules import REGISTERED
from graphreg.torch_internals.torch_modes import is_exporting
from graphreg.tracing.side_effects.reachable_state import is_foreign_class
from graphreg.tracing.side_effects.state_places import own_attributes

Space = dict[str, Any]


@has_side_effect  # otherwise a pass would remove the call as dead code
def assign_buffer(buffers: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Assign a tensor to a buffer, as the model's forward does: who has the old tensor, such as backward or the caller, keeps it as it was.

    ``buffers``: the registry. Assigned there, as in ``Counter``.
    """
    old = buffers[name]
    if (value.shape, value.dtype, value.device) != (old.shape, old.dtype, old.device):
        raise GraphRegError(
            f"the model's forward assigns to its buffer {name!r}, of shape {tuple(old.shape)}, dtype {old.dtype} and device {old.device}, "
            f"a tensor of shape {tuple(value.shape)}, dtype {value.dtype} and device {value.device}. A graph is made for one shape, dtype "
            "and device. Give the buffer those that it will have, or move the assignment into a submodule of its own, which then becomes "
            "an opaque module."
        )
    if is_exporting():
        old.copy_(value)  # what torch.export makes of an assignment, which it does not see here
    else:
        buffers[name] = value


def final_state(model: nn.Module, proxy_of: Callable[[Tensor], fx.Proxy | None]) -> list[tuple[Space, Space]]:
    """Return each namespace in which the forward may leave something, with its present content.

    ``proxy_of``: returns a tensor's proxy in the graph if the tensor was computed from the inputs'
    data, else None.
    """
    return [(space, {name: _lasting(value, proxy_of) for name, value in space.items()}) for space in _spaces(model)]


def _spaces(model: nn.Module) -> Iterator[Space]:
    """Yield the namespaces: the attributes of modules, the dicts among these, and the attributes of the user's own objects."""
    for module in model.modules():
        yield (own := vars(module))
        for name, value in own.items():
            if type(value) is dict and name not in REGISTERED:
                yield value
            elif not issubclass(type(value), (nn.Module, type)) and not callable(value) and not is_foreign_class(type(value)):
                yield own_attributes(value) or {}


def _lasting(value: Any, proxy_of: Callable[[Tensor], fx.Proxy | None]) -> Any:
    """Return a value, with proxies in place of tensors computed from the inputs' data. Of containers, only tuples are searched.

    A tuple without such tensors is returned itself: a copy would count as a change, and each change
    takes another export.
    """
    if type(value) is tuple:
        items = tuple(_lasting(item, proxy_of) for item in value)
        return value if all(map(is_, items, value)) else items
    proxy = proxy_of(value) if isinstance(value, Tensor) else None
    return value if proxy is None else proxy
