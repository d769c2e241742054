"""What the tests of the backend have in common: each begins and ends without compiled code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget all compiled code: Dynamo would run it for a later test's model."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
