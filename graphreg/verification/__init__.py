"""Checks that a rewritten module computes what the user's model computes, by running copies of both and comparing every value.

Open ``verify.py`` first: it decides what to run and what to compare. ``state.py`` compares the
parameters and buffers of two models, and ``gradients.py`` their gradients during a backward pass.
``rounding.py`` tells whether two gradients differ by rounding alone, and ``copies.py`` copies
models. ``shared_parameters.py`` lets the copies share one set of parameters. Values are compared by
functions of ``tracing/proof/``.
"""
