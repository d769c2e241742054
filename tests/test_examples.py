"""The demos' studies in small: a few steps and seeds, the shape of what they tell, and what is certain of its direction."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import contractive_study
import digits_resnet
import digits_study
import digits_verdict
import pytest
import recurrent_study
import torch
import trials
from show import Screen
from trials import Entry, choose, collect, difference, interval

import graphreg

SMALL = recurrent_study.Setup(seeds=(0, 1), steps=30, hidden=16, grid={"recurrent_norm": (1.0, 30.0), "recurrent_state": (1.0, 30.0)})

CODES = contractive_study.Setup(seeds=(0, 1), steps=40, hidden=16, grid={"contractive": (0.1, 1.0), "weight_l2": (1.0, 100.0)})


@contextmanager
def here() -> Iterator[Executor]:
    """The studies' workers, in this process: one at a time, so that the seeds of torch's generator are each run's own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def entry(name: str, **measures: list[float]) -> Entry:
    """A row whose outcomes have these measures, a number a seed."""
    rows = [dict(zip(measures, values, strict=True)) for values in zip(*measures.values(), strict=True)]
    return Entry(name, {name: 1.0}, tuple(type("Outcome", (), row) for row in rows))


# --- the recurrent study --------------------------------------------------------------------------------------------


def test_the_recurrent_study(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(recurrent_study, "workers", here)
    lines = recurrent_study.recurrent(Screen(), replace(SMALL, steps=4))
    told = capsys.readouterr().out
    assert [line.partition(": ")[0].rstrip(" 0123456789") for line in lines] == [
        f"longer sequences, {name}" for name in ("plain", "recurrent_norm", "recurrent_state", "plain, tanh")
    ]
    assert "\x1b" not in told and [line for line in told.splitlines() if len(line) > 80] == []
    assert [line.count("*") for line in told.splitlines() if line.startswith("  recurrent_") and ": " in line] == [1, 1]
    rows = [line for line in told.splitlines() if line.startswith("  ") and "±" in line]
    assert [row.split("  ")[1] for row in rows] == ["digits 1-2", "3-8", "9-32", "norm", "drift", "digits 1-2", "9-32", "drift"]
    assert [row.count("±") for row in rows] == [4] * 5 + [2] * 3
    titles = [line.partition(", ")[2].partition(":")[0] for line in lines]
    assert all(f"  {title}" in told for title in titles) and told.count("verdict") == 2


def changes(job: recurrent_study.Job) -> tuple[float, float]:
    """How much the state moves from step to step on the sequences of the training: mean |z_t - z_t-1|², mean (|z_t| - |z_t-1|)²."""
    net = recurrent_study.train(job)
    with torch.no_grad():
        x, _ = recurrent_study.streams(torch.arange(100), 20, recurrent_study.TRAINED, torch.Generator().manual_seed(0))
        states = net.rnn(x)[0]
        return float(states.diff(dim=1).square().sum(-1).mean()), float(states.norm(dim=-1).diff(dim=1).square().mean())


@pytest.mark.parametrize("seed", SMALL.seeds)
def test_a_recurrent_penalty_lowers_what_it_measures(seed: int) -> None:
    plain = changes(recurrent_study.Job({}, seed, SMALL))
    assert changes(recurrent_study.Job({"recurrent_state": 30.0}, seed, SMALL))[0] < 0.8 * plain[0]
    assert changes(recurrent_study.Job({"recurrent_norm": 30.0}, seed, SMALL))[1] < 0.8 * plain[1]


def test_a_run_depends_on_its_job_alone() -> None:
    job = recurrent_study.Job({"recurrent_norm": 1.0}, 0, SMALL)
    first = recurrent_study.run(job)
    torch.rand(3)
    assert recurrent_study.run(job) == first
    assert recurrent_study.run(recurrent_study.Job({}, 0, SMALL)) != first


def test_the_splits_have_no_digit_in_common() -> None:
    parts = [set(part.tolist()) for part in recurrent_study.split(3)]
    assert [len(part) for part in parts] == [recurrent_study.TRAIN, recurrent_study.VALIDATION, 1000]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert set(recurrent_study.split(4)[2].tolist()) == parts[2] and set(recurrent_study.split(4)[0].tolist()) != parts[0]


def test_the_measures_by_hand() -> None:
    """A state that doubles with each digit's last row: drift is 30 doublings, whatever the digits are."""

    class Doubling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            digit = torch.arange(x.shape[1]) // recurrent_study.ROWS
            return (2.0**digit).expand(len(x), -1).unsqueeze(-1), None

    net = recurrent_study.Reader(1, "relu")
    net.rnn = Doubling()  # type: ignore[assignment]
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.arange(10) == 3)  # always names a 3
    outcome = recurrent_study.measure(net, 0)
    assert outcome.norm == 2 and outcome.drift == pytest.approx(30 * 0.30103, rel=1e-5)
    _, labels = recurrent_study.streams(torch.arange(1000), 300, 32, torch.Generator().manual_seed(0))
    for found, part in ((outcome.trained, labels[:, :2]), (outcome.middle, labels[:, 2:8]), (outcome.long, labels[:, 8:])):
        assert found == pytest.approx(100 * (part == 3).double().mean().item())


