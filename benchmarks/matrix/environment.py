"""An environment of its own for each pair: made, filled by pip, and removed again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matrix.pairs import Pair

TOP = Path(__file__).parents[2]
ROOM = 12 << 30  # bytes of disk that a CUDA build of torch needs, with its downloads
# PyPI's builds of torch are for CUDA; here all of them run on the CPU, one thread a process.
SETTINGS = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Unavailable(Exception):
    """A pair cannot be had on this machine; says why."""


@dataclass(frozen=True)
class Environment:
    """The environment of a pair, in a folder with what is logged and measured in it."""

    pair: Pair
    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "env"

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def requirements(self) -> list[str]:
        """What pip is asked for: torchvision follows from torch, as each of its releases names the torch it is built for."""
        return [f"torch=={self.pair.torch}.*", "-e", f"{TOP}[test,zoo]"]

    def make(self) -> None:
        """Install everything, unless an interrupted run has done so already. Raises Unavailable."""
        done, wanted = self.folder / "installed", "\n".join([*self.requirements, (TOP / "pyproject.toml").read_text()])
        if done.exists() and done.read_text() == wanted:
            return
        self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        interpreter = find_python(self.pair.python)
        if shutil.disk_usage(self.folder).free < ROOM:
            raise Unavailable(f"less than {ROOM >> 30} GB of disk are free in {self.folder}")
        self._try([str(interpreter), "-m", "venv", str(self.root)])
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check"]
        self._try([*pip, "install", "--quiet", "--upgrade", "pip"])
        self._try([*pip, "install", "--progress-bar=off", *self.requirements])
        done.write_text(wanted)

    def remove(self) -> None:
        """Remove the environment, and keep what was logged."""
        (self.folder / "installed").unlink(missing_ok=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, log: str, *command: str, settings: Mapping[str, str] | None = None) -> int:
        """Run the environment's Python on the checkout; returns its status. What it prints goes to a file of this name."""
        variables = {**os.environ, **SETTINGS, **(settings or {})}
        variables.pop("PYTHONHOME", None)
        with (self.folder / log).open("w") as file:
            return subprocess.run(
                [str(self.python), *command], cwd=TOP, env=variables, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode

    def _try(self, command: list[str]) -> None:
        log = self.folder / "install.log"
        with log.open("a") as file:
            status = subprocess.run(command, cwd=TOP, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if status:
            raise Unavailable(reason(log.read_text()))


def find_python(version: str) -> Path:
    """Find a Python of this minor version: on the path, or among pyenv's. Raises Unavailable if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]
    for candidate in filter(None, candidates):
        asked = [str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)  # one of pyenv's shims may start none
        if done.stdout.strip() == version:
            return Path(candidate)
    raise Unavailable(f"no python{version} on this machine")


def reason(log: str) -> str:
    """What pip says last of why it failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip failed without a word"])[-1].removeprefix("ERROR:").strip()
