"""``graphreg.doctor``: tests whether compiled code draws the right masks under the present settings of torch.

Open ``doctor.py`` first. ``probes.py`` defines the experiments, which compile tiny functions that draw; ``bisect.py`` runs them and finds
the settings to blame; ``step_watch.py`` watches one training step; ``findings.py`` defines the records and their text. Without a module,
``doctor`` tests the installed torch: ``torch_check.py`` starts the process in which ``torch_parts.py`` does that.
"""

from graphreg.diagnosis.doctor import doctor
from graphreg.diagnosis.findings import Diagnosis, Finding

__all__ = [
    "Diagnosis", "Finding", "doctor",
]  # fmt: skip
