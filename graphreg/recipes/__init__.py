"""Recipes: the arguments that a module was made with, as plain data, which a JSON, TOML or YAML file can hold.

Open ``recipe.py`` first: it writes and reads the data. ``arguments.py`` turns a recipe into
arguments of ``regularize``. ``files.py`` reads and writes files, ``toml_text.py`` writes TOML, and
``lines.py`` finds the line of a file that an error is about.
"""

from graphreg.recipes.arguments import RecipeLike, by_recipe, opened
from graphreg.recipes.files import write
from graphreg.recipes.recipe import Recipe, load_recipe, recipe, save_recipe, written

__all__ = [
    "Recipe", "RecipeLike", "by_recipe", "load_recipe", "opened", "recipe", "save_recipe", "write", "written",
]  # fmt: skip
