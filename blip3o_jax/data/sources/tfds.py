"""Read data sets of format tfds: ArrayRecord files written by a TFDS builder."""

import functools
import os
import pathlib
import shlex
from typing import Any

import numpy as np

from blip3o_jax.checksums import crc32c
from blip3o_jax.config import UserError
from blip3o_jax.config.errors import first_line
from blip3o_jax.data import tfds_checks
from blip3o_jax.data.index import Counts, IndexedSource, concatenate_keys
from blip3o_jax.data.index_builder import (
    IndexData,
    IndexProgress,
    ProcessGroup,
    ShardFormat,
    open_index,
)
from blip3o_jax.data.record import INPUT_FIELDS, BadRecord, Record, make_record, parse_text_fields
from blip3o_jax.data.sources.columns import input_images, known_fields
from blip3o_jax.data.sources.shards import check_shards
from blip3o_jax.files import raise_trouble


def tfds_directories(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the directories at or up to three levels below `path` (name/config/version) that a
    TFDS builder has filled.
    """
    found = sorted(
        file.parent for depth in range(4) for file in path.glob("*/" * depth + "dataset_info.json")
    )
    # A killed builder leaves directories of this name.
    return [directory for directory in found if not directory.name.startswith("incomplete.")]


class TfdsSource(IndexedSource):
    """Read a data set that a TFDS builder wrote in ArrayRecord format: the features of
    data/record.py, and optionally `key`.
    """

    def __init__(
        self, path: str, split: str, processes: ProcessGroup = ProcessGroup(), rebuild: str = ""
    ) -> None:
        directories = tfds_directories(pathlib.Path(path))
        if len(directories) != 1:
            found = "none" if not directories else ", ".join(map(str, directories))
            raise UserError(
                f"{path}: expected one directory with a dataset_info.json, found {found}; give its"
                " path"
            )
        self._directory = str(directories[0])
        self._split = split
        reader = self._reader
        shards = list(self._info.file_instructions)
        if len(reader):
            self._check_features(reader.dataset_info.features)
        files = [os.fspath(shard.filename) for shard in shards]
        ranges = [(shard.skip, shard.take) for shard in shards]
        options = "" if split == "train" else f"--split={shlex.quote(split)}"
        dataset_index = open_index(
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
        except Exception as error:  # its JSON files may hold anything
            raise UserError(
                f"{self._directory}: no data set that TFDS can read: {first_line(error)}"
            ) from None
        try:
            shards = [
                os.fspath(s.filename) for s in builder.info.splits[self._split].file_instructions
            ]
        except Exception as error:  # an unknown field of a template, or an unknown split
            raise self._no_split(error) from None
        if not shards:
            raise UserError(f"{self._directory}: data.split={self._split!r} holds no record")
        tfds_checks.check_inside(self._directory, shards)
        check_shards(shards)
        try:
            images = [name for name in ("image", *INPUT_FIELDS) if name in builder.info.features]
            as_stored = tfds.decode.SkipDecoding()
            # TFDS's SkipDecoding lacks the method that sequences are decoded with.
            as_stored.decode_batch_example_np = as_stored.decode_example_np
            return builder.as_data_source(self._split, decoders=dict.fromkeys(images, as_stored))
        except (ValueError, NotImplementedError) as error:
            raise self._no_split(error) from None

    def _no_split(self, error: Exception) -> UserError:
        reason = first_line(error)
        return UserError(f"{self._directory}: cannot read data.split={self._split!r}: {reason}")

    def _check_features(self, features: Any) -> None:
        self._fields = known_fields(features, self._directory, "features")

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
        features = self._reader.dataset_info.features
        decoders = self._reader.decoders
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
            input_images(fields),
            key,
            shard,
        )


def _unreadable(shard: str, index: int, error: Exception) -> BadRecord:
    return BadRecord(shard, str(index), f"the record cannot be read: {first_line(error)}")


def _index_array_record(path: str, progress: IndexProgress) -> IndexData:
    """Return the index of an ArrayRecord file: of each record its bytes as they are stored."""
    reader = _array_reader(path)
    count = reader.num_records()
    sizes: list[int] = []
    sums = []
    incomplete = Counts()
    for start in range(0, count, 256):
        stop = min(start + 256, count)
        try:
            records = reader.read(start, stop)
        except Exception as error:  # a damaged chunk; the reader cannot go on
            raise_trouble(error)
            records = [_array_record(path, row) for row in range(start, stop)]
            reader = _array_reader(path)
        for data in records:
            if data is None:
                incomplete.add("unreadable", f"record {len(sizes)} first in {path}")
            sizes.append(-1 if data is None else len(data))
            sums.append(0 if data is None else crc32c([data]))
            progress.add(len(data or b""))
    arrays: dict[str, np.ndarray] = {
        "crc": np.array(sums, np.uint32),
        "sizes": np.array(sizes, np.int64).reshape(-1, 1),
    }
    return IndexData(arrays | concatenate_keys([]), incomplete=incomplete)


def _array_reader(path: str) -> Any:
    from array_record.python import array_record_module

    options = "readahead_buffer_size:0,max_parallelism:0"
    try:
        reader = array_record_module.ArrayRecordReader(path, options)
        reader.num_records()
    except Exception as error:  # what the library raises is not documented
        raise UserError(f"{path}: not a readable ArrayRecord file: {first_line(error)}") from None
    return reader


def _array_record(path: str, row: int) -> bytes | None:
    """Return one record, None where it cannot be read."""
    try:
        return _array_reader(path).read([row])[0]
    except Exception as error:
        raise_trouble(error)
        return None


ARRAY_RECORD = ShardFormat("array_record", _index_array_record)
