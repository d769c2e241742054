"""Shows how graphreg changed a model: a report with costs, a diff of the emitted Python, and a monitor of values in training.

Open ``report.py`` first: it defines ``graphreg.report``. ``records.py`` defines the records of a
report and prints them as tables. ``entries.py`` makes these records.
"""

from graphreg.reporting.diff import Diff, diff
from graphreg.reporting.entries import acted, entry, native_dropout_rows
from graphreg.reporting.monitor import Monitor, monitor
from graphreg.reporting.records import Report
from graphreg.reporting.report import report

__all__ = [
    "Diff", "Monitor", "Report", "acted", "diff", "entry", "monitor", "native_dropout_rows", "report",
]  # fmt: skip
