"""Sites: the named places of a traced model, values and parameters, and the listing that ``graphreg.names`` returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from graphreg.errors import listed
from graphreg.ir.source_function import SourceFunction
from graphreg.ir.terminal import Lines, Paragraph, Printed
from graphreg.ir.text_table import Table

Role = Literal["input", "hidden", "output", ""]
ROLES = ("input", "hidden", "output")
# a selector asks for a mark by ``#``, as for a role; a site has at most one role, but any number of
# marks
MARKS = ("branch", "trunk", "normed")
READS_PARAMETER = "a parameter"  # ``Site.why_not`` of a value that the forward reads from a parameter


@dataclass(frozen=True)
class Label:
    """One name of a site. A site may have several, such as ``layer4``, ``layer4.1`` and ``layer4.1.relu_1``.

    Attributes:
        name: The name without the port.
        op: What ``@`` in a selector matches: the name of the function or of the module's class;
            ``input`` for an argument.
        ports: If the value is one of several outputs of its module or function, the names that a
            selector may use after ``:`` for this output, such as ``("h_n", "1")``; ``("out",)`` if
            it is the only output.
        default: Whether a selector without a port selects this output.
        module: The path of the module whose output the value is; None if it is no module's output.
    """

    name: str
    op: str
    ports: tuple[str, ...] = ("out",)
    default: bool = True
    module: str | None = None

    @property
    def text(self) -> str:
        return self.name if self.default else f"{self.name}:{self.ports[0]}"


@dataclass(frozen=True)
class Site:
    """A value or parameter of the traced model.

    Attributes:
        labels: Its labels; the first gives its ``name``.
        kind: ``"value"`` or ``"parameter"``.
        role: ``"input"``, ``"hidden"``, ``"output"``, or ``""``.
        selectable: Whether a regularizer can act on the site; if not, ``why_not`` says why. Sizes,
            tuples and integers, for example, are not selectable. Nor is the value of a node that
            fetches a parameter: select the parameter instead.
        norm: Whether it is the output of a normalization, or a parameter of one, or a bias.
        loss: Whether it is a loss: the ``loss`` of the model's output, the result of a loss
            function, or an output without dims.
        module: For a value, the path of the module in whose forward it is made; for a parameter,
            the path of the module that holds it.
        shape: Its shape; None if it is not known, as for tuples, or for all values if no example
            inputs were given.
        dtype: Its dtype; None if it is not known.
        sequence: For the output sequence of a recurrent layer, also after dropout, the order of its
            axes: ``"batch first"`` or ``"time first"``; ``"state"`` for a final state; ``""`` for
            any other value.
        spatial: The number of axes behind the channels of a convolution, 2 for [batch, channels,
            height, width]; 0 if the channels are last, or if no axis is known to have them.
        channels: The axis that has the channels of a convolution, counted from 0; None if no axis is known to
            have them, or several have them.
        branch: Whether it is a residual branch: a value that a sum adds to the value that it was
            computed from.
        trunk: If it is on a residual trunk (a later sum adds a branch to it), the name of the trunk's
            first value; else ``""``.
        normed: The name of the batch norm to which every reader passes the value, for example through
            a convolution; ``""`` if some reader uses the value otherwise.
        reads: For the output of an embedding, the name of the model's input that holds the indices.
            A plan sets this field for the embedding's table (a parameter), too, because splices on
            the table need it. ``""`` for any other site.
        prediction: Whether it may be a prediction, such as logits: no later layer with weights computes something from it, a gradient
            passes through it, and it is no state or attention weights of a layer and no features after an activation.
        probability: For an output that is computed from probabilities (or their logarithms) alone, the operation that made these, such
            as ``"softmax"``; else ``""``.
        used: Whether the model's output depends on it.
        why_not: Why it is not selectable; ``""`` if it is.
    """

    labels: tuple[Label, ...]
    kind: Literal["value", "parameter"] = "value"
    role: Role = ""
    selectable: bool = True
    norm: bool = False
    loss: bool = False
    module: str = ""
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    sequence: Literal["", "batch first", "time first", "state"] = ""
    spatial: int = 0
    channels: int | None = None
    branch: bool = False
    trunk: str = ""
    normed: str = ""
    reads: str = ""
    prediction: bool = False
    probability: str = ""
    used: bool = True
    why_not: str = ""

    def __hash__(self) -> int:
        return hash(self.name)

    @cached_property
    def name(self) -> str:
        return self.labels[0].text

    @property
    def is_map(self) -> bool:
        """Whether the value has the axes of a convolution's output, [batch, channels, one or more further axes]."""
        return self.spatial > 0 and (self.shape is None or len(self.shape) == self.spatial + 2)

    @property
    def has_units(self) -> bool:
        """Whether each sample of the value has several units; True if the shape is not known. The value beside a policy has one."""
        return self.shape is None or (len(self.shape) > 1 and self.shape[-1 if self.channels is None else self.channels] > 1)

    def made_by(self, operations: Iterable[str]) -> str:
        """Return which of the operations made the value, or the probabilities that it is computed from; ``""`` if none did."""
        return min({self.probability, *(label.op.lower() for label in self.labels)}.intersection(operations), default="")

    @property
    def op(self) -> str:
        return self.labels[0].op

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(label.text for label in self.labels))

    @property
    def marks(self) -> tuple[str, ...]:
        """The site's marks, such as ``branch``."""
        return tuple(mark for mark in MARKS if getattr(self, mark))

    @property
    def marked(self) -> tuple[str, ...]:
        """The site's role, if it has one, and its marks. ``#`` in a selector matches any of these."""
        return (*((self.role,) if self.role else ()), *self.marks)

    def to_dict(self) -> dict[str, Any]:
        """Return the site as plain data; ``shape`` and ``dtype`` are None if not known."""
        return {
            "name": self.name, "also": list(self.names[1:]), "kind": self.kind, "op": self.op, "module": self.module, "role": self.role,
            "branch": self.branch, "trunk": bool(self.trunk), "normed": bool(self.normed),
            "shape": None if self.shape is None else list(self.shape), "dtype": dtype_text(self) or None,
            "selectable": self.selectable, "why_not": self.why_not,
        }  # fmt: skip


