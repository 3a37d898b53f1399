"""Run one side of the comparison in its own process, which works on request and sleeps otherwise.

Parent and worker take turns on a pipe: (method, arguments) one way, ("ok", value), ("user", one
line) or ("bug", traceback) the other. A side is a class with `__init__(task)` and `build(item,
inputs) -> Prepared`; the worker does the rest.
"""

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import multiprocessing
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from blip3o_jax import exits
from blip3o_jax.config import SamplingConfig, UserError
from blip3o_jax.parallel.flags import environment

Arrays = dict[str, np.ndarray]
# Name of a side -> the module that has it, as `Side`.
SIDES = {
    "jax": "blip3o_jax.bench.peer.jax_side",
    "torch": "blip3o_jax.bench.peer.torch_side",
    "torch_compiled": "blip3o_jax.bench.peer.torch_side",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Hold the settings that all items of a side share."""

    side: str
    directory: pathlib.Path
    device: str  # cpu or gpu
    threads: int
    jax_devices: int  # that a CPU is split into
    batch_size: int
    settings: SamplingConfig
    image_token_offset: int  # vocabulary id of the first codebook entry


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Hold an item ready to run.

    `call` does the work once and returns when it is done; its value stays on the device. `outputs`
    makes arrays to compare out of it, those of the first `checks` calls. `shared` goes to the other
    sides' inputs. `cost`: figures of the work, for the report. `memory`: the device's peak in
    bytes, where it is known.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], Arrays] | None = None
    checks: int = 1
    shared: Arrays = dataclasses.field(default_factory=dict)
    cost: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: Callable[[], int] | None = None


class Worker:
    """Drive a side's process from the parent. Every method waits for its answer."""

    def __init__(self, task: Task):
        context = multiprocessing.get_context("spawn")
        self.side = task.side
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()

    def request(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker. UserError for what a user can cure, RuntimeError for all
        else.
        """
        try:
            self._pipe.send((method, arguments))
            kind, value = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join(10)
            raise UserError(
                f"bench peer: the {self.side} process ended with status {self._process.exitcode} "
                f"in {method!r}; where that is "
                "-9 memory ran out: lower --batch_size"
            ) from error
        if kind == "user":
            raise UserError(value)
        if kind == "bug":
            raise RuntimeError(f"in the {self.side} process:\n{value}")
        return value

    def close(self) -> None:
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.terminate()


def _serve(pipe: Connection, task: Task) -> None:
    """Answer the parent's requests until its end of the pipe closes."""
    os.dup2(2, 1)  # stdout is the parent's, for its table
    exits.end_with_parent()
    _set_environment_of(task)
    try:
        runner = _Runner(importlib.import_module(SIDES[task.side]).Side, task)
    except Exception as error:
        runner, broken = None, _error_reply(error)
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send(("ok", getattr(runner, method)(*arguments)) if runner else broken)
        except KeyboardInterrupt:
            return
        except Exception as error:
            pipe.send(_error_reply(error))


def _error_reply(error: Exception) -> tuple[str, str]:
    if isinstance(error, UserError):
        return "user", str(error)
    return "bug", "".join(traceback.format_exception(error))


def _set_environment_of(task: Task) -> None:
    """Set the cores and devices of this process before any library reads them."""
    if hasattr(os, "sched_setaffinity"):
        # Pinned: XLA and PyTorch size their thread pools by the cores they may run on.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    os.environ["OMP_NUM_THREADS"] = str(task.threads)
    os.environ["JAX_PLATFORMS"] = "cpu" if task.device == "cpu" or task.side != "jax" else "cuda"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = (
        "false"  # the other sides need memory of the same device
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if task.device == "cpu":
        os.environ.update(environment("cpu", os.environ))


class _Runner:
    """Serve the parent's requests."""

    def __init__(self, side: Callable[[Task], Any], task: Task):
        self._side = side(task)
        self._base = resident_bytes()
        self._item: Prepared | None = None

    def describe(self) -> dict[str, Any]:
        return self._side.describe() | {
            "environment": {name: os.environ[name] for name in ("XLA_FLAGS",) if name in os.environ}
        }

    def start(self, item: str, inputs: Arrays) -> dict[str, Any]:
        """Build an item and run it until it is warm. The seconds of the first call are mostly
        compiling."""
        began = time.monotonic()
        prepared = self._side.build(item, inputs)
        built = time.monotonic()
        outputs, seconds = [], []
        for index in range(max(2, prepared.checks)):
            called = time.monotonic()
            value = prepared.call()
            seconds.append(time.monotonic() - called)
            if prepared.outputs is not None and index < prepared.checks:
                outputs.append(prepared.outputs(value))
            del value
        self._item = prepared
        gc.collect()
        _trim()
        _reset_peak()
        merged = (
            {name: np.stack([o[name] for o in outputs]) for name in outputs[0]} if outputs else {}
        )
        return {
            "build_s": built - began,
            "first_s": seconds[0],
            "warm_s": seconds[-1],
            "outputs": merged,
            "shared": prepared.shared,
            "cost": prepared.cost,
        }

    def repeat(self, times: int) -> list[float]:
        """Return the seconds of each of `times` calls. The one before them is not counted: it finds
        the caches as the other sides have left them, and memory that went back to the system.
        """
        item = self._started()
        item.call()
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            value = item.call()
            seconds.append(time.perf_counter() - began)
            del value
        return seconds

    def finish(self) -> int | None:
        """Release the item; return the peak memory of its calls: on the device where that is known,
        else of the process beyond the memory of its libraries."""
        item = self._started()
        if item.memory is not None:
            peak: int | None = item.memory()
        else:
            peak = _peak_bytes()
            peak = None if peak is None else peak - self._base
        self.abandon()
        return peak

    def _started(self) -> Prepared:
        if self._item is None:
            raise RuntimeError("no item has been started")
        return self._item

    def abandon(self) -> None:
        """Drop an item, also one that did not start."""
        self._item = None
        self._side.release()
        gc.collect()


def _status(name: str) -> int | None:
    try:
        text = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return _status("VmRSS") or 0


def _peak_bytes() -> int | None:
    return _status("VmHWM")


def _trim() -> None:
    """Return freed heap to the system (glibc), such as what compilers leave."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    """Reset the peak resident memory (Linux)."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        print(f"peer  the peak of memory is that of the whole process: {error}", file=sys.stderr)
