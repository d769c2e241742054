"""The page that is published: one table a provider, and below it the reason of everything that is not a plain yes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo.columns import COLUMNS, TIMED
from zoo.run import Record, by_reason, passes, told

HEAD = """# Models

What `make zoo` found: graphreg on models it was not written for, with random weights, at the smallest input that the model takes
in both modes. All builders of torchvision for classification, segmentation and video are here (quantized ones apart), and of
timm one architecture a family: a family is a module of `timm.models` (`timm.list_modules()`), the sixty are the first in
alphabetical order, and its architecture is the one that the module registers first.

| column | holds |
|---|---|
| names | the names are torchvision's (`get_graph_node_names`, both modes; "n/a" where that cannot trace the model), save that a module's \
own path is always that module's; every module that is called has a name |
| step | one training step with `hidden_dropout`, `hidden_l1` and `weight_l2` at once: loss and gradients are finite, and every \
parameter that has a gradient in the original has one |
| eval | the rewritten module in eval mode gives the original's output, bit for bit |
| stripped | so does `strip`, in eval mode, and in train mode from the same seed |
| zero | so does the rewritten module in train mode with all strengths 0, from the same seed |
| keys | `state_dict` has the same keys, order and metadata; parameters, buffers and attributes are the model's own |
| modes | every submodule keeps its mode, one that was set apart too |

*Sites* are the named values, *hidden* those that regularizers act on by default. *Regularize* is the time of that call, *step* the time
of forward and backward of the input shown without and with the three regularizers (median of {timed}, eager, one thread of a machine
that ran two models at once: a rough figure, and at such sizes mostly the price of launching kernels).

{versions}. {passing} of {all} models pass every column.
"""


def page(names: Mapping[str, str], records: Mapping[str, Record]) -> str:
    """The whole text: ``names`` in order, each with the family it stands for, and the record of each."""
    passing = sum(passes(records[name]) for name in names)
    versions = ", ".join(f"{what} {version}" for what, version in next(iter(records.values()))["versions"].items())
    parts = [HEAD.format(timed=TIMED, versions=versions[0].upper() + versions[1:], passing=passing, all=len(names))]
    for provider in dict.fromkeys(name.partition("/")[0] for name in names):
        own = [name for name in names if name.startswith(f"{provider}/")]
        parts.append(f"## {provider}\n")
        parts.append(f"{sum(passes(records[n]) for n in own)} of {len(own)} pass every column.\n")
        parts.append(table(own, names, records) + "\n")
        parts += remarks(own, records)
    return "\n".join(parts)


def table(own: Iterable[str], names: Mapping[str, str], records: Mapping[str, Record]) -> str:
    families = any(names[name] for name in own)
    head = ["model", *(["family"] if families else []), "input", *COLUMNS, "parameters", "sites", "hidden", "regularize", "step"]
    lines = [_row(head), "|---" * len(head) + "|"]
    for name in own:
        record, bare = records[name], name.partition("/")[2]
        lines.append(_row([bare, *([names[name]] if families else []), *_cells(record)]))
    return "\n".join(lines)


def _cells(record: Record) -> list[str]:
    if "error" in record:
        return ["does not run", *[""] * (len(COLUMNS) + 5)]
    answers = [_answer(record["columns"][name]) for name in COLUMNS]
    return [", ".join(record["inputs"]), *answers, *_figures(record["figures"])]


def _answer(answer: Mapping[str, object]) -> str:
    return ("n/a" if answer["remark"] else "yes") if answer["passed"] else "**no**"


def _figures(figures: Mapping[str, float]) -> list[str]:
    if "missing" in figures:
        return [""] * 5
    times = f"{figures['plain step'] * 1e3:.0f}, {figures['step'] * 1e3:.0f} ms"
    millions = f"{figures['parameters'] / 1e6:.1f} M"
    return [millions, str(figures["sites"]), str(figures["hidden"]), f"{figures['regularize']:.2f} s", times]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def remarks(own: Iterable[str], records: Mapping[str, Record]) -> list[str]:
    """Why something failed, what torchvision cannot trace, and what is kept whole; each a list, where there is any."""
    failed = [f"{_bare(n)}, {line}" for n in own for line in told(records[n])]
    ran = {_bare(n): records[n] for n in own if "error" not in records[n]}
    noted = [f"{n}: {a['remark']}" for n, r in ran.items() for a in r["columns"].values() if a["passed"] and a["remark"]]
    whole = [f"{n}: {_grouped(r['figures']['kept whole'])}" for n, r in ran.items() if r["figures"].get("kept whole")]
    shown = ", ".join(n for n, r in ran.items() if r["figures"].get("examples"))
    lists = {
        "What failed, and why:": failed,
        "No names to compare with:": noted,
        "Traced with `example_inputs`, without which a decision on a shape keeps a module whole or refuses the model:": [shown]
        * bool(shown),
        "Modules kept whole, with the reason:": whole,
    }
    return [f"{title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n" for title, lines in lists.items() if lines]


def _grouped(leaves: Mapping[str, str]) -> str:
    """Modules with one reason together: the first of them, and how many."""
    groups = by_reason(leaves)
    return "; ".join(f"{p[0]}{f' and {len(p) - 1} more' if len(p) > 1 else ''} ({reason})" for reason, p in groups.items())


def _bare(name: str) -> str:
    return name.partition("/")[2]
