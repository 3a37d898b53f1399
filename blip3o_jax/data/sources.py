"""Captioned images on disk, behind one random-access interface.

    TFDS/ArrayRecord | webdataset .tar | parquet | folder + captions.jsonl   ->   Source: len(s), s[i] -> Record

A source keeps paths and indexes only and opens files when a record is read, so it can be pickled to worker processes and
shared by threads. What is wrong with a whole data set (a missing path, a tar cut in half) is a ValueError when it is opened;
what is wrong with one record (no caption, text that is not UTF-8) is a `BadRecord` when that record is read.
"""

import bisect
import collections
import functools
import glob
import itertools
import os
import pathlib
import re
import threading
from typing import Any

import numpy as np

from blip3o_jax import config
from blip3o_jax.config import UserError
from blip3o_jax.data.record import (
    CAPTION_FIELDS,
    BadRecord,
    Record,
    Source,
    decode_text,
    fingerprint_of,
    parse_json,
    read_spans,
)
from blip3o_jax.data.tar import TarSource

CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
ROW_GROUPS_KEPT = 4


def open_mixture(data: config.DataConfig) -> list[tuple[Source, float]]:
    """The sources of a run with their weights."""
    if not data.all_sources:
        raise config.ConfigError("data.path is empty: set --config.data.path to a data set, or data.sources to a mixture")
    return [(open_source(source), source.weight) for source in data.all_sources]


def open_source(cfg: config.SourceConfig) -> Source:
    """Opens `cfg.path`: a file, a directory, a glob, or a brace pattern such as `shards/{00000..00031}.tar`.

    Raises:
      ValueError: nothing there, an unknown format, an empty or damaged data set; one line that names it.
    """
    path = os.path.expanduser(cfg.path)
    files = _expand(path)
    kind = _detect(path, files) if cfg.format == "auto" else cfg.format
    if kind == "tfds":
        source: Source = TfdsSource(path, cfg.split)
    elif kind == "folder":
        source = FolderSource(path)
    elif kind == "webdataset":
        source = TarSource(path, _members(path, files, ".tar"))
    else:
        source = ParquetSource(path, _members(path, files, ".parquet"))
    if not len(source):
        raise UserError(f"{path}: the data set is empty; give one with at least one captioned image")
    return source


