"""Private parts of torch and of Python's interpreter, each behind a function that says what it finds out."""

from graphreg.torch_internals.dynamo import AROUND, RESUMED, Entry, Functions, Place, entry, here, place_of, root_of, same_modules
from graphreg.torch_internals.functorch import (
    CHUNKED,
    Chunk,
    chunks,
    in_chunks,
    is_wrapped,
    lent,
    mappings,
    outside,
    places,
    transforms,
    unwrapped,
)
from graphreg.torch_internals.interpreter import at_rest, collector_at_rest, deep_enough
from graphreg.torch_internals.node_names import node_namer
from graphreg.torch_internals.patching import Changes, raise_interrupt
from graphreg.torch_internals.random_state import (
    ModuleStack,
    checkpoints,
    checkpoints_refused,
    draws_watched,
    quiet,
    randomness,
    regions,
    restore_randomness,
    stirred,
    told_of_seeds,
)
from graphreg.torch_internals.trace_state import kept, patched_by_fx

__all__ = [
    "AROUND", "CHUNKED", "RESUMED", "Changes", "Chunk", "Entry", "Functions", "ModuleStack", "Place", "at_rest", "checkpoints",
    "checkpoints_refused", "chunks", "collector_at_rest", "deep_enough", "draws_watched", "entry", "here", "in_chunks", "is_wrapped",
    "kept", "lent", "mappings", "node_namer", "outside", "patched_by_fx", "place_of", "places", "quiet", "raise_interrupt",
    "randomness", "regions", "restore_randomness", "root_of", "same_modules", "stirred", "told_of_seeds", "transforms", "unwrapped",
]  # fmt: skip
