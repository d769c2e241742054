"""Carries out a plan on copies of the model's graphs, checks the result, and removes the additions again (``graphreg.strip``).

No other room edits an fx graph of the model. Open ``rewrite.py`` first. ``instantiate.py`` makes the runtime modules of a plan.
``plan_lowering.py`` decides which nodes are inserted, and where; ``insertions.py`` has the records that describe these nodes.
``invariants.py`` checks every rewritten module against the traced model. ``substitute.py`` restores the model's own calls, such as those of
native dropout, and ``monitor_watches.py`` places the watches of a monitor. ``first_call.py`` proves the graph of a model that was traced
without inputs.
"""
