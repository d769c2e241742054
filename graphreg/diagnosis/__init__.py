"""``graphreg.doctor``: tests whether compiled code draws the right masks under the present settings of torch.

Open ``doctor.py`` first. ``probes.py`` holds the experiments, tiny compiled functions that draw; ``bisect.py`` runs them and finds the
settings to blame; ``step_watch.py`` watches one step of the user's; ``findings.py`` holds the records and their text.
"""

from graphreg.diagnosis.doctor import doctor
from graphreg.diagnosis.findings import Diagnosis, Finding

__all__ = [
    "Diagnosis", "Finding", "doctor",
]  # fmt: skip
