"""Read webdataset shards, with random access into plain .tar files through an index of offsets.

A member belongs to the record whose key is its path up to the first dot of the base name; what
follows that dot, in lower case, determines its role (webdataset's rule). Members that no record
uses are counted by reason.
"""

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator

import numpy as np

from blip3o_jax.checksums import crc32c
from blip3o_jax.config import UserError
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
from blip3o_jax.data.record import (
    BadRecord,
    Record,
    make_record,
    parse_json,
    parse_text_fields,
    read_spans,
)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
INPUT_SUFFIX = re.compile(rf"input(\d*)\.(?:{'|'.join(IMAGE_SUFFIXES)})")
# Columns of `sizes` and `offsets`; input images are all from the last on.
TEXT, JSON, IMAGE, INPUTS = range(4)
# All that odd headers raise; RecursionError: thousands of extended ones before one member.
_ODD_HEADERS = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
READ_AT_ONCE = 8 * 2**20  # bytes
# Name in metrics: description in messages.
UNUSED = {
    "unknown_suffix": "of unknown suffix",
    "no_key": "whose names have no key before a dot",
    "json_with_txt": ".json next to a .txt",
    "second_image": "second images of a key",
    "link": "hard or symbolic links to no member of the shard",
    "sparse": "sparse",
    "directory": "directories",
    "special": "devices or pipes",
    "after_end": "shards with bytes after the end-of-archive mark",
}


Span = tuple[int, int]  # offset, size
NOTHING: Span = (-1, -1)


class WebdatasetSource(IndexedSource):
    """Read webdataset shards: members `key.jpg` (.jpeg, .png, .webp) with `key.txt` or `key.json`,
    and reference images as `key.input.jpg` or `key.input0.jpg`, `key.input1.jpg` ... JSON has the
    fields of data/record.py; a text with reference images is an instruction.
    """

    def __init__(
        self,
        path: str,
        shards: list[str],
        processes: ProcessGroup = ProcessGroup(),
        rebuild: str = "",
    ) -> None:
        dataset_index = open_index(path, shards, FORMAT, processes=processes, rebuild=rebuild)
        super().__init__(path, shards, dataset_index, UNUSED)
        if len(self._index) == sum(extra["broken"] for extra in self._index.extra):
            suffixes = ", .".join(IMAGE_SUFFIXES)
            raise UserError(
                f"{path}: no example has both an image (.{suffixes}) and a caption (.txt, .json)",
            )

    def __getitem__(self, index: int) -> Record:
        number, row = self._index.locate(index)
        shard = self.files[number]
        arrays = self._index.shard(number).arrays
        key = self._index.shard(number).key(row)
        offsets = arrays["offsets"][row].tolist()
        sizes = arrays["sizes"][row].tolist()
        parts = read_spans(shard, list(zip(offsets, sizes, strict=True)))
        self._index.check(shard, number, row, parts, key)
        if offsets[TEXT] < 0 and offsets[JSON] < 0:
            raise BadRecord(shard, key, f"no caption; expected {key}.txt or {key}.json")
        shown = zip(parts[INPUTS:], offsets[INPUTS:], strict=True)
        inputs = [data for data, start in shown if start >= 0]
        if offsets[TEXT] < 0:
            text_fields = parse_json(parts[JSON], shard, key)[1]
        else:
            text_fields = parse_text_fields(
                {"instruction" if inputs else "caption": parts[TEXT]}, shard, key
            )
        if text_fields.task == "t2i" and offsets[IMAGE] < 0:
            raise BadRecord(shard, key, f"no image; expected {key}.{'/'.join(IMAGE_SUFFIXES)}")
        return make_record(
            text_fields, parts[IMAGE] if offsets[IMAGE] >= 0 else None, inputs, key, shard
        )


