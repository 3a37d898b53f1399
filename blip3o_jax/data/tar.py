"""webdataset shards: random access into plain .tar files through an index of offsets."""

import concurrent.futures
import functools
import itertools
import os
import pathlib
import re
import tarfile
import tempfile
from typing import Any

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.data.record import BadRecord, Record, Source, make_record, parse_json, read_spans, words

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
INPUT_SUFFIX = re.compile(rf"input(\d*)\.(?:{'|'.join(IMAGE_SUFFIXES)})")


class TarSource(Source):
    """webdataset shards: members `key.jpg` (.jpeg, .png, .webp) with `key.txt` or `key.json` beside them, and `key.input.jpg`
    or `key.input0.jpg`, `key.input1.jpg` ... where images are shown. JSON has the fields of data/record.py; a text beside
    input images is an instruction.

    An index of offsets, made once from the headers and kept as one .npy file in the user's cache directory, is mapped into
    memory by every process: worker processes of a data set with millions of examples share it.
    """

    def __init__(self, path: str, shards: list[str]) -> None:
        super().__init__(path, shards)
        self._index_file = cache_directory() / f"tar-index-2-{self.fingerprint}.npy"
        if not self._index_file.exists():
            with concurrent.futures.ThreadPoolExecutor(16) as pool:  # headers lie apart: the wait is for the disk
                rows = list(itertools.chain(*pool.map(_index_tar, range(len(shards)), shards)))
            if not any(map(_complete, rows)):
                raise UserError(
                    f"{path}: no example has both an image (.{', .'.join(IMAGE_SUFFIXES)}) and a caption (.txt, .json)"
                )
            width, most = max(len(row[-1]) for row in rows), max(1, *(len(row[3]) for row in rows))
            rows = [(*row[:3], [*row[3], *[(-1, 0)] * (most - len(row[3]))], *row[4:]) for row in rows]
            spans = [("image", "i8", 2), ("text", "i8", 2), ("inputs", "i8", (most, 2))]
            index = np.array(rows, [("shard", "i4"), *spans, ("is_json", "?"), ("key", f"S{width}")])
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
        if row["text"][0] < 0:
            raise BadRecord(shard, key, f"no caption; expected {key}.txt or {key}.json")
        spans = [(int(start), int(size)) for start, size in (row["text"], row["image"], *row["inputs"])]
        text, image, *inputs = read_spans(shard, spans)
        inputs = [data for data, (start, _) in zip(inputs, spans[2:], strict=True) if start >= 0]
        if row["is_json"]:
            said = parse_json(text, shard, key)[1]
        else:
            said = words({"instruction" if inputs else "caption": text}, shard, key)
        if said.task == "t2i" and spans[1][0] < 0:
            raise BadRecord(shard, key, f"no image; expected {key}.{'/'.join(IMAGE_SUFFIXES)}")
        return make_record(said, image if spans[1][0] >= 0 else None, inputs, key, shard)


def cache_directory() -> pathlib.Path:
    """Where indexes of data sets are kept."""
    directory = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "blip3o_jax")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home, as in some containers
        directory = pathlib.Path(tempfile.gettempdir(), "blip3o_jax")
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def _index_tar(shard_index: int, shard: str) -> list[tuple]:
    """(shard, image, text, input images, text is JSON, key) of every example, in the order of the file; members are (offset,
    size), (-1, 0) where there is none."""
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
        inputs = sorted((int(m[1] or 0), parts[suffix]) for suffix in parts if (m := INPUT_SUFFIX.fullmatch(suffix)))
        rows.append((shard_index, image, caption, [span for _, span in inputs], "txt" not in parts, key.encode()))
    if damaged_at is not None:
        last = next((row[-1].decode() for row in reversed(rows) if _complete(row)), "none")
        raise UserError(
            f"{shard}: cut off or damaged at byte {damaged_at} (last good key: {last}); fetch it again or leave it out"
        )
    return rows


def _complete(row: tuple) -> bool:
    _, image, text, inputs, *_ = row
    return text[0] >= 0 and (image[0] >= 0 or bool(inputs))


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
