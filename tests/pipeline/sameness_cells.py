"""One cell of the matrix: a net with every kind of draw, run as the cell says, and held against the values by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config as functorch
import torch._inductor.config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg.passes import BernoulliDropout, GaussianNoise
from sameness_axes import BATCHES, DTYPES, RECOMPUTATION, Cell
from sameness_hand import Draws, Hand, by_hand

ARRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda y: y.contiguous(),
    "transposed": lambda y: y.transpose(1, 2),
    "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "strided": lambda y: y[..., ::2],
}


# The draw of each branch. The deviation of the noise keeps its sum away from 0, where the slope of ``Tail`` changes.
KINDS = ("sigmoid", "noise", "own", "input")
RATES = {"sigmoid": 0.4, "noise": 0.0625, "own": 0.3, "input": 0.2}
SPLICES = [
    BernoulliDropout("heads.0", RATES["sigmoid"], name="sigmoid"),  # recomputed in backward when compiled, see forms.py
    GaussianNoise("heads.1", RATES["noise"], name="noise"),
    BernoulliDropout("u", RATES["input"], name="input"),
]


class Head(nn.Module):
    def __init__(self, layout: str, sigmoid: bool) -> None:
        super().__init__()
        self.layout, self.w, self.act = layout, nn.Parameter(torch.ones(6)), nn.Sigmoid() if sigmoid else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.act(ARRANGE[self.layout](x * self.w))
        return value


class Tail(nn.Module):
    """Its backward needs the spliced value: from memory, or recomputed. Exact: a slope of 1 or 1/2, and v a power of two."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.5)

    def forward(self, d: Tensor, v: Tensor) -> Tensor:
        value: Tensor = self.act(d) * v
        return value


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=False)


