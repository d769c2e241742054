"""The reference pages: every public name is on one of them, and every error with its cause and cure."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import graphreg
from graphreg import types

PAGES = Path(__file__).parent.parent / "docs" / "reference"
API = "".join(path.read_text() for path in PAGES.glob("api*.md"))
LISTED = re.findall(r"^\.\. auto(?:function|class|exception):: graphreg\.([\w.]+)$", API, re.MULTILINE)
ALIASES = {"ModelInput", "Selector", "types.FrontEnd", "types.Missing", "types.Penalties", "types.Scale"}  # of types, with no docstring


def test_every_public_name_stands_on_one_page() -> None:
    public = (set(graphreg.__all__) - set(graphreg._MODULES)) | {f"schedules.{name}" for name in ("linear", "cosine", "piecewise")}
    public |= {f"types.{name}" for name in types.__all__ if name not in graphreg.__all__ and name != "RewrittenModule"}
    assert public - ALIASES <= set(LISTED) and len(LISTED) == len(set(LISTED))
    assert all(f"`graphreg.{name}`" in API for name in ALIASES if "." not in name)


def test_what_is_listed_is_there() -> None:
    for name in LISTED:
        module, _, last = f"graphreg.{name}".rpartition(".")
        if module.startswith("graphreg.integrations."):  # whose libraries take long to import
            source = (PAGES.parent.parent / f"{module.replace('.', '/')}.py").read_text()
            assert re.search(rf"^class {last}\b", source, re.MULTILINE), name
        else:
            assert hasattr(import_module(module), last), name
