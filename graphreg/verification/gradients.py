"""Runs backward passes, and compares gradients meanwhile, so that a large model's gradients do not have to be kept twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.tracing.proof.values import difference, tensors


@contextmanager
def freed_if_equal(
    parameters: Mapping[str, nn.Parameter], expected: MutableMapping[str, Tensor | None], near: bool
) -> Iterator[None]:
    """In the block, free each parameter's gradient, and the gradient that is expected for it, as soon as the two are found equal.

    Both are None afterwards. Gradients that differ are kept, because the error describes the
    difference.

    Args:
        parameters: The parameters by name; a tied one by all its names.
        expected: The expected gradients. The key of each is ``"the gradient of "`` followed by the
            parameter's name.
        near: Whether to allow differences by rounding.
    """
    places: dict[nn.Parameter, list[str]] = {}
    for name, parameter in parameters.items():
        places.setdefault(parameter, []).append(f"the gradient of {name}")

    freed = set[str]()

    def compare(parameter: Tensor) -> None:
        names = places[parameter]  # type: ignore[index]
        given, ours = expected[names[0]], parameter.grad
        if ours is None:
            return
        # The gradient was equal and was freed, but a checkpoint with use_reentrant=True may add to
        # it later. Zeros change nothing and are freed, too; anything else is a difference and
        # stays.
        if names[0] in freed:
            parameter.grad = None if not ours.any() else ours
        elif given is not None and not difference(given, ours, near):
            parameter.grad = None
            expected.update(dict.fromkeys(names))
            freed.add(names[0])

    handles = [p.register_post_accumulate_grad_hook(compare) for p in places if p.requires_grad]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward(output: Any) -> Exception | None:
    """Run backward from all tensors of an output, with gradients that are unlikely to cancel; return the exception it raised, or None."""
    ends = list({id(t): t for t in tensors(output) if t.requires_grad and t.is_floating_point()}.values())
    weights = [torch.arange(t.numel(), dtype=torch.float64, device=t.device).cos().to(t.dtype).view(t.shape) for t in ends]
    try:
        if ends:
            torch.autograd.backward(ends, weights)
    except Exception as error:
        return error
    return None
