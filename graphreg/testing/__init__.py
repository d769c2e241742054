"""For the tests of your own regularizers: ``check_regularizer`` checks what every regularizer must satisfy.

Open ``check.py``: it has this function, and one function for each thing that is checked. ``models.py`` has the small models on which a
regularizer is tried if its author gives none.
"""

from graphreg.testing.check import check_regularizer
from graphreg.testing.models import Example, examples

__all__ = [
    "Example", "check_regularizer", "examples",
]  # fmt: skip
