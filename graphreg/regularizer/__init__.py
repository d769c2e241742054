"""The protocol of a regularizer: base classes, the registry of keys, and the checks on a formula.

To write a regularizer, open ``base.py``: subclass ``Splice`` or ``Penalty`` and write ``__call__``,
which is called the *formula*. Some of the other files prepare arguments of formulas
(``sequences.py``, ``units.py``, ``vjp.py``). ``by_depth.py`` has strengths that differ by depth.
``purity.py`` and ``purity_trial.py`` check that a formula is a pure function of its arguments.
"""
