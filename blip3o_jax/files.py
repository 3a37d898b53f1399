"""Report the file system's errors in one line, replace files atomically, and check output paths."""

import contextlib
import errno
import json
import os
import pathlib
import re
import stat
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO, Any

from blip3o_jax.config import UserError

# Errors of the disk rather than of a path, with advice. They are user errors wherever they occur,
# also as the cause of another exception; other errors are only if they name a path.
TROUBLE = {
    errno.ENOSPC: "free some",
    errno.EDQUOT: "free some, or ask for more",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or take another file system",
    errno.EROFS: "mount it for writing, or choose another place",
    errno.EIO: "the disk or the connection to it fails: see the system's log",
    errno.ESTALE: "mount the network's file system again",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the system's limit",
    errno.ENAMETOOLONG: "choose a shorter one",
}
_BY_TEXT = {os.strerror(number): number for number in TROUBLE}
# TensorStore reports the system's errors as text, which Orbax wraps in its exceptions.
_CODE = re.compile(r"os_error_code='(\d+)'")
_PATH = re.compile(r"""["'](/[^"']+)["']""")


def system_error(error: BaseException) -> OSError | None:
    """Return the file system's error that is `error` or its cause or context; None for others.

    An error that names a path is returned only if it is `error` itself: as the cause of another
    exception it may have been expected, such as for an optional file. An error of the disk (full,
    broken, read-only) is returned wherever it is found.
    """
    if isinstance(error, OSError) and (error.filename is not None or error.errno in TROUBLE):
        return error
    return next(filter(None, map(_trouble, _chain(error))), None)


def raise_trouble(error: BaseException) -> None:
    """Raise the system's error of TROUBLE that caused `error`, if one did.

    Data that cannot be read because of the machine must not be recorded as damaged. A name that is
    too long is a fault of the data. The text of a UserError is not searched, since it may quote any
    name; its cause is.
    """
    for each in _chain(error):
        number = getattr(each, "errno", None)
        other = isinstance(each, UserError) or (number is not None and number not in TROUBLE)
        found = None if other else _trouble(each)
        if found is not None and found.errno != errno.ENAMETOOLONG:
            raise found


def describe(error: OSError) -> str:
    """Return "PATH: what is wrong, and what to do"."""
    reason = error.strerror or str(error)
    if advice := TROUBLE.get(error.errno or 0):
        reason += f": {advice}"
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and all exceptions behind it and in groups, each once."""
    waiting = [error]
    seen = set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [e for e in (current.__cause__, current.__context__) if e is not None]
        waiting += current.exceptions if isinstance(current, BaseExceptionGroup) else ()


def _trouble(error: BaseException) -> OSError | None:
    if isinstance(error, OSError) and error.errno in TROUBLE:
        return error
    text = str(error)
    code = _CODE.search(text)
    number = (
        int(code[1])
        if code
        else next((n for phrase, n in _BY_TEXT.items() if phrase in text), None)
    )
    if number not in TROUBLE:
        return None
    # The innermost path comes last; the file is more informative than its lock.
    paths = _PATH.findall(text)
    return OSError(
        number, os.strerror(number), paths[-1].removesuffix(".__lock") if paths else None
    )


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Raise errors of the file system as OSError with a path.

    The cause of another exception counts too. Errors of writing to an open file name no path: they
    get `path`. Other errors, such as those of a connection, are raised unchanged.
    """
    try:
        yield
    except UserError:  # already names the file
        raise
    except Exception as error:
        found = system_error(error)
        if found is None or (found is error and found.filename is not None):
            raise
        number = found.errno or 0
        raise OSError(number, os.strerror(number), found.filename or str(path)) from error


