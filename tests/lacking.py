"""What only newer releases of torch have: the tests of what needs it are skipped by the condition that refuses it."""

import re

import pytest
import torch

from graphreg.torch_internals.dynamo import tells_result, traces_objects
from graphreg.torch_internals.fx import defines_named_tuples

needs_result = pytest.mark.skipif(not tells_result(), reason="torch before 2.12 does not show what a compiled call returns")
NO_OBJECTS = "torch before 2.12 does not compile a loop over the attributes of an object, or a copy of one"
needs_objects = pytest.mark.skipif(not traces_objects(), reason=NO_OBJECTS)
# up to torch 2.11, the gradient of a DTensor has no gradient itself; no attribute of torch tells of it
NO_SECOND = "torch before 2.12 does not differentiate twice through a DTensor"
needs_second_gradients_of_shards = pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12), reason=NO_SECOND)

IMPORTS = "torch before 2.12 writes an import of each known class of results into every GraphModule's pickle"
needs_own_globals = pytest.mark.skipif(not defines_named_tuples(), reason=IMPORTS)


def tells_skipped_code() -> bool:
    """Whether the reasons that Dynamo counts name each function that a graph break in a loop makes it skip. Older ones only log them."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # noqa: PLC0415  # which imports Dynamo

    return hasattr(InstructionTranslator, "raise_loop_graph_break")


def copied(code: str) -> str:
    """Code as torch.fx writes it after one of its own functions has copied the graph: before torch 2.12 with another last line."""
    if defines_named_tuples():
        return code
    return re.sub(r"return graphreg_Regularized\((\w+), ", r"return Regularized(output=\1, penalties=", code)
