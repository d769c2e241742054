"""The page docs/study.md, written from the protocol and the results."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from study.arms import ALLOWED, ARMS, PLACES, SEEDS, TUNING, Arm, plain
from study.claims import CHANGES, CLAIMS, CLOSE, NOT_TESTED, Check, Claim
from study.run import validation, written
from study.setups import MEASURES, SETUPS
from study.verdicts import Found, Records, found, ready

HEAD = """# Do the regularizers show what their papers claim?

This page tests {count} claims about {classes} regularizers on the small data sets that scikit-learn's wheel contains. The comparisons, \
the networks, the grids of strengths and the rules were fixed and committed before any of them was run. Some comparisons were added \
later, when the results of the others were known. [The protocol](#the-protocol) below has the details.

A claim that is not shown here is not refuted: networks and data are far smaller than those of the papers. And a claim that is shown \
here is shown for this network and these data alone.
"""

READING = """An *arm* is a network with regularizers in it, or without any (its *control*, called `nothing`). `few: dropout` is the \
network `few` with dropout. [The networks](#the-networks) and [the arms](#the-arms) are listed below. A *check* compares a measure of two \
arms, or of an arm and a fixed number. A claim is *shown* if all its checks hold.
"""

COLUMNS = """Each row of the table is a check. *With* is the mean of [the measure](#the-measures) over {seeds} seeds with the regularizer, \
at the strength that was chosen for it. The next column has what it is compared with: a number, the mean of the same measure of another \
arm, or the mean of another measure (`pruned of few: nothing` is the measure *pruned* of that arm). *Check* says which difference the \
claim asks for, and whether it was found: *higher* and *lower* hold if the whole interval lies on this side of 0, and *no worse* holds if \
the interval excludes a loss of {allowed:g} point or more.
"""

PROTOCOL = """## The protocol

- **Pairs.** A regularized network and its control have the same training rows, initial weights and batches for each of {seeds} seeds, and \
as many steps. A difference is taken seed by seed.
- **Intervals.** In brackets: the 95 % interval of the mean difference, by Student's t over the {seeds} seeds. A check holds if the whole \
interval lies on the claimed side of 0. "No worse" holds if the whole interval lies above {lowest:g} points.
- **Shown.** A claim is shown if all its checks hold. The intervals are not corrected for the number of checks: if no claim were true, one \
or two of all checks would still be expected to hold by chance.
- **Test rows.** The test rows are the same for all seeds: 1,000 digits, 200 patients of the diabetes data, 200 of the breast cancer data. \
No strength is chosen on them. The intervals show the effect of other training rows, initial weights, batches and noise, but not of other \
test rows.
- **Strengths.** The strengths that an arm may have, its *grid*, were fixed beforehand. Each was trained with {tuning} other seeds, and \
its score is the mean accuracy on validation rows (for the regression, R²). The rule *best* takes the strength with the highest score, and \
the weaker of two with equal scores. The rule *strongest* is for claims about a property that should cost little accuracy: it takes the \
greatest strength whose score is at most {allowed:g} point below the control's, or the smallest strength if there is none. If a check \
compares an arm with another regularizer, the strength of this one was chosen by the same rules.
- **Before.** Before the protocol was committed, only the controls were trained to the end, with one other seed, to choose the numbers of \
steps. Every arm with a regularizer was trained for three steps (in the network `chain`, 60), to see that it runs.
- **Training.** All networks are trained by Adam without weight decay. The learning rate falls linearly to 0. The parameters of `L0Gates` \
and `ConcreteDropout` have ten times the learning rate.
"""

ADDED = """\
- **Added later.** The claims on the [places of dropout](#places-of-dropout) and the networks `resnet` and `wide` were added in December \
2026, when the results of all other claims were known. They, too, were committed before any of their arms with dropout was run. But the \
controls `resnet: nothing` and `wide: nothing` had been trained before with seed 7, which is one of the ten seeds.
- **Two processors.** The control of `deep` was measured in the first run, in November. The arms of `deep` that were added in December ran \
on another processor, which rounds differently. On that processor, the control has a mean accuracy of 91.76 instead of 91.82. Compared \
with this mean, `deep: dropout, classifier` would just be shown (difference 0.02 to 0.56). No other verdict on places would change.
"""

WHERE = """## Places of dropout

graphreg *marks* the hidden values at which dropout is known to do harm: a value that feeds a batch norm has the mark `#normed`, and a \
value on the trunk of residual blocks has the mark `#trunk`. [Where should dropout act?](where.md) advises against dropout at marked \
values. Three networks of this page are residual: `resnet` and `wide` have batch norm, `deep` has layer norm. In each, dropout acts at all \
hidden values, at the hidden values without a mark (the selector `["!#normed", "!#trunk"]`), or at the classifier's input alone. If two of \
these are the same values, the table has them once.

The columns with a rate show what dropout of this rate does: the accuracy on validation rows, in %, averaged over {tuning} seeds. The rate \
with the highest accuracy was chosen. For the chosen rate, the last columns have the accuracy on test rows, in %, averaged over {seeds} \
other seeds. [Where should dropout act?](where.md#on-data) says what follows from the table.
"""

ENDS = """The chosen strength is bold. If it is the first or the last of its grid, a strength outside of the grid might do better; but the \
grids were not changed after the runs.
"""

RUN = """## Run it

```sh
make study
```

The command takes about {minutes} minutes on one core, and writes this page and its data, `docs/study.json`. If you stop it, give it again \
to continue. `make study ARGS="--only 'few: *'"` runs only the arms with these names, and the arms that they need; `make study \
ARGS=--fresh` runs all arms again. Processors round differently, so your numbers may differ slightly from those of this page.
"""


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def number(value: float) -> str:
    """Four digits at most."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def page(records: Records) -> str:
    """The page of what has run."""
    ran = [(claim, [found(records, claim, check) for check in claim.checks]) for claim in CLAIMS if ready(records, claim)]
    classes = len({claim.regularizer for claim in CLAIMS})
    seconds = sum(run["seconds"] for record in records.values() for runs in record["runs"].values() for run in runs.values())
    settings = {"seeds": len(SEEDS), "tuning": len(TUNING), "lowest": -CLOSE, "allowed": ALLOWED}
    return "\n".join([
        HEAD.format(count=len(CLAIMS), classes=classes),
        *results(records, ran),
        *places(records),
        PROTOCOL.format(**settings) + ADDED,
        *changes(), *claims(), *arms(records), *networks(), *measures(), *not_tested(),
        RUN.format(minutes=round(seconds / 60) or "fifteen"),
    ])  # fmt: skip


def results(records: Records, ran: list[tuple[Claim, list[Found]]]) -> list[str]:
    """The verdicts, then one line for each claim that is not shown."""
    if not ran:
        return ["Nothing has run yet.\n"]
    lines = [
        "## Results\n", READING, *summary(ran), *measured(records), COLUMNS.format(seeds=len(SEEDS), allowed=CLOSE),
        row("regularizer (arm)", "strength", "measure", "with", "compared with", "difference [95 % interval]", "check", "claim"),
        "|" + "---|" * 8,
    ]  # fmt: skip
    for claim, checks in ran:
        verdict = "**shown**" if all(each.holds for each in checks) else "not shown"
        strength = written(records[claim.arm]["chosen"])
        for place, each in enumerate(checks):
            head = (f"`{claim.regularizer}` ({claim.arm})", strength) if not place else ("", "")
            effect = f"{number(each.effect)} [{number(each.low)}, {number(each.high)}]"
            told = f"{number(each.against)} ({opponent(each.check)})"
            outcome = f"{'no worse' if each.check.margin else each.check.better}: {'holds' if each.holds else 'fails'}"
            lines.append(row(*head, each.check.measure, number(each.value), told, effect, outcome, "" if place else verdict))
    failures = {claim: [seen(each) for each in checks if not each.holds] for claim, checks in ran}
    sentences = [f"- `{claim.regularizer}` ({claim.arm}): {'; '.join(each)}." for claim, each in failures.items() if each]
    return [*lines, "\n## The claims that are not shown\n", *(sentences or ["None."]), ""]


def measured(records: Records) -> list[str]:
    """With which versions, on which processor and when each arm was measured; the most frequent of these comes last."""
    groups: dict[str, list[str]] = {}
    for name, record in records.items():
        groups.setdefault(record["measured"], []).append(name)
    *few, most = sorted(groups, key=lambda text: len(groups[text]))
    if not few:
        return [f"Measured with {most}.\n"]

    lines = ["The arms were measured in several runs:\n"]
    for text in few:
        others = {ARMS[name].setup for name in records if name not in groups[text]}
        whole = [setup for setup in SETUPS if setup not in others and any(ARMS[name].setup == setup for name in groups[text])]
        rest = [f"`{name}`" for name in groups[text] if ARMS[name].setup not in whole]
        lines.append(f"- {', '.join([*(f'all arms of `{setup}`' for setup in whole), *rest])}: {text}")
    return [*lines, f"- all other arms: {most}\n"]


def places(records: Records) -> list[str]:
    """Dropout at several places of the residual networks: at each rate, and as it was chosen."""
    ran = [claim for claim in CLAIMS if claim.arm in PLACES and ready(records, claim)]
    if not ran:
        return []
    rates = ARMS[ran[0].arm].grid
    head = row(
        "network", "dropout at", "number of values", *(f"rate {written(rate)}" for rate in rates), "chosen rate", "test accuracy",
        "test accuracy without dropout", "difference [95 % interval]",
    )  # fmt: skip
    lines = [WHERE.format(tuning=len(TUNING), seeds=len(SEEDS)), head, "|" + "---|" * (len(rates) + 7)]
    for claim in ran:
        setup, record, (count, where) = ARMS[claim.arm].setup, records[claim.arm], PLACES[claim.arm]
        each = found(records, claim, Check("accuracy", "higher", plain(setup)))
        scores = (f"{validation(record['runs'][written(rate)]):.1f}" for rate in rates)
        effect = f"{number(each.effect)} [{number(each.low)}, {number(each.high)}]"
        lines.append(row(setup, where, count, *scores, written(record["chosen"]), number(each.value), number(each.against), effect))
    return [*lines, ""]


def summary(ran: list[tuple[Claim, list[Found]]]) -> list[str]:
    """Which claims are shown, which are not, and for which of these the contrary is seen."""
    shown = [claim for claim, checks in ran if all(each.holds for each in checks)]
    contrary = [claim for claim, checks in ran if any(each.opposite and not each.holds for each in checks)]
    unclear = [claim for claim, _ in ran if claim not in shown and claim not in contrary]
    return [
        f"**{len(shown)} of {len(ran)} claims are shown**: {names(shown)}.\n",
        f"{len(contrary)} claims are not shown, and at least one check that fails has its whole 95 % interval on the wrong side of 0. "
        f"These are {names(contrary)}.\n",
        f"{len(unclear)} claims are not shown, and no check that fails has its whole interval on the wrong side of 0: {names(unclear)}.\n",
    ]


def names(claims: list[Claim]) -> str:
    return ", ".join(f"`{claim.regularizer}` ({claim.arm})" for claim in claims) or "none"


def opponent(check: Check) -> str:
    """What is compared with, and which of its measures where it is another one."""
    return f"{check.other} of " * bool(check.other) + (check.than if isinstance(check.than, str) else "a fixed number")


def seen(each: Found) -> str:
    """A sentence that says what is seen where a check fails."""
    check = each.check
    against = f"against {number(each.against)} ({opponent(check)})"
    if not isinstance(check.than, str):
        why = f"{check.better} was claimed"
    elif check.margin:
        why = f"a loss of {check.margin:g} point or more is not excluded"
    elif each.opposite:
        why = "the opposite of the claim"
    else:
        why = f"no clear difference, {check.better} was claimed"
    return f"{check.measure} {number(each.value)} {against}, difference {number(each.low)} to {number(each.high)}: {why}"


def changes() -> list[str]:
    head = "### Changed after results were seen\n"
    return [head, *(f"- {change}" for change in CHANGES), ""] if CHANGES else [head, "Nothing.\n"]


def claims() -> list[str]:
    lines = [row("regularizer (arm)", "paper", "what it claims", "checks"), "|---|---|---|---|"]
    for claim in CLAIMS:
        checks = "; ".join(map(asked, claim.checks))
        lines.append(row(f"`{claim.regularizer}` ({claim.arm})", claim.source, claim.says, checks))
    return ["### The claims\n", *lines, ""]


def asked(check: Check) -> str:
    if check.margin:
        return f"{check.measure} no worse than {opponent(check)}"
    than = opponent(check) if isinstance(check.than, str) else f"{check.than:g}"
    return f"{check.measure} {check.better} than {than}"


def arms(records: Records) -> list[str]:
    """The arms with their grids, and the mean validation score of each strength."""
    head = row("arm", "keywords of `regularize`, with the strength s", "rule for s", "validation score of each strength")
    lines = [head, "|---|---|---|---|"]
    lines += [row(arm.name, keywords(arm), arm.rule or "none", grid(arm, records.get(arm.name, {}))) for arm in ARMS.values()]
    return ["### The arms\n", ENDS, *lines, ""]


def keywords(arm: Arm) -> str:
    """The keywords as the page has them. ``Arm.text`` has them, too, but is part of the digest, and must stay as it is."""
    own = ", ".join(f"{key}={value!r}" for key, value in arm.keywords.items()).replace("'weight': ", "'strength': ")
    return (f"`{own}`" if own else "no regularizer") + f", together with `{arm.base}` at its chosen strength" * bool(arm.base)


def grid(arm: Arm, record: Mapping[str, Any]) -> str:
    told = []
    for strength in arm.grid or (None,):
        runs = record.get("runs", {}).get(written(strength), {})
        score = f"{fmean(runs[str(seed)]['validation'] for seed in TUNING):.1f}" if all(str(seed) in runs for seed in TUNING) else "not run"
        text = f"{written(strength)}: {score}" if arm.grid else score
        told.append(f"**{text}**" if arm.grid and strength == record.get("chosen") else text)
    return ", ".join(told)


def networks() -> list[str]:
    lines = [row(name, " ".join((setup.__doc__ or "").split())) for name, setup in SETUPS.items()]
    return ["### The networks\n", row("name", "network, data and training"), "|---|---|", *lines, ""]


def measures() -> list[str]:
    used = {name for claim in CLAIMS for check in claim.checks for name in (check.measure, check.other)}
    lines = [row(name, text if name in used else f"{text} (measured, but no check uses it)") for name, text in MEASURES.items()]
    return ["### The measures\n", row("name", "meaning"), "|---|---|", *lines, ""]


def not_tested() -> list[str]:
    return ["### Not tested\n", row("regularizer", "why"), "|---|---|", *(row(f"{name}", why) for name, why in NOT_TESTED.items()), ""]
