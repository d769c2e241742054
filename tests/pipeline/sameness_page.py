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

HEAD = """# Where masks are the same

`make sweep` tests whether a rewritten module applies exactly the masks that its noise prescribes, in forward and backward, for every \
combination of the settings below. A combination is called a cell. The command also writes this page.

| axis | values |
|---|---|
{axes}

The forms of activation checkpointing:

{checkpointing}

In each cell one net does two calls, each with forward and backward. With "one size", both batches have {one} examples. With "two \
sizes", the batches have {two} examples, and the batch axis is marked dynamic. Compiled cells use `fullgraph=True`. The net has four \
branches:

- `BernoulliDropout` after a sigmoid; compiled code recomputes this splice in backward;
- `GaussianNoise`;
- the model's own `nn.Dropout`, with `own_dropout="seeded"`;
- `BernoulliDropout` on an input of the model.

The input of the last branch is passed in the cell's layout. In the other branches the model converts the value to that layout.

The results are compared with an oracle (`tests/pipeline/sameness_hand.py`), which computes in float64 with its own code. From graphreg \
it takes only the numbers of the streams, which `rng_state` returns. It compares

- three masks, bit for bit: the mask that the forward applied, the mask in the value that backward read, and the mask that backward \
multiplied by;
- each element of the outputs, and of the gradients of the inputs, to eight roundings of the dtype; this includes the normal draws;
- the gradient of each parameter, to eight roundings of the sum of the absolute values of its terms.

All backends are compared with the same oracle, so backends that pass also agree with each other. Cells for which AOTAutograd makes the \
same graph share the code that Inductor compiled for it.

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
    """Return the whole text. The page says of a row without a record that it was not run."""
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
