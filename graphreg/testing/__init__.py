"""For the tests of your own regularizers: ``check_regularizer`` checks what every regularizer must satisfy.

Open ``check.py``: it has this function, and one function for each property that ``check_regularizer`` checks. ``models.py`` has the small
models that ``check_regularizer`` uses if its caller gives no model.
"""

from graphreg.testing.check import check_regularizer

__all__ = ["check_regularizer"]
