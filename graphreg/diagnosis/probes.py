"""Experiments that compile tiny functions under torch's present settings, and compare the masks that forward, backward and eager draw.

``measure`` and ``measure_streams`` run a chain of draws on a tensor of ones. If backward has the
masks of the forward, an element's gradient is nonzero exactly if no draw dropped the element. The
chain has several draws, because the partitioner may recompute only some of them in backward.
``measure_order`` compares two draws in one compiled graph with the same draws in eager.

An experiment has no side effects. Its functions have code objects of their own, so the experiment
does not change the code that Dynamo has cached for other functions. (``torch._dynamo.reset`` would
clear that cache.) The random generators are restored. The process caches the measurements.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphreg.compiler.settings import settings_snapshot
from graphreg.errors import first_line
from graphreg.ir.random_ops import DropoutKind
from graphreg.planning.plan import plan
from graphreg.rewriting.rewrite import rewrite
from graphreg.torch_internals.interpreter import with_own_code
from graphreg.tracing.trace import trace

InnerBackend = str | Callable[..., Any]
# With these, about a third of the elements are kept by all links, and two thirds are dropped.
P, SHAPE, LINKS = 0.25, (32, 64), 4


@dataclass(frozen=True)
class Probed:
    """The outcome of one experiment.

    Attributes:
        backward: The share of elements, in [0, 1], whose mask in backward differs from their mask
            in the forward.
        eager: The share of elements, in [0, 1], whose mask in compiled code differs from their mask
            in eager.
        error: The error with which the function failed to compile or run; ``""`` if it ran.
    """

    backward: float = 0.0
    eager: float = 0.0
    error: str = ""

    @property
    def wrong(self) -> bool:
        """Whether backward has other masks than the forward, or the function does not compile or run."""
        return self.backward > 0 or self.error != ""


def _element(x: Tensor) -> Tensor:
    return F.dropout(x, P)


def _channel(x: Tensor) -> Tensor:
    return F.dropout2d(x[:, :, None, None], P)[:, :, 0, 0]


def _alpha(x: Tensor) -> Tensor:
    return F.alpha_dropout(x, P, True)


def _channel_alpha(x: Tensor) -> Tensor:
    return F.feature_alpha_dropout(x[:, :, None, None], P, True)[:, :, 0, 0]


def _depth(x: Tensor) -> Tensor:
    return x * x.new_empty((x.shape[0], 1)).bernoulli_(1 - P)


def _attention(x: Tensor) -> Tensor:
    """Attend from each query to a single key. The weight of this key is 1 before dropout, so the result is ``x`` times the mask."""
    none = x.new_zeros((x.numel(), 1, 1, 1))
    return F.scaled_dot_product_attention(none, none, x.reshape(-1, 1, 1, 1), dropout_p=P).reshape(x.shape)


def _layer(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) >= P)


DRAWS: dict[DropoutKind, Callable[[Tensor], Tensor]] = {
    "element": _element, "channel": _channel, "alpha": _alpha, "channel alpha": _channel_alpha, "depth": _depth,
    "attention": _attention, "heads": _attention, "layer": _layer,
}  # fmt: skip


def _chain(draw: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def chain(x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.ones_like(x, dtype=torch.bool)
        for _ in range(LINKS):
            x = draw(torch.tanh(x))
            # alpha dropout sets a dropped element to a number below 0; a kept element stays above 0
            kept = kept & (x > 0)
        return x, kept

    return with_own_code(chain)


def _branches(large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """Draw twice, with different sizes, in branches that meet at the end. If a compiler swaps the draws, both masks change."""
    first = F.dropout(large, P)
    first = first @ first.t()
    second = F.dropout(small, P)
    return first.sum() + second.sum(), second


_measured: dict[tuple[Any, ...], Probed] = {}


def measure(kind: DropoutKind, backend: InnerBackend, device: torch.device) -> Probed:
    """Measure a chain of random operations of one kind under the present settings."""
    return _once(("chain", DRAWS[kind], backend, device), lambda: _of_chain(_chain(DRAWS[kind]), backend, device))


def measure_order(backend: InnerBackend, device: torch.device) -> Probed:
    """Measure whether a compiled graph makes two draws in the order of eager. ``Probed.eager`` is about the mask of the second draw."""
    return _once(("order", backend, device), lambda: _of_order(backend, device))


def measure_streams(backend: InnerBackend, device: torch.device) -> Probed:
    """Measure a chain of dropouts that draw from graphreg's streams, not from torch's generator."""
    return _once(("streams", backend, device), lambda: _of_streams(backend, device))


def _once(key: tuple[Any, ...], experiment: Callable[[], Probed]) -> Probed:
    """Return the result of an experiment under the present settings, from the cache or by running it. Errors go to ``Probed.error``."""
    # The search for the settings to blame repeats an experiment under other settings.
    full = (*key, settings_snapshot())
    if full not in _measured:
        with _apart(key[-1]):
            try:
                _measured[full] = experiment()
            except Exception as error:
                # Dynamo wraps what a backend raises; the backend's own error says more.
                _measured[full] = Probed(error=first_line(getattr(error, "inner_exception", error)))
    return _measured[full]


def _of_chain(chain: Callable[[Tensor], tuple[Tensor, Tensor]], backend: InnerBackend, device: torch.device) -> Probed:
    compiled = torch.compile(chain, fullgraph=True, backend=backend)
    torch.manual_seed(0)
    eager = chain(_ones(device))[1]
    x = _ones(device)
    torch.manual_seed(0)
    y, kept = compiled(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return Probed(_share(kept, gradient != 0), _share(kept, eager))


def _of_order(backend: InnerBackend, device: torch.device) -> Probed:
    function = with_own_code(_branches)
    compiled: Any = torch.compile(function, fullgraph=True, backend=backend)
    inputs = torch.ones(1024, 512, device=device), torch.ones(8, 8, device=device)
    torch.manual_seed(0)
    _, eager = function(*inputs)
    torch.manual_seed(0)
    _, second = compiled(*inputs)
    return Probed(eager=_share(second != 0, eager != 0))


class _DropoutChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drops = nn.ModuleList(nn.Dropout(P) for _ in range(LINKS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.ones_like(x, dtype=torch.bool)
        for drop in self.drops:
            x = drop(torch.tanh(x))
            kept = kept & (x > 0)
        return x, kept


def _of_streams(backend: InnerBackend, device: torch.device) -> Probed:
    traced = trace(_DropoutChain())
    # Two modules with one seed draw the same masks, each from its own counter of calls.
    eager, twin = (rewrite(traced, plan(traced, [], own_dropout="seeded"), 0).to(device) for _ in range(2))
    x = _ones(device)
    expected = eager(_ones(device)).output[1]
    y, kept = torch.compile(twin, fullgraph=True, backend=backend)(x).output
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return Probed(_share(kept, gradient != 0), _share(kept, expected))


def _ones(device: torch.device) -> Tensor:
    return torch.ones(SHAPE, dtype=torch.float32, device=device, requires_grad=True)


def _share(one: Tensor, other: Tensor) -> float:
    return float((one != other).double().mean())


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Run an experiment with gradients on, autocast off and no warnings, whatever the caller has set. Restore the generators at the end."""
    state = random.getstate()
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(False), torch.enable_grad(),
        torch.autocast(device.type, enabled=False), torch.compiler.set_stance("default"), warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(state)
