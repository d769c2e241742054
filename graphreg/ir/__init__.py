"""Facts about the values of a traced graph: their sites, names and roles, the operations that made them, and which share storage.

Almost every folder that docs/architecture.md lists after ``ir`` imports this one. Nothing here traces a model or edits one. Open
``site.py`` first, which says what a site is, then ``selector.py``, which says how a string finds sites.
"""
