"""The private modules that hold the settings of torch's compiler, and torch's defaults for these settings.

One of them imports Dynamo, which takes a second. So each is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

FUNCTORCH, INDUCTOR, DYNAMO = "torch._functorch.config", "torch._inductor.config", "torch._dynamo.config"


def compiler_config(place: str) -> Any:
    """Return a config module by its import path: ``FUNCTORCH``, ``INDUCTOR`` or ``DYNAMO``.

    The module has a context manager, ``patch(name=value)``, that changes a setting. Its function ``codegen_config()`` returns Python code
    that sets all settings that differ from torch's defaults.
    """
    return import_module(place)


def has_setting(place: str, name: str) -> bool:
    """Return whether the installed torch has a setting: not every version has every setting. ``place``: as for ``compiler_config``."""
    return hasattr(compiler_config(place), name)


def default_of(place: str, name: str) -> Any:
    """Return torch's own default of a setting, whatever its present value. ``place``: as for ``compiler_config``."""
    return compiler_config(place)._config[name].default
