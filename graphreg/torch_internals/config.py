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


def setting_of(place: str, name: str) -> tuple[Any, Any] | None:
    """Return the present value of a setting and torch's own default; None if the installed torch does not have the setting.

    ``place``: as for ``compiler_config``.
    """
    config = compiler_config(place)
    return (getattr(config, name), config._config[name].default) if hasattr(config, name) else None
