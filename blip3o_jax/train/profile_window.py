"""Trace a window of a run's steps with JAX's profiler.

Each host writes its trace below WORKDIR/tensorboard/plugins/profile/, where TensorBoard's profile
plugin and XProf find it. Network blocks have their names in it (`jax.named_scope`), steps their
numbers.
"""

import logging
import pathlib
from typing import Any

import jax

from blip3o_jax.config.errors import first_line

_log = logging.getLogger(__name__)


class ProfileWindow:
    """Trace the steps `first` .. `last` of a run; `window` None traces none.

    A trace that cannot be made or written is a warning: it does not end the run.
    """

    def __init__(self, directory: pathlib.Path, window: tuple[int, int] | None):
        self._directory = directory
        self._first, self._last = window or (0, -1)
        self._tracing = False

    def before_step(self, step: int) -> None:
        """Start the trace before the first step of the window, or of a run resumed within it."""
        if self._tracing or not self._first <= step <= self._last:
            return
        try:
            jax.profiler.start_trace(str(self._directory))
        except Exception as error:  # RuntimeError of XLA, OSError
            self._give_up(error)
            return
        self._tracing = True

    def after_step(self, step: int, outputs: Any) -> None:
        """Write the trace once the last step's `outputs` are computed."""
        if self._tracing and step >= self._last:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Write the trace of a window that the run's end cuts short."""
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # RuntimeError of XLA, OSError
            self._give_up(error)
            return
        _log.info("the trace of the profiler is under %s", self._directory)

    def _give_up(self, error: Exception) -> None:
        self._first, self._last = 0, -1
        _log.warning("profile_steps: no trace under %s: %s", self._directory, first_line(error))
