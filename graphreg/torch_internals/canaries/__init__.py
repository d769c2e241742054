"""Canaries: a test of each private part of torch that graphreg uses, on a tiny example.

They define operators and functions for torch.fx, so they are imported only where they are run: by the tests, and by ``graphreg.doctor()``.
Each new function of ``torch_internals`` needs a canary; ``tests/torch_internals/test_canaries.py`` fails for one that has none.
"""

from graphreg.torch_internals.canaries import (
    autograd,
    bytecode,
    distributed,
    dtensors,
    dynamo,
    dynamo_marks,
    export,
    inductor,
    modules,
    operators,
    other_threads,
    state,
    tracing,
)
from graphreg.torch_internals.canaries.canary import CANARIES, Canary, CanaryError

__all__ = [
    "CANARIES", "Canary", "CanaryError", "autograd", "bytecode", "distributed", "dtensors", "dynamo", "dynamo_marks", "export", "inductor",
    "modules", "operators", "other_threads", "state", "tracing",
]  # fmt: skip
