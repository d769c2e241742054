"""The contractive penalty with one projection, compiled, against the plain compiled step and against double backward by hand.

The floor of a workload is the ratio of multiply-adds: what autograd's products cost with the penalty, without any that
nobody needs, to what they cost without it. Attention is counted as products, in both.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from page import arguments, chosen, progress, row
from steps import step
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from workloads import WORKLOADS, ByGraphreg, Outcome, Plain, written

WEIGHT = 1e-2
GOAL = 1.05  # of the floor


def without_statistics(model: nn.Module) -> nn.Module:
    """Batch norm that keeps no running statistics, whose update cannot run under torch.func."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.track_running_stats, layer.running_mean, layer.running_var, layer.num_batches_tracked = False, None, None, None
    return model


class ByHand(nn.Module):
    """Double backward as a user writes it, one forward and one vjp for all sites; ``by_vjp``: with torch.func, as Dynamo asks."""

    def __init__(self, model: nn.Module, by_vjp: bool) -> None:
        super().__init__()
        self.model, self.by_vjp = without_statistics(model) if by_vjp else model, by_vjp

    def sites(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        found: list[Tensor] = []

        def site(z: Tensor) -> Tensor:
            found.append(z)
            return z

        output = written(self.model, x, site, lambda z: z)
        return tuple(found), output

    def forward(self, x: Tensor) -> Outcome:
        with sdpa_kernel(SDPBackend.MATH):
            if self.by_vjp:
                values, vjp, output = torch.func.vjp(self.sites, x, has_aux=True)
                (g,) = vjp(tuple(map(directions, values)))
            else:
                x = x.detach().requires_grad_()
                values, output = self.sites(x)
                (g,) = torch.autograd.grad(values, x, tuple(map(directions, values)), create_graph=True)
        return output, WEIGHT * g.square().sum() / len(x) / len(values)


def directions(z: Tensor) -> Tensor:
    return torch.randint_like(z, 2) * 2 - 1


FORMS: dict[str, tuple[bool, Callable[[nn.Module], nn.Module]]] = {
    "unregularized, compiled": (True, Plain),
    "by hand, eager": (False, lambda model: ByHand(model, False)),
    "by hand, compiled": (True, lambda model: ByHand(model, True)),
    "graphreg, eager": (False, lambda model: ByGraphreg(model, {"contractive": WEIGHT})),
    "graphreg, compiled": (True, lambda model: ByGraphreg(model, {"contractive": WEIGHT})),
}


def zeros(x: Tensor, **_: Any) -> Tensor:
    """Reads the shape alone, so that a product whose gradient is known to be 0 is read by nobody."""
    return torch.zeros(x.shape, dtype=x.dtype)


def multiply_adds(form: nn.Module, x: Tensor) -> int:
    """Of the products of one step, as autograd records it, without those whose results nobody reads."""
    parameters = dict(form.named_parameters())

    def gradients(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        output, penalty = torch.func.functional_call(form, parameters, (x,))
        return torch.autograd.grad(output.square().mean() + penalty, list(parameters.values()))

    with sdpa_kernel(SDPBackend.MATH):
        graph = make_fx(gradients, {torch.ops.aten.zeros_like.default: zeros})(parameters, x)
    graph.graph.eliminate_dead_code()
    with FlopCounterMode(display=False) as counter:
        fx.Interpreter(graph).run(*pytree.tree_leaves((parameters, x)))
    return counter.get_total_flops() // 2


def measure(workload: str, rounds: int) -> tuple[float, dict[str, tuple[float, float]], tuple[int, int]]:
    """The plain step in milliseconds; of each form median and spread of its ratio to that; multiply-adds without and with."""
    torch._dynamo.reset()
    make, shape = WORKLOADS[workload]
    torch.manual_seed(0)
    x, model = torch.randn(shape), make()
    counts = multiply_adds(Plain(copy.deepcopy(model)), x), multiply_adds(ByHand(copy.deepcopy(model), False), x)
    built = {name: wrap(copy.deepcopy(model)) for name, (_, wrap) in FORMS.items()}
    for name, form in built.items():
        if FORMS[name][0]:
            form.compile(fullgraph=True)
        for _ in range(4):
            step(form, x)
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(rounds):  # interleaved
        for name, form in built.items():
            start = time.perf_counter()
            step(form, x)
            times[name].append(time.perf_counter() - start)
    plain = times["unregularized, compiled"]
    quartiles = {name: statistics.quantiles([t / p for t, p in zip(taken, plain, strict=True)]) for name, taken in times.items()}
    return statistics.median(plain) * 1e3, {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}, counts


def main() -> None:
    options = arguments(__doc__, ("--rounds", 12), names=WORKLOADS)
    torch.set_num_threads(1)
    columns = [name for name in FORMS if name != "unregularized, compiled"]
    print(
        f"1 thread, {options.rounds} interleaved rounds, all hidden sites, one projection. Ratios to the unregularized compiled "
        "step. Multiply-adds are in millions, without and with the penalty; the floor is their ratio. The goal is at most 1.05 of the "
        "floor.\n"
    )
    print(row("workload", "unregularized, compiled, ms", "multiply-adds", "floor", *columns, "graphreg, compiled / floor"))
    print(row(*["---"] * (5 + len(columns))))
    for workload in chosen(WORKLOADS, options.only):
        progress(f"contractive: {workload}")
        plain, found, (without, with_it) = measure(workload, options.rounds)
        floor = with_it / without
        cells = [f"{found[name][0]:.2f} ± {found[name][1]:.2f}" for name in columns]
        counts = f"{without / 1e6:,.0f}, {with_it / 1e6:,.0f}"
        of_floor = found["graphreg, compiled"][0] / floor
        missed = " (missed)" if of_floor > GOAL else ""
        print(row(workload, f"{plain:.1f}", counts, f"{floor:.2f}", *cells, f"{of_floor:.2f}{missed}"), flush=True)


if __name__ == "__main__":
    main()
