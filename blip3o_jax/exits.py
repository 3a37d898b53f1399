"""End the process with one status and one line, in bounded time. docs/pods.md has the table of
statuses.

    error --> closing, CLOSING_SECONDS at most --> its line --> leave(status)
    SIGINT --> KeyboardInterrupt in the main thread, or after INTERRUPT_SECONDS its line and the end
    SIGINT again, or while a failed run is closing --> ends at once

A thread reads the signals, since the main thread cannot while it compiles or waits for a device.
Nothing heavy is imported here, so that `install` comes before everything else; without it (as a
library, in tests) signals are left as they are.
"""

import _thread
import contextlib
import io
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

BUG = 1
USER_ERROR = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "temporary failure, the user is invited to retry"
INTERRUPTED = 128 + signal.SIGINT
LOST_PEER = 128 + signal.SIGKILL  # a host that was killed takes the others along, with its status
BROKEN_PIPE = 128 + signal.SIGPIPE

# With several hosts an error ends the process after CLOSING_SECONDS, the time of `peers.lost` (2
# ANSWER + STILL, 15 s) and NOTIFY_SECONDS: 29 seconds at most, within the 30 s that a Spot machine
# is given.
CLOSING_SECONDS = 12.0  # seconds that closing may take after an error
INTERRUPT_SECONDS = 10.0  # seconds until Ctrl-C has reached the main thread and it has closed
NOTIFY_SECONDS = 2.0  # seconds for notifying the other hosts
SHUTDOWN_SECONDS = 20.0  # seconds that the interpreter may take to end after success

Reporter = Callable[[BaseException], int | None]


def _traceback(error: BaseException) -> int:
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(error)
    return BUG


