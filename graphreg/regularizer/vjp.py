"""The vector-Jacobian product (vjp) from sites to the values that ``wrt`` selects, through the forward that runs anyway.

The values of ``wrt`` are tracked from where they are produced, so that autograd records what the model makes of them, and
``torch.autograd.grad`` goes back from the sites. There is one forward, whose masks and batch statistics are the model's,
and nothing in the model's graph is replaced. Dynamo does not trace ``autograd.grad``, but leaves a function that
is allowed in graphs as one opaque call; AOTAutograd then differentiates through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError, RegularizerError
from graphreg.rng import Noise
from graphreg.torch_internals import custom_operators, has_no_formula, is_wrapped, one_level_below, transform_level

LIMIT, COMPILED_LIMIT = 1 << 13, 1 << 8  # rows of an exact Jacobian: backward passes, compiled each code of its own


@dataclass(frozen=True, eq=False)  # by identity: Dynamo of torch 2.12 asks for its hash while it has no fields yet
class Vjp:
    """The vector-Jacobian product that a formula gets as its argument ``vjp``; call it with cotangents.

    Attributes:
        sites: the values at the sites, by name.
        wrt: the values to differentiate with respect to, by name.
        noise: a stream of draws for each site, by name.
        caller: what runs the product, for messages.
        suspects: operations that may have no second derivative, for the error.
        proven: whether all operations are known to have a second derivative, so that it need not be checked.
    """

    sites: Mapping[str, Tensor]
    wrt: Mapping[str, Tensor]
    noise: Mapping[str, Noise]
    caller: str = "vjp"
    suspects: tuple[str, ...] = ()
    proven: bool = False

    def __call__(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the sum over sites of cotangent times Jacobian.

        Args:
            cotangents: by name of a site, a tensor in the shape of its value; sites may be left out.

        Returns:
            By name of ``wrt``, the product in the shape of that value; 0 where there is no path.
        """
        outputs = [self.sites[name] for name in cotangents]
        vectors = [vector.to(z.dtype) for vector, z in zip(cotangents.values(), outputs, strict=True)]
        products = gradients(outputs, list(self.wrt.values()), vectors, not self.proven, self.caller, self.suspects)
        return dict(zip(self.wrt, products, strict=True))

    def rows(self, site: str) -> Iterator[dict[str, Tensor]]:
        """Iterate over the rows of the exact Jacobian of a site's value, one for each of its elements.

        Args:
            site: the name of the site.

        Yields:
            One row, by name of ``wrt``, as ``__call__`` returns it.

        Raises:
            RegularizerError: where there are too many rows: each is a backward pass.
        """
        z = self.sites[site]
        compiled = torch.compiler.is_compiling()
        limit = COMPILED_LIMIT if compiled else LIMIT
        if z.numel() > limit:
            raise RegularizerError(
                f"{self.caller}: the exact Jacobian at {site} ({' x '.join(map(str, z.shape))}) has {z.numel()} rows, each a backward pass "
                f"that is kept for the gradient; {limit} are the most{' when compiled' if compiled else ''}. "
                "Use estimator='projection', which takes n of them, or fewer examples."
            )
        for row in torch.eye(z.numel(), dtype=z.dtype, device=z.device).unbind():
            yield self({site: row.view(z.shape)})


class _Track(torch.autograd.Function):
    """The identity, whose result requires gradients even if its argument does not."""

    @staticmethod
    def forward(x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, anchor: Tensor) -> tuple[Tensor, Any]:
        # a new anchor would be recorded below the level that differentiates, as if somebody went back through that once more
        return _Track.apply(x, anchor), in_dims[0]  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.view_as(tangent)


def tracked(x: Tensor) -> Tensor:
    """The same values, [any shape], as a tensor that autograd records from here on."""
    return _Track.apply(x, torch.zeros((), device=x.device, requires_grad=True))  # type: ignore[no-any-return,no-untyped-call]


def recorded(tensor: Tensor) -> bool:
    """Whether autograd records the tensor, at any level of torch.func's transforms: under vmap the tensor itself says no."""
    return tensor.requires_grad or (is_wrapped(tensor) and recorded(one_level_below(tensor)))


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor], prove: bool, caller: str, suspects: Sequence[str]
) -> list[Tensor]:
    """``torch.autograd.grad`` whose result can be differentiated again, with zeros where there is no path.

    Args:
        outputs: the values to differentiate.
        inputs: the values to differentiate with respect to.
        vectors: a cotangent for each output.
        prove: check that the result can be differentiated again.
        caller: what asks for it, for messages.
        suspects: operations that may have no second derivative, for messages.

    Returns:
        A gradient for each input.

    Raises:
        GraphRegError: under ``torch.vmap``, or, with ``prove``, where an operation has no second derivative.
    """
    live = [i for i, z in enumerate(outputs) if z.requires_grad]
    if any(recorded(z) for i, z in enumerate(outputs) if i not in live):
        raise GraphRegError(
            f"{caller} runs a backward pass of its own, which torch.vmap does not let it. Put the gradient inside, as for gradients of "
            "each example, torch.vmap(torch.func.grad(f)), or call the module on the whole batch."
        )
    if not live:
        return [torch.zeros_like(x) for x in inputs]
    # a function that is differentiable once tells so only of an argument that needs a gradient
    prove = prove and transform_level() is None  # torch.func allows no requires_grad_()
    cotangents = [vectors[i].detach().requires_grad_() if prove else vectors[i] for i in live]
    before = history(outputs) if prove else set()
    options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    results = list(torch.autograd.grad([outputs[i] for i in live], list(inputs), cotangents, **options))
    if prove and (culprit := once_only(results, before)):
        among = f" Among {', '.join(suspects[:4])}." if suspects else ""
        raise GraphRegError(
            f"{caller}: {culprit} cannot be differentiated twice, so the penalty would have no gradient.{among} "
            "Select sites before that operation, or a wrt behind it."
        )
    return results


def history(values: Sequence[Tensor]) -> set[Any]:
    """All autograd functions that the values were computed by."""
    functions, waiting = set[Any](), [value.grad_fn for value in values]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in functions:
            functions.add(function)
            waiting += [following for following, _ in function.next_functions]
    return functions


def once_only(values: Sequence[Tensor], before: set[Any]) -> str:
    """The name of an operation in the values' history that has no derivative; ``""`` if all have one.

    ``before``: the history of what was differentiated, which is not searched; under torch.compile a parameter has no derivative there.
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
            return _operator(name.removeprefix("GeneratedBackwardFor_").removesuffix("_defaultBackward"))
        waiting += [(following, name) for following, _ in function.next_functions]
    return ""


def _operator(name: str) -> str:
    """The qualified name of a custom operator, from autograd's name for it, which has ``_`` in place of ``::``."""
    known = {each.replace("::", "_"): each for each in custom_operators()}
    return known.get(name, name)


@cache
def known_to_dynamo() -> None:
    """Have Dynamo take this file's functions as opaque calls. Importing Dynamo takes a second, so this waits for a module that needs it."""
    torch.compiler.allow_in_graph(tracked)  # type: ignore[no-untyped-call]
    torch.compiler.allow_in_graph(gradients)  # type: ignore[no-untyped-call]
