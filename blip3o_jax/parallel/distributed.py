"""Join a job of several hosts, check that they are consistent, synchronize them and leave the job.

A host here is one process of a job: on a TPU slice one per machine, under Slurm one per task. Host
0 runs the coordinator of `jax.distributed`, logs for all and writes the files that exist once per
job. Errors of another host carry its number.
"""

import atexit
import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax

from blip3o_jax import config as config_lib
from blip3o_jax import exits, files, progress
from blip3o_jax.config import UserError
from blip3o_jax.config.errors import first_line
from blip3o_jax.parallel import peers as peers_lib
from blip3o_jax.parallel.host_logging import log_to_stderr
from blip3o_jax.parallel.preemption import Preempted

METHODS = ("auto", "off", "tpu", "slurm")
# Packages that the numbers depend on, in addition to the source files: hosts must have the same.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
_PREFIX = "blip3o"  # of all keys and barriers
# The line of an XLA error that names the collectives' library on CPUs and GPUs.
_COLLECTIVE = re.compile(r"[^\n]*\b(gloo|nccl)\b[^\n]*", re.IGNORECASE)
_uses: collections.Counter[str] = collections.Counter()
_peers: list[peers_lib.Peers] = []  # one, in a job of several hosts


@dataclasses.dataclass(frozen=True)
class Launch:
    """Describe how this process joins the job.

    `method` is one of METHODS. The other three fields are given together, and replace it.
    """

    method: str = "auto"
    coordinator: str | None = None  # HOST:PORT of host 0
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        flags = {
            f"--{name}": getattr(self, name)
            for name in ("coordinator", "num_processes", "process_id")
        }
        missing = [name for name, value in flags.items() if value is None]
        if missing and len(missing) < len(flags):
            raise UserError(
                "--coordinator, --num_processes and --process_id go together:"
                f" {' and '.join(missing)} not given"
            )
        if not missing and self.method != "auto":
            raise UserError(
                f"--distributed={self.method} and --coordinator exclude each other: leave one of"
                " them out"
            )
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            return
        if not self.coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator={self.coordinator} names no port: give it as HOST:PORT")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process_id={self.process_id} must lie in 0 .. {self.num_processes - 1}"
                " (--num_processes - 1)"
            )

    def resolved(self) -> str:
        """Return "flags", "slurm", "tpu" or "off"."""
        if self.coordinator is not None:
            return "flags"
        if self.method != "auto":
            return self.method
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
            return "slurm"
        # Device files rather than `jax.devices()`: reading JAX's devices starts the backend, after
        # which a process cannot join a job any more.
        chips = any(
            next(pathlib.Path("/dev").glob(pattern), None)
            for pattern in ("accel[0-9]*", "vfio/[0-9]*")
        )
        return "tpu" if chips and importlib.util.find_spec("libtpu") else "off"


def initialize(launch: Launch) -> None:
    """Join the job: call this before any access to JAX's devices."""
    method = launch.resolved()
    if method == "off":
        return
    # CPU devices of several hosts need gloo for their collectives.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    settings: dict[str, Any] = {"heartbeat_timeout_seconds": peers_lib.RUNTIME_TIMEOUT}
    if method == "flags":
        settings |= {
            "coordinator_address": launch.coordinator,
            "num_processes": launch.num_processes,
        }
        settings |= {"process_id": launch.process_id, "cluster_detection_method": "deactivate"}
    elif method == "slurm":
        # Without this, JAX would read the metadata of a TPU machine first.
        settings |= {"cluster_detection_method": "slurm"}
    try:
        with peers_lib.without_stack_trace():
            jax.distributed.initialize(**settings)
    except (RuntimeError, ValueError, KeyError) as error:
        how = launch.coordinator if method == "flags" else f"--distributed={method}"
        raise UserError(
            f"the hosts did not find each other through {how}: {first_line(error)}"
        ) from error
    if process_count() > 1:
        # The heartbeats start with the job: a host that is lost while another still opens its data
        # is found too.
        _peers.append(peers_lib.Peers(_runtime().client, process_index(), process_count()))
        _peers[0].start()
        exits.process.prefix = f"host {process_index()}: "
        progress.set_quiet(process_index() > 0)
        exits.process.find_cause = _cause
        exits.process.notify_peers = _peers[0].notify_peers
        exits.process.announce_stop = _peers[0].announce_stop
        exits.process.is_stop_announced = _peers[0].is_stop_announced


