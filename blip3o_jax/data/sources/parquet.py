"""Read data sets of format parquet: files of row groups, Hugging Face's image columns included."""

import bisect
import collections
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from blip3o_jax.checksums import crc32c
from blip3o_jax.config import UserError
from blip3o_jax.config.errors import first_line
from blip3o_jax.data.checked_file import DamagedArrays
from blip3o_jax.data.index import Counts, IndexedSource, ShardIndex, concatenate_keys, printable
from blip3o_jax.data.index_builder import (
    IndexData,
    IndexProgress,
    ProcessGroup,
    ShardFormat,
    open_index,
    same_state,
)
from blip3o_jax.data.record import BadRecord, Record, make_record, parse_text_fields
from blip3o_jax.data.sources.columns import FIELDS, KEY_COLUMNS, input_images, known_fields
from blip3o_jax.files import raise_trouble

CACHED_ROW_GROUPS = 4


class ParquetSource(IndexedSource):
    """Read parquet files with the columns of data/record.py; images are binary, or Hugging Face's
    struct{bytes, path}.

    Reading a record reads its whole row group unless that group is cached, so shuffled training
    needs groups of few rows.
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
            open_index(path, files, PARQUET, processes=processes, rebuild=rebuild),
        )
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        self._columns: list[tuple[list[str], str]] = []  # of each file: (fields, key or "")
        rows = []
        for number, extra in enumerate(self._index.extra):
            self._columns.append((extra["fields"], extra["key"]))
            self._groups += [(number, group) for group in range(len(extra["groups"]))]
            rows += extra["groups"]
        self._ends = np.cumsum(rows).tolist()
        # Creates the lock and the cache, which do not pickle.
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
        """Return the columns of a row group, or the reason why it cannot be read. The reason is
        cached too, since every row of the group needs it.
        """
        with self._lock:
            if group not in self._tables:
                self._tables[group] = self._read_group(*self._groups[group])
                while len(self._tables) > CACHED_ROW_GROUPS:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(group)
            return self._tables[group]

    def _read_group(self, file: int, row_group: int) -> Any:
        import pyarrow.parquet

        fields, key = self._columns[file]
        columns = [*fields, key] if key else fields
        try:
            with pyarrow.parquet.ParquetFile(self.files[file]) as parquet:
                # One thread: the loader's workers are the parallelism.
                return parquet.read_row_group(row_group, columns=columns, use_threads=False)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise_trouble(error)  # temporary ones must not be cached
            return f"the row group cannot be read: {first_line(error)}"

    def __getitem__(self, index: int) -> Record:
        group = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        table = self._table(group)
        file = self._groups[group][0]
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
            raise BadRecord(shard, key, f"the row cannot be read: {first_line(error)}") from None
        self._index.check(shard, *self._index.locate(index), parts, key)
        images = [_image_bytes(x, shard, key) for x in input_images(fields)]
        image = fields.get("image")
        return make_record(
            parse_text_fields(fields, shard, key),
            None if image is None else _image_bytes(image, shard, key),
            images,
            key,
            shard,
        )


def _index_parquet(path: str, progress: IndexProgress) -> IndexData:
    """Return the index of a file: of each row the canonical bytes of the columns that a record is
    made of.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: no UTF-8
        raise UserError(
            f"{path}: not a readable parquet file ({first_line(error)}): copy it again, or set"
            " data.format to its own"
        ) from None
    sizes = []
    sums = []
    groups = []
    incomplete = Counts()
    with file as parquet:
        fields = known_fields(names, path, "columns")
        key = next((name for name in KEY_COLUMNS if name in names), "")
        columns = [*fields, key] if key else fields
        for group in range(parquet.num_row_groups):
            groups.append(parquet.metadata.row_group(group).num_rows)
            try:
                table = parquet.read_row_group(group, columns=columns, use_threads=False)
                rows = [_readable_bytes(table, columns, row) for row in range(groups[-1])]
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise_trouble(error)
                # An error of the system, not a damaged page.
                if isinstance(error, OSError) and error.errno:
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
    arrays: dict[str, np.ndarray] = {
        "crc": np.array(sums, np.uint32),
        "sizes": np.array(sizes, np.int64).reshape(-1, 1),
    }
    return IndexData(
        arrays | concatenate_keys([]),
        {"fields": fields, "key": key, "groups": groups},
        incomplete=incomplete,
    )


def _parquet_changed(path: str, found: ShardIndex) -> str:
    """Return why the index does not describe the shard; see `index_builder.ShardFormat.changed`."""
    extra = found.header["extra"]
    groups = extra["groups"]
    fits = all(isinstance(rows, int) and rows >= 0 for rows in groups) and sum(groups) == len(found)
    if not (fits and {*extra["fields"]} <= {*FIELDS} and extra["key"] in ("", *KEY_COLUMNS)):
        raise DamagedArrays("it does not fit a parquet file")
    return same_state(path, found)


def _row_bytes(table: Any, names: Sequence[str], row: int) -> Iterator[bytes]:
    """Yield what a row says in a shard_format that does not depend on how the file stores it: for
    each column its name, kind, number of bytes or elements, and content. Of a struct the field
    `bytes` alone is used.
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


def _shown_key(value: Any) -> str:
    """Return the name of a row, also of one that Python cannot hold."""
    import pyarrow

    try:
        return str(value.as_py())
    except Exception:  # a date after the year 9999, text that is not UTF-8
        if isinstance(value, pyarrow.BinaryScalar):
            return printable(value.as_buffer().to_pybytes())
    try:
        return printable(b"".join(_value_bytes(value)).strip())
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


def _image_bytes(image: Any, shard: str, key: str) -> bytes:
    image = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(image, bytes):
        raise BadRecord(shard, key, "no image; expected encoded bytes in the column image")
    return image


PARQUET = ShardFormat(
    "parquet",
    _index_parquet,
    _parquet_changed,
    threads=4,  # each holds a row group
    extra=frozenset({"fields", "key", "groups"}),
)
