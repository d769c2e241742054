"""The random numbers of splices. Each is a function of a key and an element's index, so forward and backward see the same mask.

Open ``noise.py`` first: it has the keys, and ``Noise``, from which a regularizer draws. ``hash.py``
has the integer arithmetic of a draw. ``operators.py`` has the same draws as custom operators, which
Inductor lowers, and ``triton_kernels.py`` has them as kernels for eager code on a GPU.
``window.py`` says where a part of a value lies in the whole value, if several ranks divide the
value.
"""

from graphreg.rng.ahead import CallPlace, CallsAhead, DrawnAhead
from graphreg.rng.hash import in_plain_eager, readable
from graphreg.rng.noise import Noise, as_rank, call_keys, next_keys, of_process, rank, stream
from graphreg.rng.operators import between_calls, compiling, recomputes, within_backend
from graphreg.rng.window import Window

__all__ = [
    "CallPlace", "CallsAhead", "DrawnAhead", "Noise", "Window", "as_rank", "between_calls", "call_keys", "compiling",
    "in_plain_eager", "next_keys", "of_process", "rank", "readable", "recomputes", "stream", "within_backend",
]  # fmt: skip