class _Process:
    """Hold the state of this process; `installed`: whether this module handles its signals and
    end.
    """

    def __init__(self) -> None:
        self.installed = False
        self.reporter: Reporter = _traceback
        self.restart_hint = "run the same command again"
        self.detach()
        self.saving = False  # SIGTERM was noted: the run saves its step and ends
        self.stoppable = False  # a run listens for SIGTERM
        # Passes SIGTERM to the service that decides where all hosts stop.
        self.forward_sigterm: Callable[[], None] | None = None
        # While set, there is nothing to save: signals end the process at once, SIGTERM with this
        # line.
        self.stop_line = ""
        self.done = False  # the command is over, with success
        # Reentrant: `_interrupt` may run in the main thread while it holds the lock.
        self._lock = threading.RLock()
        self._error: BaseException | None = None  # why it closes
        self._reported = False
        self._line = ""
        self._interrupts = 0
        self._raised_sigints = 0  # SIGINTs raised here and not yet handled
        self._raise_pending = False  # whether the next one is raised

    def detach(self) -> None:
        """Reset the hooks of a job of several hosts, before it is joined and after it is left."""
        self.prefix = ""  # of the line that reports the end, such as "host 1: "
        # Returns the lost host behind an error, or the error.
        self.find_cause: Callable[[BaseException], BaseException] = lambda error: error
        self.notify_peers: Callable[[int, str], None] = lambda status, line: None
        self.announce_stop: Callable[[], None] = lambda: None  # of SIGTERM here, to the others
        self.is_stop_announced: Callable[[], bool] = lambda: False  # by any of them

    def install(self) -> None:
        self.installed = True
        _open_streams()
        sys.unraisablehook = self._unraisable
        if (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):  # a shell may have it ignored
            signal.signal(signal.SIGINT, self._interrupt)
        # Python's C handler writes each signal's number to this pipe at once; `_listen` reads it in
        # its thread, whatever the main thread does.
        read, self._wake = os.pipe()
        # As `set_wakeup_fd` requires: a handler must not block on a full pipe.
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt in the main thread, if the signals' thread has decided to.

        Python runs handlers in the order of the signals' numbers, not of their arrival, so that
        only that thread knows whether SIGTERM came before Ctrl-C.
        """
        if self._raise_pending and not self._reported:
            self._raise_pending = False
            if _importing(frame):  # an exception in the middle of an import crashes libraries
                self.end(KeyboardInterrupt())
            raise KeyboardInterrupt

    def _listen(self, read: int) -> None:
        while True:
            for number in os.read(read, 64):
                if number == signal.SIGINT:
                    self._on_sigint()
                elif number == signal.SIGTERM and self.forward_sigterm is not None:
                    self.saving = True
                    self.forward_sigterm()
                    self.announce_stop()
                elif number in (signal.SIGTERM, signal.SIGHUP):
                    if self.stop_line:
                        self.end(Stopped(self.stop_line))
                    self.saving = self.saving or self.stoppable
                # From `_unraisable`; the destructor that was interrupted needs a moment to end.
                elif number == 0:
                    time.sleep(0.05)
                    self._raise_in_main()

    def _on_sigint(self) -> None:
        """Handle one Ctrl-C."""
        if self._raised_sigints:
            # `interrupt_main` simulates a SIGINT, which arrives here again.
            self._raised_sigints -= 1
            return
        self._interrupts += 1
        if self.done:
            self.leave(0)
        if self.forward_sigterm is not None and not self.saving and self._interrupts == 1:
            self.saving = self.is_stop_announced()  # SIGTERM came to another host
        nothing_to_save = self.stop_line and not self.saving
        if self._error is not None or self._interrupts > 1 or nothing_to_save:
            self.end(self._error or KeyboardInterrupt())
        elif self.saving:
            _print(
                "blip3o: the step in work is being saved, as SIGTERM asked; Ctrl-C again ends at"
                " once, without"
            )
        else:
            self._raise_in_main()
            self._deadline(KeyboardInterrupt(), INTERRUPT_SECONDS)

    def _raise_in_main(self) -> None:
        self._raised_sigints += 1
        self._raise_pending = True
        _thread.interrupt_main()

    def closing(self, error: BaseException) -> None:
        """Bound closing because of `error`: the process ends after CLOSING_SECONDS at most."""
        with self._lock:
            if self.installed and self._error is None and not self._reported:
                self._error = error
                self._deadline(error, CLOSING_SECONDS)

    def _deadline(self, error: BaseException, seconds: float) -> None:
        def end() -> None:
            time.sleep(seconds)
            self.end(error)

        threading.Thread(target=end, name="deadline", daemon=True).start()

    def report(self, error: BaseException) -> int | None:
        """Report the error that ends the process, unless another thread is reporting one.

        That thread then ends the process.
        """
        with self._lock:
            reported = self._reported
            self._reported = self.installed
        if reported:
            # Waits for ever: the other thread ends the process.
            threading.Event().wait()
        return self.reporter(error)

    def end(self, error: BaseException) -> None:
        error = self.find_cause(error)
        status = self.report(error)
        self.leave(_traceback(error) if status is None else status)

    def leave(self, status: int) -> None:
        """End the process and its child processes, even if threads are blocked."""
        self._reported = True
        notifying = threading.Thread(
            target=self.notify_peers, args=(status, self._line), daemon=True
        )
        notifying.start()
        notifying.join(NOTIFY_SECONDS)
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                # Reward processes and data workers, which would outlive this process.
                child.kill()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # Not `sys.exit`: other threads may hold locks or wait for a device that never answers.
        os._exit(status)

    def print_line(self, line: str) -> None:
        self._line = line
        echoed = "\n" if self._interrupts and sys.stderr.isatty() else ""  # the terminal's ^C
        _print(f"{echoed}{self.prefix}{line}")

    def _unraisable(self, unraisable: Any) -> None:
        """Handle an exception that nobody can catch.

        A Ctrl-C that came in a destructor or in a callback of the garbage collector is raised once
        more. Coroutines whose event loop is closed are left out: Orbax drops some where a save
        fails, which is reported.
        """
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            os.write(self._wake, b"\0")  # the other thread raises it, once this is over
            return
        closed = isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(
            unraisable.exc_value
        )
        if not (closed or self._reported or self._error is not None):
            sys.__unraisablehook__(unraisable)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class RunEnded(Exception):
    """End a run in one line with its class's status, for causes other than a user's mistake."""

    status = LOST_PEER


class Stopped(RunEnded):
    """Report that SIGTERM reached a run that has nothing to save, or has saved it."""

    status = PREEMPTED


class _Stdout(io.TextIOWrapper):
    """Name the standard output in errors of writing, in which the system names no file.

    `flush` raises an error again that a writer has ignored, as argparse does.
    """

    failed: OSError | None = None

    def write(self, text: str) -> int:
        with self._naming():
            return super().write(text)

    def flush(self) -> None:
        with self._naming():
            super().flush()
        if self.failed is not None:
            raise self.failed

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = OSError(error.errno, error.strerror, "stdout")
            raise self.failed from error


def _open_streams() -> None:
    """Open the standard streams that the parent has closed (`>&-`) on /dev/null.

    Python has None for such a stream, and the next file to be opened would get its number, and
    with it what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    old = sys.stdout
    if type(old) is io.TextIOWrapper:
        encoding = old.encoding
        errors = old.errors
        lines = old.line_buffering
        through = old.write_through
        # `detach`: two wrappers of one buffer would both flush and close it.
        new = _Stdout(old.detach(), encoding, errors, line_buffering=lines, write_through=through)
        for name in ("stdout", "__stdout__"):
            setattr(sys, name, new)


