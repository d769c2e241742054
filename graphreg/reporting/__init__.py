"""What was done, in words and numbers: the report, its costs, the emitted source and its difference, the monitor."""

from graphreg.reporting.diff import Diff, diff
from graphreg.reporting.monitor import Monitor, monitor
from graphreg.reporting.records import Report, acted, entry, own_rows
from graphreg.reporting.report import report

__all__ = [
    "Diff", "Monitor", "Report", "acted", "diff", "entry", "monitor", "own_rows", "report",
]  # fmt: skip
