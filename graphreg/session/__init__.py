"""How strongly a model is regularized now, what it draws next, what is switched off, and what is saved: the state that users change.

Open ``session.py`` first: a rewritten module, a stage, a model in place and a backend each have one ``Session``. ``strengths.py`` has its
table of strengths, ``streams.py`` the noise, ``saved.py`` the form of a saved state, ``switches.py`` the blocks that are open. ``hosts.py``
finds the session of an object. ``controls.py``, ``sampling.py`` and ``prox.py`` have the functions that users call.
"""
