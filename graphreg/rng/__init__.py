"""Counter-based random numbers: the draws, their arithmetic, and the same as operators with lowerings."""

from graphreg.rng.noise import Noise, call_keys, next_keys, of_process, stream
from graphreg.rng.ops import compiling, recomputes, within_backend

__all__ = [
    "Noise", "call_keys", "compiling", "next_keys", "of_process", "recomputes", "stream", "within_backend",
]  # fmt: skip
