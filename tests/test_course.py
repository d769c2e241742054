"""The estimate of the demo and of the installation, from usual seconds and from the pace so far; and what the demo's screen says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import show
from course import Course, about, bar
from show import Screen

from loading import loaded

PARTS = {"first": 10.0, "second": 30.0, "third": 20.0}
DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def course(then: float = 0.0) -> tuple[Course, Clock]:
    clock = Clock()
    return Course(PARTS, then, clock), clock


def test_at_first_it_is_what_is_usual() -> None:
    made, clock = course(then=5.0)
    assert (made.left, made.total, made.done) == (65, 65, 0)
    clock.now += 4
    assert (made.left, made.done, made.elapsed) == (61, 4, 4)


def test_the_clock_never_ends_a_part() -> None:
    made, clock = course()
    clock.now += 1000
    assert made.part == "first" and made.done == pytest.approx(9.7) and made.left == pytest.approx(50.3)


def test_slow_steps_make_the_rest_slow_but_not_what_follows() -> None:
    """Twice the usual seconds, of which ten are taken for usual at first: (40 + 10) / (20 + 10) seconds for a usual one."""
    made, clock = course(then=5.0)
    made.begin("second")
    made.reached(1 / 3)
    clock.now += 40
    made.reached(1 / 3)  # nothing new
    assert made.pace == pytest.approx(10 / 30)
    made.reached(1 / 3 + 1e-9)
    assert made.pace == pytest.approx(50 / 30) and made.left == pytest.approx(50 / 30 * 40 + 5)


def test_a_part_that_has_begun_begins_once() -> None:
    made, clock = course()
    made.begin("third")
    made.reached(0.5)
    clock.now += 1
    made.begin("third")
    assert made.done == pytest.approx(50 + 1 / made.pace)


@pytest.mark.parametrize(("seconds", "text"), [(0, "about 5 s"), (42.4, "about 40 s"), (149, "about 150 s"), (200, "about 3 min")])
def test_it_is_said_as_one_says_it(seconds: float, text: str) -> None:
    assert about(seconds) == text


def test_a_bar() -> None:
    assert (bar(0, 4), bar(0.5, 4), bar(1.2, 4)) == ("[----]", "[##--]", "[####]")


def test_in_a_pipe_each_wait_has_lines_with_what_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "QUIET", 0.02)
    screen, done = Screen(), False
    with screen.course(PARTS):
        with screen.progress("second", 2) as advance:
            advance()
            while not done:
                done = "second: " in capsys.readouterr().out
        with screen.expected("third", 99.0):
            while "  ... third: " not in (out := capsys.readouterr().out):
                pass
    assert re.fullmatch(r"(  \.\.\. third: \d+ s so far, about \d+ s left\n)+", out)
    with screen.progress("alone", 3) as advance:  # without a course, it has one of its own
        while "  ... alone: 0 s so far, about 5 s left\n" not in capsys.readouterr().out:
            pass


def test_the_demo_has_seconds_for_each_of_its_parts() -> None:
    """A part without them would raise in the middle of the demo."""
    demo, folder = loaded(DEMO), DEMO.parent
    texts = "".join((folder / name).read_text() for name in ("digits_study.py", "digits_resnet.py"))
    parts = re.findall(r'screen\.(?:progress|expected)\("([^"]+)"', texts)
    assert list(demo.SECONDS) == [demo.IMPORTING, *dict.fromkeys(parts)] and demo.STUDY.keys() == demo.SECONDS.keys()
    assert 50 <= sum(demo.SECONDS.values()) <= 70
