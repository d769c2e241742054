"""The two ways in which a user compiles a rewritten module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

in_both_ways = pytest.mark.parametrize("way", ["torch.compile", "module.compile"])


def compiled(module: Any, way: str, backend: Any) -> Any:
    """Compile a module as one graph, and return what to call: the module itself if it was compiled in place."""
    if way == "module.compile":
        module.compile(backend=backend, fullgraph=True)
        return module
    return torch.compile(module, backend=backend, fullgraph=True)
