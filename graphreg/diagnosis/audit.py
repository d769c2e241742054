"""``graphreg.audit`` finds mistakes in a model's own dropout, and in the weight decay of the model's optimizer.

``audit`` reads the traced graph and the parameter groups of the optimizer. It trains nothing and
changes nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from graphreg.diagnosis.findings import site_names, told
from graphreg.errors import RegularizerError, listed, shown
from graphreg.ir.operations import NORM_MODULES, Operations
from graphreg.ir.provenance import one_value_over_again
from graphreg.ir.random_ops import NativeDropout
from graphreg.ir.roles import site_nodes
from graphreg.planning.harms import HARMS
from graphreg.torch_internals.modules import parameters_by_name
from graphreg.tracing.listing import trace_to_show
from graphreg.tracing.trace import FrontEnd, Traced

RemarkKind = Literal[
    "acts in eval mode", "never acts", "drops everything", "before batch norm", "on the trunk", "stacked", "weight decay", "rate 0",
]  # fmt: skip
# the kinds of dropout that drop elements or channels of a value
_OF_ELEMENTS = ("element", "channel", "alpha", "channel alpha")
# the kinds that change the variance of a value; alpha dropout keeps the variance
_SHIFTS = ("element", "channel")
_SRIVASTAVA = "Srivastava et al., JMLR 15 (2014), section 4"


@dataclass(frozen=True)
class Remark:
    """One thing that ``audit`` found.

    Attributes:
        kind: The kind of remark.
        sites: The names of the dropouts, or of the parameters.
        observed: The fact about these dropouts or parameters, such as their rates.
        matters: Why this fact matters.
        advice: What to do.
        source: The publication that shows why the fact matters; ``""`` if no publication is needed.
    """

    kind: RemarkKind
    sites: tuple[str, ...]
    observed: str
    matters: str
    advice: str
    source: str = ""

    def __str__(self) -> str:
        head = f"{self.kind}: {listed(self.sites)}"
        return told(head, observed=self.observed, matters=self.matters, advice=self.advice, source=self.source)


@dataclass(frozen=True)
class Audit:
    """The result of ``audit``. It prints as text, and ``bool(audit)`` is ``audit.ok``.

    Attributes:
        title: The model's class name.
        dropouts: The number of the model's own dropouts and other random operations.
        remarks: The remarks, the most serious first.
    """

    title: str
    dropouts: int
    remarks: tuple[Remark, ...]

    @property
    def ok(self) -> bool:
        """Whether there is nothing to do: no remark, except on dropouts of rate 0."""
        return all(remark.kind == "rate 0" for remark in self.remarks)

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as plain data."""
        remarks = [asdict(remark) for remark in self.remarks]
        return {"title": self.title, "ok": self.ok, "dropouts": self.dropouts, "remarks": remarks}

    def __repr__(self) -> str:
        count = f"{self.dropouts} dropout{'s' * (self.dropouts != 1)} of its own"
        said = f"{len(self.remarks)} remark{'s' * (len(self.remarks) != 1)}" if self.remarks else "nothing to remark"
        return "\n".join([f"{self.title}: {count}; {said}", *map(str, self.remarks)])


