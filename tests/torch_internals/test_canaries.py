"""What the engine uses of ``graphreg/torch_internals`` has a canary: a test on a tiny example that falls if torch behaves otherwise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ENGINE = HERE.parents[1] / "graphreg"
DOOR = ENGINE / "torch_internals"
# Names that are of graphreg or of Python alone, and have tests of their own.
NO_PART_OF_TORCH = {
    "CHUNKED", "Chunk", "DEFAULT", "ModuleStack", "at_rest", "buffers_by_name", "collector_at_rest", "deep_enough", "known_versions",
    "lists_like", "may_be_anothers", "modules_by_path", "modules_in_wrappers", "only_here", "parameters_by_name", "quiet",
    "raise_interrupt", "regions", "show_parameters_of", "warn_if_untested", "with_own_code",
}  # fmt: skip


def test_each_name_has_a_canary() -> None:
    used = set[str]()
    for path in (path for path in ENGINE.rglob("*.py") if DOOR not in path.parents):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "graphreg.torch_internals" in text else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graphreg.torch_internals"):
                used.update(each.name for each in node.names)
    tested = set(re.findall(r"\w+", "\n".join(path.read_text() for path in HERE.glob("test_canaries_*.py"))))
    missing = sorted(used - tested - NO_PART_OF_TORCH)
    assert not missing, f"{missing} of graphreg/torch_internals have no canary: a new torch would break them in silence"
    assert used >= NO_PART_OF_TORCH
