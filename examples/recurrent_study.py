"""Part 1 of the second demo: does a recurrent network go on working on sequences longer than those it was trained on?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from digits_mlp import TEST, accuracy, digits
from show import Screen, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trials import Entry, choose, collect, difference, interval, workers

import graphreg

ROWS, TRAIN, VALIDATION = 8, 400, 300  # rows of a digit, each a step; digits to train with and to choose strengths with
TRAINED, MIDDLE, LONG = 2, 8, 32  # digits a sequence, in training and at most
BATCH, STREAMS, LEARNING_RATE, CLIP = 64, 300, 2e-3, 1.0
# norm="l2" is Krueger & Memisevic's equation 1
OPTIONS: Mapping[str, dict[str, Any]] = {"recurrent_norm": {"pattern": "rnn", "norm": "l2"}, "recurrent_state": {"pattern": "rnn"}}
TANH = "plain, tanh"
DIGITS = {f"digits 1-{TRAINED}": "trained", f"{TRAINED + 1}-{MIDDLE}": "middle", f"{MIDDLE + 1}-{LONG}": "long"}


@dataclass(frozen=True)
class Setup:
    """How much is trained: all of it in the demo, very little in a test."""

    seeds: Sequence[int] = range(10)
    steps: int = 600
    hidden: int = 64
    grid: Mapping[str, Sequence[float]] = field(default_factory=lambda: {"recurrent_norm": (1, 10, 100), "recurrent_state": (1, 10, 100)})


@dataclass(frozen=True)
class Job:
    """One network to train: strengths (none: plain), a seed, and the network's activation."""

    strengths: Mapping[str, float]
    seed: int
    setup: Setup
    activation: str = "relu"


@dataclass(frozen=True)
class Outcome:
    """What a trained network does. Accuracies in per cent, of digits told right at their last row."""

    validation: float  # at the digits behind those of the trained length
    trained: float  # test accuracy at digits 1 to TRAINED
    middle: float  # at the next, to MIDDLE
    long: float  # at those behind, to LONG
    norm: float  # of the state after TRAINED digits, mean over sequences
    drift: float  # decades from there to the norm after LONG digits, up or down, mean over sequences


