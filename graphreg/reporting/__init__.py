"""Shows what graphreg did to a model: the report with its costs, the diff of the emitted Python, the monitor of values in training.

Open ``report.py`` first: it defines ``graphreg.report``. ``records.py`` defines the records of a report and how they are printed;
``entries.py`` makes them; ``terminal.py`` lays out tables for the screen and as HTML.
"""

from graphreg.reporting.diff import Diff, diff
from graphreg.reporting.entries import acted, entry, native_dropout_rows
from graphreg.reporting.monitor import Monitor, monitor
from graphreg.reporting.records import Report
from graphreg.reporting.report import report

__all__ = [
    "Diff", "Monitor", "Report", "acted", "diff", "entry", "monitor", "native_dropout_rows", "report",
]  # fmt: skip