class _Shard:
    """Collect the records of a shard in the order of the file, from its headers, and count the
    members that are not used.
    """

    def __init__(self, path: str, progress: IndexProgress) -> None:
        self.path = path
        self.unused = Counts()
        self.records: dict[bytes, dict[str, Span]] = {}
        self._files: dict[str, Span] = {}  # the targets of hard links
        members, damaged_at, end = _tar_members(path, progress)
        for member in members:
            self._add(member)
        if damaged_at is not None:
            raise UserError(
                f"{path}: cut off or damaged at byte {damaged_at} (last good key: "
                f"{self._last_good()}); fetch it again or leave it out"
            )
        self._look_after_end(end)

    def _skip(self, reason: str, name: str) -> None:
        self.unused.add(reason, f"{printable(_raw(name))} first in {self.path}")

    def _add(self, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return self._skip("directory", member.name)
        span = (member.offset_data, member.size)
        if member.issym() or member.islnk():
            span = self._files.get(_plain(member.linkname), NOTHING) if member.islnk() else NOTHING
        if span == NOTHING:
            return self._skip("link", member.name)
        if not (member.isreg() or member.islnk()):
            return self._skip("special", member.name)
        if member.issparse():  # stored without its holes: its bytes are not there in one piece
            return self._skip("sparse", member.name)
        self._files[_plain(member.name)] = span
        directory, _, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot:
            return self._skip("no_key", member.name)
        record = self.records.setdefault(_raw(f"{directory}/{stem}" if directory else stem), {})
        if suffix.lower() in record:
            name = printable(_raw(member.name))
            raise UserError(
                f"{self.path}: two members are called {name}: which picture belongs to which "
                "caption is ambiguous; write the exports to a shard each, or number them on"
            )
        record[suffix.lower()] = span
        return None

    def _last_good(self) -> str:
        for key in reversed(self.records):
            suffixes = self.records[key].keys()
            shown = any(map(INPUT_SUFFIX.fullmatch, suffixes))
            if suffixes & {"txt", "json"} and (shown or suffixes & {*IMAGE_SUFFIXES}):
                return printable(key)
        return "none"

    def _look_after_end(self, end: int) -> None:
        """Raise UserError for another archive after the end of this one; count other bytes. `end`:
        offset of the first block of zeros.
        """
        with open(self.path, "rb") as file:
            file.seek(end)
            while data := file.read(READ_AT_ONCE):
                if rest := data.lstrip(tarfile.NUL):
                    start = (end + len(data) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
                    break
                end += len(data)
            else:
                return
            file.seek(start)
            block = file.read(tarfile.BLOCKSIZE)
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError):
            self.unused.add("after_end", f"byte {start} first in {self.path}")
            return
        raise UserError(
            f"{self.path}: another archive begins at byte {start}, after the end-of-archive mark "
            "(`cat a.tar b.tar` makes such a file): its records would be lost; give every archive "
            "as a shard, or join them with `tar --concatenate`"
        )

    def rows(self) -> Iterator[tuple[bytes, list[Span]]]:
        """Yield key and parts (TEXT, JSON, IMAGE, INPUTS ...) of every record; count members that
        are none of these.
        """
        for key, members in self.records.items():
            parts = dict(members)
            inputs = sorted((int(m[1] or 0), s) for s in parts if (m := INPUT_SUFFIX.fullmatch(s)))
            spans = [parts.pop("txt", NOTHING), parts.pop("json", NOTHING), NOTHING]
            for suffix in IMAGE_SUFFIXES:
                if suffix in parts and spans[IMAGE] == NOTHING:
                    spans[IMAGE] = parts.pop(suffix)
            spans += [parts.pop(suffix) for _, suffix in inputs]
            name = printable(key)
            for suffix in parts:
                reason = "second_image" if suffix in IMAGE_SUFFIXES else "unknown_suffix"
                self._skip(reason, f"{name}.{suffix}")
            if all(span == NOTHING for span in spans):
                continue
            if spans[TEXT] != NOTHING and spans[JSON] != NOTHING:
                spans[JSON] = NOTHING
                self._skip("json_with_txt", f"{name}.json")
            yield key, spans


def _raw(name: str) -> bytes:
    """Return the bytes of a member's name in its original encoding."""
    return name.encode("utf-8", "surrogateescape")


def _plain(name: str) -> str:
    return posixpath.normpath(name)


def _index_tar(path: str, progress: IndexProgress) -> IndexData:
    """Return the index of a shard, reading every record's bytes once."""
    shard = _Shard(path, progress)
    incomplete = Counts()
    keys = []
    rows = []
    broken = 0
    for key, spans in shard.rows():
        keys.append(key)
        rows.append(spans)
        if reason := _lacks(spans):
            broken += reason != "empty_image"
            incomplete.add(reason, f"{printable(key)} first in {path}")
    # Records have different numbers of input images; the arrays have the widest.
    width = max([INPUTS, *map(len, rows)])
    even = [[*row, *[NOTHING] * (width - len(row))] for row in rows]
    spans_NM2 = np.array(even, np.int64).reshape(len(rows), width, 2)
    with open(path, "rb", buffering=0) as file:
        sums = [crc32c(_pieces(file.fileno(), row, progress)) for row in rows]
    arrays: dict[str, np.ndarray] = {
        "crc": np.array(sums, np.uint32),
        "sizes": spans_NM2[..., 1],
        "offsets": spans_NM2[..., 0],
    }
    arrays |= concatenate_keys(keys)
    return IndexData(arrays, {"broken": broken}, shard.unused, incomplete)


def _lacks(spans: list[Span]) -> str:
    """Return what a record lacks, a name of index.INCOMPLETE; "" if nothing."""
    if spans[TEXT] == NOTHING and spans[JSON] == NOTHING:
        return "no_caption"
    if spans[IMAGE] == NOTHING and len(spans) == INPUTS:
        return "no_image"
    return "empty_image" if any(size == 0 for _, size in spans[IMAGE:]) else ""


def _pieces(file: int, spans: list[Span], progress: IndexProgress) -> Iterator[bytes]:
    for offset, size in spans:
        for start in range(offset, offset + max(size, 0), READ_AT_ONCE):
            data = os.pread(file, min(READ_AT_ONCE, offset + size - start), start)
            progress.add(len(data))
            yield data


def _tar_members(
    shard: str, progress: IndexProgress
) -> tuple[list[tarfile.TarInfo], int | None, int]:
    """Return the complete members; the byte from which the file is cut off or damaged (None: it is
    sound); and the end of the headers.

    A shard without the closing block of zeros counts as cut off, since half a shard may end exactly
    between two members.
    """
    total = os.path.getsize(shard)
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(shard, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            while True:
                end = archive.offset
                try:
                    member = archive.next()
                except _ODD_HEADERS:
                    return members, end, end
                if member is None:
                    break
                # A negative size leads back (CVE-2025-8194), and the headers would be read for
                # ever. The first is read when the archive is opened.
                if member.size < 0 or (members and archive.offset <= end):
                    return members, member.offset, end
                stored = member.size if member.isreg() and not member.issparse() else 0
                if member.offset_data + stored > total:
                    return members, member.offset, end
                members.append(member)
                progress.add(0)
            end = archive.offset
    except tarfile.TarError as error:
        hint = "shards must be plain .tar, not compressed"
        raise UserError(f"{shard}: not a tar file ({error}); {hint}") from None
    except _ODD_HEADERS as error:
        hint = "the headers before its first member make no sense"
        raise UserError(f"{shard}: not a tar file ({error}); {hint}") from None
    closed = read_spans(shard, [(end, tarfile.BLOCKSIZE)]) == [tarfile.NUL * tarfile.BLOCKSIZE]
    return members, None if closed else end, end


def _changed(path: str, found: ShardIndex) -> str:
    """Return why the index does not describe the shard; see `ShardFormat.changed`. Raises
    DamagedArrays for offsets outside of the shard.
    """
    if reason := same_state(path, found):
        return reason
    offsets = found.arrays["offsets"]
    sizes = found.arrays["sizes"]
    inside = offsets.shape == sizes.shape and offsets.shape[1:] >= (INPUTS,)
    total = os.path.getsize(path)
    inside = inside and max(offsets.max(initial=0), sizes.max(initial=0)) <= total
    broken = found.header["extra"]["broken"]
    inside = inside and isinstance(broken, int) and 0 <= broken <= len(found)
    if not (inside and (offsets + sizes <= total).all()):
        raise DamagedArrays("it points outside of the shard")
    return ""


FORMAT = ShardFormat("tar", _index_tar, _changed, extra=frozenset({"broken"}))
