"""Regularizes a model in place: the model remains the same object, and runs a rewritten graph in train mode.

``in_place.py`` has the public functions. They give the model a generated subclass of its class (``placed_class.py``) and an attribute
with a ``Placed`` object (``placed.py``). This object traces a graph for each structure of arguments (``structure.py``). Two calls have the
same structure if they pass arguments for the same parameters of the forward, with equal dtypes and numbers of dims of tensors, and equal
contents of all other arguments (``calls.py``). A graph is stale if the model has changed since the trace (``fingerprint.py``).
"""