@contextlib.contextmanager
def replacing(path: pathlib.Path, mode: str = "w", *, shared: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path`, flushed to disk, when the block ends.

    A kill or an exception leaves the old file. `mode` is "w" for UTF-8 text or "wb" for bytes. With
    `shared` several hosts may write the same file at once. `path` itself is never opened: in an
    untrusted directory it may be a link to any file of the user.
    """
    unique = f".{uuid.uuid4().hex}" if shared else ""
    partial = path.with_name(f".{path.name[:100]}{unique}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            with partial.open(
                # "x" fails on a file or link that somebody has put there meanwhile.
                mode.replace("w", "x"),
                encoding=None if "b" in mode else "utf-8",
            ) as file:
                yield file
                file.flush()
                # On disk before the rename: after a power cut the new name must not refer to an
                # empty file.
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write `text` in place of the file; see `replacing`."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write `value` as a JSON file in place of the file; see `replacing`."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def replace_bytes(path: pathlib.Path, data: bytes, *, shared: bool = False) -> None:
    """Write `data` in place of the file; see `replacing`."""
    with replacing(path, "wb", shared=shared) as file:
        file.write(data)


def make_directories(path: pathlib.Path) -> list[pathlib.Path]:
    """Create a directory and its missing parents; return those created, outermost first.

    After an OSError none of them is left. Raises UserError for a link that leads nowhere.
    """
    made: list[pathlib.Path] = []
    try:
        _check_links(path)
        for missing in reversed([each for each in (path, *path.parents) if not each.exists()]):
            # PATH/.. is missing before PATH is made, and another process may make one too.
            there = missing.exists()
            missing.mkdir(exist_ok=True)
            if not there:
                made.append(missing)
    except OSError:
        remove_empty(made)
        raise
    return made


def _check_links(path: pathlib.Path, prefix: str = "") -> None:
    """Raise UserError where a link in `path` leads nowhere: no directory can be made in its place,
    and the one above it, where files could be written, is not the one that is meant.
    """
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise UserError(
                f"{prefix}{each} is a link to {os.readlink(each)}, which is not there: make that"
                " directory, or remove the link"
            )


def remove_empty(made: list[pathlib.Path]) -> None:
    """Remove those directories of `make_directories` that are empty."""
    with contextlib.suppress(OSError):
        for path in reversed(made):
            path.rmdir()


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise UserError for a pipe or a device, reading which might block for ever.

    Raises OSError for a directory or a missing file.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{path} is a pipe or a device: write what it gives to a regular file first"
        )


def check_out_directory(out: pathlib.Path, flag: str = "--out") -> None:
    """Raise UserError unless `out` is, or can become, a writable directory.

    Leaves nothing behind.
    """
    with _refused(out, flag):
        _check_links(out, f"{flag}={out}: ")
        if os.path.lexists(out) and not out.is_dir():
            raise UserError(f"{flag}={out} is there already and is no directory: choose another")
        _check_writable(out, flag)


def check_out_file(out: pathlib.Path, flag: str = "--out") -> None:
    """Raise UserError unless `out` is, or can become, a file in an existing directory.

    Leaves nothing behind.
    """
    with _refused(out, flag):
        _check_links(out, f"{flag}={out}: ")
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise UserError(f"{flag}={out} must be a file in a directory that is there")
        _check_writable(out, flag)


@contextlib.contextmanager
def _refused(out: pathlib.Path, flag: str) -> Iterator[None]:
    if "\0" in str(out):
        raise UserError(f"{flag}={str(out)!r} is no path: it holds a NUL")
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{flag}={out}: {describe(OSError(error.errno, error.strerror))}"
        ) from error


def _check_writable(out: pathlib.Path, flag: str) -> None:
    """Raise UserError unless `out`, or the nearest existing directory above it, can be written."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if there != out.absolute() and not there.is_dir():
        raise UserError(f"{flag}={out}: {there} is no directory: choose another")
    mode = os.W_OK | os.X_OK if there.is_dir() else os.W_OK
    if not os.access(there, mode):
        readonly = os.statvfs(there).f_flag & os.ST_RDONLY
        reason = "is on a read-only file system" if readonly else "is not writable for this user"
        raise UserError(f"{flag}={out}: {there} {reason}: choose another")
    # For root `os.access` allows everything, and some file systems (/proc) hold no files of ours.
    directory = there if there.is_dir() else there.parent
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{flag}={out}: no file can be made in {directory} ({reason}): choose another"
        ) from error


def cache_directory() -> pathlib.Path:
    """Return the user's cache directory, for data that can be regenerated; it exists and is
    writable. Raises UserError if none can be made.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    mine = pathlib.Path(home, "blip3o_jax")
    # For a read-only home, as in some containers. Others can write to its parent directory.
    fallback = pathlib.Path(tempfile.gettempdir(), f"blip3o_jax-{os.getuid()}")
    for directory in (mine, fallback):
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            owned = directory is mine or directory.stat().st_uid == os.getuid()
            if owned and os.access(directory, os.W_OK | os.X_OK):
                return directory
    raise UserError("no cache directory can be made: set XDG_CACHE_HOME to one with room")
