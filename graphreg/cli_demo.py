"""``graphreg demo``: what ``make demo`` runs, from an installed package too."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from graphreg.cli_errors import UsageError

FILES = {"regularizers": "demo.py", "penalties": "demo_penalties.py"}
NEEDED = ("rich", "scipy", "sklearn", "torchvision")


def demo(which: str) -> int:
    """Run a demo in a process of its own, as ``make`` does, and give its status. Raises UsageError where its extra is missing."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        raise UsageError(f"the demo needs {', '.join(absent)}, not installed here: pip install 'graphreg[demo]'.")
    return subprocess.run([sys.executable, str(script(which))], check=False).returncode


def script(which: str) -> Path:
    """The file of a demo, in the checkout or in the installed package."""
    package = find_spec("graphreg.examples")
    if package is None or package.origin is None:
        raise UsageError("this install of graphreg has no demo in it. Install graphreg anew with pip.")
    return Path(package.origin).with_name(FILES[which])
