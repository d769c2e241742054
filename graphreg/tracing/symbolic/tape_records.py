"""Records of the tape: an entry for each operation that ran during a trace, and facts about the storages of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from graphreg.ir.source_location import Origin, short
from graphreg.tracing.tensors import StorageKey, tensors_in


@dataclass(eq=False)
class TapeEntry:
    """An operation that ran during the trace, without a traced value among its arguments.

    Attributes:
        function: The function of torch that was called.
        args: Its positional arguments, copied.
        kwargs: Its keyword arguments, copied.
        after: The last node that the graph had when the operation ran; None if the graph was empty.
        scope: The path of the module whose code called the function.
        stack: The stack of module calls, as torch.fx writes it to nodes.
        origin: The line of the user's code that called the function.
        result: What the function returned.
        written_storages: The storages that the operation wrote into.
        region: What ``regions`` returned when the operation ran: grad mode, inference mode, autocast.
        copy: A copy of the result, which the graph clones instead of repeating the operation. It is
            None unless the result is a tensor and there are arguments that a graph cannot hold (an
            object, a numpy array).
    """

    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    after: fx.Node | None
    scope: str
    stack: Any
    origin: Origin | None
    result: Any
    written_storages: frozenset[StorageKey]
    region: tuple[Any, ...]
    copy: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return list(tensors_in((self.args, self.kwargs)))

    @property
    def place(self) -> str:
        """The line of the user's code, as ``" at file:line"``, for errors; ``""`` if it is not known."""
        return f" at {short(self.origin)}" if self.origin else ""


@dataclass
class StorageFacts:
    """Facts about storages. Facts are only added; the tape remembers in which order, so that a trace can be rolled back.

    Attributes:
        made: A dict. Each key is the id of a tensor; the value is the entry that made the tensor,
            and the tensor's path in the entry's result.
        fresh: Storages that the forward made.
        read: A dict. Each key is a ``get_attr`` node; the value is the tensor that the node reads.
        touched: Storages that the graph reads, directly or through a view.
        traced: Storages into which a traced value may have been written.
        rewritten: Storages that the forward wrote into after the graph had read them.
        exposed: Storages into which code can write unseen by the tape, each with the name of the
            function that gave access to it, such as ``numpy``.
        python_reads: For each operation that read tensors but returned no tensor, such as
            ``bool(t)``: the storages that it read, and the line of code. The keys are only running
            numbers.
        holding: A dict. Each key is a node; the value has the storages in which the node's result
            may lie.
        untracked: For each storage with a change that no function mode sees, the line where the
            tape noticed the change: a tensor in the storage has changed, or a tensor has got the
            storage or lost it.
    """

    made: dict[int, tuple[TapeEntry, tuple[int, ...]]] = field(default_factory=dict)
    fresh: dict[StorageKey, None] = field(default_factory=dict)
    read: dict[fx.Node, Tensor] = field(default_factory=dict)
    touched: dict[StorageKey, None] = field(default_factory=dict)
    traced: dict[StorageKey, None] = field(default_factory=dict)
    rewritten: dict[StorageKey, None] = field(default_factory=dict)
    exposed: dict[StorageKey, str] = field(default_factory=dict)
    python_reads: dict[int, tuple[frozenset[StorageKey], str]] = field(default_factory=dict)
    holding: dict[fx.Node, frozenset[StorageKey]] = field(default_factory=dict)
    untracked: dict[StorageKey, str] = field(default_factory=dict)
