"""The private modules that hold the settings of torch's compiler, and torch's defaults for these settings."""

from __future__ import annotations

from typing import Any

import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config

FUNCTORCH, INDUCTOR, DYNAMO = "torch._functorch.config", "torch._inductor.config", "torch._dynamo.config"
# The config modules by import path. Each has ``patch(name=value)``, a context manager, and ``codegen_config()``, which returns the settings
# that differ from the defaults, as Python code.
CONFIGS: dict[str, Any] = {FUNCTORCH: torch._functorch.config, INDUCTOR: torch._inductor.config, DYNAMO: torch._dynamo.config}


def has_setting(place: str, name: str) -> bool:
    """Return whether the installed torch has the setting; not every version has every setting."""
    return hasattr(CONFIGS[place], name)


def default_of(place: str, name: str) -> Any:
    """Return torch's own default of a setting, even if code or an environment variable has changed the setting."""
    return CONFIGS[place]._config[name].default
