"""Part 2 of the second demo: what does the contractive penalty make of an autoencoder, and what does it cost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from digits_mlp import NOISE, TEST, TRAIN, VALIDATION, digits, split
from show import Screen, table
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from trials import Entry, collect, difference, interval, workers

import graphreg

LEARNING_RATE = 3e-3
CODE = "1"  # the sigmoid's output: nn.Sequential names its parts by number
# exact would take 200 x 128 backward passes a step; one random projection is unbiased
OPTIONS: Mapping[str, dict[str, Any]] = {"contractive": {"pattern": CODE, "estimator": "projection"}, "weight_l2": {}}
MEASURES = {"error": ".3f", "jacobian": ".2f", "moved": ".2f", "noisy": ".2f", "neighbour": ".1f"}


@dataclass(frozen=True)
class Setup:
    """How much is trained: all of it in the demo, very little in a test."""

    seeds: Sequence[int] = range(10)
    steps: int = 1200
    hidden: int = 128
    grid: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {"contractive": (0.005, 0.01, 0.02, 0.04), "weight_l2": (2.5, 5, 10, 20)}
    )


@dataclass(frozen=True)
class Job:
    """One autoencoder to train: strengths (none: plain) and a seed."""

    strengths: Mapping[str, float]
    seed: int
    setup: Setup


@dataclass(frozen=True)
class Outcome:
    """What a trained autoencoder does; means over images. An error is the sum of squares over an image's 64 pixels."""

    validation: float  # reconstruction error on the validation split
    error: float  # on the test digits
    jacobian: float  # exact Frobenius norm of d code / d image
    moved: float  # distance by which normal noise on an image moves its code
    noisy: float  # error of the reconstruction from the noisy image, against the clean one
    neighbour: float  # % of noisy images whose nearest code among the training images' has their label


def autoencoder(hidden: int) -> nn.Sequential:
    """64 pixels in [0, 1] to a code of ``hidden`` sigmoids to logits of 64 pixels."""
    return nn.Sequential(nn.Linear(64, hidden), nn.Sigmoid(), nn.Linear(hidden, 64))


def train(job: Job) -> nn.Sequential:
    """The autoencoder after ``steps`` steps of Adam on the whole training split."""
    x = digits()[0][split(job.seed)[0]]
    torch.manual_seed(job.seed)  # the same initial weights whatever the strengths: differences to plain are paired
    net = autoencoder(job.setup.hidden)
    keywords = {name: {"strength": weight, **OPTIONS[name]} for name, weight in job.strengths.items()}
    module = graphreg.regularize(net, rng=job.seed, **keywords)
    optimizer = torch.optim.Adam(module.parameters(), LEARNING_RATE, fused=True)
    for _ in range(job.setup.steps):
        output, penalties = module(x)
        loss = x.shape[1] * binary_cross_entropy_with_logits(output, x) + sum(penalties.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net  # it shares its layers with the regularized module, and has no additions


def jacobians(net: nn.Sequential, x: Tensor) -> Tensor:
    """The Frobenius norm of d code / d x at each image [batch], in closed form: Rifai et al. 2011, equation 8."""
    code, weight = net[:2](x), net.get_parameter("0.weight")
    norms: Tensor = ((code * (1 - code)).square() @ weight.square().sum(1)).sqrt()
    return norms


@torch.no_grad()
def measure(net: nn.Sequential, seed: int) -> Outcome:
    """Everything in plain torch, so that graphreg does not judge itself."""
    images, labels = digits()
    known, validation, test = split(seed)
    x = images[test]
    noisy = x + NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 + seed))

    def error(given: Tensor, wanted: Tensor) -> float:
        return float((torch.sigmoid(net(given)) - wanted).square().sum(1).mean())

    codes, noisy_codes = net[:2](x), net[:2](noisy)
    nearest = labels[known][torch.cdist(noisy_codes, net[:2](images[known])).argmin(1)]
    return Outcome(
        validation=error(images[validation], images[validation]),
        error=error(x, x),
        jacobian=float(jacobians(net, x).mean()),
        moved=float(torch.linalg.vector_norm(noisy_codes - codes, dim=1).mean()),
        noisy=error(noisy, x),
        neighbour=100 * float((nearest == labels[test]).float().mean()),
    )


def run(job: Job) -> Outcome:
    """Train and measure; a function of the job alone, so that it may run in any process."""
    return measure(train(job), job.seed)


