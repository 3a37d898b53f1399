"""Run a function in a separate process, and end it in every way."""

import functools
import os
import re
import signal
import sys

import pytest

from blip3o_jax.bench import isolated_process
from blip3o_jax.bench.isolated_process import FAILED, REFUSED
from blip3o_jax.config import UserError


def _answer(text):
    return {"status": "fits", "text": text, "variable": os.environ["BLIP3O_TEST"]}


def _refuse():
    raise UserError("heads do not divide\nof 32 and 12")


def _abort():
    print("reading", flush=True)
    print(
        "F1125 12:00:00.000000 17 rendezvous.cc:96] Check failed: the devices never met",
        file=sys.stderr,
    )
    print("*** a trace of the stack ***", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("work", "row"),
    [
        (functools.partial(_answer, "a"), {"status": "fits", "text": "a", "variable": "1"}),
        (_refuse, {"status": REFUSED, "error": "heads do not divide"}),
        (
            _abort,
            {
                "status": FAILED,
                "error": "the compiling process ended with status -9; where that is -9 memory ran "
                "out on this machine: "
                "F1125 12:00:00.000000 17 rendezvous.cc:96] Check failed: the devices never met",
            },
        ),
    ],
)
def test_what_comes_back(work, row, monkeypatch):
    root = os.path.join(os.path.dirname(__file__), *[".."] * 3)
    monkeypatch.setenv("PYTHONPATH", root)  # where the functions above are found
    assert isolated_process.run_isolated(work, {"BLIP3O_TEST": "1"}) == row


def test_a_bug_is_reported_with_its_type():
    row = isolated_process.run_isolated(functools.partial(int, "x"), {})
    assert row["status"] == FAILED and row["error"].startswith("ValueError: invalid literal")
    assert "isolated_process.py" in row["traceback"]


def test_a_line_is_printed_now_and_then_while_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(isolated_process, "PROGRESS_PERIOD", 0.05)
    assert isolated_process.run_isolated(
        functools.partial(dict, status="done"), {}, "compiling v5p"
    ) == {"status": "done"}
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"compiling v5p: \d+ s so far", line) for line in lines)
