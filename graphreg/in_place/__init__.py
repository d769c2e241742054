"""Regularizes a model in place: the model remains the same object, and runs a rewritten graph in train mode.

``in_place.py`` has the public functions. The model gets a generated subclass of its class (``placed_class.py``) and a state
(``placed.py``). The state traces a graph for each structure of arguments (``calls.py``, ``structure.py``), and notices when a graph is
stale (``fingerprint.py``).
"""

from graphreg.in_place.in_place import regularize_, strip_

__all__ = ["regularize_", "strip_"]
