"""Finds what is wrong: ``graphreg.doctor`` in the masks of compiled code, ``graphreg.audit`` in a model's own regularization.

``audit.py`` has all of ``audit``. For ``doctor``, open ``doctor.py`` first. ``probes.py`` defines the experiments, which compile tiny
functions that draw; ``bisect.py`` runs them and finds the settings to blame; ``step_watch.py`` watches one training step; ``findings.py``
defines the records and their text. Without a module, ``doctor`` tests the installed torch: ``torch_check.py`` starts the process in which
``torch_parts.py`` does that.
"""

from graphreg.diagnosis.audit import Audit, Remark, audit
from graphreg.diagnosis.doctor import doctor
from graphreg.diagnosis.findings import Diagnosis, Finding

__all__ = [
    "Audit", "Diagnosis", "Finding", "Remark", "audit", "doctor",
]  # fmt: skip
