"""A source whose records carry what the frozen encoders make of their images, read from disk.

Directory of one (source, encoders) pair, named by a hash of all that the values depend on:

    codes-00012.npy      int32   [records, N]           of records 12 * PART .. of the source
    latents-00012.npy    float32 [records, H, W, C]
    unreadable-00012.json  {"index": "reason"}          records that could not be decoded

With places for R reference images both arrays are [records, 1 + R, ...], the image to be drawn first; what is not there is
zeros.

A part is written under another name and renamed when whole, so that writing resumes where it stopped and several hosts
share the work. `train/encode.py` writes these; float32 keeps a cached step equal to one that encodes inside.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from blip3o_jax.data.record import BadRecord, Record, Source

VERSION = 1  # of the values: raised whenever the same images and weights would give others
PART = 4096  # records


@dataclasses.dataclass(frozen=True)
class EncodedRecord(Record):
    """A record with what an example has in place of its views: `codes` [N] and scaled `latents` [H, W, C] of its image, and
    `reference_codes` [R, N], `reference_latents` [R, H, W, C] where there are places for reference images."""

    outputs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def directory_name(source: Source, settings: dict[str, Any]) -> str:
    """Hash of the source's content and of `settings`: crop and sizes, encoder configuration and weights."""
    content = json.dumps({"version": VERSION, "source": source.fingerprint, **settings}, sort_keys=True)
    return f"v{VERSION}-{hashlib.sha256(content.encode()).hexdigest()[:20]}"


class EncodedSource(Source):
    """`source` with the encoder outputs kept in `directory`."""

    def __init__(self, source: Source, directory: pathlib.Path):
        super().__init__(source.name, source.files)
        self.source, self.directory, self.shape = source, directory, source.shape

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> EncodedRecord:
        record = self.source[index]
        codes, latents, unreadable = _part(self.directory, index // PART)
        if str(index) in unreadable:
            raise BadRecord(record.shard, record.key, unreadable[str(index)])
        row = index % PART
        codes, latents = np.array(codes[row]), np.array(latents[row])
        outputs = {"codes": codes, "latents": latents}
        if codes.ndim == 2:
            outputs = {"codes": codes[0], "latents": latents[0], "reference_codes": codes[1:], "reference_latents": latents[1:]}
        return EncodedRecord(**vars(record), outputs=outputs)


@functools.lru_cache(maxsize=64)
def _part(directory: pathlib.Path, number: int) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    codes, latents = (np.load(directory / f"{name}-{number:05d}.npy", mmap_mode="r") for name in ("codes", "latents"))
    unreadable = json.loads((directory / f"unreadable-{number:05d}.json").read_text(encoding="utf-8"))
    return codes, latents, unreadable
