"""One thread a process: several test processes share the cores, and spinning threads stall each other."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Each test compiles for itself; Dynamo's limits count over a process."""
    torch._dynamo.reset()
