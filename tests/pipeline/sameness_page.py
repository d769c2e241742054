"""docs/sameness.md: what the sweep of the sameness matrix found, written from the records that its tests leave."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sameness_axes import AXES, BATCHES, CHECKPOINTING, DTYPES, LEFT_OUT, Cell, product

TOP = Path(__file__).parents[2]
RECORDS, PAGE = TOP / "build" / "sameness", TOP / "docs" / "sameness.md"
Row = tuple[str, str, str]  # backend, recomputation, checkpointing
Record = Mapping[str, Any]
ROWS: list[Row] = list(dict.fromkeys((cell.backend, cell.recomputation, cell.checkpointing) for cell in product()))

HEAD = """# Sameness

What `make sweep` found: whether a rewritten module computes what its masks say, in every cell of a matrix. It wrote this page.

| axis | values |
|---|---|
{axes}

Checkpointing:

{checkpointing}

Each cell runs one net at two calls, forward and backward, compiled with `fullgraph=True`: batches of {one} ("one size"), or of {two} \
with the batch axis marked dynamic ("two sizes"). The net has a branch for each kind of draw: \
`BernoulliDropout` behind a sigmoid, where the compiled form is recomputed in backward; `GaussianNoise`; the model's own `nn.Dropout` with \
`own_dropout="seeded"`; and `BernoulliDropout` on an input that comes in the layout. The others act on \
a value that the model brings into the layout.

Compared with values worked out by hand in float64, with nothing of graphreg's but the numbers of the streams that `rng_state` gives:

- the mask that the forward applied, the mask of the value that backward read, and the mask that backward multiplied by: bit for bit;
- each output and the gradients of the inputs, element by element: within eight roundings of the dtype, normals among them;
- the gradient of each parameter: within eight roundings of the sum of the absolute values that it is a sum of.

One oracle for every backend: what agrees with it agrees with each other. Cells of which AOTAutograd makes the same graph share what
Inductor made of it.

{total} cells, {run} run, {passed} pass. torch {torch}, {date}, on a CPU.

## Cells that pass, of {each} each (layouts by batches)

"""


def name_of(row: Row) -> str:
    return "-".join(part.replace(" ", "_") for part in row)


def record(row: Row, outcomes: Mapping[Cell, str]) -> dict[str, Any]:
    """A row as it is kept: ``outcomes`` by cell, empty where it passes, else the reason."""
    return {
        "row": row, "torch": torch.__version__.partition("+")[0], "date": datetime.date.today().isoformat(),
        "dtypes": {d: [sum(c.dtype == d and not why for c, why in outcomes.items()), sum(c.dtype == d for c in outcomes)] for d in DTYPES},
        "failed": {str(cell): why for cell, why in outcomes.items() if why},
    }  # fmt: skip


def page(records: Sequence[Record]) -> str:
    """The whole text. A row without a record was not run, and is told as such."""
    found = {tuple(each["row"]): each for each in records}
    rows = [found[row] for row in ROWS if row in found]
    counts = list(itertools.chain.from_iterable(row["dtypes"].values() for row in rows))
    text = HEAD.format(
        axes="\n".join(f"| {axis} | {', '.join(f'`{value}`' for value in values)} |" for axis, values in AXES.items()),
        checkpointing="\n".join(f"- *{name}*: {what}" for name, what in CHECKPOINTING.items()),
        one=f"{BATCHES['one size'][0]}",
        two=" and ".join(map(str, BATCHES["two sizes"])),
        total=len(product()),
        run=sum(total for _, total in counts),
        passed=sum(passed for passed, _ in counts),
        each=len(product()) // len(ROWS) // len(DTYPES),
        torch=", ".join(sorted({row["torch"] for row in rows})),
        date=max(row["date"] for row in rows),
    )
    head = ["backend", "recomputation", "checkpointing", *DTYPES]
    lines = [_line(head), "|---" * len(head) + "|"]
    lines += [_line([*row, *_counts(found.get(row))]) for row in ROWS]
    failed = [f"- {cell}: {why}" for row in rows for cell, why in row["failed"].items()]
    left_out = [f"- {what}: {why}" for what, why in LEFT_OUT.items()]
    return text + "\n".join([*lines, "", "## Cells that fail\n", *(failed or ["None."]), "", "## Left out\n", *left_out, ""])


def _counts(found: Record | None) -> list[str]:
    return ["not run"] * len(DTYPES) if found is None else [f"{passed}/{total}" for passed, total in found["dtypes"].values()]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page([json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]))