def audit(
    model: nn.Module | Traced, example_inputs: Any = None, *, optimizer: torch.optim.Optimizer | None = None, front_end: FrontEnd = "auto"
) -> Audit:
    """Look for mistakes in a model's own dropout, and in an optimizer's weight decay.

    There are remarks on dropouts that act in eval mode, never act, drop everything, have rate 0, or
    feed a batch norm; on several dropouts on one residual trunk; and on values that are dropped more
    than once. With ``optimizer``, there is a remark if the optimizer decays biases, the parameters of
    norms, or other parameters with fewer than two dims. The model is not changed.

    Args:
        model: The model, or a trace of it.
        example_inputs: As in ``trace``.
        optimizer: An optimizer that has parameters of the model.
        front_end: As in ``trace``.

    Returns:
        An ``Audit`` with the remarks, which prints as text. ``bool(audit)`` is True if there is
        nothing to do.

    Raises:
        TraceError: The model cannot be traced.
        RegularizerError: ``optimizer`` is not an optimizer, or has none of the model's parameters.
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise RegularizerError(f"optimizer={shown(optimizer)} is not allowed; give an instance of torch.optim.Optimizer.")
    traced = model if isinstance(model, Traced) else trace_to_show(model, example_inputs, front_end)
    dropouts = traced.native_dropout
    acting = [dropout for dropout in dropouts if dropout.rate and dropout.when != "never"]
    graph = next(iter(traced.graphs.values()))

    # A call such as ``if self.training: F.dropout(x)`` acts in every mode by its arguments, but
    # eval mode does not reach it.
    in_eval = site_nodes(traced.graphs.get("eval") or graph, traced.operations)
    seen = [each if each.when != "always" or each.site.name in in_eval else replace(each, when="mode") for each in dropouts]
    remarks = [*_by_themselves(seen)]
    remarks += [*_harms(traced, acting), *_stacked(graph, traced.operations, acting)]
    if optimizer is not None:
        remarks += _decayed(traced, optimizer)
    remarks += _idle(dropouts)
    return Audit(traced.title, len(dropouts), tuple(remarks))


def _by_themselves(dropouts: Sequence[NativeDropout]) -> Iterator[Remark]:
    """Yield the remarks on single dropouts that follow from their rate and mode alone, whatever their place in the graph."""
    always = [dropout for dropout in dropouts if dropout.when == "always" and dropout.rate]
    if always:
        yield Remark(
            "acts in eval mode", site_names(always), f"{_rates(always)}, in every mode",
            "predictions are random, and differ from call to call: at test time the whole network should be used",
            "pass training=self.training, or use nn.Dropout. For Monte Carlo dropout, let the dropout follow the mode, and call "
            "graphreg.noise_on",
            _SRIVASTAVA,
        )  # fmt: skip
    never = [dropout for dropout in dropouts if dropout.when == "never" and dropout.rate]
    if never:
        yield Remark(
            "never acts", site_names(never), f"{_rates(never)}, in no mode", "the model trains without the dropout that its code names",
            "pass training=self.training, or delete the call",
        )  # fmt: skip
    whole = [dropout for dropout in dropouts if dropout.rate == 1 and dropout.when != "never"]
    if whole:
        yield Remark(
            "drops everything", site_names(whole), "rate 1", "in train mode the value is all zeros, so nothing before it is trained",
            "give a rate below 1; 0.5 and less are usual", _SRIVASTAVA,
        )  # fmt: skip


def _harms(traced: Traced, acting: Sequence[NativeDropout]) -> Iterator[Remark]:
    """Yield a remark for each kind of known harm that dropouts of elements or channels do."""
    known, shifting = {site.name: site for site in traced.values}, [dropout.site.name for dropout in acting if dropout.kind in _SHIFTS]
    for harm in HARMS:
        found = harm.among([known[name] for name in shifting if name in known])
        if not found:
            continue
        if harm.mark == "normed":
            observed = listed([f"{site.name} feeds {site.normed}" for site in found])
            advice = "move the dropout after the last batch norm, or remove it here"
        else:
            observed = f"{len(found)} dropouts on the values that residual branches are added to"
            advice = "move the dropout into the branches, or after the last block"
        yield Remark(harm.kind, tuple(site.name for site in found), observed, harm.matters, advice, harm.source)


def _stacked(graph: fx.Graph, operations: Operations, acting: Sequence[NativeDropout]) -> Iterator[Remark]:
    rates = {dropout.site.name: dropout.rate or 0.0 for dropout in acting if dropout.kind in _OF_ELEMENTS}
    for group in one_value_over_again(graph, operations, rates):
        kept = math.prod(1 - rates[name] for name in group)
        yield Remark(
            "stacked", group, f"rates {', '.join(f'{rates[name]:g}' for name in group)}, one after another on one value",
            f"the value is dropped several times: {kept:.3g} of it is kept",
            f"keep only one of them; with rate {1 - kept:.3g} it keeps the same share",
        )  # fmt: skip


def _decayed(traced: Traced, optimizer: torch.optim.Optimizer) -> Iterator[Remark]:
    """Yield a remark for each rate of weight decay that the optimizer applies to biases, scales or shifts."""
    names = {id(parameter): name for name, parameter in parameters_by_name(traced.model, once=True).items()}
    decayed = defaultdict[float, list[str]](list)
    known = False
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            known |= name is not None
            decays = bool(group.get("weight_decay")) and parameter.requires_grad
            if name is None or not decays:
                continue

            path, _, own = name.rpartition(".")
            is_of_norm = isinstance(traced.operations.modules.get(path), NORM_MODULES)
            # scales and shifts have fewer than two dims
            if is_of_norm or "bias" in own or parameter.dim() < 2:
                decayed[group["weight_decay"]].append(name)

    if not known:
        raise RegularizerError(
            f"optimizer={type(optimizer).__name__}(...) has none of the parameters of {traced.title}. Give the model's own optimizer."
        )

    for rate, found in decayed.items():
        yield Remark(
            "weight decay", tuple(found), f"weight_decay={rate:g} on {len(found)} parameter{'s' * (len(found) != 1)}",
            "they are biases, scales and shifts: decay pulls these to 0, which makes the network no simpler, and has cost accuracy",
            f"make the optimizer from graphreg.param_groups(model, default={{'weight_decay': {rate:g}}}, decay='standard')",
            "He et al., Bag of tricks for image classification with convolutional neural networks, CVPR 2019, section 3.1",
        )  # fmt: skip


def _idle(dropouts: Sequence[NativeDropout]) -> Iterator[Remark]:
    idle = [dropout for dropout in dropouts if dropout.rate == 0]
    if idle:
        yield Remark(
            "rate 0", site_names(idle), f"{len(idle)} of {len(dropouts)} dropouts have rate 0", "they drop nothing",
            "nothing; if you expected dropout, give the model's constructor a rate, or regularize with own_dropout={'*': 0.1}",
        )  # fmt: skip


def _rates(dropouts: Sequence[NativeDropout]) -> str:
    rates = sorted({dropout.rate or 0.0 for dropout in dropouts})
    return f"rate{'s' * (len(rates) > 1)} {', '.join(f'{rate:g}' for rate in rates)}"
