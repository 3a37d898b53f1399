"""A directory that comes into being whole or not at all."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator

from blip3o_jax.config import UserError


@contextlib.contextmanager
def whole_directory(out: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `out`, which takes its place when the body ends, and is removed where it fails.

    UserError where `out` exists without `overwrite`, where it holds something else than what is written here (a directory
    without config.json), or where the disk refuses; nothing is touched then.
    """
    out = out.absolute()
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: choose another --out, or pass --overwrite to replace it")
    if out.exists() and not (out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))):
        raise UserError(f"{out} holds no config.json, so it is no earlier output; it is not overwritten: choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        yield partial
        _replace(out, partial)
    except Exception as error:
        if (refusal := _refusal(error)) is None:
            raise
        raise UserError(_reason(refusal, out)) from error
    finally:
        _remove(partial)


def check_space(out: pathlib.Path, needed: int) -> None:
    """UserError where the file system of `out` has less than `needed` bytes left."""
    there = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.1f} GB, but {there} has {free / 1e9:.1f} GB left: free some, or move --out"
        )


def _remove(directory: pathlib.Path) -> None:
    """Until it stays away: threads of an Orbax that has given up may still be writing to it."""
    for _ in range(50):
        if not directory.exists():
            return
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)


def _replace(out: pathlib.Path, partial: pathlib.Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refusal(error: Exception) -> OSError | None:
    """The system's error behind an exception: Orbax hands it on as text."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


def _reason(error: OSError, out: pathlib.Path) -> str:
    place = error.filename or out
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{out} was not written: {os.strerror(error.errno)}; free some space, or move --out"
    return f"{place}: {error.strerror or error}; nothing was written to {out}"
