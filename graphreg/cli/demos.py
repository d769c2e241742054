"""Runs the demos. It does not import torch, so that a demo's first line comes at once."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from graphreg.cli.errors import UsageError

FILES = {
    "regularizers": ("demo.py",), "study": ("demo.py", "--study"), "penalties": ("demo_penalties.py",), "ranks": ("demo_ranks.py",),
}  # fmt: skip
NEEDED = ("matplotlib", "pygraphviz", "rich", "scipy", "sklearn", "torchvision")


def demo(which: str) -> int:
    """Run a demo as a subprocess and return its exit status. Raises UsageError if a package that it needs is not installed."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        raise UsageError(f"the demo needs {', '.join(absent)}, not installed: pip install 'graphreg[demo]'.")
    return subprocess.run([sys.executable, str(script(which)), *FILES[which][1:]], check=False).returncode


def script(which: str) -> Path:
    """Return the path of a demo's script, in the checkout or in the installed package."""
    package = find_spec("graphreg.examples")
    if package is None or package.origin is None:
        raise UsageError("this installation of graphreg has no demo. Install graphreg again with pip.")
    return Path(package.origin).with_name(FILES[which][0])
