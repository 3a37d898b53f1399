"""Cache the outputs of the frozen encoders for a source's images on disk.

Directory of one (source, encoders) pair, named by a hash of all that the values depend on:

    codes-00012.npy      int32   [records, N]   of records 12 * RECORDS_PER_SHARD ..
    latents-00012.npy    float32 [records, H, W, C]
    shard-00012.json     {"unreadable": {"index": "reason"},
                          "codes": {"shape": [...], "crc32c": [...]}, "latents": ...}

`unreadable` names the records that could not be decoded; `crc32c` has a checksum per record. With R
reference slots both arrays are [records, 1 + R, ...], the target image first; empty slots are
zeros.

A shard is written under another name and renamed when whole, so that writing resumes where it
stopped and several hosts share the work. `train/encode.py` writes the shards; they are float32 so
that a cached step equals one that encodes inside.

Reading a cache of many gigabytes at every start takes too long. The start checks only the arrays'
sizes, and a record's checksum is compared when the record is read. A damaged shard is set aside:
its JSON file is renamed to shard-00012.json.damaged, and the next start encodes it again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from blip3o_jax import checksums, files
from blip3o_jax.config import ConfigError
from blip3o_jax.config.errors import first_line
from blip3o_jax.data.record import BadRecord, Record, Source

# Raised whenever the same images and weights would give other values, or another layout of files.
VERSION = 2
RECORDS_PER_SHARD = 4096  # records
DTYPES = {"codes": np.dtype("<i4"), "latents": np.dtype("<f4")}


class DamagedShard(ConfigError):
    """Report a shard that was set aside because its contents are not those that were written.
    `reason`: file and what is wrong with it. The record is not skipped for it, since the record
    itself is sound.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}: the cache's shard is encoded again when the run is started again"
        )
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedShard, (self.reason,)


@dataclasses.dataclass(frozen=True)
class EncodedRecord(Record):
    """Hold a record with encoder outputs in place of its images' views: `codes` [N], scaled
    `latents` [H, W, C], and with R reference slots `reference_codes` [R, N] and `reference_latents`
    [R, H, W, C].
    """

    outputs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def directory_name(source: Source, settings: dict[str, Any]) -> str:
    """Return a hash of the source's content and of `settings`: crop and sizes, encoder
    configuration and weights.
    """
    content = json.dumps(
        {"version": VERSION, "source": source.fingerprint, **settings}, sort_keys=True
    )
    return f"v{VERSION}-{hashlib.sha256(content.encode()).hexdigest()[:20]}"


class EncodedSource(Source):
    """Read the records of `source` with the encoder outputs stored in `directory`; codes lie in [0,
    `codebook_size`).
    """

    def __init__(self, source: Source, directory: pathlib.Path, codebook_size: int) -> None:
        super().__init__(source.name, source.files)
        self.source = source
        self.directory = directory
        self.shape = source.shape
        self._codebook_size = codebook_size

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> EncodedRecord:
        """Return a record with its encoder outputs. Raises DamagedShard where the stored values
        differ from those that were written, or cannot be outputs of the encoders.
        """
        record = self.source[index]
        number, row = divmod(index, RECORDS_PER_SHARD)
        shard = open_shard(self.directory, number)
        if str(index) in shard.unreadable:
            raise BadRecord(record.shard, record.key, shard.unreadable[str(index)])
        codes, latents = (shard.read(name, row) for name in DTYPES)
        if reason := not_outputs(codes, latents, self._codebook_size):
            shard.refuse(f"{shard.file.name}: record {row} has {reason}")
        outputs = {"codes": codes, "latents": latents}
        if codes.ndim == 2:
            outputs = {
                "codes": codes[0],
                "latents": latents[0],
                "reference_codes": codes[1:],
                "reference_latents": latents[1:],
            }
        return EncodedRecord(**vars(record), outputs=outputs)


def not_outputs(codes: np.ndarray, latents: np.ndarray, codebook_size: int) -> str:
    """Return why these values cannot be outputs of the encoders, "" if they can."""
    if codes.min(initial=0) < 0 or codes.max(initial=0) >= codebook_size:
        return f"codes from {codes.min()} to {codes.max()} where there are {codebook_size}"
    if not np.all(np.isfinite(latents)):
        return "latents that are not finite"
    return ""


