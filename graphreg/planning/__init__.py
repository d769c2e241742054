"""Decides which regularizer acts where, before anything changes: ``plan(traced, regularizers)`` returns a ``Plan`` of edits.

Nothing in this room changes a model or a graph. Open ``plan.py`` first. ``keywords.py`` turns
keywords into regularizers, ``matching.py`` finds the sites that a selector matches, and
``native_dropout.py`` decides what to do with the model's own dropout. ``dependence.py`` finds the
operations that a derivative goes through, ``depth.py`` numbers the model's blocks for a strength by
depth, and ``module_inputs.py`` finds the value that a module gets as its input. ``repeats.py``
finds values that splices act on several times in a row, ``parameter_splices.py`` finds the reads of
a parameter that a splice replaces, and ``blocks.py`` finds the modules that ``blocks=`` names.
``model_inputs.py`` checks the inputs of the model that options name, ``practically_off.py`` finds
penalties too weak to matter, and ``harms.py`` dropout and noise where they do known harm.
"""
