"""What every source of captioned images is made of: the record, the record that cannot be used, random access to both, and how
their text is read."""

import abc
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from blip3o_jax.config import UserError

CAPTION_FIELDS = ("caption", "text")


class BadRecord(UserError):
    """One record that cannot be used. `shard` and `key` say which; empty where only the bytes are known."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)  # all three, so that it survives the pickling between processes
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}" if self.shard else self.reason


@dataclasses.dataclass(frozen=True)
class Record:
    image: bytes  # encoded: JPEG, PNG or WebP
    caption: str
    key: str  # names the example within its shard
    shard: str  # the file it was read from


class Source(abc.ABC):
    """A data set of captioned images. `name` is the path it was opened from."""

    def __init__(self, name: str, files: Iterable[str]) -> None:
        self.name = name
        self.files = tuple(files)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Raises `BadRecord` if this one record cannot be used."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when the files do (names, sizes, times of change), whatever directory they lie in."""
        return fingerprint_of(type(self).__name__, self.files)


def fingerprint_of(kind: str, files: Iterable[str]) -> str:
    digest = hashlib.sha256(kind.encode())
    for file in files:
        stat = os.stat(file)
        digest.update(f"\0{os.path.basename(file)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def decode_text(value: bytes | str | None, shard: str, key: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadRecord(shard, key, f"the caption is not UTF-8 (byte {error.start})") from None
    if not isinstance(value, str):
        raise BadRecord(shard, key, f"no caption; expected text in {' or '.join(CAPTION_FIELDS)}")
    return value.strip()


def parse_json(raw: bytes, shard: str, key: str) -> tuple[dict[str, Any], str]:
    """A JSON object and the caption in it."""
    try:
        fields = json.loads(decode_text(raw, shard, key))
    except json.JSONDecodeError as error:
        raise BadRecord(shard, key, f"broken JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRecord(shard, key, "the JSON is not an object")
    return fields, decode_text(next((fields[f] for f in CAPTION_FIELDS if f in fields), None), shard, key)


def read_spans(path: str, spans: list[tuple[int, int]]) -> list[bytes]:
    """Byte ranges (offset, size) of a file; -1 as the offset gives nothing."""
    with open(path, "rb", buffering=0) as file:
        return [os.pread(file.fileno(), size, start) if start >= 0 else b"" for start, size in spans]
