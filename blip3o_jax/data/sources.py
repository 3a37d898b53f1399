"""Captioned images on disk, behind one random-access interface.

    TFDS/ArrayRecord | webdataset .tar | parquet | folder + captions.jsonl   ->   Source: len(s), s[i] -> Record

A source keeps paths and indexes only and opens files when a record is read, so it can be pickled to
worker processes and shared by threads. What is wrong with a whole data set (a missing path, a tar
cut in half) is a ValueError when it is opened; what is wrong with one record (no caption, text that
is not UTF-8) is a `BadRecord` when that record is read.
"""

import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import pathlib
import re
import shlex
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax import config, files
from blip3o_jax.checksums import crc32c
from blip3o_jax.config import UserError
from blip3o_jax.data import index as index_lib
from blip3o_jax.data import tfds_checks
from blip3o_jax.data.checked_file import DamagedArrays
from blip3o_jax.data.index import (
    Counts,
    IndexData,
    IndexedSource,
    ProcessGroup,
    Progress,
    ShardIndex,
)
from blip3o_jax.data.record import (
    CAPTION_FIELDS,
    INPUT_FIELDS,
    TEXT_FIELDS,
    BadRecord,
    Record,
    Source,
    TextFields,
    make_record,
    parse_json,
    parse_text_fields,
    read_spans,
)
from blip3o_jax.data.tar import TarSource
from blip3o_jax.files import raise_trouble

CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
ROW_GROUPS_KEPT = 4
KEY_COLUMNS = ("key", "id", "__key__")
FIELDS = ("task", "image", *INPUT_FIELDS, *TEXT_FIELDS, "answer")
MAX_FILES = 10**6  # files that a pattern may expand to


def open_mixture(
    data: config.DataConfig, processes: ProcessGroup = ProcessGroup()
) -> list[tuple[Source, float]]:
    """Return the sources of a run with their weights; `hosts`: those that open it at once."""
    if not data.all_sources:
        raise config.ConfigError(
            "data.path is empty: set --config.data.path to a data set, or data.sources to a mixture"
        )
    return [(open_source(source, processes), source.weight) for source in data.all_sources]


def open_source(
    cfg: config.SourceConfig, processes: ProcessGroup = ProcessGroup(), *, rebuild: str = ""
) -> Source:
    """Open `cfg.path`: a file, a directory, a glob, or a brace pattern such as
    `shards/{00000..00031}.tar`. Its index is made where there is none; `rebuild` as in
    `open_index`.

    Raises:
      ValueError: nothing there, an unknown format, an empty or damaged data set; one line that names it.
    """
    path = os.path.expanduser(cfg.path)
    files = _expand(path)
    kind = _detect(path, files) if cfg.format == "auto" else cfg.format
    if kind == "tfds":
        source: Source = TfdsSource(path, cfg.split, processes, rebuild)
    elif kind == "folder":
        source = FolderSource(path, cfg.images, processes, rebuild)
    elif kind == "webdataset":
        source = TarSource(path, _members(path, files, ".tar"), processes, rebuild)
    else:
        source = ParquetSource(path, _members(path, files, ".parquet"), processes, rebuild)
    if not len(source):
        raise UserError(
            f"{path}: the data set is empty; give one with at least one captioned image"
        )
    return ReconstructionSource(source) if cfg.task == "reconstruct" else source


class ReconstructionSource(Source):
    """The images of `source` as reconstruction examples: each is its own target, without its
    caption.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source.name, source.files)
        self._source = source
        self.unused, self.incomplete, self.notes = source.unused, source.incomplete, source.notes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        image = record.first_image
        return make_record(
            TextFields("reconstruct", "", ""), image, (image,), record.key, record.shard
        )

    @property
    def fingerprint(self) -> str:
        return f"{self._source.fingerprint}-reconstruct"


def _expand(path: str) -> list[str]:
    """The paths a pattern stands for, all of them there."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", path)
    if len(parts) > 1:
        spans = _spans(path, list(zip(parts[1::3], parts[2::3], strict=True)))
        files = [
            "".join(itertools.chain(*zip(parts[::3], (*numbers, ""), strict=True)))
            for numbers in itertools.product(*spans)
        ]
    elif glob.has_magic(path) and not os.path.exists(path):
        files = sorted(glob.glob(path)) or [path]
    else:
        files = [path]
    for file in files:
        if not os.path.exists(file):
            raise UserError(
                f"{file}: no such file or directory; check data.path (a mounted bucket works, a URL does not)"
            )
    return files