# --- the contractive study ------------------------------------------------------------------------------------------


def test_the_contractive_study(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(contractive_study, "workers", here)
    lines = contractive_study.contractive(Screen(), replace(CODES, steps=4))
    told = capsys.readouterr().out
    assert [line.partition(": ")[0].split()[1] for line in lines] == ["plain", "contractive", "weight_l2"]
    assert "\x1b" not in told and [line for line in told.splitlines() if len(line) > 80] == []
    assert [line.count("*") for line in told.splitlines() if line.startswith(("  contractive", "  weight_l2")) and ": " in line] == [1, 1]
    rows = [line for line in told.splitlines() if line.startswith("  ") and "±" in line]
    assert [row.split("  ")[1] for row in rows] == ["error", "Jacobian", "moved", "noisy", "neighbour", "error", "Jacobian", "neighbour"]
    assert [row.count("±") for row in rows] == [3] * 5 + [2] * 3
    titles = [line.partition(", ")[2].partition(":")[0] for line in lines]
    assert all(f"  {title}" in told for title in titles) and told.count("verdict") == 2


@pytest.mark.parametrize("seed", CODES.seeds)
def test_contraction_makes_the_jacobian_smaller(seed: int) -> None:
    plain, contracted = (contractive_study.run(contractive_study.Job(keywords, seed, CODES)) for keywords in ({}, {"contractive": 10.0}))
    assert contracted.jacobian < 0.8 * plain.jacobian
    assert contracted.moved < plain.moved and contracted.error > plain.error


def test_the_jacobian_in_closed_form() -> None:
    torch.manual_seed(0)
    net, x = contractive_study.autoencoder(5).double(), torch.rand(3, 64, dtype=torch.float64)
    oracle = torch.func.vmap(torch.func.jacrev(net[:2]))(x)
    torch.testing.assert_close(contractive_study.jacobians(net, x), oracle.flatten(1).norm(dim=1), rtol=1e-12, atol=0)


def test_the_penalty_is_the_mean_square_of_that_norm() -> None:
    """What graphreg trains with is what the study judges by: its exact form, by graphreg, is the closed form's mean square."""
    torch.manual_seed(0)
    net, x = contractive_study.autoencoder(5), torch.rand(3, 64)
    options = {**contractive_study.OPTIONS["contractive"], "estimator": "exact"}
    penalty = graphreg.regularize(net, contractive={"weight": 1.0, **options})(x).penalties["contractive"]
    torch.testing.assert_close(penalty, contractive_study.jacobians(net, x).square().mean())


def test_the_strongest_that_costs_nothing_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    plain = entry("plain", validation=[0.4, 0.6])
    tried = [Entry("c", {"c": weight}, entry("c", validation=[score]).outcomes) for weight, score in ((1, 0.3), (2, 0.5), (4, 0.51))]
    assert contractive_study.choose(Screen(), "c", tried, plain) is tried[1]
    assert contractive_study.choose(Screen(), "c", tried[2:], plain) is tried[2]
    assert capsys.readouterr().out.split() == ["c", "1:", "0.300", "2:", "0.500*", "4:", "0.510", "c", "4:", "0.510*"]


# --- the first demo -------------------------------------------------------------------------------------------------


def test_the_first_demo_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """What part 1 says of its widest numbers, and what part 2 shows before it trains; nothing of it is cut."""
    names, measures = ("plain", *digits_study.GRID, "all four"), ("test", *digits_verdict.MEASURES)
    entries = [entry(name, **{measure: [98.1 - i, 77.4] for measure in measures}) for i, name in enumerate(names)]
    screen, example = Screen(), torch.zeros(2, 3, 32, 32)
    screen.line(digits_verdict.SETUP.format(seeds=10, strengths="Strengths are those that make demo-study chose"))
    for text in (digits_verdict.accuracy_table(entries), digits_verdict.meant_table(entries)):
        screen.block(text)
    for line in (digits_verdict.KEY, digits_verdict.KEY_MEANT, *digits_verdict.summary(entries)):
        screen.line(f"- {line}")
    digits_resnet.show_names_and_plan(screen, digits_resnet.resnet18(num_classes=10), example)
    digits_resnet.show_call(screen)
    told = capsys.readouterr().out.splitlines()
    assert max(map(len, told)) in range(70, 81) and [line for line in told if line.endswith("...")] == []


@pytest.mark.sweep
def test_the_first_demo_in_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """``graphreg demo``, bars included: no line is wider, and none is cut."""
    text = in_a_terminal([sys.executable, "-m", "graphreg", "demo"], 80, tmp_path)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", text)]
    assert "- all of this took" in text and [line for line in lines if len(line) > 80 or re.search(r"\S(\.\.\.|…)$", line)] == []


def in_a_terminal(command: list[str], columns: int, folder: Path) -> str:
    """Run a command in a terminal of so many columns, and return all that it writes there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment) as process:
        os.close(theirs)
        written = bytearray()
        with contextlib.suppress(OSError):  # as the terminal closes
            while part := os.read(ours, 65536):
                written += part
        os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()


# --- what the studies share -----------------------------------------------------------------------------------------


def test_an_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0])  # t(2, 0.975) = 4.30265, standard deviation 1
    assert found.mean == 2 and found.half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert not found.clear and found.verdict("up", "down") == "no effect"
    assert found.text(".2f") == "2.00 [-0.48, 4.48]" and found.short("+.2f") == "+2.00 ± 2.48"
    shifted = difference(entry("a", score=[1.0, 2.0, 4.0]), entry("b", score=[2.0, 3.0, 5.0]), "score")
    assert (shifted.mean, shifted.half) == (-1, 0) and shifted.verdict("up", "down") == "down"


def test_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    tried = [(f"{i}:", entry(f"weight_{i}", validation=scores)) for i, scores in enumerate(([1.0, 3.0], [3.0, 3.0], [2.0, 4.0]))]
    assert choose(Screen(), "highest", tried) is tried[1][1]  # as good as the last, and weaker
    assert choose(Screen(), "lowest", tried, min, ".3f") is tried[0][1]
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["highest", "0:", "2.0", "1:", "3.0*", "2:", "3.0"],
        ["lowest", "0:", "2.000*", "1:", "3.000", "2:", "3.000"],
    ]


def test_outcomes_stay_in_the_order_of_the_seeds() -> None:
    steps: list[int] = []
    with here() as pool:
        found = collect("squares", {}, [pool.submit(pow, seed, 2) for seed in range(4)], lambda: steps.append(1))
    assert found.outcomes == (0, 1, 4, 9) and len(steps) == 4


def test_the_workers_have_one_thread_each() -> None:
    with trials.workers() as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
