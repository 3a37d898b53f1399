"""A source whose records carry the outputs of the frozen encoders for their images, from a cache on
disk.

Directory of one (source, encoders) pair, named by a hash of all that the values depend on:

    codes-00012.npy      int32   [records, N]           of records 12 * RECORDS_PER_SHARD .. of the source
    latents-00012.npy    float32 [records, H, W, C]
    shard-00012.json      {"unreadable": {"index": "reason"},                 records that could not be decoded
                          "codes": {"shape": [...], "crc32c": [...]}, "latents": ...}       a checksum a record

With R reference slots both arrays are [records, 1 + R, ...], the target image first; empty slots
are zeros.

A shard is written under another name and renamed when whole, so that writing resumes where it
stopped and several hosts share the work. `train/encode.py` writes these; float32 keeps a cached
step equal to one that encodes inside.

Nobody can read a cache of many gigabytes at every start, so the arrays' sizes are checked then, and
a record's checksum when it is read. A damaged shard is set aside: its json is renamed to
shard-00012.json.damaged, and the next start encodes it again.
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

VERSION = 2  # raised whenever the same images and weights would give other values, or another layout of files
RECORDS_PER_SHARD = 4096  # records
DTYPES = {"codes": np.dtype("<i4"), "latents": np.dtype("<f4")}


class DamagedShard(ConfigError):
    """A shard that is not what was written; it is set aside. `reason`: file and what is wrong with
    it. Not the fault of the record that was to be read, which therefore is not skipped for it.
    """

    def __init__(self, reason: str):
        super().__init__(
            f"{reason}: the cache's shard is encoded again when the run is started again"
        )
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedShard, (self.reason,)


@dataclasses.dataclass(frozen=True)
class EncodedRecord(Record):
    """A record with encoder outputs in place of its images' views: `codes` [N], scaled `latents` [H,
    W, C], and `reference_codes` [R, N], `reference_latents` [R, H, W, C] with R
    reference slots.
    """

    outputs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def directory_name(source: Source, settings: dict[str, Any]) -> str:
    """Return a hash of the source's content and of `settings`: crop and sizes, encoder configuration and
    weights.
    """
    content = json.dumps(
        {"version": VERSION, "source": source.fingerprint, **settings}, sort_keys=True
    )
    return f"v{VERSION}-{hashlib.sha256(content.encode()).hexdigest()[:20]}"


class EncodedSource(Source):
    """`source` with the encoder outputs kept in `directory`; codes lie in [0, `codebook_size`)."""

    def __init__(self, source: Source, directory: pathlib.Path, codebook_size: int):
        super().__init__(source.name, source.files)
        self.source, self.directory, self.shape = source, directory, source.shape
        self._codebook_size = codebook_size

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> EncodedRecord:
        """Raises DamagedShard where what is stored is not what was written, or is no output of
        encoders.
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
    """Return why these cannot be encoders' outputs, "" if they can."""
    if codes.min(initial=0) < 0 or codes.max(initial=0) >= codebook_size:
        return f"codes from {codes.min()} to {codes.max()} where there are {codebook_size}"
    if not np.all(np.isfinite(latents)):
        return "latents that are not finite"
    return ""


@dataclasses.dataclass(frozen=True)
class EncodedShard:
    """One shard, its arrays mapped into memory. `sums`: the CRC32C of each record, by the array's
    name.
    """

    file: pathlib.Path
    unreadable: dict[str, str]
    arrays: dict[str, np.ndarray]
    sums: dict[str, list[int]]

    def read(self, name: str, row: int) -> np.ndarray:
        """Return a copy of one record's values. Raises DamagedShard."""
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
    """Return the file whose presence says that a shard is whole."""
    return directory / f"shard-{number:05d}.json"


def set_aside(file: pathlib.Path) -> None:
    """Rename a shard's json, so that the shard is encoded again; several processes may find the same
    damage.
    """
    with contextlib.suppress(FileNotFoundError):
        file.replace(file.with_suffix(".json.damaged"))


def _array_file(file: pathlib.Path, name: str) -> pathlib.Path:
    return file.with_name(file.name.replace("shard", name).replace(".json", ".npy"))


def write_shard(
    directory: pathlib.Path, number: int, arrays: dict[str, np.ndarray], unreadable: dict[str, str]
) -> None:
    """Write a shard's arrays [records, ...], by name, and last the json that says that it is whole."""
    file = shard_file(directory, number)
    described = {}
    for name, values in arrays.items():
        values = np.ascontiguousarray(values, DTYPES[name])
        final = _array_file(file, name)
        header = np.lib.format.header_data_from_array_1_0(values)
        with files.replacing(final, "wb") as out:  # np.save would not say why a write fails
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
    """Open a shard, reading none of its values. Raises DamagedShard, naming the file, where it is not
    what was written; the shard is then set aside.
    """
    file = shard_file(directory, number)
    reading, arrays = file, {}
    try:
        described = checksums.read_json(file)
        for name in DTYPES:
            reading = _array_file(file, name)
            arrays[name] = np.load(reading, mmap_mode="r")
        reading = file
        shard = EncodedShard(
            file,
            described["unreadable"],
            arrays,
            {name: described[name]["crc32c"] for name in DTYPES},
        )
        shapes = {name: tuple(described[name]["shape"]) for name in DTYPES}
    except Exception as error:  # the parser of NumPy's headers raises whatever it comes upon
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # the machine's, not the file's
        reason = first_line(error).removeprefix(f"{reading} ")
        EncodedShard(file, {}, {}, {}).refuse(f"{reading.name} cannot be used ({reason})")
    for name, array in arrays.items():
        if (array.dtype, array.shape) != (DTYPES[name], shapes[name]) or len(
            shard.sums[name]
        ) != len(array):
            shard.refuse(
                f"{_array_file(file, name).name} is {array.dtype} {array.shape}, not {DTYPES[name]} {shapes[name]}"
            )
    return shard
