"""Check how the command ends, with real signals in small processes in its place."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
START = """
import contextlib, os, signal, sys, threading, time
from signal import SIGINT, SIGTERM
from blip3o_jax import exits

exits.INTERRUPT_SECONDS = exits.CLOSING_SECONDS = exits.SHUTDOWN_SECONDS = 0.5
exits.install()
statuses = {"KeyboardInterrupt": 130, "Stopped": 75}

def report(error):
    name = type(error).__name__
    print("reported", name, file=sys.stderr)
    return statuses.get(name, 2)

exits.process.reporter = report

def send(*numbers, then=9):
    for number in numbers:
        os.kill(os.getpid(), number)
    time.sleep(then)

def stoppable():
    signal.signal(SIGTERM, lambda number, frame: None)
    exits.process.stoppable = True

def passed_on(elsewhere=False):  # as on one of several hosts, before its first step
    exits.listen_for_stop("x")
    exits.process.is_stop_announced = lambda: elsewhere
    exits.process.forward_sigterm = lambda: print("passed on", file=sys.stderr)

def closing(close, error=None):
    with contextlib.ExitStack() as stack:
        stack.push(exits.bounded_close(close))
        if error:
            raise error

class Deaf:
    def __del__(self):
        send(SIGINT, then=0.2)

def main():
    try:
        return work() or 0
    except BaseException as error:
        return exits.process.report(error)

def work():
"""


def end(body):
    """Return (status, stderr) of a command whose work is `body`."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    done = subprocess.run(
        [sys.executable, "-c", f"{START}{lines}\nexits.run(main)"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
        preexec_fn=heard,  # a shell that runs the tests in the background has them ignore it
    )
    return done.returncode, done.stderr


SUPPRESSED = """
for i in range(99):
    with contextlib.suppress(BaseException):
        send(*[SIGINT] * (i == 0), then=0.1)
"""
TWICE = """
try:
    send(SIGINT)
finally:
    send(SIGINT)
"""
INTERRUPTED = (130, "reported KeyboardInterrupt\n")
FAILED = (2, "reported ValueError\n")
SAVING = (
    "blip3o: the step in work is being saved, as SIGTERM asked; Ctrl-C again ends at once, "
    "without\n"
)
THREAD = "threading.Thread(target=time.sleep, args=(9,)).start()"


@pytest.mark.parametrize(
    ("body", "ends"),
    [
        ("return 0", (0, "")),
        ("send(SIGINT)", INTERRUPTED),
        (SUPPRESSED, INTERRUPTED),  # in code that lets nothing through
        ("Deaf(); time.sleep(9)", INTERRUPTED),  # in a destructor, where Python swallows it
        (TWICE, INTERRUPTED),
        # Before there is anything to save.
        ("exits.listen_for_stop('x'); send(SIGTERM)", (75, "reported Stopped\n")),
        ("exits.listen_for_stop('x'); send(SIGINT)", INTERRUPTED),
        # SIGTERM's save is not lost to a Ctrl-C after it, but to two.
        ("stoppable(); send(SIGTERM, SIGINT, then=0.3)", (0, SAVING)),
        (
            "stoppable(); send(SIGTERM, SIGINT, SIGINT)",
            (130, SAVING + "reported KeyboardInterrupt\n"),
        ),
        ("passed_on(); send(SIGTERM, SIGINT, then=0.3)", (0, "passed on\n" + SAVING)),
        (
            "passed_on(); send(SIGTERM, SIGINT, SIGINT)",
            (130, "passed on\n" + SAVING + "reported KeyboardInterrupt\n"),
        ),
        ("passed_on(); send(SIGINT)", INTERRUPTED),
        ("passed_on(elsewhere=True); send(SIGINT, then=0.3)", (0, SAVING)),
        (
            "passed_on(elsewhere=True); send(SIGINT, SIGINT)",
            (130, SAVING + "reported KeyboardInterrupt\n"),
        ),
        # Closing that hangs, that fails, that is interrupted; threads that go on.
        ("closing(lambda: time.sleep(9), ValueError)", FAILED),
        ("closing(lambda: 1 / 0, ValueError)", FAILED),
        ("closing(lambda: 1 / 0)", (2, "reported ZeroDivisionError\n")),
        ("closing(lambda: send(SIGINT), ValueError)", FAILED),
        (f"{THREAD}; raise ValueError", FAILED),
        (THREAD, (0, "")),
    ],
)
def test_one_status_and_one_line(body, ends):
    assert end(body) == ends


def test_processes_of_ours_end_with_it(tmp_path):
    """Use a process that ignores SIGTERM, as a scorer that hangs does."""
    pid = tmp_path / "pid"
    body = f"""
import multiprocessing
hang = lambda: (signal.signal(SIGTERM, signal.SIG_IGN), time.sleep(60))
child = multiprocessing.get_context("fork").Process(target=hang)
child.start()
open({str(pid)!r}, "w").write(str(child.pid))
raise ValueError
"""
    assert end(body)[0] == 2
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(pid.read_text()), 0)
            subprocess.run(["sleep", "0.02"], check=True)


@pytest.mark.parametrize(
    "work", ["print('x' * 10**6) or 0", "print('x') or 0", "print('x') or sys.exit(0)"]
)
def test_nobody_reads_the_output(work):
    """Write more than a pipe holds, and so little that it is written at the end; argparse ends
    --help through SystemExit."""
    script = f"import sys; from blip3o_jax import exits; exits.install(); exits.run(lambda: {work})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait(20)) == ("", 141)


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        ("--version >&-", 0, ""),
        ("--version <&- >&- 2>&-", 0, ""),
        ("params --config=nowhere.py 2>&-", 2, ""),
        (
            "--version >/dev/full",
            2,
            "blip3o: error: stdout cannot be written to (No space left on device): send",
        ),
    ],
)
def test_standard_streams_that_take_nothing(arguments, status, line, tmp_path):
    command = f"{sys.executable} -m blip3o_jax {arguments}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", command], env=env, capture_output=True, text=True, timeout=30, cwd=tmp_path
    )
    assert (done.returncode, done.stderr[: len(line) or None]) == (status, line)
    assert done.stderr.count("\n") == bool(line)
