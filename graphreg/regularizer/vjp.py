"""The vector-Jacobian product (vjp) of sites with respect to the values that ``wrt`` selects, through the forward that runs anyway.

``tracked`` makes autograd record the values of ``wrt`` from where they are produced, and
``torch.autograd.grad`` goes back to them from the sites. No second forward runs, so the product is
computed with the masks and the batch statistics of the model's own forward. No operation of the
model's graph is replaced.

Dynamo does not trace ``autograd.grad``. But it treats a function that was passed to
``allow_in_graph`` as one opaque call, and AOTAutograd then differentiates through this call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError, RegularizerError
from graphreg.rng.noise import Noise
from graphreg.torch_internals.autograd import custom_operators, has_no_formula, materialized
from graphreg.torch_internals.dynamo import plain_number
from graphreg.torch_internals.dynamo_marks import allow_in_graph, assume_constant_result
from graphreg.torch_internals.functorch import is_wrapped, one_level_below, transform_level
from graphreg.torch_internals.other_threads import is_compiling

# the most rows of an exact Jacobian: each is a backward pass, and a compiled graph holds all
LIMIT, COMPILED_LIMIT = 1 << 13, 1 << 8


# hashed by identity, because Dynamo of torch 2.12 hashes the object before its fields are set
@dataclass(frozen=True, eq=False)
class Vjp:
    """The vector-Jacobian product that a formula gets as its argument ``vjp``; call it with cotangents.

    Attributes:
        sites: The values at the sites, by name.
        wrt: The values to differentiate with respect to, by name.
        noise: The noise to draw from for each site, by name.
        caller: The penalty that computes the product, for messages.
        suspects: Operations that may have no second derivative, for messages.
        proven: Whether all operations are known to have a second derivative, so that it need not be
            checked.
    """

    sites: Mapping[str, Tensor]
    wrt: Mapping[str, Tensor]
    noise: Mapping[str, Noise]
    caller: str = "vjp"
    suspects: tuple[str, ...] = ()
    proven: bool = False

    def __call__(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply the cotangent of each site by the Jacobian of the site's value, and add the products of all sites.

        Args:
            cotangents: A dict. Each key is the name of a site; the value is a tensor in the shape
                of the site's value. Sites may be left out.

        Returns:
            A dict. Each key is a name in ``wrt``; the value is the sum, in the shape of the tensor
            in ``wrt``, or zeros if no site depends on that tensor.
        """
        outputs = [self.sites[name] for name in cotangents]
        vectors = [vector.to(z.dtype) for vector, z in zip(cotangents.values(), outputs, strict=True)]
        products = gradients(outputs, list(self.wrt.values()), vectors, not self.proven, self.caller, self.suspects)
        return dict(zip(self.wrt, products, strict=True))

    def rows(self, site: str) -> Iterator[dict[str, Tensor]]:
        """Iterate over the rows of the exact Jacobian of a site's value, one row for each element of the value.

        Args:
            site: The name of the site.

        Yields:
            One row, as a dict like that of ``__call__``.

        Raises:
            RegularizerError: There are too many rows, each of which takes a backward pass.
        """
        z = self.sites[site]
        compiled = is_compiling()
        limit = COMPILED_LIMIT if compiled else LIMIT
        if z.numel() > limit:
            lengths = [str(plain_number(length)) for length in z.shape]
            raise RegularizerError(
                f"{self.caller}: the exact Jacobian at {site} ({' x '.join(lengths)}) has {plain_number(z.numel())} rows, each a backward "
                f"pass that is kept for the gradient; {limit} are the most{' when compiled' if compiled else ''}. "
                "Use estimator='projection', which takes n backward passes, or fewer examples."
            )
        for row in torch.eye(z.numel(), dtype=z.dtype, device=z.device).unbind():
            yield self({site: row.view(z.shape)})


class _Track(torch.autograd.Function):
    """The identity of ``x``. The result requires gradients even if ``x`` does not, because ``anchor`` does."""

    @staticmethod
    def forward(x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return materialized(grad), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, anchor: Tensor) -> tuple[Tensor, Any]:
        # Pass on the same anchor. Autograd would record a new one at a lower level, as if that
        # level differentiated, too.
        return _Track.apply(x, anchor), in_dims[0]  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.view_as(tangent)


