"""Writes a page of the zoo: a table for each provider, and below it the reason for each cell that is not a plain yes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zoo.columns import COLUMNS, TIMED
from zoo.run import PLACE, Record, by_reason, failure_lines, passes

FIGURES = ("parameters", "sites", "hidden", "regularize", "step time")

HEAD = """{introduction}

Each model goes through `regularize(model)`, with `example_inputs` if it needs them (`front_end="auto"`: symbolic, else export): a \
*front end* makes the graph. A model that `regularize` refuses with either one goes through \
`torch.compile(model, backend=graphreg.backend(...))`. The column *front end* shows which of the three it was.

| column | what is checked |
|---|---|
| names | every module that is called has a name, and the names are those of torchvision (`get_graph_node_names`, both modes). Two \
names differ from torchvision's. torchvision may give a module's path to another value; here, it names only the output of that module. \
And stochastic depth (timm's `DropPath` and the like) is one operation, as `nn.Dropout` is. "n/a": with the backend; or torchvision \
cannot trace the model, and only the first part was checked |
| step | one training step with `hidden_dropout`, `hidden_l1` and `weight_l2` together: loss and gradients are finite, and every \
parameter that has a gradient in the original has one |
| gradients | with all strengths 0 and no penalty in the loss, the same parameters have a gradient as in the original, and no element \
of a gradient differs by more than 1e-4 times the largest element of all gradients |
| eval | in eval mode the output is that of the original: "yes" means bit for bit; "1e-06" means that it differs by at most \
1e-6 times the larger of 1 and its largest absolute value, which is allowed if the front end is not the symbolic one |
| stripped | the output of the module that `strip` returns is that of the original, in eval mode, and in train mode from the same seed; \
"n/a" with the backend, which adds nothing to the model |
| zero | in train mode with all strengths 0, the output is that of the original from the same seed |
| verify | `graphreg.verify` finds no difference from the original in outputs, buffers, gradients and inputs that are written into, over \
several calls in both modes; "n/a" with the backend |
| keys | `state_dict` has the same keys, order and metadata; parameters, buffers, attributes and configuration are the model's own |
| modes | every submodule keeps its mode, even if it differs from the model's mode |
| compiled | `torch.compile(module, fullgraph=True, backend="aot_eager")` makes one graph of the rewritten module, \
and a training step has finite gradients, none of them \
missing. "Inductor": the same with Inductor, for a sample of the models. "n graphs": the number of graphs of the backend. "n/a": \
torch.compile cannot compile the original either |

*Sites* is the number of named values, *hidden* the number of hidden values, those that one layer with weights passes to the next: \
dropout and noise act there by default. *Regularize* is the time that `regularize` takes; *traces* is the part of this time that is spent \
in tracing (symbolic) or in the two calls of `torch.export.export` (export). With the backend, *regularize* is the time of the \
first call. *Step time* is the time of forward and backward, without and with the three regularizers. It is \
a median of {timed}, in eager, on one thread of a machine that ran two models at once. It is a rough figure, and at such sizes mostly the \
overhead of calling operators. Before each forward, the buffers are restored and the random generators are seeded. KV caches of \
attention are not compared, because graphreg switches them off.

{left}{versions}. {passing} of {all} models pass every column ({share:.1%}). {bare} \
Front ends: {ways}.
"""


def page(names: Mapping[str, str], records: Mapping[str, Record], skipped: Mapping[str, Mapping[str, str]], introduction: str) -> str:
    """The whole text: ``names`` in order, each with the family it stands for, the record of each, and by provider what was passed over.

    ``introduction``: what the models are; a provider's name in braces stands for the number of its models.
    """
    ran = {name: records[name] for name in names if name in records}
    left, passing = [name for name in names if name not in ran], sum(map(passes, ran.values()))
    versions = ", ".join(f"{what} {version}" for what, version in next(iter(ran.values()))["versions"].items())
    counts = Counter(name.partition("/")[0] for name in names)
    ways = Counter(record.get("figures", {}).get("front end", "none") for record in ran.values())
    bare = [name for name in ran if ran[name].get("ours") is False]
    head = HEAD.format(
        timed=TIMED, versions=versions[0].upper() + versions[1:], passing=passing, all=len(ran), share=passing / len(ran),
        left=f"**{len(left)} of the zoo's {len(names)} models have not been tried yet.** " * bool(left),
        introduction=introduction.strip().format(**counts), ways=", ".join(f"{way} {count}" for way, count in ways.most_common()),
        bare=f"{len(bare)} failed with an error that graphreg does not raise itself: {', '.join(bare)}." if bare
        else "Every model that does not run is refused by an error of graphreg's own.",
    )  # fmt: skip
    parts = [head]
    for provider in dict.fromkeys(name.partition("/")[0] for name in names):
        own = [name for name in ran if name.startswith(f"{provider}/")]
        parts.append(f"## {provider}\n")
        if own:
            bare = [bool(figures["bare"]) for figures in (ran[n].get("figures", {}) for n in own) if "bare" in figures]
            whole = ", some of them with opaque modules, which are called as a whole"
            without = f" {sum(bare)} of {len(bare)} can be traced without inputs{whole}." if bare else ""
            parts.append(f"{sum(passes(ran[n]) for n in own)} of {len(own)} pass every column.{without}\n")
            parts.append(table(own, names, ran) + "\n")
            parts += remarks(own, ran)
        waiting = ", ".join(_bare(name) for name in left if name.startswith(f"{provider}/"))
        parts += _lists({"Not tried yet:": [waiting] * bool(waiting)})
        parts += _lists({"Left out, and why:": [f"{what}: {why}" for what, why in skipped.get(provider, {}).items()]})
    return PLACE.sub("", "\n".join(parts))


def table(own: Iterable[str], names: Mapping[str, str], records: Mapping[str, Record]) -> str:
    families = any(names[name] for name in own)
    head = ["model", *(["family"] if families else []), "input", "front end", *COLUMNS, *FIGURES]
    lines = [_row(head), "|---" * len(head) + "|"]
    for name in own:
        record, bare = records[name], name.partition("/")[2]
        lines.append(_row([bare, *([names[name]] if families else []), *_cells(record)]))
    return "\n".join(lines)


def _cells(record: Record) -> list[str]:
    if "error" in record:
        return ["refused", *[""] * (len(COLUMNS) + len(FIGURES) + 1)]
    answers = [record["columns"][name]["cell"] for name in COLUMNS]
    return [", ".join(record["inputs"]), record["figures"].get("front end", ""), *answers, *_figures(record["figures"])]


def _figures(figures: Mapping[str, Any]) -> list[str]:
    if "missing" in figures:
        return [""] * len(FIGURES)
    times = f"{figures['plain step'] * 1e3:.0f}, {figures['step'] * 1e3:.0f} ms"
    traces = f", traces {figures['traces']:.2f} s" if figures["traces"] else ""
    count = f"{figures['parameters'] / 1e6:.1f} M" if figures["parameters"] >= 1e5 else f"{figures['parameters'] / 1e3:.1f} k"
    return [count, str(figures["sites"]), str(figures["hidden"]), f"{figures['regularize']:.2f} s{traces}", times]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def remarks(own: Iterable[str], records: Mapping[str, Record]) -> list[str]:
    """Why something failed, what torchvision cannot trace, and which modules are opaque; each a list, where there is any."""
    failed = [f"{_bare(n)}, {line}" for n in own for line in failure_lines(records[n])]
    ran = {_bare(n): records[n] for n in own if "error" not in records[n]}
    noted = [f"{n}: {a['remark']}" for n, r in ran.items() for a in r["columns"].values() if a["passed"] and a["remark"]]
    refused = [f"{n}: {r['figures']['refused']}" for n, r in ran.items() if r["figures"].get("refused")]
    whole = [f"{n}: {_grouped(r['figures']['kept whole'])}" for n, r in ran.items() if r["figures"].get("kept whole")]
    shown = ", ".join(n for n, r in ran.items() if r["figures"].get("examples"))
    named = [f"{n}: {key} on `{on}`" for n, r in ran.items() for key, on in r["figures"].get("named", {}).items()]
    lists = {
        "What failed, and why:": failed,
        "Not checked, and why:": noted,
        "Run through the backend, because `regularize` refuses it:": refused,
        "Traced with `example_inputs`, because without them a module becomes opaque, the model cannot be traced, or the graph does not "
        "take these inputs:": [shown] * bool(shown),
        "Given a selector, because all hidden values are outputs of norms, where a penalty on values has no default site:": named,
        "Opaque modules, and why:": whole,
    }
    return _lists(lists)


def _lists(lists: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n" for title, lines in lists.items() if lines]


def _grouped(leaves: Mapping[str, str]) -> str:
    """Modules with one reason together: the first of them, and how many."""
    groups = by_reason(leaves)
    return "; ".join(f"{p[0]}{f' and {len(p) - 1} more' if len(p) > 1 else ''} ({reason})" for reason, p in groups.items())


def _bare(name: str) -> str:
    return name.partition("/")[2]
