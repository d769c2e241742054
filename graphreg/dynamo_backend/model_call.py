"""One call of a model whose forward is several graphs: collects the graphs' measurements and computes the penalties over all graphs.

A measurement is what a penalty's formula returns for one site. If the formula takes all sites at once, each graph makes one
measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from graphreg.dynamo_backend.capture import Known
from graphreg.dynamo_backend.joins import Joins, Measured
from graphreg.dynamo_backend.strengths import CallStrengths
from graphreg.errors import GraphRegError, RegularizerError, warn
from graphreg.regularizer.base import Penalty
from graphreg.runtime.attach import Scale
from graphreg.runtime.distributed_values import with_plain_gradient
from graphreg.runtime.penalty import AllSitesTotal, Total
from graphreg.torch_internals.distributed import is_distributed
from graphreg.torch_internals.modules import parameters_by_name


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter that a penalty measures. Raise GraphRegError if the model has no parameter of this name any more."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        raise GraphRegError(
            f"a penalty measures {name}, which {type(model).__name__} has no more as a parameter: the layer was replaced, pruned or "
            "parametrized (weight_norm, spectral_norm) after the first call. Compile the model again with another backend: "
            "torch.compile(model, backend=graphreg.backend(...))."
        ) from None


class Measurer:
    """Computes a penalty over all graphs of a call: the mean (or sum) of its measurements, times its strength.

    Attributes:
        regularizer: The penalty.
        name: The name of the penalty.
        all_at_once: Whether the penalty's formula takes the argument ``values``, which has the values of all sites.
        parameters: The names of the parameters that the penalty measures; empty for a penalty on values.
        sites: The names of the parameters that have a strength of their own: all, or none if the formula takes all at once.
        total_module: The runtime module that computes the mean or sum, times the strength.
    """

    def __init__(self, regularizer: Penalty, name: str, parameters: Sequence[str]) -> None:
        self.regularizer, self.name, self.parameters = regularizer, name, tuple(parameters)
        self.all_at_once = "values" in regularizer.takes
        self.sites = self.parameters if regularizer.by_site else ()
        on_parameters = regularizer.on == "parameters"
        kind = AllSitesTotal if self.all_at_once and on_parameters else Total
        self.total_module = kind(regularizer, name, torch.tensor([regularizer.weight], dtype=torch.float64, device="cpu"))

    def total(self, strengths: CallStrengths, values: Sequence[Tensor], sites: Sequence[str], model: nn.Module) -> Tensor:
        """Return the penalty, 0-d, from the measurements that the graphs made, or from the model's parameters.

        ``sites``: the site of each measurement.
        """
        device = values[0].device if values else next((p.device for p in parameters_by_name(model).values()), torch.device("cpu"))
        places = tuple(self.sites or sites) if strengths.differ(self.name) else ()
        strength = self.total_module._buffers["strength"] = strengths.tensor(self.name, places, device)
        if self.parameters:
            weights = [parameter_of(model, name) for name in self.parameters]
            if self.all_at_once:
                total: Tensor = self.total_module(dict(zip(self.parameters, weights, strict=True)))
                return total
            values = weights
        elif self.all_at_once:
            if len(values) > 1:
                raise RegularizerError(
                    f"{self.name} looks at all of its sites at once, and in this call they are in {len(values)} graphs. Select only "
                    "sites of one graph; graphreg.report(backend) lists them."
                )
            return values[0] if values else strength[0].to(torch.float32) * 0
        elif values:
            # The graphs may run on several devices, and measure in several precisions.
            dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else values[0].dtype
            values = [value.to(values[0].device, dtype) for value in values]
        total = self.total_module(*values)
        return total

    def is_plain(self, model: nn.Module) -> bool:
        """Return whether all parameters that the penalty measures are plain tensors, not of a subclass such as DTensor."""
        return all(type(parameter_of(model, name)) in (nn.Parameter, Tensor) for name in self.parameters)

    def share(self, strength: float, count: int) -> float:
        """Return the derivative of the penalty with respect to one of its ``count`` measurements. ``strength``: that at its site."""
        if self.all_at_once:
            return 1.0
        return strength / (1 if self.total_module.sums else count)


class Call:
    """The state of one call of the model: what its graphs have measured so far, and the strengths at the beginning of the call."""

    def __init__(
        self, model: nn.Module, strengths: CallStrengths, measurers: Mapping[str, Measurer], attaches: bool, scale: Scale | None,
        penalties_off: bool,
    ) -> None:  # fmt: skip
        self.model, self.strengths, self.measurers, self.attaches = model, strengths, measurers, attaches
        self.penalties_off = penalties_off
        self.started = False
        self.names: dict[str, None] = {}  # the site names that the graphs of the call have taken so far
        self.acted: set[tuple[str, str]] = set()  # pairs (regularizer, site): which regularizer has acted at which site so far
        self.occurrences: Counter[tuple[str, type]] = Counter()  # by site and class of regularizer: how often the class acted at the site
        self.values: dict[str, list[Tensor]] = {}  # the measurements, by penalty
        self.sites: dict[str, list[str]] = {}  # the sites of the measurements, by penalty
        self.trains: set[str] = set()  # the penalties with a measurement that requires grad
        self.made = WeakTensorKeyDictionary()  # for each output of the call's graphs, what is known of it (Known)
        self.computed_totals: dict[str, Tensor] = {}  # penalties on parameters that the call's first graph computed
        self.has_distributed_outputs = False  # whether an output of the call's graphs is a DTensor
        self.joins = Joins(self.share, scale)

    def known(self, inputs: Sequence[Any]) -> dict[int, Known]:
        """Return what is known of the inputs that earlier graphs of the call computed, by the id of the input."""
        return {id(value): self.made[value] for value in inputs if isinstance(value, Tensor) and value in self.made}

    def weighs(self) -> dict[str, tuple[Total, tuple[str, ...]]]:
        """Return the penalties on parameters that a graph must compute: all of them in the call's first graph, and none in a later graph.

        Penalties on sharded parameters are left out; no graph computes them.
        """
        if self.started:
            return {}
        return {name: (m.total_module, m.parameters) for name, m in self.measurers.items() if m.parameters and m.is_plain(self.model)}

    def taken(
        self, results: Sequence[Any], measured: Sequence[Measured], weighed: Sequence[str], counts: bool, inputs: Sequence[Any]
    ) -> list[Any]:
        """Collect the measurements of a graph that has run, and return the graph's own outputs.

        With ``penalties="attach"``, the returned outputs are connected to the penalties in autograd.

        Args:
            results: What the graph returned: its own outputs, then the measurements ``measured``, then the totals of the penalties
                ``weighed``.
            measured: For each measurement, the name of the penalty that made it, and the site.
            weighed: The penalties on parameters that the graph computed.
            counts: Whether the totals of ``weighed`` are valid.
            inputs: The arguments of the graph.
        """
        self.started = True
        count = len(results) - len(weighed)
        for name, total in zip(weighed, results[count:], strict=True):
            if counts:
                self.computed_totals.setdefault(name, total)
        outputs, values = list(results[: count - len(measured)]), list(results[count - len(measured) : count])
        self.has_distributed_outputs |= any(map(is_distributed, outputs))
        for (name, site), value in zip(measured, values, strict=True):
            self.values.setdefault(name, []).append(value.detach() if self.attaches else value)
            self.sites.setdefault(name, []).append(site)
            if value.requires_grad:
                self.trains.add(name)
        return self._joined(outputs, measured, values, inputs) if self.attaches else outputs

    def _joined(self, outputs: list[Any], measured: Sequence[Measured], values: list[Tensor], inputs: Sequence[Any]) -> list[Any]:
        # Not computed yet, so this is the call's first graph, behind which all others come in the
        # chain.
        if "of_parameters" not in self.__dict__:
            self.joins.measured([(name, "") for name in self.of_parameters], list(self.of_parameters.values()))
        self.joins.measured(measured, values)
        return self.joins.join(outputs, inputs)

    @cached_property
    def of_parameters(self) -> dict[str, Tensor]:
        """The penalties on parameters by name. They are computed once in a call, however many graphs read the parameters."""
        names = [name for name, measurer in self.measurers.items() if measurer.regularizer.on == "parameters"]
        return {name: self.computed_totals[name] if name in self.computed_totals else self._total(name) for name in names}

    def _total(self, name: str) -> Tensor:
        return self.measurers[name].total(self.strengths, self.values.get(name, []), self.sites.get(name, []), self.model)

    def totals(self) -> dict[str, Tensor]:
        """Return every penalty of the call by name, 0-d; detached if penalties are attached. In a block of ``penalties_off``, each is 0."""
        totals = {name: self.of_parameters[name] if name in self.of_parameters else self._total(name) for name in self.measurers}
        if self.penalties_off:
            return {name: torch.zeros_like(total, requires_grad=False) for name, total in totals.items()}
        if self.attaches:
            return {name: total.detach() for name, total in totals.items()}
        if self.has_distributed_outputs:
            return {name: with_plain_gradient(total) for name, total in totals.items()}
        return totals

    def check(self) -> None:
        """Raise RegularizerError if grad mode is on and a penalty has measurements, none of which requires grad."""
        idle = [name for name in self.values if name not in self.trains] if torch.is_grad_enabled() else []
        if idle:
            raise RegularizerError(
                f"{idle[0]}: no parameter that can train reaches its sites, so the penalty would change nothing. Unfreeze a parameter, or "
                "leave the penalty out."
            )

    def check_joined(self, result: Any) -> bool:
        """Check that a backward pass from ``result``, what the call returns, would reach the attached penalties.

        Raise GraphRegError if no output that requires grad leads to them. Warn if only some such outputs do. Return whether it warned.
        """
        apart, alone = self.joins.apart(result)
        if not apart:
            return False
        names = {id(parameter): name for name, parameter in parameters_by_name(self.model, once=True).items()}
        known = sorted({names[id(tensor)] for tensor in apart if id(tensor) in names})
        what = f"the parameter {known[0]} itself" if known else "a tensor that no graph computed, such as one of its arguments"
        cure = (
            "Return a view of it (h.view_as(h)), which a graph makes; or use penalties='return' and add backend.penalties() to the loss, "
            "or graphreg.regularize."
        )
        if alone:
            raise GraphRegError(
                f"penalties='attach': the model returns {what}, and nothing else that needs a gradient. No backward pass would reach the "
                f"penalties. {cure}"
            )
        warn(
            f"penalties='attach': the model returns {what}, beside what its graphs compute. A backward pass from this tensor alone "
            f"would not reach the penalties. {cure}"
        )
        return True

    def share(self, name: str, site: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the derivative of the penalty ``name`` with respect to its measurement at a site in this call, 0-d.

        For a penalty on parameters, return the derivative with respect to its total. The derivative is not known before the call has ended,
        because a penalty may be a mean over its sites in all graphs of the call.
        """
        measurer = self.measurers[name]
        if self.penalties_off:
            return torch.zeros((), dtype=dtype, device=device)
        share = 1.0 if measurer.parameters else measurer.share(self.strengths.at(name, site), len(self.values[name]))
        return torch.tensor(share, dtype=dtype, device=device)
