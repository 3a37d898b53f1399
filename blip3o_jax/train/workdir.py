"""Lock a run's working directory, and remove what a refused run has created in it.

WORKDIR/lock.json names the process that writes there: host, pid and start time. The file's
modification time, renewed every HEARTBEAT_PERIOD seconds, is the process's heartbeat. A second run
is refused. The lock of a process that has ended is taken over: on the same machine at once, on
another after STALE_AFTER seconds without a heartbeat, since a preempted job resumes elsewhere
within seconds. The lock uses only exclusive creation and renaming, so that it works on network file
systems.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import socket
import stat
import threading
import time
import uuid

from blip3o_jax import files
from blip3o_jax.config import UserError
from blip3o_jax.parallel.distributed import host_0_first, log_host0, process_index

LOCK = "lock.json"
HEARTBEAT_PERIOD = 10.0  # seconds between renewals of the lock's modification time
STALE_AFTER = 60.0  # seconds without one after which a process on another machine counts as dead
FILES = ("recipe.json", "checkpoints/config.json")  # that runs write below it, besides *.jsonl
DIRECTORIES = ("checkpoints", "tensorboard", "text")
ATTEMPTS = 10  # to take a lock that others take and release in between


@dataclasses.dataclass(frozen=True)
class Owner:
    """Describe the process that holds a lock. `process_start` is in clock ticks after the boot,
    None where the system does not provide it; `machine` identifies the boot and the namespace that
    the pid belongs to. The file holds all fields but `seen`.
    """

    host: str = "an unknown host"
    pid: int = 0
    process_start: int | None = None
    machine: str = ""
    since: str = ""
    token: str = ""
    seen: float = 0.0  # the file's modification time

    @classmethod
    def this_process(cls, token: str) -> "Owner":
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(
            socket.gethostname(), os.getpid(), _process_start(os.getpid()), _machine(), since, token
        )

    @classmethod
    def read(cls, path: pathlib.Path) -> "Owner | None":
        """Return the owner of a lock, or None if there is no lock.

        The owner is an unknown one if the file is incomplete: it is being written, or its writer
        was killed.
        """
        try:
            state = path.stat()
            seen = state.st_mtime
            if not stat.S_ISREG(state.st_mode):  # reading a pipe might block for ever
                return cls(seen=seen)
            owner = cls(**json.loads(path.read_bytes()), seen=seen)
            return owner if isinstance(owner.pid, int) and 0 < owner.pid < 2**31 else cls(seen=seen)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, RecursionError):
            return cls(seen=seen)

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"

    def here(self) -> bool:
        """Return whether the owner's process is of this machine, so that its pid can be checked."""
        return bool(self.machine) and (self.host, self.machine) == (
            socket.gethostname(),
            _machine(),
        )

    def runs(self) -> bool:
        """Return whether the process of an owner that is `here` still runs.

        The start time distinguishes it from a later process with the same pid.
        """
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # of another user, whose /proc may be hidden
            return _process_start(self.pid) in (None, self.process_start)
        return _process_start(self.pid) == self.process_start


def _machine() -> str:
    parts = []
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts) or socket.gethostname()


