"""SIGTERM: all hosts save the same step and exit with EXIT_PREEMPTED."""

import signal
import threading
from types import TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: "temporary failure, the user is invited to retry". It is none of the statuses of `blip3o` (0, 1, 2,
# 130), of Python, of a shell (126, 127) or of a signal (128 and more), so that a launcher can tell "run me again" from a crash.
EXIT_PREEMPTED = 75


class Preempted(Exception):
    """Raised on all hosts once the step they agreed on is saved."""


class StopRequest:
    """Whether this job was asked to stop (`with StopRequest() as stop: ... stop.due(step)`).

    With several hosts the preemption service of `jax.distributed` holds SIGTERM on each of them; the step it picks is at least
    one ahead of where any host is. A process by itself has a signal handler here: the first SIGTERM is noted, a second one
    ends the process as if nobody had listened.
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._before is not None and not self._noted:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: Any) -> None:
        self._noted = True
        signal.signal(number, self._before)

    def due(self, step: int) -> bool:
        """True at the step that all hosts are to stop after. To be asked at every step, on every host."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted
