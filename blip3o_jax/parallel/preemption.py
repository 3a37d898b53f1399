"""SIGTERM: all hosts save the same step and exit with status 75 (exits.PREEMPTED)."""

import signal
import threading
from types import TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from blip3o_jax import exits

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Preempted(exits.Stopped):
    """Raised on all hosts once the step they agreed on is saved."""


class StopRequest:
    """Whether this job was asked to stop (`with StopRequest() as stop: ... stop.due(step)`).

    With several hosts the preemption service of `jax.distributed` holds SIGTERM on each of them; the
    step it picks is at least one ahead of where any host is. A process by itself has a signal handler
    here, for SIGHUP too unless it is ignored: the first signal is noted, a second one ends the process
    as if nobody had listened. Before the first step there is nothing to save: there the `blip3o`
    command ends at once (exits.py).
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: dict[signal.Signals, Any] = {}
        self._line = exits.process.stop_line

    def __enter__(self) -> "StopRequest":
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
            exits.process.stoppable = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        exits.process.saving = exits.process.stoppable = False
        if not self._noted:
            exits.process.stop_line = self._line
            for number, before in self._before.items():
                signal.signal(number, before)

    def _note(self, number: int, frame: Any) -> None:
        self._noted = True
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def due(self, step: int) -> bool:
        """True at the step that all hosts are to stop after. To be asked at every step, on every host."""
        exits.process.stop_line = ""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted
