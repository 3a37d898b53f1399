"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and the terminal (a live bar there, plain lines elsewhere)."""

import json
import math
import pathlib
import sys
import time
from typing import Any

import numpy as np


class MetricLog:
    """Rows of {"step": n, name: value, ...} under `directory`. Rows of steps past `start` are dropped on opening: a resumed run
    writes them again."""

    def __init__(self, directory: pathlib.Path, start: int, total: int, title: str):
        from tensorboardX import SummaryWriter

        self.path = directory / "metrics.jsonl"
        rows = [row for row in read_rows(self.path) if row["step"] <= start]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        self._start, self._total, self._title = start, total, title
        self._began = time.monotonic()
        self._progress: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._progress = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"), console=Console(stderr=True)
            )
            self._task = self._progress.add_task(title, total=total, completed=start, numbers="")
            self._progress.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row, and what the terminal shows of it."""
        row = {"step": step} | {k: (v if math.isfinite(v) else str(v)) for k, v in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        shown = ("reward/mean", "loss", "ce", "flow", "accuracy", "psnr", "usage", "kl", "grad_norm", "examples_per_s", "mfu")
        numbers = "  ".join(f"{k} {values[k]:.4g}" for k in shown if k in values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        else:
            rate = (step - self._start) / max(1e-9, time.monotonic() - self._began)
            left = (self._total - step) / max(1e-9, rate)
            print(f"{self._title}  step {step}/{self._total}  {numbers}  ETA {left:.0f} s", file=sys.stderr, flush=True)

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        """uint8 images, side by side in TensorBoard."""
        self._events.add_images(name, images_BHWC, step, dataformats="NHWC")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._events.close()


class SilentLog:
    """What the other hosts write to: nothing. The numbers are the same on all of them."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None: ...

    def close(self) -> None: ...


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines that a run writes, none where it is not there; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