class Net(nn.Module):
    """Three branches from x, and one from u, which comes in the layout: outputs by branch."""

    def __init__(self, layout: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(wrap(Head(layout, kind == "sigmoid")) for kind in KINDS[:-1])
        self.tails = nn.ModuleList(wrap(Tail()) for _ in KINDS)
        self.own = nn.Dropout(RATES["own"])

    def forward(self, x: Tensor, u: Tensor, v: Tensor) -> list[Tensor]:
        values = [head(x[k]) for k, head in enumerate(self.heads)] + [u]
        values[2] = self.own(values[2])
        return [tail(value, v[k]) for k, (tail, value) in enumerate(zip(self.tails, values, strict=True))]


class Bigger(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = checkpoint(lambda *args: self.layer(*args).output, *args, use_reentrant=False)
        return outputs


@dataclass(frozen=True)
class Batch:
    """Inputs of one call and the cotangents of its outputs. v and c are powers of two, so that products with them are exact."""

    x: Tensor
    u: Tensor
    v: Tensor
    c: Tensor


def batch(cell: Cell, size: int, seed: int) -> Batch:
    source, dtype, arrange = torch.Generator().manual_seed(seed), DTYPES[cell.dtype], ARRANGE[cell.layout]

    def signed(values: Tensor) -> Tensor:
        return values * (torch.randint(0, 2, values.shape, generator=source) * 2 - 1)

    x, u = (signed(0.5 + 0.5 * torch.rand(shape, generator=source)).to(dtype) for shape in ((3, size, 3, 4, 6), (size, 3, 4, 6)))
    u = arrange(u)
    v, c = (signed(2.0 ** torch.randint(-1, 2, (len(KINDS), *u.shape), generator=source)).to(dtype) for _ in range(2))
    return Batch(x.requires_grad_(), u.requires_grad_(), v.requires_grad_(), c)


def regularized(cell: Cell) -> torch.fx.GraphModule:
    wrap: Callable[[nn.Module], nn.Module] = Checkpointed if cell.checkpointing == "in the model" else lambda module: module
    net, source = Net(cell.layout, wrap), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in net.parameters():
            w.copy_((1 + 0.5 * torch.rand(6, generator=source)) * (torch.randint(0, 2, (6,), generator=source) * 2 - 1))
    module = graphreg.regularize(net.to(DTYPES[cell.dtype]), SPLICES, rng=11, own_dropout="seeded")
    if cell.checkpointing == "layers":
        for part in (*net.heads, *net.tails):
            part.act = checkpoint_wrapper(part.act)
    return module


def runner(cell: Cell, module: torch.fx.GraphModule) -> Callable[..., list[Tensor]]:
    """What the cell's user calls."""
    run: Any = module
    if cell.checkpointing == "cut out":
        run = split_module(module, module, lambda node: int(node.meta.get("graphreg", {}).get("kind") != "key"))
        run.submod_1 = Checkpointed(run.submod_1)
    elif cell.checkpointing == "in a bigger model":
        run = Bigger(module)
    if cell.backend != "eager":
        run = torch.compile(run, fullgraph=True, backend=cell.backend)
    if cell.checkpointing == "in a bigger model":
        return run  # type: ignore[no-any-return]
    if cell.checkpointing == "around the whole":
        return lambda *args: checkpoint(lambda *args: run(*args).output, *args, use_reentrant=False)  # type: ignore[no-any-return]
    return lambda *args: run(*args).output  # type: ignore[no-any-return]


def check(cell: Cell, cached: bool = False) -> None:
    """Raises AssertionError where the cell does not hold, and whatever it raises where it does not run.

    ``cached``: what was compiled of the same graph before, by the same graphreg, is taken again.
    """
    torch._dynamo.reset()
    with ExitStack() as settings:
        if RECOMPUTATION[cell.recomputation]:
            settings.enter_context(functorch.patch(**RECOMPUTATION[cell.recomputation]))
        if cell.checkpointing == "in a bigger model":
            settings.enter_context(torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True))
        # What an earlier graphreg compiled is not what is asked here. Object files of the same C++ are.
        settings.enter_context(torch._inductor.config.patch(fx_graph_cache=cached))
        settings.enter_context(functorch.patch(enable_autograd_cache=False))
        module = regularized(cell)
        run = runner(cell, module)
        held = cell.checkpointing in ("in a bigger model", "around the whole")
        for call, size in enumerate(BATCHES[cell.batch]):
            given = batch(cell, size, call)
            if cell.batch == "two sizes":
                for tensor, axis in ((given.x, 1), (given.u, 0), (given.v, 1)):
                    torch._dynamo.mark_dynamic(tensor, axis)
            with graphreg.frozen_noise(module) if held else contextlib.nullcontext():
                outputs = run(given.x, given.u, given.v)
                found = torch.autograd.grad(outputs, [given.x, given.u, given.v, *module.parameters()], list(given.c))
            compare(cell, module, call, given, outputs, found)
        assert graphreg.rng_state(module)["call"] == 2


def compare(cell: Cell, module: nn.Module, call: int, given: Batch, outputs: list[Tensor], found: tuple[Tensor, ...]) -> None:
    of_x, of_u, of_v, *of_w = found
    for k, kind in enumerate(KINDS):
        hand = expected(cell, module, call, given, k)
        of_input = of_u if kind == "input" else of_x[k]
        if kind != "noise":
            assert torch.equal(outputs[k] != 0, hand.output != 0), f"{kind}: the mask of the forward"
            assert torch.equal(of_v[k] != 0, hand.of_v != 0), f"{kind}: the mask of the value that backward read"
            assert torch.equal(of_input != 0, hand.of_x != 0), f"{kind}: the mask that backward multiplied by"
        close(cell, f"{kind}: the output", outputs[k], hand.output, hand.output.abs())
        close(cell, f"{kind}: the gradient of v", of_v[k], hand.of_v, hand.of_v.abs())
        close(cell, f"{kind}: the gradient of the input", of_input, hand.of_x, hand.of_x.abs())
        if kind != "input":
            close(cell, f"{kind}: the gradient of the parameter", of_w[k], hand.of_w, hand.terms)


def close(cell: Cell, what: str, ours: Tensor, hand: Tensor, scale: Tensor) -> None:
    """Within eight roundings of ``scale``: of a sum, the sum of the absolute values of its terms."""
    assert ours.dtype == DTYPES[cell.dtype] and ours.shape == hand.shape, what
    beyond = (ours.detach().double() - hand).abs() - 8 * torch.finfo(ours.dtype).eps * scale
    assert bool((beyond <= 0).all()), f"{what}: {int((beyond > 0).sum())} of {beyond.numel()} beyond, by {float(beyond.max()):.3g}"


def expected(cell: Cell, module: nn.Module, call: int, given: Batch, k: int) -> Hand:
    kind, wide = KINDS[k], torch.float64
    weights = [p.detach().to(wide) for p in module.parameters()]
    v, c = given.v[k].detach(), given.c[k]
    streams = {name.rpartition("_")[2]: stream for name, stream in graphreg.rng_state(module)["streams"].items()}
    draws, rate, zeros = Draws(streams[kind], call), RATES[kind], torch.zeros_like(v, dtype=wide)
    if kind == "noise":
        factor, added = zeros + 1, rate * draws.normal(v)
    else:
        factor, added = draws.keep(v, rate) / (1 - rate), zeros
    if kind == "input":
        x, w, arrange = given.u, torch.ones(given.u.shape[-1], dtype=wide), ARRANGE["contiguous"]
    else:
        x, w, arrange = given.x[k], weights[k], ARRANGE[cell.layout]
    return by_hand(x.detach().to(wide), w, v.to(wide), c.to(wide), arrange, kind == "sigmoid", factor, added)
