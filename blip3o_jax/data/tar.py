"""webdataset shards: random access into plain .tar files through an index of offsets."""

import concurrent.futures
import functools
import itertools
import os
import pathlib
import tarfile
import tempfile
from typing import Any

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.data.record import BadRecord, Record, Source, decode_text, parse_json, read_spans

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class TarSource(Source):
    """webdataset shards: members `key.jpg` (.jpeg, .png, .webp) with `key.txt` or `key.json` beside them.

    An index of offsets, made once from the headers and kept as one .npy file in the user's cache directory, is mapped into
    memory by every process: worker processes of a data set with millions of examples share it.
    """

    def __init__(self, path: str, shards: list[str]) -> None:
        super().__init__(path, shards)
        self._index_file = _cache_directory() / f"tar-index-{self.fingerprint}.npy"
        if not self._index_file.exists():
            with concurrent.futures.ThreadPoolExecutor(16) as pool:  # headers lie apart: the wait is for the disk
                rows = list(itertools.chain(*pool.map(_index_tar, range(len(shards)), shards)))
            if not any(map(_complete, rows)):
                raise UserError(
                    f"{path}: no example has both an image (.{', .'.join(IMAGE_SUFFIXES)}) and a caption (.txt, .json)"
                )
            width = max(len(row[-1]) for row in rows)
            fields = [("shard", "i4"), ("image", "i8"), ("image_size", "i8"), ("text", "i8"), ("text_size", "i8")]
            index = np.array(rows, [*fields, ("is_json", "?"), ("key", f"S{width}")])
            with tempfile.NamedTemporaryFile(dir=self._index_file.parent, suffix=".npy", delete=False) as file:
                np.save(file, index)
            os.replace(file.name, self._index_file)

    @functools.cached_property
    def _index(self) -> np.ndarray:
        return np.load(self._index_file, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_index"}

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        row = self._index[index]
        shard, key = self.files[row["shard"]], row["key"].decode()
        if row["image"] < 0:
            raise BadRecord(shard, key, f"no image; expected {key}.{'/'.join(IMAGE_SUFFIXES)}")
        if row["text"] < 0:
            raise BadRecord(shard, key, f"no caption; expected {key}.txt or {key}.json")
        spans = [(int(row["image"]), int(row["image_size"])), (int(row["text"]), int(row["text_size"]))]
        image, text = read_spans(shard, spans)
        caption = parse_json(text, shard, key)[1] if row["is_json"] else decode_text(text, shard, key)
        return Record(image, caption, key, shard)


def _cache_directory() -> pathlib.Path:
    directory = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "blip3o_jax")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home, as in some containers
        directory = pathlib.Path(tempfile.gettempdir(), "blip3o_jax")
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def _index_tar(shard_index: int, shard: str) -> list[tuple]:
    """(shard, image offset, size, caption offset, size, caption is JSON, key) of every example, in the order of the file."""
    examples: dict[str, dict[str, tuple[int, int]]] = {}
    members, damaged_at = _tar_members(shard)
    for member in members:
        directory, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if member.isfile() and stem:
            key = f"{directory}/{stem}" if directory else stem
            examples.setdefault(key, {})[suffix.lower()] = (member.offset_data, member.size)
    rows = []
    for key, parts in examples.items():
        image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), (-1, 0))
        caption = next((parts[suffix] for suffix in ("txt", "json") if suffix in parts), (-1, 0))
        rows.append((shard_index, *image, *caption, "txt" not in parts, key.encode()))
    if damaged_at is not None:
        last = next((row[-1].decode() for row in reversed(rows) if _complete(row)), "none")
        raise UserError(
            f"{shard}: cut off or damaged at byte {damaged_at} (last good key: {last}); fetch it again or leave it out"
        )
    return rows


def _complete(row: tuple) -> bool:
    _, image, _, caption, *_ = row
    return image >= 0 and caption >= 0


def _tar_members(shard: str) -> tuple[list[tarfile.TarInfo], int | None]:
    """The members that are there in full, and the byte from which the file is cut off or damaged (None: it is sound).

    A shard without the closing block of zeros counts as cut off: half a shard may end exactly between two members.
    """
    total, members = os.path.getsize(shard), []
    try:
        with tarfile.open(shard, "r:") as archive:
            while True:
                end = archive.offset
                try:
                    member = archive.next()
                except tarfile.TarError:
                    return members, end
                if member is None:
                    break
                if member.offset_data + member.size > total:
                    return members, member.offset
                members.append(member)
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"{shard}: not a tar file ({error}); shards must be plain .tar, not compressed") from None
    return members, None if read_spans(shard, [(end, tarfile.BLOCKSIZE)]) == [tarfile.NUL * tarfile.BLOCKSIZE] else end
