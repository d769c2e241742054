"""``make rivals``: measures every cell of the table in docs/randomness.md, and fails where the page says another thing."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

from rivals.rows import COLUMNS, PAGE, ROWS, found, said

PACKAGES = ("torch", "keras", "jax", "flax")


def main() -> int:
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))
    page, wrong = said(PAGE.read_text()), 0
    for column, module in COLUMNS.items():
        print(column)
        for row, verdict in found(importlib.import_module(f"rivals.{module}").PROBES).items():
            differs = page[column][row] != verdict
            wrong += differs
            print(f"  {ROWS[row]}: {verdict}{f'; the page says {page[column][row]!r}' if differs else ''}", flush=True)
    print(f"{wrong} cells of {PAGE.name} are wrong" if wrong else f"{PAGE.name} says the same")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
