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
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from blip3o_jax import config
from blip3o_jax.config import UserError
from blip3o_jax.data.record import (
    CAPTION_FIELDS,
    INPUT_FIELDS,
    TEXT_FIELDS,
    BadRecord,
    Record,
    Source,
    Words,
    fingerprint_of,
    make_record,
    parse_json,
    read_spans,
    words,
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
    return Redrawn(source) if cfg.task == "reconstruct" else source


class Redrawn(Source):
    """The images of `source`, each to be drawn again as it is shown; what they are captioned is not said."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.name, source.files)
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        image = record.first_image
        return make_record(Words("reconstruct", "", ""), image, (image,), record.key, record.shard)

    @functools.cached_property
    def fingerprint(self) -> str:
        return f"{self._source.fingerprint}-reconstruct"


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
    """A directory of images and a captions.jsonl: one object a line with the fields of data/record.py, images by their paths
    (`file_name` or `output_image` will do for `image`)."""

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
        key = f"line {number + 1}"
        fields, said = parse_json(raw, self._lines_file, key)
        name, inputs = _image_paths(fields)
        if not all(isinstance(path, str) for path in (*inputs, name or "")):
            raise BadRecord(self._lines_file, key, "images are given by their paths")
        key = name or (inputs[0] if inputs else key)
        return make_record(said, self._read(name) if name else None, map(self._read, inputs), key, self._lines_file)

    def _read(self, name: str) -> bytes:
        try:
            return pathlib.Path(self._root, name).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name with NUL or half a character
            reason = error.strerror if isinstance(error, OSError) else "no file can have this name"
            raise BadRecord(self._lines_file, name, f"the image cannot be read: {reason}") from None

    @functools.cached_property
    def fingerprint(self) -> str:
        images = []
        for index in range(len(self)):
            number, start, size = self._spans[index]
            [raw] = read_spans(self._lines_file, [(start, size)])
            try:
                name, inputs = _image_paths(parse_json(raw, "", str(number))[0])
            except BadRecord:
                continue  # the line counts through captions.jsonl's own size and time
            images += [os.path.join(self._root, str(path)) for path in (name, *inputs) if path]
        return fingerprint_of("FolderSource", [*self.files, *(image for image in images if os.path.exists(image))])


def _image_paths(fields: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The image to be drawn, or None, and those shown."""
    name = next((fields[n] for n in ("file_name", "image", "output_image") if fields.get(n)), None)
    return name, _several(fields)


def _several(fields: Mapping[str, Any]) -> list[Any]:
    """The images shown. Empty ones are none: TFDS has no missing values, and gives several as an array."""
    for given in map(fields.get, INPUT_FIELDS):
        images = [] if given is None else list(given) if isinstance(given, list | tuple | np.ndarray) else [given]
        if any(images):
            return images
    return []


class ParquetSource(Source):
    """Parquet files with the columns of data/record.py; images are binary, or Hugging Face's struct{bytes, path}.

    A record costs its whole row group unless that group was read lately: shuffled training wants groups of few rows.
    """

    def __init__(self, path: str, files: list[str]) -> None:
        import pyarrow
        import pyarrow.parquet

        super().__init__(path, files)
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        self._columns: list[tuple[list[str], str]] = []  # of each file: (fields, key or "")
        rows = []
        for index, file in enumerate(self.files):
            try:
                metadata = pyarrow.parquet.read_metadata(file)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None
            names = metadata.schema.to_arrow_schema().names
            fields = _known_fields(names, file, "columns")
            self._columns.append((fields, next((name for name in ("key", "id", "__key__") if name in names), "")))
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
        except (pyarrow.ArrowException, OSError) as error:
            return f"the row group cannot be read: {(str(error).splitlines() or [''])[0]}"

    def __getitem__(self, index: int) -> Record:
        group = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        table, file = self._table(group), self._groups[group][0]
        shard, (names, key_column) = self.files[file], self._columns[file]
        if isinstance(table, str):
            raise BadRecord(shard, f"row {index}", table)
        key = str(table[key_column][row].as_py()) if key_column else f"row {index}"
        try:
            fields = {name: table[name][row].as_py() for name in names}
        except UnicodeDecodeError as error:
            raise BadRecord(shard, key, f"the text is not UTF-8 (byte {error.start})") from None
        images = [_encoded(x, shard, key) for x in _several(fields)]
        image = fields.get("image")
        return make_record(
            words(fields, shard, key), None if image is None else _encoded(image, shard, key), images, key, shard
        )


def _known_fields(names: Iterable[str], where: str, kind: str) -> list[str]:
    """Those of `names` that a record is made of."""
    names = list(names)
    known = [name for name in ("task", "image", *INPUT_FIELDS, *TEXT_FIELDS, "answer") if name in names]
    if not {"image", *INPUT_FIELDS} & set(known) or not {"task", *TEXT_FIELDS} & set(known):
        raise UserError(f"{where}: needs the {kind} image and {' or '.join(CAPTION_FIELDS)}; it has {', '.join(names)}")
    return known


def _encoded(image: Any, shard: str, key: str) -> bytes:
    image = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(image, bytes):
        raise BadRecord(shard, key, "no image; expected encoded bytes in the column image")
    return image


def _tfds_directories(path: pathlib.Path) -> list[pathlib.Path]:
    """The directories at or up to three levels below (name/config/version) that a TFDS builder has filled."""
    found = sorted(file.parent for depth in range(4) for file in path.glob("*/" * depth + "dataset_info.json"))
    return [directory for directory in found if not directory.name.startswith("incomplete.")]  # of a run that was killed


class TfdsSource(Source):
    """A data set that a TFDS builder wrote in ArrayRecord format: the features of data/record.py, and maybe `key`."""

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
            images = [name for name in ("image", *INPUT_FIELDS) if name in builder.info.features]
            as_stored = tfds.decode.SkipDecoding()
            as_stored.decode_batch_example_np = as_stored.decode_example_np  # of sequences, which TFDS leaves out
            return builder.as_data_source(self._split, decoders=dict.fromkeys(images, as_stored))
        except (ValueError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self._directory}: cannot read data.split={self._split!r}: {reason}") from None

    def _check_features(self, features: Any) -> None:
        self._fields = _known_fields(features, self._directory, "features")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        shard = self.files[bisect.bisect_right(self._ends, index)]
        try:
            fields = self._reader[index]
        except Exception as error:  # ArrayRecord's and protobuf's own, of damaged bytes
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise BadRecord(shard, str(index), f"the record cannot be read: {reason}") from error
        key = fields.get("key", str(index))
        key = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
        fields = {name: fields[name] for name in self._fields}
        return make_record(words(fields, shard, key), fields.get("image") or None, _several(fields), key, shard)
