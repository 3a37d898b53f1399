"""Read data sets of format folder: a directory of images and a file of JSON lines."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from blip3o_jax.checksums import crc32c
from blip3o_jax.config import UserError
from blip3o_jax.config.errors import escaped
from blip3o_jax.data import record as record_lib
from blip3o_jax.data.checked_file import DamagedArrays
from blip3o_jax.data.index import Counts, IndexedSource, ShardIndex, concatenate_keys
from blip3o_jax.data.index_builder import (
    THREADS,
    IndexData,
    IndexProgress,
    ProcessGroup,
    ShardFormat,
    open_index,
)
from blip3o_jax.data.record import BadRecord, Record, make_record, parse_json, read_spans
from blip3o_jax.data.sources.columns import input_images
from blip3o_jax.files import raise_trouble

CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")


class FolderSource(IndexedSource):
    """Read a directory of images and a captions.jsonl: one object a line with the fields of
    data/record.py, images by their paths (`file_name` or `output_image` may stand for `image`).

    Paths are relative to the directory of captions.jsonl, or to `images`, and must not lead out of
    both: not by `..`, by an absolute path or by a symbolic link. Otherwise the author of the
    captions could choose which files of this machine are read.
    """

    def __init__(
        self,
        path: str,
        images: str = "",
        processes: ProcessGroup = ProcessGroup(),
        rebuild: str = "",
    ) -> None:
        candidates = (
            [os.path.join(path, name) for name in CAPTION_FILES] if os.path.isdir(path) else [path]
        )
        self._lines_file = next((c for c in candidates if os.path.isfile(c)), "")
        if not self._lines_file:
            raise UserError(f"{path}: there is no {' or '.join(CAPTION_FILES)} in it")
        images = os.path.expanduser(images)
        if images and not os.path.isdir(images):
            raise UserError(
                f"data.images={images} is not a directory: give the one that holds the images of"
                f" {path}"
            )
        own = os.path.dirname(self._lines_file)
        self._images = _ImageFiles(self._lines_file, (images, own) if images else (own,))
        shard_format = ShardFormat(
            "folder",
            functools.partial(_index_folder, self._images),
            functools.partial(_folder_changed, self._images),
            _captions_state,
            variant=os.path.abspath(images) if images else "",
            size=functools.partial(_folder_size, self._images),
            one_file=False,
        )
        options = f"--images={shlex.quote(images)}" if images else ""
        dataset_index = open_index(
            path,
            [self._lines_file],
            shard_format,
            processes=processes,
            rebuild=rebuild,
            options=options,
        )
        super().__init__(path, [self._lines_file], dataset_index)

    def __getitem__(self, index: int) -> Record:
        number, start, size = self._index.shard(0).arrays["lines"][index].tolist()
        [raw] = read_spans(self._lines_file, [(start, size)])
        key = f"line {number}"
        fields, text_fields = parse_json(raw, self._lines_file, key)
        name, inputs = _image_paths(fields)
        if not all(isinstance(path, str) for path in (*inputs, name or "")):
            raise BadRecord(self._lines_file, key, "images are given by their paths")
        paths = [path for path in (name, *inputs) if path]
        key = paths[0] if paths else key
        images = [self._images.read(path) for path in paths]
        self._index.check(self._lines_file, 0, index, (raw.strip(), *images), key)
        return make_record(
            text_fields, images.pop(0) if name else None, images, key, self._lines_file
        )


@dataclasses.dataclass(frozen=True)
class _ImageFiles:
    """Find the images that the lines of a captions file name, below one of `roots`."""

    captions: str
    roots: tuple[str, ...]

    def path(self, name: str) -> str:
        """Return the path of an image below the first of the roots that has it. Raises ValueError
        for a NUL or a lone surrogate.
        """
        paths = [os.path.join(root, name) for root in self.roots]
        return next((path for path in paths[:-1] if os.path.lexists(path)), paths[-1])

    def find(self, name: str) -> str:
        """Return the path of an image, symbolic links resolved. Raises BadRecord where it leads out
        of the roots or is not a regular file.
        """
        try:
            path = os.path.realpath(self.path(name))
            inside = any(
                os.path.commonpath([root, path]) == root
                for root in map(os.path.realpath, self.roots)
            )
            # Opening a pipe would block.
            plain = stat.S_ISREG(os.stat(path).st_mode) if inside else True
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None
        if not inside:
            hint = "set data.images, or images of the source, to a directory that holds it"
            reason = f"{record_lib.OUTSIDE}, to {path}: {hint}"
            raise BadRecord(self.captions, name, reason, record_lib.OUTSIDE)
        if not plain:
            raise BadRecord(self.captions, name, "the image cannot be read: it is no plain file")
        return path

    def read(self, name: str) -> bytes:
        path = self.find(name)
        try:
            return pathlib.Path(path).read_bytes()
        except OSError as error:
            raise self._unreadable(name, error) from None

    def size(self, name: str) -> int:
        """Return the size of an image in bytes, -1 where it cannot be read."""
        try:
            return os.path.getsize(self.find(name))
        except (BadRecord, OSError):
            return -1

    def sizes(self, names: Sequence[str], before: Sequence[int] = ()) -> list[int]:
        """Return the sizes of images. For an image that had a size `before`, one call to the file
        system is enough: reading it checks whether the path leads out of the roots.
        """

        def size(name: str, known: int) -> int:
            if known < 0:
                return self.size(name)
            try:
                return os.stat(self.path(name)).st_size
            except (OSError, ValueError):
                return -1

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(size, names, before or [-1] * len(names)))

    def _unreadable(self, name: str, error: Exception) -> BadRecord:
        reason = "no file can have this name"  # a name with NUL or a lone surrogate
        if isinstance(error, OSError):
            reason = error.strerror or type(error).__name__
        return BadRecord(self.captions, name, f"the image cannot be read: {reason}")


def _captions_state(path: str) -> dict[str, Any]:
    """Return the digest of a captions file, which is read at every opening."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _captions(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield line number (from 1), offset and bytes of each line that is not blank."""
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, start, line
            start += len(line)


