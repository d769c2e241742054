"""make bench: every benchmark, one after the other, and the page of what came out: docs/benchmarks.md.

A part that was measured stays (under build/bench) until it is measured again: ``--only steps cost`` renews these two alone.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import networkx
import torch
import torchvision
from page import arguments, chosen, progress

HERE = Path(__file__).resolve().parent
STORE, PAGE = HERE.parent / "build" / "bench", HERE.parent / "docs" / "benchmarks.md"
PARTS: dict[str, tuple[str, list[str]]] = {
    "steps": ("Step time, one thread", ["steps.py", "--threads", "1"]),
    "steps-2": ("Step time, two threads", ["steps.py", "--threads", "2"]),
    "backend": ("graphreg as a torch.compile backend", ["backend.py"]),
    "breakdown": ("Where the time goes", ["breakdown.py"]),
    "memory": ("Memory and time to compile", ["memory.py"]),
    "recurrent": ("Recurrent layers, compiled", ["recurrent.py"]),
    "contractive": ("The contractive penalty", ["contractive.py"]),
    "dropout": ("Native dropout, seeded", ["dropout.py"]),
    "cost": ("The cost of regularize()", ["cost.py"]),
    "export-cost": ("The cost of regularize() with torch.export", ["export_cost.py"]),
    "generators": ("Random number generators", ["generators.py"]),
}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()}, {os.cpu_count()} cores"


def run(name: str) -> str:
    title, command = PARTS[name]
    progress(f"bench: {title}")
    environment = os.environ | {"OMP_NUM_THREADS": command[2] if "--threads" in command else "1"}
    command = [sys.executable, str(HERE / command[0]), *command[1:]]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"benchmark {name} failed; what it said is above. The parts before it are kept in {STORE}.")
    text = done.stdout.strip() if "|" in done.stdout else f"```text\n{done.stdout.strip()}\n```"
    return f"## {title}\n\n`python benchmarks/{' '.join(PARTS[name][1])}`, {datetime.date.today()}\n\n{text}\n"


def page() -> str:
    about = (HERE / "about.md").read_text().strip()
    machine = (
        f"{processor()}, {platform.system()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, networkx {networkx.__version__}. No GPU was measured."
    )
    parts = [(STORE / f"{name}.md").read_text().strip() for name in PARTS if (STORE / f"{name}.md").exists()]
    return "\n\n".join([about.replace("MACHINE", machine), *parts]) + "\n"


def main() -> None:
    options = arguments(__doc__, names=PARTS)
    STORE.mkdir(parents=True, exist_ok=True)
    for name in chosen(PARTS, options.only):
        (STORE / f"{name}.md").write_text(run(name))
        PAGE.write_text(page())
    progress("")
    print(f"{PAGE.relative_to(HERE.parent)} is written.")


if __name__ == "__main__":
    main()