def tracked(x: Tensor) -> Tensor:
    """Return a new tensor that is equal to ``x``, [any shape], and that autograd records from here on."""
    if torch.compiler.is_dynamo_compiling():
        _known_to_dynamo()
    return _tracked(x)


def _tracked(x: Tensor) -> Tensor:
    return _Track.apply(x, torch.zeros((), device=x.device, requires_grad=True))  # type: ignore[no-any-return,no-untyped-call]


def recorded(tensor: Tensor) -> bool:
    """Return whether autograd records the tensor at any level of torch.func's transforms.

    Under vmap, ``requires_grad`` may be False for a tensor that is recorded.
    """
    return tensor.requires_grad or (is_wrapped(tensor) and recorded(one_level_below(tensor)))


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor], prove: bool, caller: str, suspects: Sequence[str]
) -> list[Tensor]:
    """Compute, by ``torch.autograd.grad``, gradients that can be differentiated again; zeros for an input that no output depends on.

    Args:
        outputs: The values to differentiate.
        inputs: The values to differentiate with respect to.
        vectors: A cotangent for each output.
        prove: Whether to check that the result can be differentiated again.
        caller: The penalty that needs the gradients, for messages.
        suspects: Operations that may have no second derivative, for messages.

    Returns:
        A gradient for each input.

    Raises:
        GraphRegError: ``torch.vmap`` is active, or, with ``prove``, an operation has no second
            derivative.
    """
    if torch.compiler.is_dynamo_compiling():
        _known_to_dynamo()
    return _gradients(outputs, inputs, vectors, prove, caller, suspects)


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor], prove: bool, caller: str, suspects: Sequence[str]
) -> list[Tensor]:
    live = [i for i, z in enumerate(outputs) if z.requires_grad]
    if any(recorded(z) for i, z in enumerate(outputs) if i not in live):
        raise GraphRegError(
            f"{caller} runs a backward pass of its own, which torch.vmap does not allow. Take the gradient within vmap, as in "
            "torch.vmap(torch.func.grad(f)) for gradients of each example, or call the module on the whole batch."
        )
    if not live:
        return [torch.zeros_like(x) for x in inputs]

    prove = prove and transform_level() is None  # torch.func allows no requires_grad_()
    # a once_differentiable function shows that it has no second derivative only if its incoming
    # gradient requires grad
    cotangents = [vectors[i].detach().requires_grad_() if prove else vectors[i] for i in live]
    before = history(outputs) if prove else set()
    options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    results = list(torch.autograd.grad([outputs[i] for i in live], list(inputs), cotangents, **options))

    if prove and (culprit := once_only(results, before)):
        among = f" Among {', '.join(suspects[:4])}." if suspects else ""
        raise GraphRegError(
            f"{caller}: {culprit} cannot be differentiated twice, so the penalty would have no gradient.{among} "
            "Select sites before that operation, or a wrt after it."
        )
    return results


def history(values: Sequence[Tensor]) -> set[Any]:
    """Return the autograd functions of all operations that the values were computed by."""
    functions, waiting = set[Any](), [value.grad_fn for value in values]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in functions:
            functions.add(function)
            waiting += [following for following, _ in function.next_functions]
    return functions


def once_only(values: Sequence[Tensor], before: set[Any]) -> str:
    """Return the name of an operation in the history of ``values`` that has no derivative; ``""`` if all operations have one.

    ``before``: the history of the values that were differentiated. This part is not searched,
    because the autograd functions of parameters are in it, and under torch.compile these have no
    derivative.
    """
    waiting, seen = [(value.grad_fn, "") for value in values], set(before)
    while waiting:
        function, user = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        name = function.name().rpartition("::")[2]
        if name in ("NotImplemented", "Error", "DelayedError"):
            return f"the operation whose derivative {user} reads" if user else "an operation"
        if name.startswith("GeneratedBackwardFor") and has_no_formula(function):
            operator = name.removeprefix("GeneratedBackwardFor_").removesuffix("_defaultBackward")
            # autograd writes ``_`` in place of ``::``
            known = {each.replace("::", "_"): each for each in custom_operators()}
            return known.get(operator, operator)
        waiting += [(following, name) for following, _ in function.next_functions]
    return ""


@assume_constant_result
def _known_to_dynamo() -> None:
    """Make Dynamo treat ``_tracked`` and ``_gradients`` as opaque calls."""
    allow_in_graph(_tracked, _gradients)
