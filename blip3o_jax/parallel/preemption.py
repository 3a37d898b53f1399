"""Stop on SIGTERM: all hosts save the same step and exit with status 75 (exits.PREEMPTED)."""

import ctypes
import signal
import threading
from types import TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from blip3o_jax import exits

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_LIBC = ctypes.CDLL(None)
_LIBC.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
_LIBC.signal.restype = ctypes.c_void_p
_NO_HANDLER = (None, 1)  # SIG_DFL and SIG_IGN, as ctypes reads them


def _handler_address(number: int) -> int | None:
    """Return the address of the C function that handles a signal."""
    action = (ctypes.c_void_p * 32)()  # more than a struct sigaction, which begins with it
    _LIBC.sigaction(ctypes.c_int(number), None, action)
    return action[0]


class Preempted(exits.Stopped):
    """Report, on all hosts, that the job was preempted and the step agreed on is saved."""


class StopRequest:
    """Receive requests to stop this job (`with StopRequest() as stop: ... stop.due(step)`).

    With several hosts the preemption service of `jax.distributed` decides; the step it picks is at
    least one ahead of every host's. SIGTERM reaches the service through the thread that reads the
    signals (exits.py), so that a later Ctrl-C does not interrupt the save.

    In a job of one process this class installs the signal handlers, of SIGHUP too unless it is
    ignored: the first signal requests a stop, a second one ends the process as by default. Before
    the first step there is nothing to save, and the `blip3o` command ends at once (exits.py).
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: dict[signal.Signals, Any] = {}
        self._line = exits.process.stop_line
        self._service: int | None = None  # address of the preemption service's handler of SIGTERM

    def __enter__(self) -> "StopRequest":
        # Python sets signal handlers in the main thread only.
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.distributed.is_initialized():
            self._intercept()
        else:
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
            exits.process.stoppable = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        exits.process.saving = exits.process.stoppable = False
        exits.process.forward_sigterm = None
        if self._service is not None:
            _LIBC.signal(signal.SIGTERM, self._service)
        if not self._noted:
            exits.process.stop_line = self._line
            for number, before in self._before.items():
                signal.signal(number, before)

    def _intercept(self) -> None:
        """Restore Python's handling of SIGTERM, which forwards it to the preemption service.

        `jax.distributed` has replaced Python's handler by the service's. That one only sets a flag,
        which a thread of the service polls, so that it can be called from any thread.
        """
        if not exits.process.installed:  # then nothing would forward the signal
            return
        service = _handler_address(signal.SIGTERM)
        if service in _NO_HANDLER:
            return
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        if service == _handler_address(signal.SIGTERM):
            # It was Python's own handler: jax_enable_preemption_service is off.
            signal.signal(signal.SIGTERM, before)
            return
        self._service = service
        handle = ctypes.CFUNCTYPE(None, ctypes.c_int)(service)
        exits.process.forward_sigterm = lambda: handle(signal.SIGTERM)

    def _note(self, number: int, frame: Any) -> None:
        self._noted = True
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def due(self, step: int) -> bool:
        """Return whether all hosts are to stop after `step`. Call it at every step, on every
        host.
        """
        exits.process.stop_line = ""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted
