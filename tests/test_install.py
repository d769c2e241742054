"""``.ci/install``, which both commands of the README begin with: it is never silent for long, and shows why pip failed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loading import loaded

TOP = Path(__file__).parents[1]
STEPS = "import time\nfor line in ('Collecting torch>=2.12', 'Installing collected packages: a, b, torch'):\n    print(line, flush=True)\n"
STEPS += "    time.sleep(0.6)\n"


@pytest.fixture(scope="module")
def installer() -> Any:
    return loaded(TOP / ".ci" / "install")


def test_a_pipe_gets_a_line_now_and_then(installer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert installer.install([sys.executable, "-c", STEPS], quiet=0.1) == 0
    *said, last = capsys.readouterr().out.splitlines()
    assert said and all(re.fullmatch(r"installing, \d+ s so far: .+", line) for line in said)
    assert any(line.endswith("3 packages are being unpacked") for line in said)
    assert re.fullmatch(r"installed in \d+ s", last)


def test_what_pip_said_is_shown_if_it_fails(installer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('ERROR: no such package'); sys.exit(3)"
    assert installer.install([sys.executable, "-c", code]) == 3
    assert capsys.readouterr().out == "ERROR: no such package\n"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "looking for packages"),
        (["Collecting torch>=2.12\n"], "collecting torch>=2.12"),
        (["Collecting torch\n", "  Downloading torch-2.13.0.whl (190 MB)\n"], "downloading torch-2.13.0.whl"),
        (["Collecting torch\n", "Installing collected packages: a, b\n", "\n"], "2 packages are being unpacked"),
    ],
)
def test_the_step(installer: Any, lines: list[str], said: str) -> None:
    assert installer.step(lines) == said


EXTRAS = {
    "demo": "demo", "test": "test", "lint": "test,lint", "site": "test,docs", "bench": "bench", "gpu": "test,gpu", "zoo": "zoo",
}  # fmt: skip


@pytest.mark.parametrize("target", EXTRAS)
def test_the_makefile_installs_by_it(target: str) -> None:
    """Also what a command needs besides the tests."""
    done = subprocess.run(["make", "-n", "-W", "pyproject.toml", target], cwd=TOP, capture_output=True, text=True, check=True)
    assert re.findall(r"^\.venv/bin/python (\.ci/install .*)$", done.stdout, re.MULTILINE) == [f".ci/install '.[{EXTRAS[target]}]'"]
