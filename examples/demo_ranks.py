"""A run on two ranks that is killed and resumed, offline: python examples/demo_ranks.py

Two processes train a small transformer that FSDP2 shards. One of them is killed in the middle of a step. Both are started again, and
resume from the last checkpoint of torch.distributed.checkpoint. The losses are compared with those of a run that nobody killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

EXTRA = ("rich", "sklearn")
try:
    import digits_ranks
    from digits_ranks import RANKS, TEST, Setup, accuracy, checkpoints, plain
    from show import Advance, Screen, prove
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in EXTRA:
        raise
    raise SystemExit(f"The demo needs {error.name}, which is not installed: pip install 'graphreg[demo]'") from None

# A forked process has the imports, which take longer than the training. What it knows of a run, it reads from the run's folder.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
PATIENCE = 300.0  # seconds after which a rank that does not end is killed, and the demo fails


class Ranks:
    """The processes of one run."""

    def __init__(self, folder: Path, setup: Setup, halt: int = -1, control: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.started = folder, time.monotonic()
        self.processes = [
            CONTEXT.Process(target=digits_ranks.main, args=(folder, rank, port, setup, halt, control)) for rank in range(RANKS)
        ]
        for process in self.processes:
            process.start()

    def statuses(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def kill(self, rank: int) -> int | None:
        """Kill a rank by SIGKILL, and return its status."""
        self.processes[rank].kill()
        self.processes[rank].join()
        return self.processes[rank].exitcode

    def watch(self) -> Iterator[None]:
        """Yield now and then, until all ranks have ended. Kill those that take too long."""
        while None in self.statuses():
            if time.monotonic() - self.started > PATIENCE:
                self.end()
            yield
            time.sleep(0.1)

    def end(self) -> None:
        """Kill the ranks that still run."""
        for rank, status in enumerate(self.statuses()):
            if status is None:
                self.kill(rank)

    def log(self, rank: int) -> str:
        return (self.folder / f"log.{rank}").read_text(errors="replace")


@contextlib.contextmanager
def started(folder: Path, setup: Setup, halt: int = -1, control: bool = False) -> Iterator[Ranks]:
    """Start the ranks, and leave none behind."""
    ranks = Ranks(folder, setup, halt, control)
    try:
        yield ranks
    finally:
        ranks.end()


def losses(folder: Path, rank: int, kind: str = "losses") -> list[tuple[int, str]]:
    """The lines that a rank has written so far: the step, and the loss in hexadecimal, to the last bit."""
    path = folder / f"{kind}.{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(step), loss) for step, loss in map(str.split, lines)]


def finished(screen: Screen, folder: Path, setup: Setup, what: str, control: bool = False) -> None:
    """Run to the end, and show the progress."""
    kind, written = "control" if control else "losses", 0
    before = len(losses(folder, 0, kind))
    total = setup.every - 1 if control else setup.steps - max(checkpoints(folder), default=0)
    with started(folder, setup, control=control) as ranks, screen.progress(what, total) as advance:
        for _ in ranks.watch():
            written = _shown(advance, written, len(losses(folder, 0, kind)) - before)
    for rank, status in enumerate(ranks.statuses()):
        prove(status == 0, f"rank {rank} ends with status 0, and not {status}:\n{ranks.log(rank)}")


def _shown(advance: Advance, written: int, now: int) -> int:
    for _ in range(now - written):
        advance()
    return now


@dataclass(frozen=True)
class Killed:
    """A run of which rank 1 was killed.

    Attributes:
        step: The step in the middle of which it was killed.
        status: The status of its process.
        said: The last line of rank 0.
        done: How many losses each rank had written.
        start: The step of the last checkpoint.
    """

    step: int
    status: int | None
    said: str
    done: list[int]
    start: int


def killed(screen: Screen, folder: Path, setup: Setup, step: int) -> Killed:
    """Run until rank 1 stands still in the middle of a step, and kill it there."""
    written = 0
    with started(folder, setup, step) as ranks:
        with screen.progress("training", step) as advance:
            for _ in ranks.watch():
                written = _shown(advance, written, len(losses(folder, 1)))
                if (folder / "halted").exists():
                    break
        prove(ranks.statuses() == [None, None], f"both ranks run until rank 1 is killed:\n{ranks.log(0)}\n{ranks.log(1)}")
        status = ranks.kill(1)
        for _ in ranks.watch():
            pass
    prove(ranks.statuses()[0] not in (0, None), "rank 0 cannot go on alone")
    last = (ranks.log(0).strip().splitlines() or ["nothing"])[-1]
    said = re.sub(r"\[/\S+\] ", "", last).partition(". ")[0]  # without the place in torch's source, and without torch's advice
    return Killed(step, status, said, [len(losses(folder, rank)) for rank in range(RANKS)], max(checkpoints(folder)))


@dataclass(frozen=True)
class Verdict:
    """What the comparison found.

    Attributes:
        equal: How many losses are bit-equal with those of the uninterrupted run.
        differ: How many of the losses after a resume without graphreg's state differ.
        controls: How many such losses there are.
        accuracy: The accuracy on the test images, in per cent.
    """

    equal: int
    differ: int
    controls: int
    accuracy: float


def compared(whole: Path, broken: Path, setup: Setup, run: Killed) -> Verdict:
    """Compare the losses of both ranks, and the weights. The demo ends here if one is not bit-equal."""
    equal, differ, controls = 0, 0, 0
    for rank in range(RANKS):
        expected, lines = losses(whole, rank), losses(broken, rank)
        prove([step for step, _ in expected] == [*range(setup.steps)], "the uninterrupted run has a loss for each step")
        steps = [*range(run.done[rank]), *range(run.start, setup.steps)]
        prove([step for step, _ in lines] == steps, f"the steps of rank {rank} are those up to its end, and those from {run.start} on")
        for step, loss in lines:
            prove(loss == expected[step][1], f"rank {rank}, step {step}: {loss} is the loss of the uninterrupted run, {expected[step][1]}")
        equal += len(lines)
        control = losses(broken, rank, "control")
        differ, controls = differ + sum(loss != expected[step][1] for step, loss in control), controls + len(control)
    models = [plain(folder, setup) for folder in (whole, broken)]
    prove(all(map(torch.equal, *(model.parameters() for model in models))), "the weights are equal at the end")
    return Verdict(equal, differ, controls, accuracy(models[1]))


def killed_and_resumed(screen: Screen, setup: Setup, place: Path) -> list[str]:
    """All four runs. Return the lines of the summary."""
    whole, broken = place / "whole", place / "broken"
    whole.mkdir()
    broken.mkdir()
    screen.title("1. A run that nobody kills")
    finished(screen, whole, setup, "training")
    first, last = (float.fromhex(losses(whole, 0)[step][1]) for step in (0, -1))
    screen.line(f"{setup.steps} steps on {RANKS} ranks; the loss of rank 0 went from {first:.3f} to {last:.3f}.")
    screen.title("2. The same run, and rank 1 is killed")
    run = killed(screen, broken, setup, random.randrange(setup.every + 1, setup.steps - 1))  # any step after the first checkpoint will do
    screen.line(f"Rank 1 was killed by SIGKILL in the middle of step {run.step}; its status is {run.status}.")
    screen.line("Rank 0 ended with:")
    screen.line(f"  {run.said}")
    screen.line(f"The last checkpoint is that of step {run.start}.")
    screen.title("3. For comparison: both ranks resumed without the state of graphreg")
    finished(screen, broken, setup, "training", control=True)
    screen.line(f"{len(losses(broken, 0, 'control'))} steps from step {run.start} on.")
    screen.title("4. Both ranks resumed with it")
    finished(screen, broken, setup, "training")
    screen.line(f"{setup.steps - run.start} steps from step {run.start} on.")
    verdict = compared(whole, broken, setup, run)
    differ = f"{verdict.differ} of the {verdict.controls} losses of the run that was resumed without RegularizerState differ"
    return [
        f"a run on {RANKS} ranks was killed in step {run.step}, and resumed from the checkpoint of step {run.start}",
        prove(verdict.equal > 0, f"its {verdict.equal} losses are those of the uninterrupted run, bit for bit; so are its weights"),
        prove(verdict.differ == verdict.controls > 0, f"{differ}, so the comparison can fail"),
        f"accuracy on {TEST} digits that were not trained on: {verdict.accuracy:.1f} %",
    ]


def main() -> None:
    """The four runs, then what came out of them."""
    start, screen = time.perf_counter(), Screen()
    screen.line("graphreg: a sharded run, killed and resumed", style="bold")
    screen.line("A minute on two cores, no network.")
    setup = Setup()
    screen.line(
        f"A transformer of {setup.depth} blocks on scikit-learn's digits: FSDP2, compiled blocks, dropout that rises by a schedule, "
        f"a penalty on weights whose strength changes, and a checkpoint every {setup.every} steps."
    )
    with tempfile.TemporaryDirectory() as place:
        lines = killed_and_resumed(screen, setup, Path(place))
    screen.title("Summary")
    for line in lines:
        screen.line(f"- {line}")
    screen.line(f"- all of this took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
