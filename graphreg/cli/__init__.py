"""The command line: ``graphreg names | plan | report | diff | draw | audit | doctor | demo | completion``.

Open ``main.py`` first. ``parser.py`` and ``regularizer_names.py`` read the command line without
importing torch, so that ``--help`` and completion are quick. ``load.py`` loads the model and its
example inputs, ``keywords.py`` makes the regularizers, and ``commands.py`` runs the command.
"""
