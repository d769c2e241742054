"""Runtime modules of penalties on derivatives, whose formulas take ``vjp``, and the function that runs a forward which contains them.

``Track`` makes autograd record what is computed from a value that the penalty's option ``wrt`` selects. ``Derivative`` differentiates and
computes the penalty. ``run`` calls the emitted code so that autograd records its operations and can differentiate them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphreg.compiler.inductor_passes import improve_derivatives, improve_graph
from graphreg.errors import GraphRegError, RegularizerError
from graphreg.ir.layout import clone
from graphreg.planning.dependence import DependenceSlice
from graphreg.regularizer.base import Penalty
from graphreg.regularizer.formula_arguments import VJP_NAMES
from graphreg.regularizer.vjp import Vjp, tracked
from graphreg.rng.noise import Noise
from graphreg.runtime.model_inputs import fitted, require_inputs
from graphreg.runtime.penalty import Total, formula, has_no_elements, nothing
from graphreg.runtime.runtime_module import RuntimeModule, accumulation
from graphreg.runtime.sharding import refuse_sharded_derivatives
from graphreg.torch_internals import pytree
from graphreg.torch_internals.other_threads import is_compiling


class Derivative(Total):
    """Computes a penalty whose formula takes ``vjp``, the vector-Jacobian product for all its sites at once.

    Attributes:
        dependence: What is known of the dependence slice, the operations that lead from the values that ``wrt`` selects to the sites.
        slots: For each site, by its name: the row of the call's keys from which the random directions for this site are drawn.
        always: Whether the penalty acts in eval mode as well as in train mode.
        proven: Whether a call without torch.compile has shown that all operations of the slice have a second derivative.
    """

    path = ""  # the penalty follows the mode of the whole model

    def __init__(
        self, regularizer: Penalty, name: str, strength: Tensor | None, dependence: DependenceSlice, slots: Mapping[str, int]
    ) -> None:
        super().__init__(regularizer, name, strength)
        self.dependence, self.slots = dependence, dict(slots)
        self.always = bool(regularizer.engine_options.always)
        self.proven = False

    def acts(self) -> bool:
        """Whether the penalty is computed in the present mode, and no block of ``penalties_off`` is open."""
        return not self.is_off and (self.always or self.owner[0].training)

    def forward(  # type: ignore[override]
        self, values: dict[str, Tensor], wrt: dict[str, Tensor], key: Tensor, /, *, clock: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """Return the penalty, 0-d.

        ``values``: the values of the penalty's sites, by site name. ``wrt``: the values that the option ``wrt`` selects, by site name.
        ``key``: the keys for the random directions, int32 [streams, 2]. ``clock`` and ``inputs``: as in ``Measure``.
        """
        if not values:
            return self.weight(torch.float32, clock) * 0
        first = next(iter(values.values()))
        if self.is_off:
            return nothing(first)
        if not self.acts():
            return self.weight(accumulation(first.dtype), clock) * 0
        self._require(values, wrt)
        if torch.compiler.is_dynamo_compiling():
            improve_graph()
            improve_derivatives()
        # Token numbers and None have no derivative, and by a value without elements, there is none; the penalty goes on with the others.
        real = {name: x for name, x in wrt.items() if isinstance(x, Tensor) and x.is_floating_point() and not has_no_elements(x)}
        if (wrt and not real) or all(map(has_no_elements, values.values())):
            return self.weight(accumulation(first.dtype), clock) * 0
        noise = {name: Noise(key[self.slots[name]]) for name in values}
        compiling = is_compiling()
        vjp = Vjp(values, real, noise, self.description, self.dependence.suspects, not compiling and self.proven)
        weight = self.weight(accumulation(first.dtype), clock)
        require_inputs(self.regularizer, inputs, self.description)
        arguments = {**dict.fromkeys(VJP_NAMES, vjp), "weight": weight, **fitted(self.regularizer, inputs, weight.dtype, first.device)}
        total = formula(self.regularizer, arguments, first.device.type, self.description)
        # No operation has refused its second derivative, so later calls need not look for one.
        if not compiling:
            self.proven = True
        return weight * total

    def _require(self, values: Mapping[str, Tensor], wrt: Mapping[str, Tensor]) -> None:
        for z in values.values():
            accumulation(z.dtype)
        tensors = [x for x in wrt.values() if isinstance(x, Tensor)]
        if tensors and not any(x.is_floating_point() for x in tensors):
            raise RegularizerError(
                f"{self.description}: wrt selects integers only ({', '.join(wrt)}), which have no derivative. "
                "Select a hidden value, e.g. wrt='embedding'; graphreg.names(model) lists them."
            )
        inference = not is_compiling() and torch.is_inference_mode_enabled()  # Dynamo cannot trace the second function
        if inference or not torch.is_grad_enabled():
            raise GraphRegError(
                f"{self.description} needs derivatives, but autograd does not record this call: it is under torch.inference_mode, or under "
                "torch.no_grad in a module that another pass made. Use torch.enable_grad(), or eval mode without always=True."
            )


class Track(RuntimeModule):
    """Makes autograd record what is computed from a value, if a penalty acts that differentiates with respect to this value."""

    apart = False  # whether the result has a storage of its own, because the model may write into the value's: see Insertions.apart

    def __init__(self, site: str, readers: Sequence[Derivative]) -> None:
        super().__init__(f"wrt {site}")
        self.site, self.readers = site, tuple(readers)

    def forward(self, x: Any) -> Any:
        """Return the value. If one of the ``readers`` acts, autograd records what is computed from the result."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or not any(reader.acts() for reader in self.readers):
            return x
        return tracked(clone(x) if self.apart else x)


def run(forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, rules: Any, names: Sequence[str]) -> Any:
    """Run the emitted forward. If a penalty on derivatives acts, run the forward so that this penalty can differentiate it.

    Autograd then records the forward even under ``torch.no_grad``, and if the penalty differentiates through attention, attention is
    computed by operations that have a second derivative.

    ``rules``: the container of the runtime modules. ``names``: the names of the penalties on derivatives in this container.
    """
    acting = [penalty for penalty in [rules._modules[name] for name in names] if penalty.acts()]
    if not acting:
        return forward(module, *args, **kwargs)
    refuse_sharded_derivatives(rules, [penalty.description for penalty in acting])
    if any(penalty.dependence.attends for penalty in acting):
        with sdpa_kernel(SDPBackend.MATH):
            return _recorded(forward, module, args, kwargs)
    return _recorded(forward, module, args, kwargs)


def _recorded(forward: Callable[..., Any], module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run the forward with autograd recording. Under ``torch.no_grad`` the result is detached, so it requires no gradient, as usual."""
    if torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    with torch.enable_grad():
        result = forward(module, *args, **kwargs)
    return pytree.tree_map_only(Tensor, Tensor.detach, result)
