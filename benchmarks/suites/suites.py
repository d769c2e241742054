"""Which tests are run, and where their sources come from."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

MODELS = (
    "bert", "roberta", "electra", "deberta_v2", "gpt2", "llama", "mistral", "qwen2", "gemma", "opt", "t5", "bart", "whisper", "vit", "swin",
    "clip", "wav2vec2", "mamba", "mixtral", "detr", "resnet", "convnext",
)  # fmt: skip
REGULARIZERS = {"hidden_dropout": 0.1, "hidden_l2": 1e-4, "weight_l2": 1e-4}
REPOSITORY = "https://github.com/huggingface/transformers"


@dataclass(frozen=True)
class Suite:
    """A file of tests of a library: its path within the library's sources, and the pytest configuration that holds there."""

    name: str
    library: str
    file: str


SUITES = (
    *(Suite(model, "transformers", f"tests/models/{model}/test_modeling_{model}.py") for model in MODELS),
    Suite("timm", "timm", "tests/test_models.py"),
)
VERSIONS = {"timm": "timm/version.py", "transformers": "src/transformers/__init__.py"}  # which file of the sources names their version


class Missing(Exception):
    """The sources of a library are not there, or are of another version than the installed one."""


def sources(library: str, folder: Path) -> Path:
    """The library's sources: ``folder/LIBRARY``, which is fetched if it is not there. Raises Missing."""
    path = folder / library
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        FETCH[library](path, version(library))
    named = path / VERSIONS[library]
    if not named.is_file() or f"'{version(library)}'" not in named.read_text().replace('"', "'"):
        raise Missing(
            f"{path} does not have the sources of {library} {version(library)}, which is installed: {VERSIONS[library]} does not "
            f"name this version. Remove the folder to fetch them, or give another one (make suites SUITES=FOLDER)."
        )
    return path


def _unpacked(path: Path, number: str) -> None:
    """timm's source distribution contains its tests."""
    made = path.with_name(f"timm-{number}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", f"timm=={number}"]
    _done([*command, "--dest", str(path.parent)])
    with tarfile.open(made.with_name(f"{made.name}.tar.gz")) as archive:
        archive.extractall(path.parent, filter="data")
    made.rename(path)


def _cloned(path: Path, number: str) -> None:
    """The tests of transformers' models are in its repository alone."""
    _done(["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{number}", REPOSITORY, str(path)])


def _done(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Missing(f"there is no {command[0]} on this machine") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Missing(f"`{' '.join(command)}` failed: {said}. Give a folder that has the sources: make suites SUITES=FOLDER.")


FETCH: dict[str, Callable[[Path, str], None]] = {"timm": _unpacked, "transformers": _cloned}
