"""Part 2: torchvision's resnet18 by name: sites, plan, emitted Python, compiled training, pictures, and the way back."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from digits_mlp import accuracy, digits
from matplotlib.figure import Figure
from show import Screen, prove
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models import resnet18  # type: ignore[import-untyped]

import graphreg
from graphreg import Site

TRAIN, BATCH, STEPS, EVERY = 1500, 32, 60, 10
COMPILING, DRAWING = 30, 3  # seconds, usually
RAISED, RAISE_AT, WEIGHT_L2 = 0.3, 31, 100
KEYWORDS: dict[str, Any] = {
    "dropout": {("!#normed", "!#trunk"): 0.1},
    "hidden_l1": {"strength": 2, "pattern": "layer[34].*"},
    "weight_l2": {"strength": WEIGHT_L2, "pattern": "*conv2.w*"},
}


def images() -> tuple[Tensor, Tensor]:
    """The digits as resnet18 wants them: [1797, 3, 32, 32], and labels [1797]."""
    flat, labels = digits()
    large = interpolate(flat.view(-1, 1, 8, 8), size=(32, 32), mode="bilinear")
    return large.expand(-1, 3, -1, -1).contiguous(), labels


def head(text: str, lines: int) -> str:
    """The first lines, and how many follow."""
    all_lines = text.splitlines()
    left = len(all_lines) - lines
    return "\n".join([*all_lines[:lines], f"... {left} more"] if left > 0 else all_lines)


def show_names_and_plan(screen: Screen, net: nn.Module, example: Tensor) -> None:
    """As lists, because the tables that graphreg prints of them are wider."""
    traced = graphreg.trace(net, example)
    screen.line("\ntraced = graphreg.trace(net, example)\nthe sites in traced.values: name, operation, shape, role and marks")
    screen.block(head("\n".join(map(described, traced.values)), 14))
    plan = graphreg.plan(traced, graphreg.from_kwargs(traced, **KEYWORDS))
    screen.line("\nthe edits in graphreg.plan(traced, regularizers), before anything changes")
    screen.block("\n".join(f"{edit.site.name:<23}{edit.name:<11}{edit.weight:>5g}   matched by {edit.matched}" for edit in plan.edits))


def described(site: Site) -> str:
    shape = "x".join(map(str, site.shape or ()))
    return f"{site.name:<23}{site.op:<19}{shape:<13}{', '.join(site.marked)}".rstrip()


def show_call(screen: Screen) -> None:
    lines = [f"{name}={value!r}," for name, value in KEYWORDS.items()]
    screen.line("\nthe whole change to the program")
    screen.block("\n    ".join(["module = graphreg.regularize(net, example_inputs=example, compile=True,", *lines]).rstrip(",") + ")")
    screen.block("output, penalties = module(x)\nloss = cross_entropy(output, y) + sum(penalties.values())")


def show_code(screen: Screen, module: fx.GraphModule) -> None:
    """The lines around one splice, without the ``;  name = None`` with which fx frees memory."""
    lines = [line.strip().split(";  ")[0] for line in module.code.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("avgpool_dropout"))
    screen.line("\nmodule.code: the emitted Python around one splice")
    screen.block("\n".join(lines[at - 1 : at + 3]))


def step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> dict[str, float]:
    """One step of training; what the loss was made of, and one penalty worked out by hand from the same weights."""
    output, penalties = module(x)
    error = cross_entropy(output, y)
    weights = [p for name, p in module.named_parameters() if name.endswith("conv2.weight")]
    by_hand = WEIGHT_L2 * torch.stack([w.square().mean() for w in weights]).mean()
    optimizer.zero_grad()
    (error + sum(penalties.values())).backward()
    optimizer.step()
    return {"cross-entropy": error.item(), **{name: value.item() for name, value in penalties.items()}, "by hand": by_hand.item()}


def train(screen: Screen, module: fx.GraphModule, x: Tensor, y: Tensor) -> list[dict[str, float]]:
    """Compiled steps, their penalties printed as they go; what ``step`` gives for each."""
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(TRAIN, (BATCH,), generator=generator) for _ in range(STEPS)]
    screen.line("\ncompiling with Inductor, then training ...")
    start = time.perf_counter()
    with screen.expected("compiling", COMPILING):
        steps = [step(module, optimizer, x[batches[0]], y[batches[0]])]
    with screen.progress("training resnet18", STEPS) as advance:
        for number in range(1, STEPS + 1):
            if number == RAISE_AT:
                graphreg.set_strength(module, "dropout", RAISED)
                screen.line(f'  graphreg.set_strength(module, "dropout", {RAISED:g})  # nothing is compiled again')
            if number > 1:
                rows = batches[number - 1]
                steps.append(step(module, optimizer, x[rows], y[rows]))
            advance()
            if number == 1 or number % EVERY == 0:
                values = "   ".join(f"{name} {value:.3f}" for name, value in steps[-1].items() if name != "by hand")
                screen.line(f"  step {number:>2}   {values}   {time.perf_counter() - start:5.1f} s")
    return steps


def pictures(screen: Screen, module: fx.GraphModule, steps: Sequence[dict[str, float]], folder: Path) -> None:
    """The rewritten network as a drawing and as a page, and how cross-entropy and penalties developed."""
    folder.mkdir(parents=True, exist_ok=True)
    screen.line(f"\ngraphreg.draw(module, path), and a plot of the losses, in {folder}")
    what = {
        "resnet18.svg": "the network, with what was added in colour",
        "resnet18.html": "the same, to search and unfold in a browser",
        "curves.svg": "cross-entropy and penalties, step by step",
    }
    with screen.expected("drawing", DRAWING):
        graphreg.draw(module, folder / "resnet18.svg")
        graphreg.draw(module, folder / "resnet18.html")
        curves(steps).savefig(folder / "curves.svg")
    screen.block("\n".join(f"{name:<14} {text}" for name, text in what.items()))


def curves(steps: Sequence[dict[str, float]]) -> Figure:
    """A line each for the cross-entropy and the penalties; a mark where the rate of dropout was raised."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in steps[0]:
        if name != "by hand":
            axes.plot(range(1, len(steps) + 1), [each[name] for each in steps], label=name)
    axes.axvline(RAISE_AT, color="grey", linestyle=":")
    axes.annotate(f" dropout {RAISED:g}", (RAISE_AT, 1), xycoords=("data", "axes fraction"), va="top", color="grey")
    axes.set(title="resnet18 on digits, regularized by graphreg", xlabel="step", ylabel="part of the loss", ylim=(0, None))
    axes.legend()
    return figure


