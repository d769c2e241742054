"""Whether the masks of a module are right under the present settings of torch, found by trying it."""

from graphreg.diagnosis.doctor import doctor
from graphreg.diagnosis.findings import Diagnosis, Finding

__all__ = [
    "Diagnosis", "Finding", "doctor",
]  # fmt: skip
