"""make bench: every benchmark, one after the other, and the page of what came out: docs/benchmarks.md.

A part that was measured stays (under build/bench) until it is measured again: ``--only steps cost`` renews these two alone. A part runs in
a process of its own. While other processes keep the machine busy, nothing is measured and no page is written; ``--anyway`` does both, and
the page says so.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import networkx
import torch
import torchvision
from machine import Load, busy, clock, looked, since
from page import BUILD, arguments, chosen, progress

HERE = Path(__file__).resolve().parent
STORE, PAGE = BUILD, HERE.parent / "docs" / "benchmarks.md"
PARTS: dict[str, tuple[str, list[str]]] = {
    "models": ("Models that people train", ["model_steps.py"]),
    "steps": ("Step time, one thread", ["steps.py", "--threads", "1"]),
    "steps-2": ("Step time, two threads", ["steps.py", "--threads", "2"]),
    "catalogue": ("Each regularizer", ["catalogue.py"]),
    "backend": ("However it is compiled", ["backend.py"]),
    "breakdown": ("Where the time goes", ["breakdown.py"]),
    "memory": ("Memory", ["memory.py"]),
    "recompute": ("What a compiled backward recomputes", ["recompute.py"]),
    "strengths": ("Many strengths, and a search", ["strengths.py"]),
    "compile-time": ("Time to compile", ["compile_time.py"]),
    "overhead": ("Overhead of calls, and the start of processes", ["overhead.py"]),
    "recurrent": ("Recurrent layers, compiled", ["recurrent.py"]),
    "contractive": ("The contractive penalty", ["contractive.py"]),
    "dropout": ("Native dropout, seeded", ["dropout.py"]),
    "cost": ("The cost of regularize()", ["cost.py"]),
    "tracing": ("The time to trace models of transformers", ["tracing.py"]),
    "export-cost": ("The cost of regularize() with torch.export", ["export_cost.py"]),
    "proof": ("The price of the proof", ["proof.py"]),
    "generators": ("Random number generators", ["generators.py"]),
}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()}, {os.cpu_count()} cores"


def run(name: str) -> str:
    """What the script of a part prints."""
    _, command = PARTS[name]
    environment = os.environ | {"OMP_NUM_THREADS": command[2] if "--threads" in command else "1"}
    command = [sys.executable, str(HERE / command[0]), *command[1:]]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"benchmark {name} failed; what it said is above. The parts before it are kept in {STORE}.")
    return done.stdout.strip()


def section(name: str, said: str, load: Load) -> str:
    """A part as it stands on the page, with the load while it ran."""
    title, command = PARTS[name]
    text = said if "|" in said else f"```text\n{said}\n```"
    reason = busy(load, idle=False)
    under = f", {load}" if reason is None else f", **measured while the machine was busy**: {reason}"
    return f"## {title}\n\n`python benchmarks/{' '.join(command)}`, {datetime.date.today()}, {processor()}{under}\n\n{text}\n"


def page() -> str:
    about = (HERE / "about.md").read_text().strip()
    machine = (
        f"{processor()}, {platform.system()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, networkx {networkx.__version__}. No GPU was measured."
    )
    parts = [(STORE / f"{name}.md").read_text().strip() for name in PARTS if (STORE / f"{name}.md").exists()]
    return "\n\n".join([about.replace("MACHINE", machine), *parts]) + "\n"


def refuse(load: Load, idle: bool, anyway: bool, what: str) -> None:
    """End the process if the machine is too busy, unless it is told to go on."""
    reason = busy(load, idle)
    if reason is None:
        return
    if not anyway:
        sys.exit(
            f"\nmake bench: {what}, because {reason}. End what else runs and give the command again: parts that were measured are kept. "
            "With --anyway (make bench ARGS=--anyway) it goes on, and the page says that the machine was busy."
        )
    print(f"the machine is busy: {reason}. --anyway was given, and the page will say so.", flush=True)


def measure(
    name: str, anyway: bool, running: Callable[[str], str] = run, look: Callable[[], Load] = looked, meanwhile: Callable[..., Load] = since
) -> str:
    """Measure a part, and return its section of the page. The load is looked at before it and while it runs."""
    title = PARTS[name][0]
    progress(f"bench: {title}")
    before = look()
    print(f"{title}: {before}", flush=True)
    refuse(before, True, anyway, f"{name!r} is not measured")
    start = clock()
    said = running(name)
    load = meanwhile(start)
    print(f"{title}: {load} while it ran", flush=True)
    refuse(load, False, anyway, f"{name!r} is thrown away and the page is not written")
    return section(name, said, load)


def main() -> None:
    options = arguments(__doc__, names=PARTS, switches=("--anyway",))
    STORE.mkdir(parents=True, exist_ok=True)
    for name in chosen(PARTS, options.only):
        (STORE / f"{name}.md").write_text(measure(name, options.anyway))
        PAGE.write_text(page())
    progress("")
    print(f"{os.path.relpath(PAGE, HERE.parent)} is written.")


if __name__ == "__main__":
    main()
