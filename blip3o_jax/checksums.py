"""Write and check CRC32C checksums, so that damaged files are found when they are read.

    {..., "crc32c": "8a9136aa"}     a JSON object with its checksum among its keys
    DIR/manifest.json  {"files": {"a/b": [bytes, CRC32C], ...}, ...}     every other file below DIR,
                                     and facts about them, such as the step that they belong to

Orbax and TensorStore offer less: OCDBT has checksums of its B-tree nodes only, and Orbax sets
zarr3's `crc32c` codec for the index of a shard only, so that a flipped bit in an array's bytes
would be read as another number.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import google_crc32c

from blip3o_jax.config import UserError
from blip3o_jax.config.errors import escaped, first_line
from blip3o_jax.files import replace_text

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "manifest.json"
KEY = "crc32c"
_CHUNK = 2**24  # bytes read at once
_THREADS = 8  # reading waits for the disk, and CRC32C runs at several GB/s
# Directories that this process has found intact, by the sizes and times of their files. Without
# it, an export and its verification, or the parts of one checkpoint, would each read all files.
_intact: set[tuple[Any, ...]] = set()


class DamagedFile(UserError):
    """Report a file whose contents are not those that were written."""


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Write an object with its checksum, whole or not at all."""
    replace_text(path, json.dumps(value | {KEY: _of_json(value)}, indent=1) + "\n")


def read_json(path: pathlib.Path, *, edited: bool = False) -> dict[str, Any]:
    """Read an object that `write_json` wrote, and return it without the checksum.

    With `edited`, for files that people edit, an object without a checksum is accepted. Raises
    DamagedFile.
    """
    if path.exists() and not path.is_file():  # reading a pipe might block for ever
        raise DamagedFile(f"{path} is no regular file: put back a copy of it")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # of UTF-8 too
        raise DamagedFile(
            f"{path} cannot be read as JSON ({first_line(error)}): put back a copy of it"
        ) from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} is no JSON object: put back a copy of it")
    found = value.pop(KEY, None)
    if found is None and edited:
        return value
    if found != _of_json(value):
        hint = f"; if you have edited it, take out its {KEY!r}" if edited else ""
        raise DamagedFile(f"{path} is damaged (its CRC32C is another): put back a copy of it{hint}")
    return value


def _of_json(value: dict[str, Any]) -> str:
    """Return the checksum of the values, independent of the file's formatting."""
    return f"{crc32c([json.dumps(value, sort_keys=True).encode()]):08x}"


def crc32c(parts: "Iterable[bytes | np.ndarray]", before: int = 0) -> int:
    """Return the CRC32C (Castagnoli) of `parts` one after the other; `before` is that of the bytes
    that precede them.
    """
    return functools.reduce(google_crc32c.extend, parts, before)


def file_crc32c(path: pathlib.Path) -> int:
    """Return the CRC32C of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = google_crc32c.extend(crc, chunk)
    return crc


def write_manifest(directory: pathlib.Path, **facts: int) -> None:
    """Write `directory`/manifest.json for all files in the directory, and its `facts`."""
    names = sorted(_names(directory))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        files = dict(
            zip(names, pool.map(lambda name: of_file(directory / name), names), strict=True)
        )
    write_json(directory / MANIFEST, {"files": files} | facts)


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """Return the contents of a directory's manifest. Raises DamagedFile."""
    file = directory / MANIFEST
    try:
        return read_json(file)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise DamagedFile(f"{file} {'is missing' if missing else error.strerror}") from error


