"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and the terminal (a live bar there,
plain lines elsewhere).
"""

import collections
import json
import logging
import math
import os
import pathlib
import shutil
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from blip3o_jax import files

_log = logging.getLogger(__name__)


class MetricLog:
    """Rows of {"step": n, name: value, ...} under `directory`. Rows of steps past `start` are
    dropped on opening: a resumed run writes them again. A disk that is full or fails raises OSError
    in `write`, `images`, `sync` or `close`.
    """

    def __init__(self, directory: pathlib.Path, start: int, total: int, title: str):
        self._rows = JsonLines(
            directory / "metrics.jsonl", ("step",), lambda row: row["step"] <= start
        )
        self._events = _Events(directory / "tensorboard", start)
        self._start, self._total, self._title = start, total, title
        self._began = time.monotonic()
        self._progress: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._progress = Progress(
                *columns,
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task(title, total=total, completed=start, numbers="")
            self._progress.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row, and what the terminal shows of it."""
        row = {"step": step} | {k: (v if math.isfinite(v) else str(v)) for k, v in values.items()}
        self._rows.write(row)
        self._events.scalars(step, values)
        shown = (
            "rl/reward",
            "loss",
            "ce",
            "flow",
            "accuracy",
            "psnr",
            "usage",
            "rl/kl",
            "grad_norm",
            "examples_per_s",
            "mfu",
        )
        numbers = "  ".join(f"{k} {values[k]:.4g}" for k in shown if k in values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        else:
            rate = (step - self._start) / max(1e-9, time.monotonic() - self._began)
            left = (self._total - step) / max(1e-9, rate)
            # In one piece, so that Ctrl-C does not come before the end of the line.
            sys.stderr.write(
                f"{self._title}  step {step}/{self._total}  {numbers}  ETA {left:.0f} s\n"
            )
            sys.stderr.flush()

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        """uint8 images, side by side in TensorBoard."""
        self._events.image(step, name, np.concatenate(images_BHWC, axis=1))

    def sync(self) -> None:
        """Everything so far is on disk when this returns: rows up to a checkpoint are, before that
        exists.
        """
        self._rows.sync()
        self._events.sync()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        try:
            self._rows.close()
        finally:
            self._events.close()


class SilentLog:
    """What the other hosts write to: nothing. The numbers are the same on all of them."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class _Events:
    """TensorBoard's file of a run, written in the calling thread: tensorboardX's own SummaryWriter
    has a thread that dies on a full disk, and then blocks its caller for ever.
    """

    def __init__(self, directory: pathlib.Path, start: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._event = Event
        directory.mkdir(parents=True, exist_ok=True)
        # One file an opening, also of two within a second.
        self._path = directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        with files.writing(self._path):
            self._records = RecordWriter(str(self._path))
            self._add(file_version="brain.Event:2")
            # What an earlier start has written of later steps is hidden.
            self._add(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        from tensorboardX.summary import image

        self._add(step=step, summary=image(name, image_HWC, dataformats="HWC"))

    def sync(self) -> None:
        with files.writing(self._path):
            self._records.flush()

    def close(self) -> None:
        with files.writing(self._path):
            try:
                self._records.flush()
            finally:
                self._records.close()

    def _add(self, **fields: Any) -> None:
        with files.writing(self._path):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class JsonLines:
    """A file of JSON lines that a run appends to. Opening keeps the rows that `keep` is true of,
    the last of those that share `keys` (whole numbers), and replaces the file where that changes
    it; a kill at any moment leaves the old file or the new.
    """

    def __init__(
        self, path: pathlib.Path, keys: tuple[str, ...], keep: Callable[[dict[str, Any]], bool]
    ):
        self.path = path
        rows, broken = parse_rows(path, *keys)
        by_key = {tuple(row[key] for key in keys): row for row in rows.values()}
        text = "".join(json.dumps(row) + "\n" for row in by_key.values() if keep(row))
        before = path.read_bytes() if path.exists() else b""
        if broken:
            damaged = path.with_name(f"{path.name}.damaged")
            shutil.copyfile(path, damaged)
            _log.warning(
                "%s: left out %s; the file as it was is %s", path, _told(broken), damaged.name
            )
        if text.encode() != before:
            files.replace_text(path, text)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, *rows: dict[str, Any]) -> None:
        with files.writing(self.path):
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()

    def sync(self) -> None:
        with files.writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with files.writing(self.path):
            self._file.close()


def read_rows(path: pathlib.Path, *keys: str) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines that a run writes, none where it is not there.

    Rows have `keys`, as whole numbers. A last line cut short by a kill is left out, since a run
    that goes on writes it again; other lines that are no such row are left out with a warning that
    says which.
    """
    rows, broken = parse_rows(path, *keys)
    if broken:
        _log.warning("%s: left out %s", path, _told(broken))
    return list(rows.values())


def parse_rows(path: pathlib.Path, *keys: str) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Return ({number of a line: row}, {number of a line: what is wrong with it}), from 1, of a
    file of JSON lines, as `read_rows` does. Blank lines and a last one cut short are in neither.
    """
    rows, broken = {}, {}
    data = path.read_bytes() if path.exists() else b""
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if line.strip() and number < len(lines):
                broken[number] = "no JSON"
            continue
        if not isinstance(row, dict) or any(type(row.get(key)) is not int for key in keys):
            broken[number] = f"no object with {' and '.join(keys)}" if keys else "no object"
            continue
        rows[number] = row
    return rows, broken


def _told(broken: dict[int, str]) -> str:
    """6 lines (4 no JSON, 2 no object): 3, 7, 12, 13, 15, ..."""
    if len(broken) == 1:
        ((number, wrong),) = broken.items()
        return f"line {number} ({wrong})"
    counted = ", ".join(
        f"{count} {wrong}" for wrong, count in collections.Counter(broken.values()).items()
    )
    return f"{len(broken)} lines ({counted}): {', '.join(map(str, list(broken)[:5]))}{', ...' * (len(broken) > 5)}"
