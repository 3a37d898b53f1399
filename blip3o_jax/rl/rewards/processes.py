"""Call functions in spawned processes, each call with a time limit, in runs of days.

    waiting calls --> the first process that is free --> its answer | TimeoutError | ProcessEnded

Every process has its own pipe and one call at a time. So the call of a process that ended is known,
and no shared lock stays held. concurrent.futures breaks its whole pool when a process ends, and
cannot end a call that hangs; pools whose processes share a queue lose a call, or deadlock, when a
process is killed while it holds the queue's lock.
"""

import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from blip3o_jax import exits
from blip3o_jax.config import UserError

MOST_DEATHS = 3  # processes in a row that may end while they start
# Seconds that a process may take to end after its pipe was closed. Then it is killed, and its exit
# code is lost.
ENDING = 5.0

Future = concurrent.futures.Future


class ProcessEnded(Exception):
    """Report that the process of a call ended before it answered. `args`: its exit code, negative
    for a signal."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    future: Future
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    timeout: float

    def settle(self, result: Any = None, error: BaseException | None = None) -> None:
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


@dataclasses.dataclass(eq=False)
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: connection.Connection
    deadline: float  # of its start, then of its call
    ready: bool = False
    call: _Call | None = None


class Processes:
    """Run `workers` processes, started at once.

    Each runs `initializer(*initargs)` first, in up to `start_timeout` seconds. `what` names their
    task in messages. One thread serves all processes and runs the futures' callbacks.
    """

    def __init__(
        self,
        initializer: Callable[..., None],
        initargs: tuple[Any, ...],
        *,
        workers: int,
        start_timeout: float,
        what: str,
    ):
        # Spawn: a fork would copy the threads' locks of JAX in whatever state they are in.
        self._context = multiprocessing.get_context("spawn")
        self._initialise = functools.partial(initializer, *initargs)
        self._start_timeout, self._what = start_timeout, what
        self._lock = threading.RLock()  # guards these three; the rest belongs to the thread
        self._waiting: collections.deque[_Call] = collections.deque()
        self._error: BaseException | None = None  # why no more calls are taken
        self._woken = False
        self._bell, self._button = self._context.Pipe(duplex=False)
        self._deaths = 0
        self._workers = [self._started() for _ in range(workers)]
        self._thread = threading.Thread(target=self._serve, name="processes", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def call(
        self,
        function: Callable[..., Any],
        arguments: Callable[[], tuple[Any, ...]],
        timeout: float = math.inf,
    ) -> Future:
        """Return the future of `function(*arguments())` in one of the processes.

        `arguments` is called when a process is free. The future always completes; its exception is
        the function's, TimeoutError after `timeout` seconds of the call, ProcessEnded, or
        UserError if no process starts.
        """
        call = _Call(Future(), function, arguments, timeout)
        with self._lock:
            if self._error is None:
                self._waiting.append(call)
                self._wake()
                return call.future
        call.settle(error=self._error)
        return call.future

    def drop(self) -> None:
        """Cancel the calls that wait for a process."""
        with self._lock:
            calls = list(self._waiting)
            self._waiting.clear()
        for call in calls:
            call.future.cancel()

    def ready(self) -> int:
        """Return the number of processes that have started, busy ones included."""
        return 0 if self._error is not None else sum(worker.ready for worker in list(self._workers))

    @property
    def error(self) -> BaseException | None:
        """Return the reason why calls are refused, or None."""
        return self._error

    def close(self) -> None:
        """End the processes at once; calls that are not done raise RuntimeError."""
        with self._lock:
            self._error = self._error or RuntimeError(f"the processes of {self._what} are closed")
            self._wake()
        self._thread.join()
        atexit.unregister(self.close)

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._button.send_bytes(b"!")

    def _started(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._initialise), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the process
        return _Worker(process, ours, time.monotonic() + self._start_timeout)

    def _serve(self) -> None:
        try:
            while self._error is None:
                self._hand_out()
                patience = min(worker.deadline for worker in self._workers) - time.monotonic()
                pipes: dict[Any, _Worker] = {worker.pipe: worker for worker in self._workers}
                ready = connection.wait(
                    [self._bell, *pipes], None if patience == math.inf else max(patience, 0.0)
                )
                for pipe in ready:
                    if pipe is self._bell:
                        with self._lock:
                            self._bell.recv_bytes()
                            self._woken = False
                    else:
                        self._hear(pipes[pipe])
                for worker in list(self._workers):
                    if time.monotonic() > worker.deadline:
                        self._end_late(worker)
        except BaseException as e:  # callers must not wait for ever
            self._error = e
            raise
        finally:
            self._give_up()

    def _hand_out(self) -> None:
        for worker in list(self._workers):
            while worker.ready and worker.call is None:
                with self._lock:
                    if not self._waiting:
                        return
                    call = self._waiting.popleft()
                worker.call, worker.deadline = call, time.monotonic() + call.timeout
                try:
                    _send(worker.pipe, (call.function, call.arguments()))
                except OSError:
                    self._bury(worker)
                    break
                except Exception as e:  # arguments that cannot be pickled: the caller's error
                    worker.call, worker.deadline = None, math.inf
                    call.settle(error=e)

    def _hear(self, worker: _Worker) -> None:
        try:
            result, error = _receive(worker.pipe)
        except (EOFError, OSError):
            self._bury(worker)
            return
        except Exception as e:  # an answer that cannot be unpickled
            result, error = None, e
        call = worker.call
        worker.call = None
        worker.deadline = math.inf
        if call is None:
            worker.ready, self._deaths = True, 0
        else:
            call.settle(result, error)

    def _end_late(self, worker: _Worker) -> None:
        if not worker.ready:
            self._stop(
                f"no process of {self._what} has started within {self._start_timeout:g} s: does it "
                "hang?"
            )
            return
        call, worker.call = worker.call, None
        worker.process.kill()
        self._bury(worker)
        if call is not None:  # only a call has a deadline, once the process is ready
            call.settle(error=TimeoutError())

    def _bury(self, worker: _Worker) -> None:
        """Replace a process that has ended or is about to end."""
        worker.process.join(ENDING)
        _kill(worker)
        self._workers.remove(worker)
        self._deaths += not worker.ready
        if self._deaths < MOST_DEATHS:
            self._workers.append(self._started())
        else:
            self._stop(
                f"the processes of {self._what} end while they start: try it alone, outside of a "
                "run"
            )
        if worker.call is not None:
            worker.call.settle(error=ProcessEnded(worker.process.exitcode))

    def _stop(self, message: str) -> None:
        with self._lock:
            self._error = self._error or UserError(message)

    def _give_up(self) -> None:
        for worker in self._workers:
            _kill(worker)
        with self._lock:
            calls = [*(worker.call for worker in self._workers if worker.call), *self._waiting]
            self._waiting.clear()
        for call in calls:
            call.settle(error=self._error)


def _send(pipe: connection.Connection, value: Any) -> None:
    """Send a value, its arrays as raw memory: pickling large images takes longer than sending."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    pipe.send((data, [piece.nbytes for piece in raw]))
    for piece in raw:
        pipe.send_bytes(piece)


def _receive(pipe: connection.Connection) -> Any:
    data, sizes = pipe.recv()
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        pipe.recv_bytes_into(buffer)
    return pickle.loads(data, buffers=buffers)


def _kill(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join(ENDING)  # longer only where the kernel waits for a disk
    worker.pipe.close()


def _work(pipe: connection.Connection, initialise: Callable[[], None]) -> None:
    """Run a process: answer calls by (result, error) until its pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    exits.end_with_parent()
    initialise()
    answer: tuple[Any, BaseException | None] = None, None
    with contextlib.suppress(EOFError, OSError):
        while True:
            try:
                _send(pipe, answer)
            except Exception as e:
                _send(
                    pipe,
                    (None, RuntimeError(f"the answer cannot be sent: {type(e).__name__}: {e}")),
                )
            function, arguments = _receive(pipe)
            try:
                answer = function(*arguments), None
            except BaseException as e:
                answer = None, e
