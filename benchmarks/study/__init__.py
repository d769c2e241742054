"""The study: whether regularizers show on small data what their papers claim. The protocol is in arms.py and claims.py."""
