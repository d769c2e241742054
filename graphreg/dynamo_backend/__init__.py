"""``graphreg.backend``: a backend of torch.compile that regularizes every graph that Dynamo captures of a model.

Open ``options.py`` first, then ``backend.py``: a ``Backend`` follows each call of the model through its graphs. ``subgraph.py`` takes one
captured graph through the engine (``capture.py`` labels it, the engine plans and rewrites it, ``emit.py`` gives it back in Dynamo's form).
``model_call.py`` puts together what the graphs of one call measured, ``all_graphs.py`` what the whole backend reports.
"""

from graphreg.dynamo_backend.backend import Backend
from graphreg.dynamo_backend.options import backend, backend_of

__all__ = [
    "Backend", "backend", "backend_of",
]  # fmt: skip
