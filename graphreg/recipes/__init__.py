"""Recipes: the arguments that a module was made with, as plain data, which a JSON, TOML or YAML file can hold.

Open ``recipe.py`` first: it writes and reads the data. ``arguments.py`` turns a recipe into
arguments of ``regularize``. ``files.py`` reads and writes files, ``toml_text.py`` writes TOML, and
``lines.py`` finds the line of a file that an error is about.
"""