def listed(directory: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Return {name: (bytes, CRC32C)} of the files that a directory's manifest names. Raises
    DamagedFile.
    """
    return _files(read_manifest(directory), directory / MANIFEST)


def _files(manifest: dict[str, Any], file: pathlib.Path) -> dict[str, tuple[int, int]]:
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise DamagedFile(f"{file} lists no files")
    for name, value in files.items():
        if not _is_size_and_crc(value):
            raise DamagedFile(f"{file} has no size and CRC32C of {name!r}: put back a copy of it")
        # The manifest is untrusted: it must not make this process read other files.
        if pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/") or "\0" in name:
            raise DamagedFile(
                f"{file} names {name!r}, which is not below it: put back a copy of it"
            )
        # Surrogates are no file's name, and escape sequences would reach the terminal.
        if not name.isprintable():
            raise DamagedFile(
                f"{file} names {name!r}, which is no file's name: put back a copy of it"
            )
    return {name: (size, crc) for name, (size, crc) in files.items()}


def _is_size_and_crc(value: Any) -> bool:
    if not (
        isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    ):
        return False
    return 0 <= value[0] < 2**63 and 0 <= value[1] < 2**32


def of_file(path: pathlib.Path) -> tuple[int, int]:
    """Return (bytes, CRC32C) of a file."""
    return path.stat().st_size, file_crc32c(path)


def _names(directory: pathlib.Path) -> set[str]:
    """Return the names of all files below a directory except its manifest."""
    paths = (pathlib.Path(place) / file for place, _, files in os.walk(directory) for file in files)
    return {path.relative_to(directory).as_posix() for path in paths} - {MANIFEST}


def find_damage(
    directory: pathlib.Path,
    reader: int = 0,
    readers: int = 1,
    required: Iterable[str] = (),
    **facts: int,
) -> str:
    """Compare the files of `directory` with its manifest.

    Returns a description of the first difference, "" if there is none. The manifest must list the
    names `required`. Unlisted files are damage too, except hidden ones, which systems leave behind
    and nothing reads. Each of several hosts is one of `readers` and checks some of the files;
    reader 0 also checks for unlisted ones. The manifest must have the same `facts`: the manifest of
    another directory fits its own files wherever it is copied or renamed to.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        return "it is no directory"
    try:
        manifest = read_manifest(directory)
        files = _files(manifest, directory / MANIFEST)
    except DamagedFile as error:
        return str(error).removeprefix(f"{directory}/").partition(":")[0]
    for fact, wanted in facts.items():
        if manifest.get(fact) != wanted:
            found = escaped(str(manifest.get(fact, "none"))[:40])
            return f"{MANIFEST} has {fact} {found}, not {wanted}"
    for name in required:
        if name not in files:
            return f"{MANIFEST} does not list {name}"
    unlisted = (
        sorted(name for name in _names(directory) - files.keys() if "/." not in f"/{name}")
        if reader == 0
        else []
    )
    if unlisted:
        return f"{escaped(unlisted[0])} is not listed in {MANIFEST}"
    # Sorted and strided: all hosts divide the files alike, without communication.
    mine = dict(sorted(files.items())[reader::readers])
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda item: _stat(directory / item[0]), mine.items()))
    signature = (directory, reader, readers, tuple(zip(mine.items(), found, strict=True)))
    if signature in _intact:
        return ""
    for (name, (size, _)), state in zip(mine.items(), found, strict=True):
        if state is None:
            return (
                f"{name} is {'no regular file' if os.path.lexists(directory / name) else 'missing'}"
            )
        if state[0] != size:
            return f"{name} has {state[0]} bytes, not {size}"
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for reason in pool.map(lambda item: _differs(directory, item[0], item[1][1]), mine.items()):
            if reason:
                return reason
    # Only a directory found intact is remembered: a damaged one may be repaired.
    _intact.add(signature)
    return ""


def _stat(path: pathlib.Path) -> tuple[int, int, int] | None:
    """Return (bytes, time of change, inode) of a regular file, None for anything else.

    Reading a FIFO or a device might block for ever.
    """
    try:
        state = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(state.st_mode):
        return None
    return state.st_size, state.st_mtime_ns, state.st_ino


def _differs(directory: pathlib.Path, name: str, crc: int) -> str:
    try:
        found = file_crc32c(directory / name)
    except OSError as error:
        return f"{name}: {error.strerror}"
    return "" if found == crc else f"{name} has CRC32C {found:08x}, not {crc:08x}"
