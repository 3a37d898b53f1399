"""How the command ends, with real signals in small processes that stand in for it."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
START = """
import contextlib, gc, os, signal, sys, threading, time
from blip3o_jax import exits
exits.PATIENCE = exits.CLOSING = exits.SHUTDOWN = 0.5
exits.install()
exits.process.report = lambda error: print("told", type(error).__name__, file=sys.stderr) or (130 if isinstance(error, KeyboardInterrupt) else 75 if isinstance(error, exits.Stopped) else 2)
send = lambda *numbers: [os.kill(os.getpid(), number) for number in numbers]
def main():
    try:
        return work() or 0
    except BaseException as error:
        return exits.process.tell(error)
def work():
"""


def end(body):
    """(status, stderr) of a command whose work is `body`."""
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


INT, TERM = "signal.SIGINT", "signal.SIGTERM"
IN_C = "time.sleep(9)"


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ("return 0", 0, ""),
        (f"send({INT}); {IN_C}", 130, "told KeyboardInterrupt\n"),
        # In code that lets nothing through, such as a library's.
        (f"for _ in range(99):\n    with contextlib.suppress(BaseException):\n        send({INT}) if not _ else None; time.sleep(0.1)", 130, "told KeyboardInterrupt\n"),
        # In a destructor Python itself swallows it.
        (f"class A:\n    def __del__(self): send({INT}); time.sleep(0.2)\nA(); {IN_C}", 130, "told KeyboardInterrupt\n"),
        (f"try:\n    send({INT}); {IN_C}\nfinally:\n    send({INT}); time.sleep(9)", 130, "told KeyboardInterrupt\n"),
        # SIGTERM before there is anything to save, and Ctrl-C then.
        (f"exits.listen_for_stop('stopped'); send({TERM}); {IN_C}", 75, "told Stopped\n"),
        (f"exits.listen_for_stop('stopped'); send({INT}); {IN_C}", 130, "told KeyboardInterrupt\n"),
        # SIGTERM's save is not lost to a Ctrl-C, but to two.
        (f"signal.signal({TERM}, lambda *_: None); exits.process.stoppable = True; send({TERM}, {INT}); time.sleep(0.3)", 0, "blip3o: the step in work is being saved, as SIGTERM asked; Ctrl-C again ends at once, without\n"),
        (f"signal.signal({TERM}, lambda *_: None); exits.process.stoppable = True; send({TERM}, {INT}, {INT}); time.sleep(9)", 130, "told KeyboardInterrupt\n"),
        # Closing that hangs, closing that fails, and threads that go on.
        ("with contextlib.ExitStack() as stack:\n    stack.push(exits.pushed(lambda: time.sleep(9)))\n    raise ValueError", 2, "told ValueError\n"),
        ("with contextlib.ExitStack() as stack:\n    stack.push(exits.pushed(lambda: 1 / 0))\n    raise ValueError", 2, "told ValueError\n"),
        ("with contextlib.ExitStack() as stack:\n    stack.push(exits.pushed(lambda: 1 / 0))", 2, "told ZeroDivisionError\n"),
        (f"with contextlib.ExitStack() as stack:\n    stack.push(exits.pushed(lambda: (send({INT}), time.sleep(9))))\n    raise ValueError", 2, "told ValueError\n"),
        ("threading.Thread(target=time.sleep, args=(9,)).start(); raise ValueError", 2, "told ValueError\n"),
        ("threading.Thread(target=time.sleep, args=(9,)).start()", 0, ""),
    ],
)
def test_one_status_and_one_line(body, status, told):
    found, err = end(body)
    if status == 130 and "being saved" in err:
        err = "".join(err.splitlines(keepends=True)[1:])
    assert (found, err) == (status, told)


def test_processes_of_ours_end_with_it(tmp_path):
    """One that ignores SIGTERM, as a scorer that hangs does."""
    pid = tmp_path / "pid"
    body = (
        "import multiprocessing\n"
        f"child = multiprocessing.get_context('fork').Process(target=lambda: (signal.signal({TERM}, signal.SIG_IGN), time.sleep(60)))\n"
        f"child.start(); open({str(pid)!r}, 'w').write(str(child.pid)); raise ValueError"
    )
    assert end(body)[0] == 2
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(pid.read_text()), 0)
            subprocess.run(["sleep", "0.02"], check=True)


def test_nobody_reads_the_output():
    command = f"{sys.executable} -m blip3o_jax --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.strip() in ("0", "141") and done.stderr == ""
