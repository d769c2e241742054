"""Callbacks and checkpoint objects for training libraries: they save noise and strengths, log the penalties, and set their scale.

``transformers.py`` and ``lightning.py`` have a callback each, ``accelerate.py`` and
``distributed_checkpoint.py`` have an object for checkpoints each, and ``parts.py`` has what they
share. Import from the file of the library that you use, such as
``from graphreg.integrations.lightning import RegularizerCallback``.
"""
