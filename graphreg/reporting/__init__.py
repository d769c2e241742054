"""Shows how graphreg changed a model: a report with costs, a diff of the emitted Python, and a monitor of values in training.

Open ``report.py`` first: it defines ``graphreg.report``. ``records.py`` defines the records of a
report and prints them as tables. ``entries.py`` makes these records.
"""