def _spans(path: str, ends: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return the numbers of each range of a pattern as they are written; `ends`: its first and
    last.
    """
    count = 1
    for low, high in ends:
        if int(high) < int(low):
            hint = f"write {{{high}..{low}}}"
            raise UserError(f"{path}: the range {{{low}..{high}}} is empty: {hint}")
        count *= int(high) - int(low) + 1
    if count > MAX_FILES:
        hint = "name the shards that are there"
        raise UserError(f"{path}: stands for more than {MAX_FILES} files: {hint}")
    return [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in ends]


def _detect(path: str, files: list[str]) -> str:
    first = pathlib.Path(files[0])
    if first.is_dir():
        if any((first / name).exists() for name in CAPTION_FILES):
            return "folder"
        if _tfds_directories(first):
            return "tfds"
        for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
            if any(first.glob(f"*{suffix}")):
                return kind
        raise UserError(
            f"{path}: unknown format; expected dataset_info.json, {', '.join(CAPTION_FILES)}, *.tar or *.parquet in it"
        )
    kinds = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "folder"}
    if first.suffix not in kinds:
        raise UserError(
            f"{first}: unknown format; expected .tar (not compressed), .parquet, .jsonl or a directory"
        )
    return kinds[first.suffix]


def _members(path: str, files: list[str], suffix: str) -> list[str]:
    found = itertools.chain(
        *(
            sorted(glob.glob(os.path.join(f, f"*{suffix}"))) if os.path.isdir(f) else [f]
            for f in files
        )
    )
    files = list(found)
    if not files:
        raise UserError(f"{path}: the data set is empty; there is no *{suffix} file in it")
    _check_shards(files)
    return files


def _check_shards(paths: Iterable[str]) -> None:
    """Raise UserError where one of the shards is no regular file."""

    def check(path: str) -> None:
        try:
            files.check_regular(path)
        except OSError as error:
            raise_trouble(error)
            raise UserError(f"{path}: the shard cannot be read: {error.strerror}") from None

    with concurrent.futures.ThreadPoolExecutor(index_lib.THREADS) as pool:
        for _ in pool.map(check, paths):
            pass


class FolderSource(IndexedSource):
    """A directory of images and a captions.jsonl: one object a line with the fields of
    data/record.py, images by their paths (`file_name` or `output_image` will do for `image`).

    Paths are relative to the directory of captions.jsonl, or to `images`, and must not lead out of
    both: not by `..`, by an absolute path or by a symbolic link. Otherwise whoever wrote the
    captions chooses which files of this machine are read.
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
                f"data.images={images} is not a directory: give the one that holds the images of {path}"
            )
        own = os.path.dirname(self._lines_file)
        self._images = _ImageFiles(self._lines_file, (images, own) if images else (own,))
        shard_format = index_lib.ShardFormat(
            "folder",
            functools.partial(_index_folder, self._images),
            functools.partial(_folder_changed, self._images),
            _captions_state,
            variant=os.path.abspath(images) if images else "",
            size=functools.partial(_folder_size, self._images),
            one_file=False,
        )
        options = f"--images={shlex.quote(images)}" if images else ""
        dataset_index = index_lib.open_index(
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
    """The images that the lines of a captions file name, below one of the directories `roots`."""

    captions: str
    roots: tuple[str, ...]

    def path(self, name: str) -> str:
        """Return the path of an image below the first of the roots that has it. ValueError: a NUL,
        a lone surrogate.
        """
        paths = [os.path.join(root, name) for root in self.roots]
        return next((path for path in paths[:-1] if os.path.lexists(path)), paths[-1])

    def find(self, name: str) -> str:
        """Return the path of an image, symbolic links resolved; BadRecord where it leads out or to
        no plain file.
        """
        try:
            path = os.path.realpath(self.path(name))
            inside = any(
                os.path.commonpath([root, path]) == root
                for root in map(os.path.realpath, self.roots)
            )
            plain = (
                stat.S_ISREG(os.stat(path).st_mode) if inside else True
            )  # a pipe would be waited for
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None
        if not inside:
            reason = "the path leads out of the data set"
            hint = "set data.images, or images of the source, to a directory that holds it"
            raise BadRecord(self.captions, name, f"{reason}, to {path}: {hint}")
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
        """Return the bytes of an image, -1 where it cannot be read."""
        try:
            return os.path.getsize(self.find(name))
        except (BadRecord, OSError):
            return -1

    def sizes(self, names: Sequence[str], before: Sequence[int] = ()) -> list[int]:
        """Return the sizes of images. Of those that had one `before` a single call to the file
        system is enough: whether the path leads out of the roots is looked at when it is read.
        """

        def size(name: str, known: int) -> int:
            if known < 0:
                return self.size(name)
            try:
                return os.stat(self.path(name)).st_size
            except (OSError, ValueError):
                return -1

        with concurrent.futures.ThreadPoolExecutor(index_lib.THREADS) as pool:
            return list(pool.map(size, names, before or [-1] * len(names)))

    def _unreadable(self, name: str, error: Exception) -> BadRecord:
        reason = "no file can have this name"  # one with NUL or half a character
        if isinstance(error, OSError):
            reason = error.strerror
        return BadRecord(self.captions, name, f"the image cannot be read: {reason}")


def _captions_state(path: str) -> dict[str, Any]:
    """Return what says that a captions file is the same: it is read at every opening."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _captions(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, from 1, and offset of each line that is not blank, and its bytes."""
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, start, line
            start += len(line)


def _paths_of(line: bytes) -> list[str]:
    """Return the images that a line names, as far as it can be read: what is wrong with it is said
    when the record is.
    """
    try:
        name, inputs = _image_paths(json.loads(line))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    return [path for path in (name, *inputs) if isinstance(path, str) and path]


def _index_folder(images: _ImageFiles, path: str, progress: Progress) -> IndexData:
    lines, names, row_sizes, sums, incomplete = [], {}, [], [], Counts()

    def row(found: tuple[int, int, bytes]) -> tuple[int, int, dict[str, int]]:
        """(CRC32C, size or -1 where an image cannot be read, sizes of the images)"""
        line, sizes = found[2].strip(), {}
        value = crc32c([line])
        for name in _paths_of(line):
            try:
                data = images.read(name)
            except BadRecord as error:
                raise_trouble(error)
                sizes[name] = -1
                continue
            progress.add(len(data))
            sizes[name], value = len(data), crc32c([data], value)
        size = -1 if -1 in sizes.values() else len(line) + sum(sizes.values())
        return value, size, sizes

    with concurrent.futures.ThreadPoolExecutor(index_lib.THREADS) as pool:
        for some in _batched(_captions(path), 1024):
            for (number, start, line), (value, size, sizes) in zip(
                some, pool.map(row, some), strict=True
            ):
                lines.append((number, start, len(line)))
                sums.append(value)
                row_sizes.append(size)
                names |= sizes
                if size < 0:
                    incomplete.add("unreadable", f"line {number} first in {path}")
    raw = [name.encode("utf-8", "surrogatepass") for name in names]
    arrays = {
        "crc": np.array(sums, np.uint32),
        "sizes": np.array(row_sizes, np.int64).reshape(-1, 1),
        "lines": np.array(lines, np.int64).reshape(-1, 3),
        "paths": np.frombuffer(b"".join(raw), np.uint8),
        "path_ends": np.cumsum([len(name) for name in raw], dtype=np.int64),
        "path_sizes": np.array(list(names.values()), np.int64),
    }
    return IndexData(arrays | index_lib.concatenate_keys([]), incomplete=incomplete)


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
    return f"the size of {names[first]} was {before[first]}, now it is {now[first]}{others} (-1: it cannot be read)"


def _folder_size(images: _ImageFiles, path: str) -> int:
    names = [name for _, _, line in _captions(path) for name in _paths_of(line)]
    return sum(size for size in images.sizes(names) if size > 0)


def _batched(values: Iterable[Any], count: int) -> Iterator[list[Any]]:
    values = iter(values)
    while some := list(itertools.islice(values, count)):
        yield some


def _image_paths(fields: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The image to be drawn, or None, and those shown."""
    name = next((fields[n] for n in ("file_name", "image", "output_image") if fields.get(n)), None)
    return name, _several(fields)


def _several(fields: Mapping[str, Any]) -> list[Any]:
    """The images shown. Empty ones are none: TFDS has no missing values, and gives several as an
    array.
    """
    for given in map(fields.get, INPUT_FIELDS):
        images = (
            []
            if given is None
            else list(given)
            if isinstance(given, list | tuple | np.ndarray)
            else [given]
        )
        if any(images):
            return images
    return []


class ParquetSource(IndexedSource):
    """Parquet files with the columns of data/record.py; images are binary, or Hugging Face's
    struct{bytes, path}.

    A record costs its whole row group unless that group was read lately: shuffled training wants
    groups of few rows.
    """

    def __init__(
        self,
        path: str,
        files: list[str],
        processes: ProcessGroup = ProcessGroup(),
        rebuild: str = "",
    ) -> None:
        super().__init__(
            path,
            files,
            index_lib.open_index(path, files, PARQUET, processes=processes, rebuild=rebuild),
        )
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        self._columns: list[tuple[list[str], str]] = []  # of each file: (fields, key or "")
        rows = []
        for number, extra in enumerate(self._index.extra):
            self._columns.append((extra["fields"], extra["key"]))
            self._groups += [(number, group) for group in range(len(extra["groups"]))]
            rows += extra["groups"]
        self._ends = np.cumsum(rows).tolist()
        self.__setstate__(self.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_lock", "_tables")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._tables: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def _table(self, group: int) -> Any:
        """The columns of a row group, or the reason why it cannot be read: that is kept as well,
        since all of its rows ask."""
        with self._lock:
            if group not in self._tables:
                self._tables[group] = self._read_group(*self._groups[group])
                while len(self._tables) > ROW_GROUPS_KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(group)
            return self._tables[group]

    def _read_group(self, file: int, row_group: int) -> Any:
        import pyarrow.parquet

        fields, key = self._columns[file]
        columns = [*fields, key] if key else fields
        try:
            with pyarrow.parquet.ParquetFile(self.files[file]) as parquet:
                return parquet.read_row_group(row_group, columns=columns, use_threads=False)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise_trouble(error)  # which may be over when the next of its rows asks
            return f"the row group cannot be read: {_reason(error)}"

    def __getitem__(self, index: int) -> Record:
        group = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        table, file = self._table(group), self._groups[group][0]
        shard, (names, key_column) = self.files[file], self._columns[file]
        if isinstance(table, str):
            raise BadRecord(shard, f"row {index}", table)
        key = _shown_key(table[key_column][row]) if key_column else f"row {index}"
        try:
            fields = {name: table[name][row].as_py() for name in names}
            columns = [*names, key_column] if key_column else names
            parts = list(_row_bytes(table, columns, row))
        except UnicodeDecodeError as error:
            raise BadRecord(shard, key, f"the text is not UTF-8 (byte {error.start})") from None
        except Exception as error:  # as many as there are types of values
            raise BadRecord(shard, key, f"the row cannot be read: {_reason(error)}") from None
        self._index.check(shard, *self._index.locate(index), parts, key)
        images = [_encoded(x, shard, key) for x in _several(fields)]
        image = fields.get("image")
        return make_record(
            parse_text_fields(fields, shard, key),
            None if image is None else _encoded(image, shard, key),
            images,
            key,
            shard,
        )


def _index_parquet(path: str, progress: Progress) -> IndexData:
    """Return the index of a file: of each row the canonical bytes of the columns that a record is
    made of.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: no UTF-8
        raise UserError(f"{path}: not a readable parquet file ({_reason(error)})") from None
    sizes, sums, groups, incomplete = [], [], [], Counts()
    with file as parquet:
        fields = _known_fields(names, path, "columns")
        key = next((name for name in KEY_COLUMNS if name in names), "")
        columns = [*fields, key] if key else fields
        for group in range(parquet.num_row_groups):
            groups.append(parquet.metadata.row_group(group).num_rows)
            try:
                table = parquet.read_row_group(group, columns=columns, use_threads=False)
                rows = [_readable_bytes(table, columns, row) for row in range(groups[-1])]
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise_trouble(error)
                if isinstance(error, OSError) and error.errno:  # not the page, in any other way
                    raise
                rows = [[]] * groups[-1]  # each of them is a bad record when it is read
                incomplete.add("unreadable", f"row group {group} first in {path}", groups[-1])
            else:
                for row, parts in enumerate(rows, sum(groups[:-1])):
                    if not parts:
                        incomplete.add("unreadable", f"row {row} first in {path}")
            for parts in rows:
                sizes.append(sum(map(len, parts)) if parts else -1)
                sums.append(crc32c(parts))
            progress.add(parquet.metadata.row_group(group).total_byte_size)
    arrays = {"crc": np.array(sums, np.uint32), "sizes": np.array(sizes, np.int64).reshape(-1, 1)}
    return IndexData(
        arrays | index_lib.concatenate_keys([]),
        {"fields": fields, "key": key, "groups": groups},
        incomplete=incomplete,
    )


def _parquet_changed(path: str, found: ShardIndex) -> str:
    """See `index.ShardFormat.changed`."""
    extra = found.header["extra"]
    groups = extra["groups"]
    fits = all(isinstance(rows, int) and rows >= 0 for rows in groups) and sum(groups) == len(found)
    if not (fits and {*extra["fields"]} <= {*FIELDS} and extra["key"] in ("", *KEY_COLUMNS)):
        raise DamagedArrays("it does not fit a parquet file")
    return index_lib.same_state(path, found)


def _row_bytes(table: Any, names: Sequence[str], row: int) -> Iterator[bytes]:
    """Yield what a row says in a shard_format that does not depend on how the file stores it: for each
    column its name, kind, number of bytes or elements, and content. Of a struct the field `bytes`
    alone is used.
    """
    for name in names:
        yield f"{name}\0".encode()
        yield from _value_bytes(table[name][row])


def _readable_bytes(table: Any, names: Sequence[str], row: int) -> list[bytes]:
    """Return the bytes of a row, none where it cannot be read."""
    try:
        return list(_row_bytes(table, names, row))
    except MemoryError:
        raise
    except Exception:  # as many as there are types of values
        return []


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _shown_key(value: Any) -> str:
    """Return the name of a row, also of one that Python cannot hold."""
    import pyarrow

    try:
        return str(value.as_py())
    except Exception:  # a date after the year 9999, text that is not UTF-8
        if isinstance(value, pyarrow.BinaryScalar):
            return index_lib.printable(value.as_buffer().to_pybytes())
    try:
        return index_lib.printable(b"".join(_value_bytes(value)).strip())
    except Exception:
        return "a key that cannot be shown"


def _value_bytes(value: Any) -> Iterator[bytes]:
    import pyarrow

    kind = value.type
    if not value.is_valid:
        yield b"none"
    elif isinstance(value, pyarrow.BinaryScalar):  # text too; it need not be UTF-8
        data = value.as_buffer()
        yield b"bytes %d " % data.size
        yield data.to_pybytes()
    elif pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        yield from _value_bytes(value["bytes"])
    elif pyarrow.types.is_struct(kind):
        yield b"struct %d " % len(value)
        for number, field in enumerate(kind):
            yield f"{field.name}\0".encode()
            yield from _value_bytes(value[number])
    elif pyarrow.types.is_temporal(kind) and hasattr(value, "value"):  # Python holds fewer
        yield f"{kind} {value.value} ".encode()
    elif isinstance(value, pyarrow.ListScalar):
        yield b"list %d " % len(value)
        for each in value.values:
            yield from _value_bytes(each)
    elif isinstance(value, pyarrow.DictionaryScalar):
        yield from _value_bytes(value.value)
    else:
        yield f"{value.as_py()!r} ".encode(errors="backslashreplace")


PARQUET = index_lib.ShardFormat(
    "parquet",
    _index_parquet,
    _parquet_changed,
    threads=4,  # each holds a row group
    extra=frozenset({"fields", "key", "groups"}),
)


def _known_fields(names: Iterable[str], where: str, kind: str) -> list[str]:
    """Those of `names` that a record is made of."""
    names = list(names)
    twice = [name for name in (*KEY_COLUMNS, *FIELDS) if names.count(name) > 1]
    if twice:
        hint = "rename or drop the one that is not meant"
        raise UserError(f"{where}: the name {twice[0]} is there twice among the {kind}: {hint}")
    known = [name for name in FIELDS if name in names]
    if not {"image", *INPUT_FIELDS} & set(known) or not {"task", *TEXT_FIELDS} & set(known):
        raise UserError(
            f"{where}: needs the {kind} image and {' or '.join(CAPTION_FIELDS)}; it has {', '.join(names)}"
        )
    return known


def _encoded(image: Any, shard: str, key: str) -> bytes:
    image = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(image, bytes):
        raise BadRecord(shard, key, "no image; expected encoded bytes in the column image")
    return image


def _tfds_directories(path: pathlib.Path) -> list[pathlib.Path]:
    """The directories at or up to three levels below (name/config/version) that a TFDS builder has
    filled.
    """
    found = sorted(
        file.parent for depth in range(4) for file in path.glob("*/" * depth + "dataset_info.json")
    )
    return [
        directory for directory in found if not directory.name.startswith("incomplete.")
    ]  # of a run that was killed


class TfdsSource(IndexedSource):
    """A data set that a TFDS builder wrote in ArrayRecord format: the features of data/record.py,
    and maybe `key`.
    """

    def __init__(
        self, path: str, split: str, processes: ProcessGroup = ProcessGroup(), rebuild: str = ""
    ) -> None:
        directories = _tfds_directories(pathlib.Path(path))
        if len(directories) != 1:
            found = "none" if not directories else ", ".join(map(str, directories))
            raise UserError(
                f"{path}: expected one directory with a dataset_info.json, found {found}; give its path"
            )
        self._directory, self._split = str(directories[0]), split
        reader = self._reader
        shards = list(self._info.file_instructions)
        if len(reader):
            self._check_features(reader.dataset_info.features)
        files = [os.fspath(shard.filename) for shard in shards]
        ranges = [(shard.skip, shard.take) for shard in shards]
        options = "" if split == "train" else f"--split={shlex.quote(split)}"
        dataset_index = index_lib.open_index(
            path,
            files,
            ARRAY_RECORD,
            ranges=ranges,
            processes=processes,
            rebuild=rebuild,
            options=options,
        )
        if "[" not in split:  # a part of a split leaves records out on purpose
            for file, records, (skip, take) in zip(
                files, dataset_index.records, ranges, strict=True
            ):
                if more := records - skip - take:
                    dataset_index.unused.add("undeclared", f"first in {file}", more)
        descriptions = {"undeclared": "records beyond those that dataset_info.json counts"}
        super().__init__(path, files, dataset_index, descriptions)

    @property
    def _info(self) -> Any:
        return self._reader.dataset_info.splits[self._split]

    @functools.cached_property
    def _reader(self) -> Any:
        import tensorflow_datasets as tfds

        tfds_checks.check_description(self._directory)
        try:
            builder = tfds.builder_from_directory(self._directory)
        except Exception as error:  # whatever its JSON files hold
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"{self._directory}: no data set that TFDS can read: {reason}"
            ) from None
        try:
            shards = [
                os.fspath(s.filename) for s in builder.info.splits[self._split].file_instructions
            ]
        except Exception as error:  # of a template's fields, or a split that there is not
            raise self._no_split(error) from None
        if not shards:
            raise UserError(f"{self._directory}: data.split={self._split!r} holds no record")
        tfds_checks.check_inside(self._directory, shards)
        _check_shards(shards)
        try:
            images = [name for name in ("image", *INPUT_FIELDS) if name in builder.info.features]
            as_stored = tfds.decode.SkipDecoding()
            as_stored.decode_batch_example_np = (
                as_stored.decode_example_np
            )  # of sequences, which TFDS leaves out
            return builder.as_data_source(self._split, decoders=dict.fromkeys(images, as_stored))
        except (ValueError, NotImplementedError) as error:
            raise self._no_split(error) from None

    def _no_split(self, error: Exception) -> UserError:
        reason = str(error).partition("\n")[0] or type(error).__name__
        return UserError(f"{self._directory}: cannot read data.split={self._split!r}: {reason}")

    def _check_features(self, features: Any) -> None:
        self._fields = _known_fields(features, self._directory, "features")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __getitem__(self, index: int) -> Record:
        number, row = self._index.locate(index)
        shard = self.files[number]
        try:
            raw = self._reader.data_source[index]
        except Exception as error:  # ArrayRecord's own, of damaged bytes
            raise _unreadable(shard, index, error) from error
        self._index.check(shard, number, row, [raw], str(index))
        features, decoders = self._reader.dataset_info.features, self._reader.decoders
        try:
            fields = features.deserialize_example_np(raw, decoders=decoders)
        except Exception as error:  # protobuf's own
            raise _unreadable(shard, index, error) from error
        key = fields.get("key", str(index))
        key = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
        fields = {name: fields[name] for name in self._fields}
        return make_record(
            parse_text_fields(fields, shard, key),
            fields.get("image") or None,
            _several(fields),
            key,
            shard,
        )


def _unreadable(shard: str, index: int, error: Exception) -> BadRecord:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return BadRecord(shard, str(index), f"the record cannot be read: {reason}")


def _index_array_record(path: str, progress: Progress) -> IndexData:
    """Return the index of an ArrayRecord file: of each record its bytes as they are stored."""
    reader = _array_reader(path)
    count = reader.num_records()
    sizes, sums, incomplete = [], [], Counts()
    for start in range(0, count, 256):
        stop = min(start + 256, count)
        try:
            records = reader.read(start, stop)
        except Exception as error:  # a damaged chunk; the reader is of no use any more
            raise_trouble(error)
            records = [_array_record(path, row) for row in range(start, stop)]
            reader = _array_reader(path)
        for data in records:
            if data is None:
                incomplete.add("unreadable", f"record {len(sizes)} first in {path}")
            sizes.append(-1 if data is None else len(data))
            sums.append(0 if data is None else crc32c([data]))
            progress.add(len(data or b""))
    arrays = {"crc": np.array(sums, np.uint32), "sizes": np.array(sizes, np.int64).reshape(-1, 1)}
    return IndexData(arrays | index_lib.concatenate_keys([]), incomplete=incomplete)


def _array_reader(path: str) -> Any:
    from array_record.python import array_record_module

    options = "readahead_buffer_size:0,max_parallelism:0"
    try:
        reader = array_record_module.ArrayRecordReader(path, options)
        reader.num_records()
    except Exception as error:  # what the library raises is not documented
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable ArrayRecord file: {reason}") from None
    return reader


def _array_record(path: str, row: int) -> bytes | None:
    """Return one record, None where it cannot be read."""
    try:
        return _array_reader(path).read([row])[0]
    except Exception as error:
        raise_trouble(error)
        return None


ARRAY_RECORD = index_lib.ShardFormat("array_record", _index_array_record)
