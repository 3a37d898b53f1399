"""Write the TensorBoard event file of a run."""

import json
import pathlib
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from blip3o_jax import files


class EventFile:
    """Write an event file in the calling thread.

    tensorboardX's SummaryWriter writes in a thread that dies on a full disk, after which the
    caller blocks for ever.

    Raises OSError, with the file's name, where the disk is full or fails.
    """

    def __init__(self, directory: pathlib.Path, start: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._event = Event
        directory.mkdir(parents=True, exist_ok=True)
        # One file for each opening, also of two within a second.
        self._path = directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        with files.writing(self._path):
            self._records = RecordWriter(str(self._path))
            self._add(file_version="brain.Event:2")
            # Hides what an earlier start has written of later steps.
            self._add(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write {tag: value} of a step."""
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Write a uint8 image."""
        from tensorboardX.summary import image

        self._add(step=step, summary=image(name, image_HWC, dataformats="HWC"))

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text verbatim: indented, it is a code block of Markdown."""
        from tensorboardX.summary import text as summary_of

        block = "\n".join(f"    {line}" for line in text.split("\n"))
        self._add(step=step, summary=summary_of(name, block))

    def hparams(self, values: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Write the hyperparameters of the run, to be compared by `metrics`, tags of scalars."""
        from tensorboardX.summary import hparams

        scalar = (bool, int, float, str, type(None))
        known = {k: v if isinstance(v, scalar) else json.dumps(v) for k, v in values.items()}
        experiment, session, _ = hparams(known, dict.fromkeys(metrics, 0.0))
        self._add(summary=experiment)
        self._add(summary=session)

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