class Names(Printed, Sequence[str]):
    """The listing that ``graphreg.names`` returns: a sequence of all names of all sites, which prints as a table of the sites.

    ``source``: the model's own code with the sites, which then prints in the place of the table; None without ``source=True``.
    """

    def __init__(
        self, title: str, sites: Sequence[Site], notes: Sequence[str] = (), source: Sequence[SourceFunction] | None = None
    ) -> None:
        self.title, self.sites, self.notes = title, tuple(sites), tuple(notes)
        self.source = None if source is None else tuple(source)
        self._names = [name for site in self.sites for name in site.names]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._names[index]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def _blocks(self) -> Iterator[Paragraph]:
        rows = [
            (s.name, s.op, shape_text(s), dtype_text(s), ", ".join(s.marked) or ("" if s.selectable else s.why_not), ", ".join(s.names[1:]))
            for s in self.sites
        ]
        yield Lines((f"{self.title}: {len(self.sites)} site{'s' * (len(self.sites) != 1)}",), "bold")
        if self.source is not None:
            for function in self.source:
                yield from function.paragraphs()
            yield Lines(("", *self._unlined(self.source), *self.notes))
            return
        yield Table(("name", "op", "shape", "dtype", "role", "also called"), tuple(rows))
        yield Lines(self.notes)

    def _unlined(self, source: Sequence[SourceFunction]) -> Iterator[str]:
        """Yield what no line makes."""
        lined = {name for function in source for line in function.lines for name in line.sites}
        values = [site for site in self.sites if site.kind == "value" and site.why_not != READS_PARAMETER]
        unlined = [site.name for site in values if lined.isdisjoint(site.names)]
        parameters = sum(site.kind == "parameter" for site in self.sites)
        if unlined:
            yield f"made by no line of the model's own code that is known: {listed(unlined)}"
        if parameters:
            yield f"not shown: {parameters} parameters, which no line makes"

    def to_dict(self) -> dict[str, Any]:
        """Return the listing as plain data, fit for JSON: ``title``, ``sites`` (by ``Site.to_dict``), ``notes``; ``source`` if asked."""
        data = {"title": self.title, "sites": [site.to_dict() for site in self.sites], "notes": list(self.notes)}
        return data if self.source is None else data | {"source": [function.to_dict() for function in self.source]}


def shape_text(site: Site) -> str:
    return "x".join(map(str, site.shape)) if site.shape is not None else ""


def dtype_text(site: Site) -> str:
    return str(site.dtype).removeprefix("torch.") if site.dtype is not None else ""
