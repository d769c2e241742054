"""What a user asks and sets while a model trains: strengths, where the noise stands, noise held still, noise in eval mode.

Each function takes whatever has a handle: a rewritten module, a backend, or what torch.compile made with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from graphreg.errors import RegularizerError, shown
from graphreg.runtime.handle import Handle
from graphreg.runtime.module_handle import handle_of

Ranks = Literal["differ", "same"]
Regulated = nn.Module | Handle | Callable[..., Any]  # a rewritten module, a backend, or what torch.compile made with one


def strengths(module: Regulated) -> dict[str, float]:
    """Return the present strengths (weights and rates) by regularizer name."""
    return handle_of(module).strengths()


def set_strength(module: Regulated, name: str, value: float) -> None:
    """Change a regularizer's strength (its weight or rate); nothing is recompiled.

    Args:
        module: A rewritten module, also compiled or wrapped, or a backend.
        name: The regularizer's name, one of ``strengths(module)``.
        value: The new strength.

    Raises:
        NoMatchError: No regularizer has this name.
        RegularizerError: ``value`` is out of the regularizer's range.
    """
    handle_of(module).set_strength(name, value)


def rng_state(module: Regulated) -> dict[str, Any]:
    """Return the state of the noise: a plain dict to save beside a checkpoint, the same on every rank.

    It has graphreg's streams and the number of their next call; all calls in a block of ``frozen_noise`` count as one. It has no
    strengths: a run that changes them also saves ``strengths(module)``. A native dropout that was left alone (``own_dropout="keep"``)
    draws from torch's generator, whose state is ``torch.get_rng_state()``. A module that draws nothing has a state without streams.
    """
    return handle_of(module).rng_state()


def set_rng_state(module: Regulated, state: dict[str, Any]) -> None:
    """Resume the noise at a saved state: the next call draws the masks that would have come next when ``rng_state`` was called.

    Streams are matched by name and replace the module's own, so the seed is that of the state from here on.

    Args:
        module: A rewritten module, also compiled or wrapped, or a backend.
        state: What ``rng_state`` returned.

    Raises:
        RegularizerError: The state is damaged, or of another version or another module. The noise then stays as it was.
    """
    handle_of(module).set_rng_state(state)


def set_ranks(module: Regulated, ranks: Ranks) -> None:
    """Choose whether the ranks of torch.distributed draw different masks (``"differ"``, the default) or the ``"same"``.

    The same masks are right where ranks share one example, as in tensor parallelism.

    Args:
        module: A rewritten module, also compiled or wrapped, or a backend.
        ranks: ``"differ"`` or ``"same"``.

    Raises:
        RegularizerError: ``ranks`` is another word.
        GraphRegError: The module has no splice.
    """
    handle = handle_of(module)
    handle.require_draws()
    if ranks not in ("differ", "same"):
        raise RegularizerError(f"ranks={shown(ranks)} is not allowed; give 'differ' (each rank draws its own masks) or 'same'.")
    handle.set_ranks(ranks)


@contextmanager
def frozen_noise(module: Regulated) -> Iterator[None]:
    """Draw the same masks in every call inside the block, for line searches, gradient checks or sharpness-aware steps.

    The block counts as one call, or as none if nothing was drawn in it. A nested block is part of the outer one. Nothing is
    recompiled. A native dropout left to torch (``own_dropout="keep"``) is not held; the logger ``graphreg`` warns of it, once a module.
    A module that draws nothing is not affected.

    Each thread has blocks of its own, which end when that thread leaves them; in eager they have masks of their own. A thread without
    a block draws the held masks for as long as any thread holds the noise.
    """
    with handle_of(module).frozen_noise():
        yield


@contextmanager
def noise_on(module: Regulated) -> Iterator[None]:
    """Keep every splice acting whatever the mode: ``with graphreg.noise_on(module): module.eval()(x)``.

    Blocks of several threads may overlap: the noise is on until the last of them ends. A native dropout left to torch
    (``own_dropout="keep"``) goes on following its module's mode. Raises GraphRegError for a module without a splice.
    """
    with handle_of(module).noise_on():
        yield