def _process_start(pid: int) -> int | None:
    """Return a process's start time from /proc; None if it has ended or /proc is unavailable."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _check_kinds(workdir: pathlib.Path) -> None:
    """Raise UserError if a directory has the name of a file that the run writes, or vice versa."""
    for path in (*map(workdir.joinpath, FILES), *sorted(workdir.glob("*.jsonl"))):
        if os.path.lexists(path) and not path.is_file():
            raise UserError(
                f"{path} is no regular file, but the run writes one: move it away, or choose"
                " another --workdir"
            )
    for path in map(workdir.joinpath, DIRECTORIES):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(
                f"{path} is no directory, but the run makes one: move it away, or choose another"
                " --workdir"
            )


class WorkdirLock:
    """Lock the working directory (`with WorkdirLock(workdir) as lock:`), on host 0.

    Raises UserError if another run holds the lock or the directory cannot be written to. Unless
    `begun` is set, leaving removes what the failed start has made: the directory itself and a
    trained text tokenizer.
    """

    def __init__(self, workdir: pathlib.Path) -> None:
        self.begun = False
        self._workdir = workdir
        self._path = workdir / LOCK
        self._token = uuid.uuid4().hex
        self._made: list[pathlib.Path] = []  # directories, outermost first
        self._had_text = True
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="workdir-lock", daemon=True)

    def __enter__(self) -> "WorkdirLock":
        with host_0_first("lock"):
            if process_index() == 0:
                try:
                    self._take()
                except BaseException as error:
                    self._leave()
                    if not isinstance(error, OSError):
                        raise
                    reason = error.strerror or str(error)
                    raise UserError(
                        f"--workdir={self._workdir} cannot be written to ({reason}): choose another"
                    ) from error
                self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if process_index() == 0:
            # The heartbeat's thread ends first: it must not renew the lock of a successor.
            self._end.set()
            self._thread.join()
            self._leave()

    def check(self) -> None:
        """Raise UserError if another run has taken the lock because this one's heartbeat stopped:
        this run must not write any more.
        """
        if process_index() == 0 and not self._mine():
            owner = Owner.read(self._path)
            now = f"now is that of {owner}" if owner else "is gone"
            raise UserError(
                f"{self._path} was this run's and {now}: two runs must not write to one --workdir;"
                " this one ends"
            )

    def _take(self) -> None:
        self._made = files.make_directories(self._workdir)
        _check_kinds(self._workdir)
        for _ in range(ATTEMPTS):
            if self._created():
                break
            self._check_plain()
            owner = Owner.read(self._path)
            if owner is not None and self._lives(owner):
                raise UserError(
                    f"--workdir={self._workdir} is in use by another run ({owner}): wait for its"
                    " end, stop it, or choose another"
                )
            if owner is not None:
                self._remove(owner)
        else:
            raise UserError(
                f"{self._path} comes and goes: other runs start in this --workdir now; run again,"
                " or choose another"
            )
        self._had_text = (self._workdir / "text").exists()

    def _check_plain(self) -> None:
        """Raise UserError if the lock's path is not a regular file, such as a dangling link: it can
        neither be created nor read.
        """
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(self._path.lstat().st_mode):
                raise UserError(
                    f"{self._path} is no regular file, as the lock of a run is: remove it, or"
                    " choose another --workdir"
                )

    def _created(self) -> bool:
        values = dataclasses.asdict(Owner.this_process(self._token))
        del values["seen"]
        try:
            # O_EXCL: creation fails if the file exists, which is atomic on network file systems
            # too.
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        return True

    def _lives(self, owner: Owner) -> bool:
        """Return whether the owner's process is alive. On another machine this waits up to
        STALE_AFTER seconds for a heartbeat.
        """
        if owner.here():
            return owner.runs()
        silent = self._server_time() - owner.seen
        end = time.monotonic() + min(STALE_AFTER, STALE_AFTER - silent)
        waiting_logged = False
        while (left := end - time.monotonic()) > 0:
            if not waiting_logged:
                log_host0(
                    f"{self._workdir} is locked by {owner}: waiting up to {left:.0f} s for a"
                    " heartbeat"
                )
                waiting_logged = True
            time.sleep(min(left, 1.0))
            now = Owner.read(self._path)
            if now is None:
                return False
            # A changed time is a heartbeat, a changed token another run: either holds the lock.
            if (now.token, now.seen) != (owner.token, owner.seen):
                return True
        return False

    def _server_time(self) -> float:
        """Return the time by the clock that sets modification times; a file server's may differ
        from this machine's.
        """
        probe = self._path.with_name(f"{LOCK}.{self._token}.time")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _remove(self, owner: Owner) -> None:
        """Remove a dead owner's lock, unless another process has: the rename succeeds for only one
        of them.
        """
        aside = self._path.with_name(f"{LOCK}.{self._token}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        taken = Owner.read(aside)
        if taken is not None and taken.token != owner.token and not self._path.exists():
            # The lock of a faster process that took over meanwhile: give it back.
            aside.rename(self._path)
            return
        aside.unlink()
        log_host0(f"{self._workdir}: took over the lock of {owner}, which is gone")

    def _renew(self) -> None:
        while not self._end.wait(HEARTBEAT_PERIOD):
            with contextlib.suppress(OSError):  # `check` or another write reports the fault
                if self._mine():
                    os.utime(self._path)

    def _mine(self) -> bool:
        owner = Owner.read(self._path)
        return owner is not None and owner.token == self._token

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            if self._mine():
                self._path.unlink()
            if not self.begun and not self._had_text:
                shutil.rmtree(self._workdir / "text", ignore_errors=True)
            files.remove_empty(self._made)
