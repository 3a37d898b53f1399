"""Write a directory atomically: after a failure it is absent or unchanged."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator

from blip3o_jax import files
from blip3o_jax.config import UserError

# Lists the names written to a directory; one that holds further names is not overwritten.
MANIFEST = ".blip3o_output.json"


@contextlib.contextmanager
def atomic_directory(
    out: pathlib.Path, *, overwrite: bool, sources: Iterable[pathlib.Path | None] = ()
) -> Iterator[pathlib.Path]:
    """Yield an empty directory next to `out`; rename it to `out` after the block.

    It is removed if the block fails. Raises UserError when `out` exists without `overwrite`, when
    it is not an earlier output or holds files added since, when it overlaps one of `sources`, which
    the block reads, or when the file system fails; `out` is unchanged then.
    """
    out = pathlib.Path(os.path.realpath(out))
    _check_disjoint(out, sources)
    _check_absent(out, overwrite)
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(
            tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
        )
        # `mkdtemp` makes the directory private; the output is to be read like any other.
        partial.chmod(0o755)
        yield partial
        names = sorted(path.name for path in partial.iterdir())
        (partial / MANIFEST).write_text(json.dumps({"written": names}) + "\n", encoding="utf-8")
        _check_absent(out, overwrite)  # another process may have created it during the block
        _replace(out, partial)
    except Exception as error:
        if isinstance(error, UserError) or (found := files.system_error(error)) is None:
            raise
        raise UserError(f"{out} was not written: {files.describe(found)}") from error
    finally:
        if partial is not None:
            _remove(partial)


def check_space(out: pathlib.Path, needed: int) -> None:
    """Raise UserError when the file system of `out` has less than `needed` bytes free."""
    real = pathlib.Path(os.path.realpath(out))
    # The root directory has no parents.
    there = next((p for p in real.parents if p.exists()), real)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e6:,.1f} MB, but {there} has {free / 1e6:,.1f} MB free: "
            "delete files there, or choose another --out"
        )


def _check_disjoint(out: pathlib.Path, sources: Iterable[pathlib.Path | None]) -> None:
    for source in sources:
        read = pathlib.Path(os.path.realpath(source)) if source is not None else None
        if read is not None and (out == read or out in read.parents or read in out.parents):
            raise UserError(f"{out} overlaps {read}, which is read: choose an --out outside of it")


def _check_absent(out: pathlib.Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UserError(
            f"{out} exists already: choose another --out, or pass --overwrite to replace it"
        )
    try:
        there = {path.name for path in out.iterdir()}
        known = (
            set(json.loads((out / MANIFEST).read_text(encoding="utf-8"))["written"]) | {MANIFEST}
            if there
            else set()
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out} was not written by blip3o convert and is not overwritten: choose another --out"
        ) from None
    if extra := sorted(there - known):
        raise UserError(
            f"{out} holds {extra[0]}, which blip3o convert did not write: move it elsewhere, or "
            "choose another --out"
        )


def _remove(directory: pathlib.Path) -> None:
    """Remove a directory, retrying: threads of a failed Orbax save may still write to it."""
    for _ in range(50):
        if not directory.exists():
            return
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)


def _replace(out: pathlib.Path, partial: pathlib.Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = partial.with_suffix(".old")
    # Two renames: the old output is whole under one of the names at every moment.
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