def stdout_line(error: BaseException) -> str | None:
    """Return the line for an error of writing to the standard output, None for another."""
    if isinstance(error, OSError) and error.filename == "stdout":
        return f"stdout cannot be written to ({error.strerror}): send the output elsewhere"
    return None


process = _Process()


def install() -> None:
    """Handle SIGINT and report the end of the process; called once by the command, before anything
    heavy is imported.
    """
    process.install()


def listen_for_stop(line: str) -> None:
    """End the process at SIGTERM and SIGHUP with `line` and status 75, until a run can save."""
    if process.installed:
        process.stop_line = line
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda number, frame: None)


def bounded_close(close: Callable[[], object]) -> Callable[[Any, BaseException | None, Any], None]:
    """Return a callback for `ExitStack.push` that calls `close()`.

    If the block has failed, the call is bounded in time, and its errors become notes of the
    block's error.
    """

    def exit(kind: Any, error: BaseException | None, where: Any) -> None:
        if error is not None and not isinstance(error, Stopped):
            process.closing(error)
        try:
            close()
        except BaseException as later:
            if error is None:
                raise
            error.add_note(f"while closing: {type(later).__name__}: {later}")

    return exit


def is_broken_pipe(error: BaseException) -> bool:
    """Return whether nobody reads this process's output any more, as after `| head`."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # POLLERR is always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run(main: Callable[[], int]) -> None:
    """Run a command and end the process with its status."""
    try:
        try:
            status = main()
        except SystemExit as error:  # of argparse, after --help among others
            status = error.code if isinstance(error.code, int) else BUG
        sys.stdout.flush()
        process.done = status == 0
    except KeyboardInterrupt:  # before the command line was read
        process.print_line(f"blip3o: interrupted; {process.restart_hint}")
        status = INTERRUPTED
    except BaseException as error:
        status = BROKEN_PIPE if is_broken_pipe(error) else _unwritten(error)
    if status:
        process.leave(status)
    # Threads of libraries are not waited for without end.
    threading.Thread(target=_leave_late, name="shutdown", daemon=True).start()


def _unwritten(error: BaseException) -> int:
    line = stdout_line(error)
    if line is None:
        return _traceback(error)
    process.print_line(f"blip3o: error: {line}")
    return USER_ERROR


def _leave_late() -> None:
    time.sleep(SHUTDOWN_SECONDS)
    process.leave(0)


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def end_with_parent() -> None:
    """End this process when its parent ends, which may be killed; call it first in a child.

    A thread waits for the parent, since the main thread may hang in a call. Does nothing in a
    process that multiprocessing has not started.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(BUG)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
