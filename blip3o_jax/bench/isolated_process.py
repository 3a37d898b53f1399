"""Run a function in a separate process, whose memory is freed with it and whose failure, of any
kind, ends one row of a report only."""

import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from blip3o_jax.config import UserError
from blip3o_jax.config.errors import first_line, type_and_line

Row = dict[str, Any]
REFUSED, FAILED = "refused", "failed"


PROGRESS_PERIOD = 60.0  # seconds


def run_isolated(
    work: Callable[[], Row], environment: Mapping[str, str], name: str = "compiling"
) -> Row:
    """Return what `work`, which can be pickled, returns in a new process; where it raises, or its
    process is killed, a row that says so, with the traceback of an exception that is a bug.
    `environment` is added to this process's own.
    """
    package = pathlib.Path(__file__).parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory(prefix="blip3o-bench-") as scratch:
        work_file, row_file, log_file = (
            pathlib.Path(scratch) / file for file in ("work", "row", "log")
        )
        work_file.write_bytes(pickle.dumps(work))
        with log_file.open("wb") as log:
            command = [
                sys.executable,
                "-m",
                "blip3o_jax.bench.isolated_process",
                str(work_file),
                str(row_file),
            ]
            # The pipe is never written to: it ends when this process does, which ends the child
            # (`_end_with_parent`).
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
            try:
                status = _wait(process, name)
            finally:
                process.kill()
                process.wait()
        if row_file.exists():
            return json.loads(row_file.read_text(encoding="utf-8"))
        lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        # A library that ends the process prints the reason in a line ("F1125 12:00:00.0 ..."),
        # and more after it.
        last = (
            [line for line in lines if re.match(r"F\d{4} ", line)] or lines or ["it said nothing"]
        )[-1:]
        killed = "; where that is -9 memory ran out on this machine" if status < 0 else ""
        return {
            "status": FAILED,
            "error": f"the {name} process ended with status {status}{killed}: {last[0][:300]}",
        }


def _wait(process: subprocess.Popen[bytes], name: str) -> int:
    """Wait for the process and return its exit status; print a line every PROGRESS_PERIOD
    seconds."""
    began = time.monotonic()
    while True:
        try:
            return process.wait(timeout=PROGRESS_PERIOD)
        except subprocess.TimeoutExpired:
            print(f"{name}: {time.monotonic() - began:.0f} s so far", file=sys.stderr, flush=True)


def _end_with_parent() -> None:
    """End this process when the parent ends: the parent never writes, so that its end of the pipe
    closes only then.
    """
    sys.stdin.buffer.read()
    os._exit(1)


def main(work_file: str, row_file: str) -> None:
    """Run the function of `work_file` and write its row to `row_file`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work: Callable[[], Row] = pickle.loads(pathlib.Path(work_file).read_bytes())
    try:
        row = work()
    except UserError as error:
        row = {"status": REFUSED, "error": first_line(error)}
    except Exception as error:
        import traceback

        row = {
            "status": FAILED,
            "error": type_and_line(error)[:400],
            "traceback": traceback.format_exc(),
        }
    pathlib.Path(row_file).write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