def _expand(path: str) -> list[str]:
    """The paths a pattern stands for, all of them there."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", path)
    if len(parts) > 1:
        spans = [
            [f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)]
            for low, high in zip(parts[1::3], parts[2::3], strict=True)
        ]
        files = [
            "".join(itertools.chain(*zip(parts[::3], (*numbers, ""), strict=True))) for numbers in itertools.product(*spans)
        ]
    elif glob.has_magic(path) and not os.path.exists(path):
        files = sorted(glob.glob(path)) or [path]
    else:
        files = [path]
    for file in files:
        if not os.path.exists(file):
            raise UserError(f"{file}: no such file or directory; check data.path (a mounted bucket works, a URL does not)")
    return files


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
        raise UserError(f"{first}: unknown format; expected .tar (not compressed), .parquet, .jsonl or a directory")
    return kinds[first.suffix]


def _members(path: str, files: list[str], suffix: str) -> list[str]:
    found = itertools.chain(*(sorted(glob.glob(os.path.join(f, f"*{suffix}"))) if os.path.isdir(f) else [f] for f in files))
    files = list(found)
    if not files:
        raise UserError(f"{path}: the data set is empty; there is no *{suffix} file in it")
    return files


class FolderSource(Source):
    """A directory of images and a captions.jsonl: one object a line, `file_name` or `image` beside `caption` or `text`."""

    def __init__(self, path: str) -> None:
        candidates = [os.path.join(path, name) for name in CAPTION_FILES] if os.path.isdir(path) else [path]
        self._lines_file = next((c for c in candidates if os.path.isfile(c)), "")
        if not self._lines_file:
            raise UserError(f"{path}: there is no {' or '.join(CAPTION_FILES)} in it")
        super().__init__(path, [self._lines_file])
        self._root = os.path.dirname(self._lines_file)
        with open(self._lines_file, "rb") as file:
            lines = [len(line) if line.strip() else -len(line) for line in file]
        starts = np.cumsum([0, *np.abs(lines)])
        self._spans = [(n, int(starts[n]), size) for n, size in enumerate(lines) if size > 0]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        number, start, size = self._spans[index]
        [raw] = read_spans(self._lines_file, [(start, size)])
        fields, caption = parse_json(raw, self._lines_file, f"line {number + 1}")
        name = fields.get("file_name", fields.get("image"))
        if not isinstance(name, str):
            raise BadRecord(self._lines_file, f"line {number + 1}", "no image; expected its path in file_name or image")
        try:
            image = pathlib.Path(self._root, name).read_bytes()
        except OSError as error:
            raise BadRecord(self._lines_file, name, f"the image cannot be read: {error.strerror}") from None
        return Record(image, caption, name, self._lines_file)

    @functools.cached_property
    def fingerprint(self) -> str:
        images = []
        for index in range(len(self)):
            number, start, size = self._spans[index]
            [raw] = read_spans(self._lines_file, [(start, size)])
            try:
                fields, _ = parse_json(raw, "", str(number))
                images.append(os.path.join(self._root, str(fields.get("file_name", fields.get("image")))))
            except BadRecord:
                continue  # the line counts through captions.jsonl's own size and time
        return fingerprint_of("FolderSource", [*self.files, *(image for image in images if os.path.exists(image))])


class ParquetSource(Source):
    """Parquet files with a column `image` (binary, or Hugging Face's struct{bytes, path}) and one `caption` or `text`.

    A record costs its whole row group unless that group was read lately: shuffled training wants groups of few rows.
    """

    def __init__(self, path: str, files: list[str]) -> None:
        import pyarrow
        import pyarrow.parquet

        super().__init__(path, files)
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        self._columns: list[tuple[str, str]] = []  # of each file: (caption, key or "")
        rows = []
        for index, file in enumerate(self.files):
            try:
                metadata = pyarrow.parquet.read_metadata(file)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None
            names = metadata.schema.to_arrow_schema().names
            caption = next((name for name in CAPTION_FIELDS if name in names), None)
            if "image" not in names or caption is None:
                raise UserError(f"{file}: needs the columns image and {' or '.join(CAPTION_FIELDS)}; it has {', '.join(names)}")
            self._columns.append((caption, next((name for name in ("key", "id", "__key__") if name in names), "")))
            self._groups += [(index, group) for group in range(metadata.num_row_groups)]
            rows += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(rows).tolist()
        self.__setstate__(self.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_tables")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._tables: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _table(self, group: int) -> Any:
        import pyarrow.parquet

        with self._lock:
            if group not in self._tables:
                file, row_group = self._groups[group]
                columns = ["image", *filter(None, self._columns[file])]
                with pyarrow.parquet.ParquetFile(self.files[file]) as parquet:
                    self._tables[group] = parquet.read_row_group(row_group, columns=columns, use_threads=False)
                while len(self._tables) > ROW_GROUPS_KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(group)
            return self._tables[group]

    def __getitem__(self, index: int) -> Record:
        group = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        table, file = self._table(group), self._groups[group][0]
        shard, (caption_column, key_column) = self.files[file], self._columns[file]
        key = str(table[key_column][row].as_py()) if key_column else f"row {index}"
        image = table["image"][row].as_py()
        image = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(image, bytes):
            raise BadRecord(shard, key, "no image; expected encoded bytes in the column image")
        try:
            caption = table[caption_column][row].as_py()
        except UnicodeDecodeError as error:
            raise BadRecord(shard, key, f"the caption is not UTF-8 (byte {error.start})") from None
        return Record(image, decode_text(caption, shard, key), key, shard)


def _tfds_directories(path: pathlib.Path) -> list[pathlib.Path]:
    """The directories at or up to three levels below (name/config/version) that a TFDS builder has filled."""
    found = sorted(file.parent for depth in range(4) for file in path.glob("*/" * depth + "dataset_info.json"))
    return [directory for directory in found if not directory.name.startswith("incomplete.")]  # of a run that was killed


class TfdsSource(Source):
    """A data set that a TFDS builder wrote in ArrayRecord format: features `image`, `caption` or `text`, and maybe `key`."""

    def __init__(self, path: str, split: str) -> None:
        directories = _tfds_directories(pathlib.Path(path))
        if len(directories) != 1:
            found = "none" if not directories else ", ".join(map(str, directories))
            raise UserError(f"{path}: expected one directory with a dataset_info.json, found {found}; give its path")
        self._directory, self._split = str(directories[0]), split
        reader = self._reader
        shards = list(self._info.file_instructions)
        self._ends = np.cumsum([shard.take for shard in shards]).tolist()
        super().__init__(path, [os.fspath(shard.filename) for shard in shards])
        if len(reader):
            self._check_features(reader.dataset_info.features)

    @property
    def _info(self) -> Any:
        return self._reader.dataset_info.splits[self._split]

    @functools.cached_property
    def _reader(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._directory)
        try:
            return builder.as_data_source(self._split, decoders={"image": tfds.decode.SkipDecoding()})
        except (ValueError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self._directory}: cannot read data.split={self._split!r}: {reason}") from None

    def _check_features(self, features: Any) -> None:
        self._caption = next((name for name in CAPTION_FIELDS if name in features), None)
        if "image" not in features or self._caption is None:
            names = ", ".join(features)
            raise UserError(f"{self._directory}: needs the features image and {' or '.join(CAPTION_FIELDS)}; it has {names}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        fields = self._reader[index]
        shard = self.files[bisect.bisect_right(self._ends, index)]
        key = fields.get("key", str(index))
        key = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
        return Record(fields["image"], decode_text(fields[self._caption], shard, key), key, shard)
