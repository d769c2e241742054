"""The private modules that hold the settings of torch's compiler, and torch's defaults for these settings."""

from __future__ import annotations

from typing import Any

import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config

FUNCTORCH, INDUCTOR, DYNAMO = "torch._functorch.config", "torch._inductor.config", "torch._dynamo.config"
# The config modules by import path. Each module has a context manager, ``patch(name=value)``, that changes a setting. Its function
# ``codegen_config()`` returns Python code that sets all settings that differ from torch's defaults.
CONFIGS: dict[str, Any] = {FUNCTORCH: torch._functorch.config, INDUCTOR: torch._inductor.config, DYNAMO: torch._dynamo.config}


def has_setting(place: str, name: str) -> bool:
    """Return whether the installed torch has a setting; not every version of torch has every setting. ``place``: a key of ``CONFIGS``."""
    return hasattr(CONFIGS[place], name)


def default_of(place: str, name: str) -> Any:
    """Return torch's own default of a setting, whatever its present value. ``place``: a key of ``CONFIGS``."""
    return CONFIGS[place]._config[name].default
