"""Part 1: which regularizer helps an over-large network on few digits, and does each do what it is meant to?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from digits_mlp import HIDDEN, NEAR_ZERO, NOISE, STEPS, TEST, TRAIN, VALIDATION
from digits_study import FEW, GRID, SEEDS, train_all, train_few
from show import Screen, table
from trials import Entry, difference, interval

MEASURES = {"half_off": "half off", "noisy": "noisy", "weight_norm": "norm", "near_zero": "near zero"}
MEANT = dict(zip(GRID, MEASURES, strict=True))  # what each regularizer is for
SETUP = (
    f"A 64-{HIDDEN}-{HIDDEN}-10 network learns {TRAIN} of scikit-learn's digits in {STEPS} steps of Adam, as it is (\"plain\") or as "
    "graphreg.regularize(net, hidden_dropout=0.5) and the like: the names below are its keywords. {seeds} seeds each: other samples, "
    f"weights and noise. {{strengths}} on {VALIDATION} validation samples; the {TEST} test samples take no part in that."
)
KEY = (
    "test accuracy in %: mean over seeds [95 % interval]. Differences to plain are paired by seed; one whose interval contains 0 is "
    '"no effect". Of 20 such intervals one misses the truth by chance.'
)
KEY_MEANT = f"""\
half off: test accuracy in % with half of the hidden units off at random
noisy: test accuracy in % with normal noise of {NOISE:g} on the input
norm: of all weights
near zero: % of activations below {NEAR_ZERO:g} at the hidden sites
*: what the regularizer is meant to change, and the difference that it makes"""


def accuracy_table(entries: Sequence[Entry]) -> str:
    plain = entries[0]
    rows = [("", "test accuracy", "difference to plain", "verdict"), (plain.name, interval(plain.of("test")).text(".1f"), "", "")]
    for entry in entries[1:]:
        gain = difference(entry, plain, "test")
        rows.append((entry.title, interval(entry.of("test")).text(".1f"), gain.text("+.2f"), gain.verdict("better", "worse")))
    return table(rows)


def meant_table(entries: Sequence[Entry]) -> str:
    plain = entries[0]
    rows = [("", *MEASURES.values(), "change of *", "verdict")]
    for entry in entries:
        meant = MEANT.get(entry.name)
        cells = [f"{fmean(entry.of(measure)):.1f}{'*' if measure == meant else ' '}" for measure in MEASURES]
        change = difference(entry, plain, meant) if meant else None
        rows.append((entry.name, *cells, change.short("+.2f") if change else "", change.verdict("higher", "lower") if change else ""))
    return table(rows)


def summary(entries: Sequence[Entry]) -> list[str]:
    """Which regularizers moved the test accuracy, which did not, and how far each moved what it is meant to change."""
    gains = {entry.name: difference(entry, entries[0], "test") for entry in entries[1:]}
    own_measures = {entry.name: difference(entry, entries[0], MEANT[entry.name]) for entry in entries if entry.name in MEANT}
    lines = [f"digits, plain: test accuracy {fmean(entries[0].of('test')):.1f} %"]
    for kind in ("better", "no effect", "worse"):
        changes = [f"{name} {gain.mean:+.1f}" for name, gain in gains.items() if gain.verdict("better", "worse") == kind]
        lines += [f"digits, {kind}: {', '.join(changes)}"] if changes else []
    changes = [f"{name} {change.mean:+.1f}" if change.clear else f"{name} no effect" for name, change in own_measures.items()]
    return [*lines, f"digits, own measure: {', '.join(changes)}"]


def study(screen: Screen, whole: bool = True) -> list[str]:
    """Train, tell, and give the lines for the summary. ``whole``: with all seeds, choosing the strengths; else with few."""
    screen.title("1. Digits: an over-large network, few samples")
    how = "Strengths are chosen" if whole else "Strengths are those that make demo-study chose"
    screen.line(SETUP.format(seeds=len(SEEDS if whole else FEW), strengths=how))
    if whole:
        screen.line("\nvalidation accuracy in %, by strength (* chosen)\nall four: the chosen ones together, scaled")
    entries = train_all(screen) if whole else train_few(screen)
    screen.line(f"\n{KEY}")
    screen.block(accuracy_table(entries))
    screen.line(f"\n{KEY_MEANT}")
    screen.block(meant_table(entries))
    return summary(entries)
