"""Shows how graphreg changed a model: a report with costs, a diff of the emitted Python, a monitor of values, and effects on the loss.

Open ``report.py`` first: it defines ``graphreg.report``. ``records.py`` defines the records of a
report and prints them as tables. ``entries.py`` makes these records. ``effect.py`` measures how strongly each
regularizer acts now.
"""
