"""Finds faults: ``graphreg.doctor`` finds wrong masks in compiled code, ``graphreg.audit`` finds mistakes in a model's own dropout.

``audit.py`` has all of ``audit``. For ``doctor``, open ``doctor.py`` first. ``probes.py`` defines
the experiments, which compile tiny functions that draw random numbers. ``bisect.py`` runs the
experiments, and finds the settings of torch that cause a fault. ``step_watch.py`` watches one
training step. ``findings.py`` defines the records and their text. Without a module, ``doctor``
tests the installed torch: ``torch_check.py`` starts a process that runs ``torch_parts.py``.
"""
