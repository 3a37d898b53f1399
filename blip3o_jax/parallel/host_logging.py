"""Log to stderr with the number of the host, whichever library logs.

Libraries install handlers of their own: Orbax's import puts a plain one on the root logger, after
which `logging.basicConfig` does nothing, and absl's replaces the handlers on stderr. So the
handlers on stderr are replaced here, and absl's gets the same formatter.
"""

import logging
import sys
import warnings
from typing import TextIO

from absl import logging as absl_logging

# Orbax logs errors of its threads with a traceback; `Checkpoints.check` and `close` raise them.
_RAISED_AGAIN = (
    "_SignalingThread.run() raised",
    "in background save thread",
    "Save Finalize thread",
)


class HostFormatter(logging.Formatter):
    """Format the message of a record, with `prefix` before each of its lines."""

    def __init__(self, prefix: str) -> None:
        super().__init__("%(message)s")
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).rstrip().split("\n")
        return "\n".join(f"{self.prefix}{line}" for line in lines)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Write to the present `sys.stderr`, which a progress line replaces while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # StreamHandler's would set the stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def log_to_stderr(host: int, hosts: int) -> None:
    """Log the warnings of all hosts, with the number of each except host 0; host 0 also logs the
    choices of this package, such as a kernel.
    """
    formatter = HostFormatter(f"host {host}: " if host else "")
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream in (
            sys.stderr,
            sys.__stderr__,
        ):
            root.removeHandler(handler)
    handler = StderrHandler()
    handler.setFormatter(formatter)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    absl_logging.get_absl_handler().setFormatter(formatter)
    if hosts > 1:
        _log_warnings()
    package = logging.getLogger(__package__.partition(".")[0])
    package.setLevel(logging.NOTSET if host else logging.INFO)
    logging.getLogger("absl").addFilter(_without_traceback)


def _log_warnings() -> None:
    """Log Python's warnings, each in one line without the line of source it names."""
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: (
        f"{filename}:{lineno}: {category.__name__}: {message}"
    )
    logging.captureWarnings(True)


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info:
        record.exc_info = None
        return not any(words in record.getMessage() for words in _RAISED_AGAIN)
    return True
