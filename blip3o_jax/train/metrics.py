"""Write the metrics of a run to metrics.jsonl, TensorBoard events and the terminal.

Names have the form GROUP/NAME in all of them: train/ for values that the step computes, perf/ for
rates and memory, data/ for the data sets, rl/ for rollouts and rewards, eval/ for previews.
"""

import collections
import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from blip3o_jax import files
from blip3o_jax.config import flat
from blip3o_jax.progress import Progress
from blip3o_jax.train.tensorboard import EventFile

_log = logging.getLogger(__name__)
GROUPS = ("train", "eval", "perf", "data", "rl")
# Metrics that the terminal shows, by the names it has for them.
TERMINAL = {
    "rl/reward": "reward",
    "train/loss": "loss",
    "train/ce": "ce",
    "train/flow": "flow",
    "train/accuracy": "accuracy",
    "train/psnr": "psnr",
    "train/usage": "usage",
    "rl/kl": "kl",
    "train/grad_norm": "grad_norm",
    "perf/examples_per_s": "examples/s",
    "perf/mfu": "mfu",
}
# Metrics that TensorBoard compares the hyperparameters of runs by.
HPARAM_METRICS = ("train/loss", "rl/reward")


class ElapsedTime:
    """Measure the time of a run, from this moment on and, after `resume`, with all before."""

    def __init__(self) -> None:
        self._wall = time.monotonic()
        self._cpu = time.process_time()

    def resume(self, row: Mapping[str, Any]) -> None:
        """Add the time of the run up to `row`, the last that it keeps."""
        self._wall -= row.get("perf/elapsed_seconds", 0.0)  # none in rows of older versions
        self._cpu -= row.get("perf/cpu_seconds", 0.0)

    def read(self) -> dict[str, float]:
        """Return the seconds, and those of CPU time of all threads of this process."""
        return {
            "perf/elapsed_seconds": time.monotonic() - self._wall,
            "perf/cpu_seconds": time.process_time() - self._cpu,
        }


class MetricLog:
    """Write rows of {"step": n, name: value, ...} under `directory`. Opening drops the rows of
    steps past `start`: a resumed run writes them again. Every method raises OSError where the disk
    is full or fails.
    """

    def __init__(self, directory: pathlib.Path, start: int, total: int, title: str):
        self._rows = JsonLines(
            directory / "metrics.jsonl", ("step",), lambda row: row["step"] <= start
        )
        self._events = EventFile(directory / "tensorboard", start)
        self.last_row = self._rows.last_row  # of the run that this one resumes
        self._start = start
        self._progress = Progress(title, total, before="step", done=start)

    def describe(self, config: Mapping[str, Any], command: str) -> None:
        """Write the resolved configuration and the command line to TensorBoard, as text and as
        hyperparameters.
        """
        self._events.text(self._start, "config", json.dumps(config, indent=2))
        self._events.text(self._start, "command", command)
        self._events.hparams(flat(config), HPARAM_METRICS)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row, and show some of it in the terminal."""
        row = {"step": step} | {k: (v if math.isfinite(v) else str(v)) for k, v in values.items()}
        self._rows.write(row)
        self._events.scalars(step, values)
        shown = [f"{name} {values[tag]:.4g}" for tag, name in TERMINAL.items() if tag in values]
        self._progress.update(step, *shown, now=True)

    def once(self, activity: str, key: Hashable = None) -> contextlib.AbstractContextManager[None]:
        """Show what happens once, in place of the ETA; see `Progress.once`."""
        return self._progress.once(activity, key)

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        """Write uint8 images to TensorBoard in one row."""
        self._events.image(step, name, np.concatenate(images_BHWC, axis=1))

    def sync(self) -> None:
        """Flush everything to disk, so that the rows up to a checkpoint's step are there before the
        checkpoint is.
        """
        self._rows.sync()
        self._events.sync()

    def close(self) -> None:
        self._progress.close()
        try:
            self._rows.close()
        finally:
            self._events.close()


class SilentLog:
    """Write nothing: the log of all hosts except host 0, whose metrics are the same."""

    last_row: Mapping[str, Any] = {}

    def describe(self, config: Mapping[str, Any], command: str) -> None: ...

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def once(self, activity: str, key: Hashable = None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Append JSON lines to a file.

    Opening drops rows for which `keep` is false, and all but the last of rows with equal `keys`
    (integers). The file is replaced only if that changes it; a kill at any moment leaves the old
    file or the new one.
    """

    def __init__(
        self, path: pathlib.Path, keys: tuple[str, ...], keep: Callable[[dict[str, Any]], bool]
    ):
        self.path = path
        rows, broken = parse_rows(path, *keys)
        by_key = {tuple(row[key] for key in keys): row for row in rows.values()}
        kept = [row for row in by_key.values() if keep(row)]
        self.last_row: Mapping[str, Any] = kept[-1] if kept else {}  # of those before opening
        text = "".join(json.dumps(row) + "\n" for row in kept)
        before = path.read_bytes() if path.exists() else b""
        if broken:
            damaged = path.with_name(f"{path.name}.damaged")
            shutil.copyfile(path, damaged)
            _log.warning(
                "%s: left out %s; the file as it was is %s", path, _describe(broken), damaged.name
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
    """Return the rows of a file of JSON lines that a run writes; an empty list if there is no file.

    Every row has `keys`, as whole numbers. A last line cut short by a kill is left out, since a
    resumed run writes it again; other malformed lines are left out with a warning that lists them.
    """
    rows, broken = parse_rows(path, *keys)
    if broken:
        _log.warning("%s: left out %s", path, _describe(broken))
    return list(rows.values())


def parse_rows(path: pathlib.Path, *keys: str) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Return ({line number: row}, {line number: what is wrong with the line}), numbered from 1, of
    a file of JSON lines, as `read_rows` does. Blank lines and a last line cut short are in neither.
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


def _describe(broken: dict[int, str]) -> str:
    """Describe the broken lines, like "6 lines (4 no JSON, 2 no object): 3, 7, 12, 13, 15, ..."."""
    if len(broken) == 1:
        ((number, wrong),) = broken.items()
        return f"line {number} ({wrong})"
    counted = ", ".join(
        f"{count} {wrong}" for wrong, count in collections.Counter(broken.values()).items()
    )
    return (
        f"{len(broken)} lines ({counted}):"
        f" {', '.join(map(str, list(broken)[:5]))}{', ...' * (len(broken) > 5)}"
    )