def set_phase(phase: str, step: int) -> None:
    """Publish this host's phase and step, which the other hosts report if the host is lost."""
    for peers in _peers:
        peers.phase = phase
        peers.step = step


def run(launch: Launch, job: Callable[[], object]) -> int:
    """Join the job, run it, leave it, and return the exit status.

    In a job of several hosts an error notifies the other hosts (peers.py) and ends this process.
    """
    initialize(launch)
    log_to_stderr(process_index(), process_count())
    try:
        job()
        status = 0
    except Preempted as stopped:
        log_host0(f"{stopped}; the same command goes on from there")
        status = exits.PREEMPTED
    except InconsistentHosts as error:  # raised on all hosts, so reported once
        if process_index() == 0:
            exits.process.prefix = ""
            exits.process.reporter(error)
        status = exits.USER_ERROR
    except BaseException as error:
        if process_count() == 1:
            raise
        exits.process.end(error)
    if process_count() > 1:
        try:
            barrier("end", 300.0)
        except RuntimeError as error:
            exits.process.end(error)
        _peers[0].close()
        # JAX has registered its shutdown for the interpreter's exit too; the next line does it now.
        atexit.unregister(jax.distributed.shutdown)
        jax.distributed.shutdown()
        _peers.clear()
        exits.process.detach()
        progress.set_quiet(False)
    return status


def _cause(error: BaseException) -> BaseException:
    """Return the lost host that caused `error`, else the failed connection, else `error` itself.

    When a host is lost, collectives and barriers fail on the others with errors that do not name
    it.
    """
    ours = (
        isinstance(error, (UserError, KeyboardInterrupt, exits.RunEnded))
        or files.system_error(error) is not None
    )
    if ours or not _peers:
        return error
    return _peers[0].lost() or _lost_connection(error) or error


def _lost_connection(error: BaseException) -> peers_lib.LostConnection | None:
    """Return the LostConnection of a failed collective or barrier, None for another error."""
    if isinstance(error, BarrierError):
        return peers_lib.LostConnection(first_line(error))
    found = (
        _COLLECTIVE.search(str(error)) if isinstance(error, jax.errors.JaxRuntimeError) else None
    )
    return peers_lib.LostConnection(found[0].strip()) if found else None


def _runtime() -> Any:
    """Return the state of `jax.distributed`: `client` (None before `start`), `process_id`,
    `num_processes`.

    The key-value store and the barriers of the client need no devices, so that hosts can exchange
    values before anything is compiled and while a device hangs. JAX 0.10 to 0.12 have no public
    access to them; only this function uses the private one.
    """
    try:
        from jax._src.distributed import global_state

        global_state.client, global_state.process_id, global_state.num_processes  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"jax {jax.__version__} keeps the state of jax.distributed elsewhere: adapt {__name__}"
        ) from error
    return global_state


def process_index() -> int:
    """Return the number of this host, without initialising devices."""
    return _runtime().process_id if _runtime().client is not None else 0


def process_count() -> int:
    """Return the number of hosts, without initialising devices."""
    return _runtime().num_processes if _runtime().client is not None else 1


def log_host0(text: str) -> None:
    """Print a line on stderr, on host 0 only."""
    if process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def set_key(key: str, value: str) -> None:
    """Set a key that all hosts can read, replacing its value."""
    _runtime().client.key_value_set(f"{_PREFIX}/{key}", value, allow_overwrite=True)


def wait_for_key(key: str, seconds: float) -> str:
    """Wait for a key and return its value. Raises TimeoutError after `seconds`."""
    try:
        return _runtime().client.blocking_key_value_get(f"{_PREFIX}/{key}", int(1000 * seconds))
    except RuntimeError as error:
        raise TimeoutError(first_line(error)) from error


def read_keys(directory: str) -> dict[str, str]:
    """Return the values of all keys under `directory`, by the last part of the key."""
    found = _runtime().client.key_value_dir_get(f"{_PREFIX}/{directory}/")
    return {key.rpartition("/")[2]: value for key, value in found}


class BarrierError(RuntimeError):
    """Report that not all hosts reached a barrier."""


