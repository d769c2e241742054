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
    """Weights and rates by regularizer name."""
    return handle_of(module).strengths()


def set_strength(module: Regulated, name: str, value: float) -> None:
    """Change a weight or rate; nothing is compiled again.

    Raises NoMatchError for an unknown name, RegularizerError for a value out of the regularizer's range.
    """
    handle_of(module).set_strength(name, value)


def rng_state(module: Regulated) -> dict[str, Any]:
    """Where the noise stands: a plain dict to save beside a checkpoint, the same on every rank.

    It has graphreg's streams and their call, the held call in a block of ``frozen_noise``. It has no strengths: a run that changes
    them saves ``strengths(module)`` too. A dropout of the model's own that was left alone (``own_dropout="keep"``) draws from
    torch's generator, whose state is ``torch.get_rng_state()``. A module that draws nothing has a state without streams.
    """
    return handle_of(module).rng_state()


def set_rng_state(module: Regulated, state: dict[str, Any]) -> None:
    """Resume the noise where ``rng_state`` found it: the next call draws what the next call would have drawn then.

    The streams are found by name, and take the place of the module's own: the seed is the state's from here on.
    Raises RegularizerError for a state that is damaged, of another version or of another module; the noise then stays.
    """
    handle_of(module).set_rng_state(state)


def set_ranks(module: Regulated, ranks: Ranks) -> None:
    """Whether the ranks of torch.distributed draw different masks, ``"differ"`` (as they do by themselves), or the ``"same"``.

    The same masks are right where ranks share one example, as in tensor parallelism. Raises RegularizerError for another word,
    GraphRegError without a splice.
    """
    handle = handle_of(module)
    handle.require_draws()
    if ranks not in ("differ", "same"):
        raise RegularizerError(f"ranks={shown(ranks)} is not allowed; give 'differ' (each rank draws its own masks) or 'same'.")
    handle.set_ranks(ranks)


@contextmanager
def frozen_noise(module: Regulated) -> Iterator[None]:
    """Every call in the block draws the same masks: line searches, gradient checks, sharpness-aware steps.

    The block counts as one call, or as none where nothing was drawn in it. A block within a block is part of it. Nothing
    is compiled again. Each thread has blocks of its own, with masks of their own in eager, and they end by its own exit; a thread
    without one draws what is held as long as anybody holds it. A dropout left to torch (``own_dropout="keep"``) is not held; the
    logger ``graphreg`` warns of it, once a module. It does nothing to a module that draws nothing.
    """
    with handle_of(module).frozen_noise():
        yield


@contextmanager
def noise_on(module: Regulated) -> Iterator[None]:
    """Keep every splice acting, whatever the mode: ``with graphreg.noise_on(module): module.eval()(x)``.

    Blocks of several threads overlap: the noise is on until the last of them ends. A dropout left to torch (``own_dropout="keep"``)
    follows its module's mode. Raises GraphRegError without a splice.
    """
    with handle_of(module).noise_on():
        yield
