"""Regularizes a model in place: it stays the object that it is, and runs a rewritten graph in train mode.

``in_place.py`` has the public functions. The model gets a generated subclass of its class (``placed_class.py``) and a state
(``placed.py``), which traces a graph for each structure of arguments (``calls.py``, ``structure.py``) and notices when one is stale
(``fingerprint.py``).
"""

from graphreg.in_place.in_place import regularize_, strip_

__all__ = ["regularize_", "strip_"]