def barrier(name: str, seconds: float = 3600.0) -> None:
    """Wait until all hosts call this. Raises BarrierError after `seconds`, or if a host is lost."""
    if process_count() == 1:
        return
    _uses[name] += 1
    try:
        # A barrier's name can be used once, hence the count of its uses, which is the same on all
        # hosts.
        _runtime().client.wait_at_barrier(f"{_PREFIX}/{name}/{_uses[name]}", int(1000 * seconds))
    except RuntimeError as error:
        raise BarrierError(
            f"barrier {name!r}: not all hosts came within {seconds:.0f} s"
        ) from error


@contextlib.contextmanager
def host_0_first(name: str) -> Iterator[None]:
    """Run the block on host 0 first, then on the others: for files that host 0 writes."""
    if process_index() > 0:
        barrier(name)
    try:
        yield
    finally:
        if process_index() == 0:
            barrier(name)


class InconsistentHosts(UserError):
    """Report, on all hosts, that their configuration, code or storage differs."""


def check_consistent(config: dict[str, Any], workdir: pathlib.Path, seconds: float = 300.0) -> None:
    """Raise InconsistentHosts unless all hosts have the same configuration and code and see the
    same working directory.

    Args:
      config: nested dicts of plain values.
      workdir: the directory of the run, on storage that all hosts share.
      seconds: the maximum time to wait for the other hosts.
    """
    if process_count() == 1:
        return
    mine = {"workdir": str(workdir), "config": config_lib.flat(config), "code": code_version()}
    try:
        if process_index() > 0:
            set_key(
                f"consistency/{process_index()}",
                _inconsistency(
                    mine, json.loads(wait_for_key("consistency/0", seconds)), process_index()
                ),
            )
        else:
            with _token(workdir) as token:
                # Host 0 publishes first and collects; the others compare, and send only their
                # differences.
                set_key("consistency/0", json.dumps(mine | {"token": token}))
                inconsistencies = [
                    wait_for_key(f"consistency/{other}", seconds)
                    for other in range(1, process_count())
                ]
            set_key("consistency/verdict", "; ".join(filter(None, inconsistencies)))
        verdict = wait_for_key("consistency/verdict", seconds)
    except TimeoutError as error:
        raise UserError(
            f"not all of the {process_count()} hosts answered within {seconds:.0f} s: {error}"
        ) from error
    if verdict:
        raise InconsistentHosts(f"the hosts disagree, nothing was run: {verdict}")


@contextlib.contextmanager
def _token(workdir: pathlib.Path) -> Iterator[str]:
    """Yield the name of a file in `workdir` that exists during the block. It is removed afterwards,
    with the directories made for it, since the run may still be refused.
    """
    made = files.make_directories(workdir)
    token = workdir / f".host-0-{uuid.uuid4().hex}"
    try:
        # A random name, so that a file left by another run proves nothing.
        token.touch()
        yield token.name
    finally:
        token.unlink(missing_ok=True)
        files.remove_empty(made)


def _inconsistency(
    mine: dict[str, Any], zero: dict[str, Any], me: int, patience: float = 20.0
) -> str:
    """Return the difference between host `me` and host 0 as text, "" if there is none."""
    what = {"code": "runs other code", "config": "has another configuration"}
    for group, text in what.items():
        names = sorted(mine[group].keys() | zero[group].keys())
        # Converted to JSON and back like host 0's values: tuples become lists.
        here = json.loads(json.dumps(mine[group]))
        differ = [
            f"{name} is {here.get(name)!r}, not {zero[group].get(name)!r}"
            for name in names
            if here.get(name) != zero[group].get(name)
        ]
        if differ:
            more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
            return f"host {me} {text} than host 0: {', '.join(differ[:3])}{more}"
    # Network file systems show a new file to other hosts only after their caches expire.
    end = time.monotonic() + patience
    while not (pathlib.Path(mine["workdir"]) / zero["token"]).exists():
        if time.monotonic() > end:
            return (
                f"host {me} does not see what host 0 writes to {zero['workdir']}: --workdir must"
                " lie on shared storage"
            )
        time.sleep(0.2)
    return ""


def code_version() -> dict[str, str]:
    """Return a hash of this package's source files and the versions of the packages that results
    depend on.
    """
    root = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    # Sorted, since file systems list a directory in different orders.
    for path in sorted(root.rglob("*.py")):
        digest.update(
            path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {root.name: digest.hexdigest()[:12]} | versions
