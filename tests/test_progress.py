"""Check the line of progress: its width, its ETA without what happens once, and where it goes."""

import io
import sys

import pytest

from blip3o_jax import progress
from blip3o_jax.progress import Progress


class Clock:
    seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.fixture(autouse=True)
def own_display(monkeypatch):
    """Show no work that an earlier test of this process left unfinished."""
    monkeypatch.setattr(progress, "_display", progress._Display())


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_eta_leaves_out_what_happens_once(clock, capsys):
    with Progress("joint 4/5", 100, before="step", done=40) as work:
        with work.once("compiling", "64 px"):
            assert work.line() == "joint 4/5  step 40/100  compiling"
            clock.seconds += 300
        clock.seconds += 4
        work.update(42, "loss 2")
        assert work.line() == "joint 4/5  step 42/100  ETA 1:56  loss 2"
        with work.once("compiling", "64 px"):  # the step is compiled: its time counts
            clock.seconds += 2
        with work.once("compiling", "96 px"):
            clock.seconds += 300
        work.update(43)
        assert work.line() == "joint 4/5  step 43/100  ETA 1:54"
        work.update(100, now=True)
        clock.seconds += 3  # a last checkpoint: the line is not repeated
    assert capsys.readouterr().err.splitlines() == [
        "joint 4/5  step 40/100  compiling",
        "joint 4/5  step 42/100  ETA 1:56  loss 2",
        "joint 4/5  step 42/100  compiling  loss 2",
        "joint 4/5  step 43/100  ETA 1:54",
        "joint 4/5  step 100/100  took 10:06",
    ]


def test_a_line_has_at_most_80_columns(clock):
    values = [f"metric_{i} {i / 7:.4g}" for i in range(12)]
    with Progress(f"encode {'x' * 90}.tar", 10**6, after="images", shown=False) as work:
        clock.seconds = 1.0
        work.update(1, *values)
        line = work.line()
        assert len(line) <= 80 and "xx.tar  1/1000000 images  ETA 11d 13:46" in line
        assert len(work.line(40)) <= 40
        assert work.line(20) == "1/1000000 images  ET"  # no dots of a title


def test_short_work_prints_nothing_and_lines_keep_their_interval(clock, capsys):
    with Progress("index a.tar", 10) as work:
        work.advance(5)
    assert capsys.readouterr().err == ""
    with Progress("index a.tar", 10) as work:
        for _ in range(10):
            clock.seconds += 2
            work.advance(1)
    assert [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "3/10",
        "6/10",
        "9/10",
        "10/10",
    ]


def test_one_of_several_hosts_is_quiet(clock, capsys):
    progress.set_quiet(True)
    try:
        with Progress("encode", 10) as work, work.once("compiling"):
            work.update(10, now=True)
    finally:
        progress.set_quiet(False)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TTY_INTERACTIVE", "0")])
def test_a_terminal_that_cannot_draw_a_line_again_has_lines(monkeypatch, clock, name, value):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    with Progress("joint", 4) as work:
        clock.seconds += 6
        work.update(2)
        assert terminal.getvalue() == "joint  2/4  ETA 0:06\n"


def test_on_a_terminal_other_lines_come_above_and_the_last_state_stays(monkeypatch):
    """Give nested work a line each; both are gone in the end, but for their last states."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with Progress("joint", 3, before="step") as outer, outer.once("encoding"):
        with Progress("encode", 2) as inner:
            inner.update(2, now=True)
            print("a warning", file=sys.stderr)
        outer.update(3, "loss 1", now=True)
    assert sys.stderr is terminal
    lines = [line.split("\x1b[2K")[-1].strip("\r") for line in terminal.getvalue().split("\n")]
    kept = [line for line in lines if line.startswith(("a warning", "joint  step 3"))]
    assert kept[0] == "a warning"
    assert kept[-1].startswith("joint  step 3/3  took 0:00  loss 1")
    assert "\x1b[?25l" not in terminal.getvalue(), "the cursor stays visible"