def strip_and_prove(screen: Screen, module: fx.GraphModule, original: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """The stripped module against a copy of the network that graphreg never saw, with the trained weights loaded."""
    stripped = graphreg.strip(module).eval()
    same_keys = list(module.state_dict()) == list(stripped.state_dict()) == list(original.state_dict())
    original.load_state_dict(stripped.state_dict())
    with torch.no_grad():
        given, wanted = stripped(x), original.eval()(x)
    screen.line("\nstripped = graphreg.strip(module): the network itself again")
    screen.line(f"  test accuracy after {STEPS} steps: {accuracy(given, y):.1f} % of {len(y)} images")
    return [
        prove("graphreg" not in stripped.code and same_keys, "nothing of graphreg in strip's code; state_dict keys are the original's"),
        prove(torch.equal(given, wanted), f"strip gives the original's outputs bit for bit, on {len(y)} images in eval mode"),
    ]


def resnet(screen: Screen, folder: Path) -> list[str]:
    """Show, train, draw into ``folder``, strip; gives the lines for the summary."""
    screen.title("2. torchvision's resnet18, by name")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # where other jobs share the cores, two threads that wait for each other are far slower than one
    x, y = images()
    net = resnet18(num_classes=10)
    original = copy.deepcopy(net)
    show_names_and_plan(screen, net, x[:BATCH])
    module = graphreg.regularize(net, example_inputs=x[:BATCH], rng=0, compile=True, **KEYWORDS)
    show_call(screen)
    show_code(screen, module)
    counters.clear()
    steps = train(screen, module, x[:TRAIN], y[:TRAIN])
    worst = max(abs(each["weight_l2"] / each["by hand"] - 1) for each in steps)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    pictures(screen, module, steps, folder)
    proofs = [
        prove((graphs, breaks) == (1, 0), f"{STEPS} compiled steps: one graph, no graph break, no recompilation"),
        prove(worst < 1e-5, "weight_l2 of the compiled graph agrees with mean(w ** 2) by hand, at every step"),
        *strip_and_prove(screen, module, original, x[TRAIN:], y[TRAIN:]),
    ]
    return [f"resnet18, proved: {proof}" for proof in proofs]