def choose(screen: Screen, name: str, tried: Sequence[Entry], plain: Entry) -> Entry:
    """The strongest whose validation error is at most plain's, else the weakest; tells how they did."""
    limit, scores = fmean(plain.of("validation")), [fmean(entry.of("validation")) for entry in tried]
    good = [i for i, score in enumerate(scores) if score <= limit]
    at = good[-1] if good else 0
    cells = [
        f"{f'{entry.keywords[name]:g}:':>8} {score:.3f}{'*' if i == at else ' '}"
        for i, (entry, score) in enumerate(zip(tried, scores, strict=True))
    ]
    screen.line(f"  {name:<16}{''.join(cells)}".rstrip())
    return tried[at]


def train_all(screen: Screen, setup: Setup) -> list[Entry]:
    """Plain, and each penalty at its chosen strength."""

    def submit(pool: Executor, strengths: Mapping[str, float]) -> list[Future[Outcome]]:
        return [pool.submit(run, Job(strengths, seed, setup)) for seed in setup.seeds]

    grid = [(name, weight) for name, weights in setup.grid.items() for weight in weights]
    with workers() as pool, screen.progress("training", len(setup.seeds) * (1 + len(grid))) as advance:
        first, waiting = submit(pool, {}), {(name, weight): submit(pool, {name: weight}) for name, weight in grid}
        plain = collect("plain", {}, first, advance)
        screen.line(f"  {'plain':<16}{'':>8} {fmean(plain.of('validation')):.3f}")
        tried = {name: [collect(name, {name: w}, waiting[name, w], advance) for w in weights] for name, weights in setup.grid.items()}
        return [plain, *(choose(screen, name, entries, plain) for name, entries in tried.items())]


def setting(setup: Setup) -> str:
    return (
        f"An autoencoder, 64 pixels to {setup.hidden} sigmoids and back, learns {TRAIN} of scikit-learn's digits in {setup.steps} steps, "
        f'about as many as suit it best: as it is ("plain"); with contractive on its code (pattern="{CODE}", one random projection a '
        f"step); and, for comparison, with weight_l2. {len(setup.seeds)} seeds each. Of each penalty the strongest is taken whose error on "
        f"{VALIDATION} validation digits is no higher than plain's; the {TEST} test digits take no part in that."
    )


KEY = f"""\
mean over seeds ± half of its 95 % interval, on test digits
error: of the reconstruction, summed over pixels
Jacobian: the exact norm of d code / d image
moved: how far normal noise of {NOISE:g} on the pixels moves the code
noisy: error of the reconstruction from the noisy image, against the clean one
neighbour: % of noisy images next to a training image of their label, by code"""
KEY_GAIN = 'difference to plain, paired by seed; one that is smaller than its ± is "no effect"'


def measures_table(entries: Sequence[Entry]) -> str:
    rows: list[tuple[str, ...]] = [("", *(entry.title for entry in entries))]
    for name, form in MEASURES.items():
        title = name.capitalize() if name == "jacobian" else name
        rows.append((title, *(interval(entry.of(name)).short(form) for entry in entries)))
    return table(rows)


def gain_table(entries: Sequence[Entry]) -> str:
    rows: list[tuple[str, ...]] = [("", *(cell for entry in entries[1:] for cell in (entry.title, "verdict")))]
    verdicts = (("error", "+.3f", "higher", "lower"), ("Jacobian", "+.2f", "larger", "smaller"), ("neighbour", "+.1f", "better", "worse"))
    for name, form, up, down in verdicts:
        gains = [difference(entry, entries[0], name.lower()) for entry in entries[1:]]
        rows.append((name, *(cell for gain in gains for cell in (gain.short(form), gain.verdict(up, down)))))
    return table(rows)


def summary(entries: Sequence[Entry]) -> list[str]:
    """The Jacobian and the error of each row, and what of it is clear."""
    plain = entries[0]
    lines = []
    for entry in entries:
        line = f"autoencoder, {entry.title}: Jacobian norm {fmean(entry.of('jacobian')):.2f}, error {fmean(entry.of('error')):.3f}"
        if entry is not plain:
            line += f" ({difference(entry, plain, 'error').verdict('higher', 'lower')})"
        lines.append(f"{line}, {fmean(entry.of('neighbour')):.1f} % of noisy images next to their label")
    return lines


def contractive(screen: Screen, setup: Setup | None = None) -> list[str]:
    """Train, tell, and give the lines for the summary."""
    setup = setup or Setup()
    screen.title("2. A contractive autoencoder")
    screen.line(setting(setup))
    screen.line("\nvalidation error, by strength (* chosen)")
    entries = train_all(screen, setup)
    screen.line(f"\n{KEY}")
    screen.block(measures_table(entries))
    screen.line(f"\n{KEY_GAIN}")
    screen.block(gain_table(entries))
    return summary(entries)
