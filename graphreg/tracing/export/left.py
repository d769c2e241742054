"""What an exported forward leaves in attributes for its next call, in a form that outlives the export.

torch.export's own tensors do not tell what they were made from, and it puts the attributes of modules back. The next trace, which shows
whether the next call would compute something else, is to find what the forward has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from graphreg.tracing.side_effects.places import REGISTERED
from graphreg.tracing.side_effects.reach import others

Space = dict[str, Any]


def left_behind(model: nn.Module, proxy_of: Callable[[Tensor], fx.Proxy | None]) -> list[tuple[Space, Space]]:
    """Return each space of names that the model holds, with what is in it now.

    ``proxy_of``: a tensor's name in the graph, if it carries the inputs' data to the next call.
    """
    return [(space, {name: _lasting(value, proxy_of) for name, value in space.items()}) for space in _spaces(model)]


def _spaces(model: nn.Module) -> Iterator[Space]:
    """The attributes of modules, the dicts among them, and the attributes of objects of the user's."""
    for module in model.modules():
        yield (own := vars(module))
        for name, value in own.items():
            if type(value) is dict and name not in REGISTERED:
                yield value
            elif not isinstance(value, (nn.Module, type)) and not callable(value) and not others(type(value)):
                yield getattr(value, "__dict__", {})


def _lasting(value: Any, proxy_of: Callable[[Tensor], fx.Proxy | None]) -> Any:
    """A proxy for a tensor that carries data, also in a tuple; anything else as it is."""
    if type(value) is tuple:
        return tuple(_lasting(item, proxy_of) for item in value)
    proxy = proxy_of(value) if isinstance(value, Tensor) else None
    return value if proxy is None else proxy
