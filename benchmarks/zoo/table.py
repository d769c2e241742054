"""The page that is published: one table a provider, and below it the reason of everything that is not a plain yes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zoo.columns import COLUMNS, TIMED
from zoo.run import Record, by_reason, failure_lines, passes

PLACE = re.compile(r"(?<![\w.])/(?:[\w.-]+/)*?(?:lib/python3\.\d+/(?:site-packages/)?|(?=benchmarks/zoo/))")  # where things are installed
FIGURES = ("parameters", "sites", "hidden", "regularize", "step time")

HEAD = """# Models

What `make zoo` found: graphreg on models it was not written for, with random weights, at the smallest input that the model takes
in both modes. Where they come from:

| provider | holds |
|---|---|
| torchvision, segmentation, video, flow, detection | all builders that `torchvision.models.list_models()` gives, of detection with \
scenes of 64 x 64 (SSD resizes them itself), of optical flow with two updates in place of twelve |
| quantizable | its quantizable models in their float form (`quantize=False`), which is what is trained |
| timm | {timm} architectures: of each family the first, then of each the second, and so on; a family is a module of `timm.models` \
(`timm.list_modules()`), in alphabetical order, its architectures are in the order in which it registers them, and nothing is \
shrunk but the picture |
| transformers | the first {transformers} families (folders of `transformers.models`) in alphabetical order that have a tiny \
configuration and a forward of text, pictures or sound: the configuration's fields made small by a rule on their names \
(`benchmarks/zoo/tiny.py`), else its depths and vocabulary alone; at most 100 million parameters; `AutoModel`'s model of the first type \
that runs; the second of two texts ends in padding, for of a mask of ones transformers makes another graph than a run |
| transformer, recurrent | torch's own layers in the forms that people write |
| control | models whose forward decides, by the shapes of its inputs or by what is in them |

A model goes through `regularize(model)`; with `example_inputs` where it needs them (`front_end="auto"`: symbolic, else export); what \
neither front end takes goes through `torch.compile(model, backend=graphreg.backend(...))`. *Front end* says which.

| column | holds |
|---|---|
| names | every module that is called has a name, and the names are torchvision's (`get_graph_node_names`, both modes), save that a \
module's own path is always that module's, and that timm's `DropPath` is one operation, as `nn.Dropout` is; "n/a" through the \
backend, and, of torchvision's, where that cannot trace the model |
| step | one training step with `hidden_dropout`, `hidden_l1` and `weight_l2` at once: loss and gradients are finite, and every \
parameter that has a gradient in the original has one |
| gradients | with all strengths 0 and the loss of the output alone, the same parameters have a gradient as in the original, and it \
differs by at most 1e-4 of the largest |
| eval | in eval mode the output is the original's: "yes" is bit for bit, "1e-06" is to 1e-6 of its largest value or of 1, which \
is allowed where the front end is not the symbolic one |
| stripped | so is that of `strip`, in eval mode, and in train mode from the same seed; "n/a" through the backend, which adds nothing \
to the model |
| zero | so is that in train mode with all strengths 0, from the same seed |
| verify | `graphreg.verify` finds no difference from the original in outputs, buffers, inputs that are written into and gradients, over \
several calls in both modes; "n/a" through the backend |
| keys | `state_dict` has the same keys, order and metadata; parameters, buffers, attributes and configuration are the model's own |
| modes | every submodule keeps its mode, one that was set apart too |
| compiled | `torch.compile(fullgraph=True)` takes it as one graph (aot_eager), and a training step runs with finite gradients, none \
lost; "Inductor": that too, on a sample; "n graphs": of the backend; "n/a": it refuses the model itself |

*Sites* are the named values, *hidden* those that regularizers act on by default. *Regularize* is the time of that call, with what \
the traces (symbolic) or the two calls of `torch.export.export` (export) take of it; of the backend it is the time of the first call.
*Step time* is the time of forward and backward of the input shown without and with the three regularizers (median of {timed}, eager, one \
thread of a machine that ran two models at once: a rough figure, and at such sizes mostly the price of launching kernels). Buffers are \
put back between runs, and the generators start from the same seed. Caches of keys and values, which graphreg switches off, are \
not compared.

{left}{versions}. {passing} of {all} models pass every column ({share:.1%}). {bare} \
Front ends: {ways}.
"""


def page(names: Mapping[str, str], records: Mapping[str, Record], skipped: Mapping[str, Mapping[str, str]]) -> str:
    """The whole text: ``names`` in order, each with the family it stands for, the record of each, and by provider what was passed over."""
    ran = {name: records[name] for name in names if name in records}
    left, passing = [name for name in names if name not in ran], sum(map(passes, ran.values()))
    versions = ", ".join(f"{what} {version}" for what, version in next(iter(ran.values()))["versions"].items())
    counts = Counter(name.partition("/")[0] for name in names)
    ways = Counter(record.get("figures", {}).get("front end", "none") for record in ran.values())
    bare = [name for name in ran if ran[name].get("ours") is False]
    head = HEAD.format(
        timed=TIMED, versions=versions[0].upper() + versions[1:], passing=passing, all=len(ran), share=passing / len(ran),
        left=f"**{len(left)} of the zoo's {len(names)} models have not run.** " * bool(left),
        timm=counts["timm"], transformers=counts["transformers"], ways=", ".join(f"{way} {count}" for way, count in ways.most_common()),
        bare=f"{len(bare)} met an error that is not graphreg's own: {', '.join(bare)}." if bare else "No failure is a bare traceback.",
    )  # fmt: skip
    parts = [head]
    for provider in dict.fromkeys(name.partition("/")[0] for name in names):
        own = [name for name in ran if name.startswith(f"{provider}/")]
        parts.append(f"## {provider}\n")
        if own:
            parts.append(f"{sum(passes(ran[n]) for n in own)} of {len(own)} pass every column.\n")
            parts.append(table(own, names, ran) + "\n")
            parts += remarks(own, ran)
        waiting = ", ".join(_bare(name) for name in left if name.startswith(f"{provider}/"))
        parts += _lists({"Have not run:": [waiting] * bool(waiting)})
        parts += _lists({"Passed over, and why:": [f"{what}: {why}" for what, why in skipped.get(provider, {}).items()]})
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
        return ["does not run", *[""] * (len(COLUMNS) + len(FIGURES) + 1)]
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
        "Not asked, and why:": noted,
        "Through the backend, for neither front end takes it:": refused,
        "Traced with `example_inputs`, without which a decision on a shape makes a module opaque or refuses the model:": [shown]
        * bool(shown),
        "No hidden value but the outputs of norms, so that a penalty on values has no default site; a selector was given:": named,
        "Opaque modules, with the reason:": whole,
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
