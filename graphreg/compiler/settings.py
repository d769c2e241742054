"""Reads and temporarily changes the torch compiler settings that decide how random operations run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from graphreg.torch_internals.config import DYNAMO, FUNCTORCH, INDUCTOR, compiler_config, setting_of

# The settings that decide which operations backward runs again, in which order operations run, and from which generator they draw.
NAMES = {
    FUNCTORCH: (
        "activation_memory_budget", "aggressive_recomputation", "ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains",
        "ban_recompute_materialized_backward", "ban_recompute_not_in_allowlist", "ban_recompute_reductions", "recompute_views",
        "treat_parameters_as_free_to_save", "functionalize_rng_ops", "graphsafe_rng_functionalization", "cse",
    ),
    INDUCTOR: (
        "fallback_random", "align_random_eager", "reorder_for_locality", "reorder_for_peak_memory", "custom_partitioner_fn",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One compiler setting as it is now.

    Attributes:
        place: the config module, such as ``"torch._inductor.config"``.
        name: the name in that module.
        value: the present value.
        default: torch's default.
    """

    place: str
    name: str
    value: Any
    default: Any

    def __str__(self) -> str:
        more = "the default" if self.value == self.default else f"default {self.default!r}"
        return f"{self.place}.{self.name} = {self.value!r} ({more})"

    @property
    def at_default(self) -> str:
        """The line of Python code that sets this setting to torch's default."""
        return f"{self.place}.{self.name} = {self.default!r}"


def setting(place: str, name: str) -> Setting | None:
    """Return a setting as it is now; None if the installed torch does not have it."""
    values = setting_of(place, name)
    return Setting(place, name, *values) if values is not None else None


def changed_settings() -> list[Setting]:
    """Return the settings among ``NAMES`` that differ from torch's defaults, no matter whether code or the environment changed them."""
    settings = [setting(place, name) for place, names in NAMES.items() for name in names]
    return [each for each in settings if each is not None and each.value != each.default]


@contextmanager
def patched_settings(*values: tuple[Setting, Any]) -> Iterator[None]:
    """Give settings other values in a block, and restore them at its end. ``values``: pairs of a setting and its value."""
    with ExitStack() as stack:
        for each, value in values:
            stack.enter_context(compiler_config(each.place).patch(**{each.name: value}))
        yield


def defaults(settings: Sequence[Setting]) -> Any:
    """Return a context manager in which these settings have torch's defaults."""
    return patched_settings(*((each, each.default) for each in settings))


def settings_snapshot() -> tuple[str, ...]:
    """Return all compiler settings that differ from torch's defaults, as Python code, one text for each config module.

    Measurements can be compared only if they were made under equal settings.
    """
    return tuple(compiler_config(place).codegen_config() for place in (FUNCTORCH, INDUCTOR, DYNAMO))