def _listed_images(line: bytes) -> list[str]:
    """Return the images that a line names. A line that cannot be parsed names none here; reading
    its record reports the fault.
    """
    try:
        name, inputs = _image_paths(json.loads(line))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    return [path for path in (name, *inputs) if isinstance(path, str) and path]


def _index_folder(images: _ImageFiles, path: str, progress: IndexProgress) -> IndexData:
    lines = []
    names: dict[str, int] = {}
    row_sizes = []
    sums = []
    incomplete = Counts()

    def row(found: tuple[int, int, bytes]) -> tuple[int, int, dict[str, int]]:
        """Return (CRC32C, size or -1 where an image cannot be read, sizes of the images)."""
        line = found[2].strip()
        sizes = {}
        value = crc32c([line])
        for name in _listed_images(line):
            try:
                data = images.read(name)
            except BadRecord as error:
                raise_trouble(error)
                sizes[name] = -1
                continue
            progress.add(len(data))
            sizes[name] = len(data)
            # The running checksum of a record: its line, then its images in their order.
            value = crc32c([data], value)
        size = -1 if -1 in sizes.values() else len(line) + sum(sizes.values())
        return value, size, sizes

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for some in _batched(_captions(path), 1024):
            for (number, start, line), (value, size, sizes) in zip(
                some, pool.map(row, some), strict=True
            ):
                lines.append((number, start, len(line)))
                sums.append(value)
                row_sizes.append(size)
                names |= sizes
                if size < 0:
                    lacking = next(name for name, known in sizes.items() if known < 0)
                    where = f"{escaped(lacking)}, line {number} first in {path}"
                    incomplete.add("unreadable", where)
    # Names from JSON may hold lone surrogates, which must survive the round trip.
    raw = [name.encode("utf-8", "surrogatepass") for name in names]
    arrays: dict[str, np.ndarray] = {
        "crc": np.array(sums, np.uint32),
        "sizes": np.array(row_sizes, np.int64).reshape(-1, 1),
        "lines": np.array(lines, np.int64).reshape(-1, 3),
        "paths": np.frombuffer(b"".join(raw), np.uint8),
        "path_ends": np.cumsum([len(name) for name in raw], dtype=np.int64),
        "path_sizes": np.array(list(names.values()), np.int64),
    }
    return IndexData(arrays | concatenate_keys([]), incomplete=incomplete)


def _folder_changed(images: _ImageFiles, path: str, found: ShardIndex) -> str:
    if _captions_state(path) != found.header["state"]:
        return "it is not as it was indexed"
    arrays = found.arrays
    lines = arrays["lines"]
    if (
        lines.shape != (len(found), 3)
        or lines.min(initial=0) < 0
        or lines.max(initial=0) > os.path.getsize(path)
    ):
        raise DamagedArrays("it points outside of the captions")
    starts = [0, *arrays["path_ends"][:-1].tolist()]
    raw = arrays["paths"].tobytes()
    ends = arrays["path_ends"].tolist()
    names = [raw[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=False)]
    before = arrays["path_sizes"].tolist()
    now = images.sizes(names, before)
    changed = [number for number, size in enumerate(now) if size != before[number]]
    if not changed:
        return ""
    first = changed[0]
    others = f", as of {len(changed) - 1} others" if changed[1:] else ""
    return (
        f"the size of {names[first]} was {before[first]}, now it is {now[first]}{others} (-1: it"
        " cannot be read)"
    )


def _folder_size(images: _ImageFiles, path: str) -> int:
    names = [name for _, _, line in _captions(path) for name in _listed_images(line)]
    return sum(size for size in images.sizes(names) if size > 0)


def _batched(values: Iterable[Any], count: int) -> Iterator[list[Any]]:
    values = iter(values)
    while some := list(itertools.islice(values, count)):
        yield some


def _image_paths(fields: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return the path of the target image, or None, and those of the references."""
    name = next((fields[n] for n in ("file_name", "image", "output_image") if fields.get(n)), None)
    return name, input_images(fields)
