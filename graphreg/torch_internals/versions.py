"""The versions of torch that graphreg supports, and a warning about others."""

from __future__ import annotations

import re
import sys

import torch

from graphreg.errors import UntestedTorchWarning, warn

OLDEST, NEWEST = (2, 10), (2, 15)  # as in docs/versions.md
_asked = False


def version() -> tuple[int, int]:
    """Return the major and the minor version number of the installed torch."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def known_versions() -> str:
    """Return a clause, for messages, that says for which versions of torch graphreg is made."""
    return f"graphreg is made for torch {_dotted(OLDEST)} to {_dotted(NEWEST)}"


def warn_if_untested() -> None:
    """Warn, once in a process, if the installed torch is newer than all tested versions, or does not work with this Python."""
    global _asked  # noqa: PLW0603
    if _asked:
        return
    _asked = True
    if version() < (2, 11) and sys.version_info[:3] == (3, 13, 0):
        warn(
            f"torch {torch.__version__} on Python 3.13.0 does not notice that attributes change, for example the mode of a module: code "
            "that it has compiled in train mode also runs in eval mode. Use Python 3.13.1 or newer, or torch 2.12 or newer.",
            UntestedTorchWarning,
        )
    if version() > NEWEST:
        warn(
            f"{known_versions()}, and this is torch {torch.__version__}. 'python -m graphreg doctor --torch' shows in seconds which parts "
            "work with it. To silence this: warnings.filterwarnings('ignore', category=graphreg.UntestedTorchWarning).",
            UntestedTorchWarning,
        )


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