class Reader(nn.Module):
    """Reads rows [batch, time, 8] and names each digit at its last row: logits [batch, digits, 10]."""

    def __init__(self, hidden: int, activation: str) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(8, hidden, nonlinearity=activation, batch_first=True), nn.Linear(hidden, 10)
        if activation == "relu":  # the start of Le, Jaitly & Hinton 2015, which Krueger & Memisevic stabilize
            nn.init.eye_(self.rnn.get_parameter("weight_hh_l0"))
            nn.init.normal_(self.rnn.get_parameter("weight_ih_l0"), 0, 0.1)
            for bias in ("bias_hh_l0", "bias_ih_l0"):
                nn.init.zeros_(self.rnn.get_parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        return self.head(states[:, ROWS - 1 :: ROWS])  # type: ignore[no-any-return]


def split(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Digits for training, validation and test; the test digits are the same for all seeds."""
    rest = TEST + torch.randperm(len(digits()[1]) - TEST, generator=torch.Generator().manual_seed(seed))
    return rest[:TRAIN], rest[TRAIN : TRAIN + VALIDATION], torch.arange(TEST)


def streams(rows: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` sequences of ``length`` digits, one behind the other: [count, 8 * length, 8], and labels [count, length]."""
    images, labels = digits()
    chosen = rows[torch.randint(len(rows), (count, length), generator=generator)]
    return images[chosen].reshape(count, ROWS * length, 8), labels[chosen]


def train(job: Job) -> Reader:
    """The network after ``steps`` steps on fresh sequences of TRAINED digits."""
    rows = split(job.seed)[0]
    generator = torch.Generator().manual_seed(job.seed)
    torch.manual_seed(job.seed)  # the same initial weights and sequences whatever the strengths: differences to plain are paired
    net = Reader(job.setup.hidden, job.activation)
    module = graphreg.regularize(net, **{name: {"strength": weight, **OPTIONS[name]} for name, weight in job.strengths.items()})
    optimizer = torch.optim.Adam(module.parameters(), LEARNING_RATE, fused=True)
    for _ in range(job.setup.steps):
        x, y = streams(rows, BATCH, TRAINED, generator)
        output, penalties = module(x)
        loss = cross_entropy(output.flatten(0, 1), y.flatten()) + sum(penalties.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
    return net  # it shares its layers with the regularized module, and has no additions


@torch.no_grad()
def measure(net: Reader, seed: int) -> Outcome:
    """Everything in plain torch, so that graphreg does not judge itself."""
    _, validation, test = split(seed)
    x, y = streams(validation, STREAMS, LONG, torch.Generator().manual_seed(1000 + seed))
    valid = net(x)[:, TRAINED:]
    right = accuracy(valid.flatten(0, 1), y[:, TRAINED:].flatten())
    x, y = streams(test, STREAMS, LONG, torch.Generator().manual_seed(0))
    states = net.rnn(x)[0][:, ROWS - 1 :: ROWS]
    found = net.head(states)
    parts = (slice(0, TRAINED), slice(TRAINED, MIDDLE), slice(MIDDLE, LONG))
    trained, middle, long = (accuracy(found[:, part].flatten(0, 1), y[:, part].flatten()) for part in parts)
    norms = torch.linalg.vector_norm(states.double(), dim=-1)  # in float32 the square of 1e20 is no number
    decades = norms.clamp(1e-6).log10()  # a state that is all zeros has no logarithm
    drift = (decades[:, -1] - decades[:, TRAINED - 1]).abs().mean()
    return Outcome(right, trained, middle, long, float(norms[:, TRAINED - 1].mean()), float(drift))


def run(job: Job) -> Outcome:
    """Train and measure; a function of the job alone, so that it may run in any process."""
    return measure(train(job), job.seed)


def train_all(screen: Screen, setup: Setup) -> list[Entry]:
    """Plain, each penalty at its best strength, and the network that hardly needs one."""

    def submit(pool: Executor, strengths: Mapping[str, float], activation: str = "relu") -> list[Future[Outcome]]:
        return [pool.submit(run, Job(strengths, seed, setup, activation)) for seed in setup.seeds]

    grid = [(name, weight) for name, weights in setup.grid.items() for weight in weights]
    with workers() as pool, screen.progress("training", len(setup.seeds) * (2 + len(grid))) as advance:
        first, waiting = submit(pool, {}), {(name, weight): submit(pool, {name: weight}) for name, weight in grid}
        last = submit(pool, {}, "tanh")
        entries = [collect("plain", {}, first, advance)]
        choose(screen, "plain", [("", entries[0])])
        for name, weights in setup.grid.items():
            tried = [(f"{w:g}:", collect(name, {name: w}, waiting[name, w], advance)) for w in weights]
            entries.append(choose(screen, name, tried))
        return [*entries, collect(TANH, {}, last, advance)]


def setting(setup: Setup) -> str:
    return (
        f"A recurrent network of {setup.hidden} rectified units reads scikit-learn's digits row by row, one behind the other, and names "
        f"each at its last row. It learns from sequences of {TRAINED} digits ({TRAINED * ROWS} steps) and is tested on sequences of {LONG} "
        f'({LONG * ROWS} steps): as it is ("plain"), with recurrent_norm (norm="l2", the norm stabilizer of Krueger & Memisevic), and with '
        f"recurrent_state. {len(setup.seeds)} seeds each: other digits to learn from, other weights. Strengths are chosen on sequences of "
        f"{VALIDATION} validation digits; the {TEST} test digits take no part in that."
    )


KEY = f"""\
mean over seeds ± half of its 95 % interval
digits: test accuracy in % at the digits of the trained length and behind it
norm: of the state after {TRAINED} digits
drift: decades (factors of 10), up or down, from there to the norm after {LONG} digits
{TANH}: tanh for the rectifier, whose state cannot grow"""
KEY_GAIN = 'difference to plain, paired by seed; one that is smaller than its ± is "no effect"'


def accuracy_table(entries: Sequence[Entry]) -> str:
    rows: list[tuple[str, ...]] = [("", *(entry.title for entry in entries))]
    for title, name in (*DIGITS.items(), ("norm", "norm"), ("drift", "drift")):
        rows.append((title, *(interval(entry.of(name)).short(".2f" if name == "drift" else ".1f") for entry in entries)))
    return table(rows)


def gain_table(entries: Sequence[Entry]) -> str:
    rows: list[tuple[str, ...]] = [("", *(cell for entry in entries[1:] for cell in (entry.title, "verdict")))]
    for title, name in (*((title, name) for title, name in DIGITS.items() if name != "middle"), ("drift", "drift")):
        form, up, down = ("+.2f", "more", "less") if name == "drift" else ("+.1f", "better", "worse")
        gains = [difference(entry, entries[0], name) for entry in entries[1:]]
        rows.append((title, *(cell for gain in gains for cell in (gain.short(form), gain.verdict(up, down)))))
    return table(rows)


def summary(entries: Sequence[Entry]) -> list[str]:
    """What plain does behind the trained length, and what each penalty makes of it."""
    plain, *penalised, tanh = entries

    def described(entry: Entry) -> str:
        return f"{fmean(entry.of('long')):.1f} % right at digits {MIDDLE + 1} to {LONG}, drift {fmean(entry.of('drift')):.2f} decades"

    lines = [f"longer sequences, plain: {described(plain)}"]
    for entry in penalised:
        gain = difference(entry, plain, "long")
        change = f"{gain.mean:+.1f} points" if gain.clear else "no clear difference"
        lines.append(f"longer sequences, {entry.title}: {described(entry)} ({change})")
    return [*lines, f"longer sequences, {tanh.title}: {described(tanh)}; a state with bounds has less need of a penalty"]


def recurrent(screen: Screen, setup: Setup | None = None) -> list[str]:
    """Train, tell, and give the lines for the summary."""
    setup = setup or Setup()
    screen.title("1. Longer sequences than trained on: the recurrent penalties")
    screen.line(setting(setup))
    screen.line(f"\nvalidation accuracy in % at digits {TRAINED + 1} to {LONG}, by strength (* chosen)")
    entries = train_all(screen, setup)
    screen.line(f"\n{KEY}")
    screen.block(accuracy_table(entries))
    screen.line(f"\n{KEY_GAIN}")
    screen.block(gain_table(entries[:-1]))
    return summary(entries)
