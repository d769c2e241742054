"""A backend of torch.compile that regularizes each graph that Dynamo captures."""

from graphreg.dynamo_backend.backend import Backend
from graphreg.dynamo_backend.options import backend, backend_of

__all__ = [
    "Backend", "backend", "backend_of",
]  # fmt: skip
