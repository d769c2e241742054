"""The settings of torch's compiler: modules without a public name, whose values can be read, patched, and compared with the defaults."""

from __future__ import annotations

from typing import Any

import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config

FUNCTORCH, INDUCTOR, DYNAMO = "torch._functorch.config", "torch._inductor.config", "torch._dynamo.config"
# By the name that a user writes. Each has ``patch(name=value)``, a block, and ``codegen_config()``, all that is not the default as code.
CONFIGS: dict[str, Any] = {FUNCTORCH: torch._functorch.config, INDUCTOR: torch._inductor.config, DYNAMO: torch._dynamo.config}


def has_setting(place: str, name: str) -> bool:
    """Whether this torch has the setting: they come and go from version to version."""
    return hasattr(CONFIGS[place], name)


def default_of(place: str, name: str) -> Any:
    """torch's default of a setting, whatever it is set to now by code or by the environment."""
    return CONFIGS[place]._config[name].default
