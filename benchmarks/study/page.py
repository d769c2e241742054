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
the networks, the grids of strengths and the rules were fixed and committed before any of them was run; \
[the protocol](#the-protocol) is below.

A claim that is not shown here is not refuted: networks and data are far smaller than those of the papers. And a claim that is shown \
here is shown for this network and these data alone.
"""

PROTOCOL = """## The protocol

- **Pairs.** A regularized network and its control have the same training rows, initial weights and batches for each of {seeds} seeds, and \
as many steps. A difference is taken seed by seed.
- **Intervals.** In brackets: the 95 % interval of the mean difference, by Student's t over the {seeds} seeds. A check holds if the whole \
interval lies on the claimed side of 0. "No worse" holds if the whole interval lies above {lowest:g} points.
- **Shown.** A claim is shown if all its checks hold. Nothing corrects for the number of claims: if none of them were true, one or two of \
all single checks would be expected to hold by chance.
- **Test rows.** They are the same for all seeds (1,000 digits, 200 patients of the diabetes data, 200 of the breast cancer data), so that \
no strength is chosen on them. So the intervals show the effect of other training rows, initial weights, batches and noise, but \
not of other test rows.
- **Strengths** come from a grid that was fixed beforehand, by the score on validation rows, averaged over {tuning} other seeds. The rule \
*best* takes the strength with the highest score, and the weaker of two with equal scores. The rule *strongest* is for claims about a \
property that should cost little: it takes the greatest strength whose score is at most {allowed:g} point below the control's, or the \
smallest strength if there is none. Rivals are chosen from grids by the same rules. The score is accuracy; for the regression it is R².
- **Before.** Before the protocol was committed, only the controls were trained to the end, on one other seed, to set the numbers of \
steps. Every arm with a regularizer took three steps (in chain, 60), to see that it runs.
- **Training.** Adam without weight decay; the rate falls to 0 in a straight line. The parameters of `L0Gates` and `ConcreteDropout` \
have ten times the rate.
"""

ADDED = """\
- **Added later.** The claims on the [places of dropout](#places-of-dropout) and the networks `resnet` and `wide` came in December 2026, \
when the results of all others were known. They, too, were committed before any of their arms was run. Their controls had been trained \
before on seed 7, which is one of the ten. The control of `deep` is the one of the first run, in November, whose processor rounds \
differently. Trained again on the processor of the new arms, it had a mean of 91.76 in place of 91.82, and `deep: dropout, classifier` \
would just be shown (0.02 to 0.56). No other verdict on places would change.
"""

WHERE = """## Places of dropout

[Where should dropout act?](where.md) advises against dropout at hidden values that feed a batch norm (`#normed`) or lie on the trunk of \
residual blocks (`#trunk`). Three networks of this page are residual: `resnet` and `wide` have batch norm, `deep` has layer norm. \
Dropout acts at all their hidden values, at those without a mark (the selector `["!#normed", "!#trunk"]`), or at the classifier's input \
alone. If two of these places are the same, the table has them once.

The columns with a rate have the mean validation accuracy of {tuning} seeds, in %: what the places do at the same rate. The rate with the \
highest accuracy was chosen. For this rate, the last columns have the mean test accuracy of {seeds} other seeds, in %. \
[Where should dropout act?](where.md#on-data) says what follows.
"""

ENDS = """The strength that was chosen is bold. Where it is the first or the last of its grid, one outside the grid might do better; the \
grids stay as they were fixed.
"""

RUN = """## Run it

```sh
make study
```

It takes about {minutes} minutes of one core, goes on where it was stopped, and writes this page and its data, `docs/study.json`. \
`make study ARGS="--only 'few: *'"` runs some arms, `ARGS=--fresh` all of them again. Other processors round differently, so that runs \
differ slightly from those of this page.
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
        "## Results\n", *summary(ran), f"Measured with {'; '.join(sorted({record['measured'] for record in records.values()}))}.\n",
        row("regularizer", "strength", "measure", "with", "against", "difference [95 %]", "check", "claim"), "|" + "---|" * 8,
    ]  # fmt: skip
    for claim, checks in ran:
        verdict = "**shown**" if all(each.holds for each in checks) else "not shown"
        strength = written(records[claim.arm]["chosen"])
        for place, each in enumerate(checks):
            head = (f"`{claim.regularizer}` ({claim.arm})", strength) if not place else ("", "")
            effect = f"{number(each.effect)} [{number(each.low)}, {number(each.high)}]"
            told = f"{number(each.against)}: {opponent(each.check)}"
            outcome = ("holds" if each.holds else "fails") + " (no worse)" * bool(each.check.margin)
            lines.append(row(*head, each.check.measure, number(each.value), told, effect, outcome, "" if place else verdict))
    failures = {claim: [seen(each) for each in checks if not each.holds] for claim, checks in ran}
    sentences = [f"- `{claim.regularizer}` ({claim.arm}): {'; '.join(each)}." for claim, each in failures.items() if each]
    return [*lines, "\n## What is not shown\n", *(sentences or ["Nothing."]), ""]


def places(records: Records) -> list[str]:
    """Dropout at several places of the residual networks: at each rate, and as it was chosen."""
    ran = [claim for claim in CLAIMS if claim.arm in PLACES and ready(records, claim)]
    if not ran:
        return []
    rates = ARMS[ran[0].arm].grid
    head = row("network", "dropout at", "values", *map(written, rates), "chosen", "test", "test, without dropout", "difference [95 %]")
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
        f"{len(contrary)} are not shown, and in at least one check the whole interval lies on the other side: {names(contrary)}.\n",
        f"{len(unclear)} are not shown, and no interval lies on the other side: {names(unclear)}.\n",
    ]


def names(claims: list[Claim]) -> str:
    return ", ".join(f"`{claim.regularizer}` ({claim.arm})" for claim in claims) or "none"


def opponent(check: Check) -> str:
    """What is compared with, and which of its measures where it is another one."""
    return (check.than if isinstance(check.than, str) else "a fixed number") + f" ({check.other})" * bool(check.other)


def seen(each: Found) -> str:
    """A sentence that says what is seen where a check fails."""
    check = each.check
    against = f"against {number(each.against)} ({opponent(check)})"
    if not isinstance(check.than, str):
        why = f"{check.better} was claimed"
    elif check.margin:
        why = f"a loss of more than {check.margin:g} is not excluded"
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
    lines = [row("arm", "keywords; s is the strength", "rule", "grid: validation score"), "|---|---|---|---|"]
    lines += [row(arm.name, f"`{arm.text}`", arm.rule or "none", grid(arm, records.get(arm.name, {}))) for arm in ARMS.values()]
    return ["### The arms\n", ENDS, *lines, ""]


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
    lines = [row(name, text) for name, text in MEASURES.items()]
    return ["### The measures\n", row("name", "meaning"), "|---|---|", *lines, ""]


def not_tested() -> list[str]:
    return ["### Not tested\n", row("regularizer", "why"), "|---|---|", *(row(f"{name}", why) for name, why in NOT_TESTED.items()), ""]
