"""``.ci/install``, which both commands of the README begin with: it tells from the first second how long it takes, and why pip failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from loading import loaded

TOP = Path(__file__).parents[1]
# What pip says, a line after the progress was shown four times: however busy the machine is, each line is seen.
STEPS = """
import os, sys, time
for number, line in enumerate(("Collecting torch>=2.12", "Installing collected packages: a, b, torch"), 1):
    print(line, flush=True)
    while os.path.getsize(sys.argv[1]) < 4 * number:
        time.sleep(0.01)
"""
USUAL = {"making .venv": 2.0, "looking for packages": 10.0, "downloading": 20.0, "unpacking": 30.0}


@pytest.fixture(scope="module")
def installer() -> Any:
    return loaded(TOP / ".ci" / "install")


def progress(installer: Any, follows: str = "", terminal: bool = False, seen: Path = Path(os.devnull)) -> Any:
    """The progress by a clock that advances a little at each look, not by the machine's. ``seen``: a file with a byte for each showing."""

    class Told(installer.Progress):  # type: ignore[misc]
        def show(self, step: str) -> None:
            super().show(step)
            with seen.open("a") as file:
                file.write(".")

    ticks = count()
    return Told(installer.Course(USUAL, 60.0 if follows else 0.0, lambda: 0.02 * next(ticks)), follows, terminal, quiet=0.1)


def steps(seen: Path) -> list[str]:
    seen.touch()
    return [sys.executable, "-c", STEPS, str(seen)]


def test_a_pipe_gets_a_line_at_once_and_now_and_then(installer: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    assert installer.run(steps(seen), progress(installer, "the demo", seen=seen), installer.packages()) == 0
    first, *said = capsys.readouterr().out.splitlines()
    assert first == "installing, about 120 s left, the demo included; 0 s so far: making .venv"  # 62 s of the parts, and the demo
    assert said and all(re.fullmatch(r"installing, about \d+ s left, the demo included; \d+ s so far: .+", line) for line in said)
    assert any("unpacking 3 packages, 0 done" in line for line in said)


def test_a_terminal_has_one_line_that_is_drawn_anew(
    installer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = progress(installer, terminal=True, seen=tmp_path / "seen")
    assert installer.run(steps(tmp_path / "seen"), shown) == 0
    shown.last("installed in 1 s")
    out = capsys.readouterr().out
    *drawn, last = out.split("\r")[1:]
    assert len(drawn) > 3 and all(re.match(r"\[#*-*\] installing, about \d+ s left; \d+ ", text) for text in drawn)
    assert max(len(text.removesuffix("\x1b[K")) for text in drawn) == 59 and drawn[-1].count("#") > drawn[0].count("#")
    assert last == "\x1b[Kinstalled in 1 s\n" and out.count("\n") == 1


def test_what_pip_said_is_shown_if_it_fails(installer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('ERROR: no such package'); sys.exit(3)"
    assert installer.run([sys.executable, "-c", code], progress(installer)) == 3
    assert capsys.readouterr().out.splitlines()[-1] == "ERROR: no such package"


@pytest.mark.parametrize(
    ("lines", "said", "part"),
    [
        ([], "looking for packages", "looking for packages"),
        (["Collecting torch>=2.12\n"], "collecting torch>=2.12", "looking for packages"),
        (["  Downloading torch-2.13.0.whl.metadata (30 kB)\n"], "downloading torch-2.13.0.whl.metadata", "looking for packages"),
        (["Collecting torch\n", "  Downloading torch-2.13.0.whl (190 MB)\n"], "downloading torch-2.13.0.whl", "downloading"),
        (["Collecting torch\n", "Installing collected packages: a, b\n", "\n"], "unpacking 2 packages, 1 done", "unpacking"),
    ],
)
def test_the_step(installer: Any, lines: list[str], said: str, part: str) -> None:
    course = installer.Course(USUAL)
    course.begin("looking for packages")
    assert (installer.step(lines, course, 1), course.part) == (said, part)
    if part == "unpacking":
        assert course.done == pytest.approx(2 + 10 + 20 + 15, abs=0.5)  # half of the packages


def test_packages_are_counted(installer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "VENV", tmp_path)
    assert installer.packages() == 0
    for name in ("a-1.dist-info", "a", "b-2.dist-info"):
        (tmp_path / "lib" / "python3.11" / "site-packages" / name).mkdir(parents=True)
    assert installer.packages() == 2


EXTRAS = {
    "demo": "demo", "test": "test", "lint": "test,lint", "site": "test,docs", "bench": "bench", "gpu": "test,gpu", "zoo": "zoo",
}  # fmt: skip
FOLLOWS = {"demo": " --then 60 'the demo'", "test": " --then 400 'the tests'"}


@pytest.mark.parametrize("target", EXTRAS)
def test_the_makefile_installs_by_it(target: str) -> None:
    """Also what a command needs besides the tests; the estimate is of what follows, too."""
    done = subprocess.run(["make", "-n", "-W", "pyproject.toml", target], cwd=TOP, capture_output=True, text=True, check=True)
    (told,) = re.findall(r"^python3 \.ci/install (.*)$", done.stdout, re.MULTILINE)
    assert told.rstrip() == f"'.[{EXTRAS[target]}]'{FOLLOWS.get(target, '')}"
