"""What it costs to try strengths: eight lanes of one program beside eight runs, and a trial of a search beside one that compiles anew.

The programs are those of docs/howto/many_strengths.md and docs/howto/search.md, compiled by Inductor. All times are CPU times.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from alternate import alternated
from compile_time import used
from figures import ratio
from page import arguments, chosen, progress, row
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import graphreg

LANES, BATCH, FEATURES, CLASSES, RATE = 8, 128, 64, 3, 0.1
STEPS = 20  # of a trial
TRIALS = {"set": "later ones, by `set_strength`", "regularized": "regularized anew", "compiled": "regularized and compiled anew"}
FORMS = {"runs": "eight runs, ms", "steps": "the lanes' step eight times", "same": 'lanes, `"same"`', "different": 'lanes, `"different"`'}


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, FEATURES), torch.randint(CLASSES, (BATCH,))


def regularized(hidden: int) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))
    return graphreg.regularize(net, hidden_dropout=0.2, weight_l2={"weight": 0.01, "reduction": "sum"}, rng=0)


def timed(turn: Callable[[], None]) -> Callable[[], float]:
    """The same by the clock of the process and its compilers."""

    def taken() -> float:
        start = used()
        turn()
        return used() - start

    return taken


def trained(module: nn.Module, step: Callable[..., Any], x: Tensor, y: Tensor, steps: int) -> None:
    """Steps as one writes them for a single run."""
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    for _ in range(steps):
        output, penalties = step(x)
        optimizer.zero_grad()
        (cross_entropy(output, y) + sum(penalties.values())).backward()
        optimizer.step()


def lanes(hidden: int, form: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """For ``alternate.py``: eight steps, one for each strength."""
    module, (x, y) = regularized(hidden), data()
    if form == "runs":
        compiled = torch.compile(module, fullgraph=True)
        trained(module, compiled, x, y, 8)
        return timed(lambda: trained(module, compiled, x, y, LANES)), {}
    buffers = graphreg.strength_buffers(module)

    def step(parameters: dict[str, Tensor], strengths: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        lent = {name: strengths[key].expand(len(of.sites)) for key, of in buffers.items() for name in of.names}

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            output, penalties = functional_call(module, {**parameters, **lent}, (x,))
            return cross_entropy(output, y) + sum(penalties.values())

        gradients = grad(loss)(parameters)
        return {name: parameter - RATE * gradients[name] for name, parameter in parameters.items()}

    def together(parameters: dict[str, Tensor], strengths: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        stacked: dict[str, Tensor] = vmap(step, in_dims=(0, 0, None, None), randomness=form)(parameters, strengths, x, y)
        return stacked

    start = {name: p.detach() for name, p in module.named_parameters()}
    strengths = {"hidden_dropout": torch.linspace(0, 0.5, LANES), "weight_l2": torch.logspace(-4, -1, LANES)}
    compiled = torch.compile(step if form == "steps" else together, fullgraph=True)
    if form == "steps":
        alone = [dict(start) for _ in range(LANES)]
        single = [{key: values[lane] for key, values in strengths.items()} for lane in range(LANES)]

        def turn() -> None:
            alone[:] = [compiled(mine, lent, x, y) for mine, lent in zip(alone, single, strict=True)]
    else:
        many = [{name: p.expand(LANES, *p.shape).clone() for name, p in start.items()}]

        def turn() -> None:
            many[0] = compiled(many[0], strengths, x, y)

    for _ in range(5):
        turn()
    return timed(turn), {}


def trials(form: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """For ``alternate.py``: a trial with strengths of its own, in the module of all trials or in one of its own."""
    module, (x, y), draw = regularized(32), data(), random.Random(0)
    compiled = torch.compile(module, fullgraph=True)
    weights, noise = {name: value.clone() for name, value in module.state_dict().items()}, graphreg.rng_state(module)

    def turn() -> None:
        nonlocal module, compiled
        if form == "compiled":
            torch._dynamo.reset()
        if form != "set":
            module = regularized(32)
            compiled = torch.compile(module, fullgraph=True)
        module.load_state_dict(weights)
        graphreg.set_rng_state(module, noise)
        graphreg.set_strength(module, "hidden_dropout", draw.uniform(0, 0.6))
        graphreg.set_strength(module, "weight_l2", 10 ** draw.uniform(-4, -1))
        trained(module, compiled.train(), x, y, STEPS)
        with torch.no_grad():
            cross_entropy(compiled.eval()(x).output, y)

    return timed(turn), {}


def of_lanes(rounds: int) -> None:
    print(
        f"CPU times of a step of SGD with {LANES} strengths, batch {BATCH}, {FEATURES} inputs, one hidden layer, one thread, {rounds} "
        "interleaved rounds. A run is a compiled module with a backward pass and an optimizer. Without a unit: the ratio to eight runs.\n"
    )
    print(row("hidden units", *FORMS.values()))
    print(row(*["---"] * (1 + len(FORMS))))
    for hidden in (32, 512):
        progress(f"strengths: lanes of {hidden} units")
        found = {form: each.seconds for form, each in alternated("strengths:lanes", {f: [hidden, f] for f in FORMS}, rounds).items()}
        milliseconds = f"{statistics.median(found['runs']) * 1e3:.1f}"
        print(row(hidden, milliseconds, *(ratio(found[form], found["runs"]) for form in FORMS if form != "runs")), flush=True)


def of_trials(count: int) -> None:
    progress("strengths: trials of a search")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty: the very first trial compiles
        found = {form: each.seconds for form, each in alternated("strengths:trials", {form: [form] for form in TRIALS}, count).items()}
    later = {form: seconds[1:] for form, seconds in found.items()}
    print(
        f"CPU seconds of a trial of a search: {STEPS} steps of the net with 32 hidden units, then validation. Medians of {count - 1} "
        "trials after the first. *Regularized anew*: a module of its own for each trial; Dynamo takes the code of the first. "
        "*Compiled anew*: Dynamo has no such code, as in a new process, and Inductor's cache has the kernels.\n"
    )
    print(row("the first", *TRIALS.values(), "compiled anew / by `set_strength`"))
    print(row(*["---"] * (2 + len(TRIALS))))
    seconds = (f"{statistics.median(each):.3f}" for each in later.values())
    print(row(f"{found['set'][0]:.1f}", *seconds, ratio(later["compiled"], later["set"])), flush=True)


PARTS: dict[str, Callable[[Any], None]] = {
    "lanes": lambda options: of_lanes(options.rounds),
    "trials": lambda options: of_trials(options.trials),
}


def main() -> None:
    options = arguments(__doc__, ("--rounds", 100), ("--trials", 12), names=PARTS)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # so that the time of compilers is that of children
    for part in chosen(PARTS, options.only).values():
        part(options)
        print()


if __name__ == "__main__":
    main()