@dataclasses.dataclass(frozen=True)
class EncodedShard:
    """Hold one shard, its arrays mapped into memory. `sums`: the CRC32C of each record, by the
    array's name.
    """

    file: pathlib.Path
    unreadable: dict[str, str]
    arrays: dict[str, np.ndarray]
    sums: dict[str, list[int]]

    def read(self, name: str, row: int) -> np.ndarray:
        """Return a copy of one record's values. Raises DamagedShard."""
        # A copy: the checksum is of the bytes that are returned, not of a mapping that may change
        # afterwards.
        values = np.array(self.arrays[name][row])
        if checksums.crc32c([values.tobytes()]) != self.sums[name][row]:
            self.refuse(
                f"{_array_file(self.file, name).name} is damaged (another CRC32C in record {row})"
            )
        return values

    def refuse(self, reason: str) -> None:
        """Set the shard aside and raise DamagedShard."""
        set_aside(self.file)
        open_shard.cache_clear()
        raise DamagedShard(f"{self.file.parent}/{reason}")


def shard_file(directory: pathlib.Path, number: int) -> pathlib.Path:
    """Return the JSON file that marks a shard as complete."""
    return directory / f"shard-{number:05d}.json"


def set_aside(file: pathlib.Path) -> None:
    """Rename a shard's JSON file so that the shard is encoded again. The file may be gone: several
    processes may find the same damage.
    """
    with contextlib.suppress(FileNotFoundError):
        file.replace(file.with_suffix(".json.damaged"))


def _array_file(file: pathlib.Path, name: str) -> pathlib.Path:
    return file.with_name(file.name.replace("shard", name).replace(".json", ".npy"))


def write_shard(
    directory: pathlib.Path, number: int, arrays: dict[str, np.ndarray], unreadable: dict[str, str]
) -> None:
    """Write a shard's arrays {name: [records, ...]}, and last the JSON file that marks the shard as
    complete.
    """
    file = shard_file(directory, number)
    described = {}
    for name, values in arrays.items():
        values = np.ascontiguousarray(values, DTYPES[name])
        final = _array_file(file, name)
        header = np.lib.format.header_data_from_array_1_0(values)
        with files.replacing(final, "wb") as out:  # np.save loses the reason of a failed write
            np.lib.format.write_array_header_1_0(out, header)
            out.write(values.data)
        described[name] = {
            "shape": values.shape,
            "crc32c": [checksums.crc32c([row.tobytes()]) for row in values],
        }
    checksums.write_json(file, {"unreadable": unreadable} | described)
    open_shard.cache_clear()


@functools.lru_cache(maxsize=64)
def open_shard(directory: pathlib.Path, number: int) -> EncodedShard:
    """Open a shard without reading its values. Raises DamagedShard, naming the file, where the
    shard is not what was written; the shard is then set aside.
    """
    file = shard_file(directory, number)
    reading = file
    arrays = {}
    try:
        described = checksums.read_json(file)
        for name in DTYPES:
            reading = _array_file(file, name)
            # Mapped: a worker reads one record of a shard of gigabytes.
            arrays[name] = np.load(reading, mmap_mode="r")
        reading = file
        shard = EncodedShard(
            file,
            described["unreadable"],
            arrays,
            {name: described[name]["crc32c"] for name in DTYPES},
        )
        shapes = {name: tuple(described[name]["shape"]) for name in DTYPES}
    except Exception as error:  # NumPy's header parser raises many types
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # a fault of the machine, not of the file
        reason = first_line(error).removeprefix(f"{reading} ")
        EncodedShard(file, {}, {}, {}).refuse(f"{reading.name} cannot be used ({reason})")
    for name, array in arrays.items():
        if (array.dtype, array.shape) != (DTYPES[name], shapes[name]) or len(
            shard.sums[name]
        ) != len(array):
            shard.refuse(
                f"{_array_file(file, name).name} is {array.dtype} {array.shape}, not {DTYPES[name]}"
                f" {shapes[name]}"
            )
    return shard
