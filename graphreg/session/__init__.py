"""How strongly a model is regularized now, what it draws next, what is switched off, and what is saved: the state that users change.

Open ``session.py`` first: a rewritten module, a stage, a model in place and a backend each have one ``Session``. ``strengths.py`` has its
table of strengths, ``streams.py`` the noise, ``saved.py`` the form of a saved state, ``switches.py`` the blocks that are open. ``hosts.py``
finds the session of an object. ``controls.py`` and ``sampling.py`` have the functions that users call.
"""

from graphreg.session.controls import (
    Regulated,
    asked_of,
    changed_strengths,
    frozen_noise,
    model_state_dict,
    noise_off,
    noise_on,
    penalties_off,
    reset_state,
    rng_state,
    set_ranks,
    set_rng_state,
    set_strength,
    site_strengths,
    strength_buffers,
    strengths,
    strengths_now,
)
from graphreg.session.hosts import (
    BackendHost,
    InPlaceHost,
    backend_host,
    graphs_of,
    in_place_host,
    native_draws,
    record_of,
    regularized,
    rewritten,
    rules_of,
    session_of,
)
from graphreg.session.sampling import Samples, sample
from graphreg.session.session import Session, StrengthBuffers
from graphreg.session.streams import CallClock, CountedStream, CountedStreams, FixedStreams, GrowingStreams, StreamName
from graphreg.session.strengths import OWN, Row, number, strength_text

__all__ = [
    "OWN",
    "BackendHost",
    "CallClock",
    "CountedStream",
    "CountedStreams",
    "FixedStreams",
    "GrowingStreams",
    "InPlaceHost",
    "Regulated",
    "Row",
    "Samples",
    "Session",
    "StreamName",
    "StrengthBuffers",
    "asked_of",
    "backend_host",
    "changed_strengths",
    "frozen_noise",
    "graphs_of",
    "in_place_host",
    "model_state_dict",
    "native_draws",
    "noise_off",
    "noise_on",
    "number",
    "penalties_off",
    "record_of",
    "regularized",
    "reset_state",
    "rewritten",
    "rng_state",
    "rules_of",
    "sample",
    "session_of",
    "set_ranks",
    "set_rng_state",
    "set_strength",
    "site_strengths",
    "strength_buffers",
    "strength_text",
    "strengths",
    "strengths_now",
]  # fmt: skip
