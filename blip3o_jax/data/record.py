"""Define records of images and text, random access to them, and the parsing of their text fields.

Every format has the same fields, whether they are keys of JSON, columns, features or members of a
tar file:

    task           t2i, edit, reconstruct or understand; by default a question or an instruction
                   determines it
    caption, text  what the image shows
    instruction    how to edit the input images
    question       about the input images
    answer         in words, to a question
    image          the target image
    input_image    one reference image; input_images: several

The first text of a list that is not empty is used. A byte-order mark is not part of a text.
"""

import abc
import dataclasses
import json
import os
import pathlib
import re
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from blip3o_jax.config import ConfigError, UserError
from blip3o_jax.config.errors import escaped, not_a_choice, type_and_line
from blip3o_jax.data.template import TASKS

CAPTION_FIELDS = ("caption", "text")
TEXT_FIELDS = ("instruction", "question", *CAPTION_FIELDS)
INPUT_FIELDS = ("input_image", "input_images")


T = TypeVar("T")

# Kinds of bad records: the text does not fit in its row; the bytes are not those that were indexed;
# an image lies outside of the data set.
TOO_LONG = "too long"
OUTSIDE = "the path leads out of the data set"
CHANGED = "changed since it was indexed"
_PACKAGE = pathlib.Path(__file__).parent.parent
_LIBRARIES = tuple(
    sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
# Where the part of a reason begins that differs from record to record.
_VARIABLE = re.compile(r"\s\d|[:;(\[{'\"\\]")


class BadRecord(UserError):
    """Report one record that cannot be used. `shard` and `key` identify it; they are empty where
    only the bytes are known.

    `kind`: what reasons of the same cause have in common; by default the reason up to its first
    number, quote or colon.
    """

    def __init__(self, shard: str, key: str, reason: str, kind: str = "") -> None:
        kind = kind or _VARIABLE.split(reason, maxsplit=1)[0].strip() or "unreadable"
        # Exceptions pickle by their arguments: all of them are needed to cross processes.
        super().__init__(shard, key, reason, kind)
        self.shard = shard
        self.key = key
        self.reason = reason
        self.kind = kind

    def __str__(self) -> str:
        message = f"{self.shard}: {self.key}: {self.reason}" if self.shard else self.reason
        return escaped(message)


class RowTooLong(UserError):
    """Report text that does not fit in its row. `data.too_long` decides what becomes of the record;
    its image tokens are never cut.

    Attributes:
      reason: what is too long.
      cure: what to do.
    """

    def __init__(
        self,
        key: str,
        length: int,
        max_length: int,
        reason: str = "needs {length} tokens, a row has {max_length}",
        cure: str = "shorten its caption or raise data.max_length",
    ) -> None:
        # Exceptions pickle by their arguments, and this one comes from the data workers.
        super().__init__(key, length, max_length, reason, cure)
        self.key = key
        self.length = length
        self.max_length = max_length
        self.reason = reason.format(length=length, max_length=max_length)
        self.cure = cure

    def __str__(self) -> str:
        return f"example {self.key!r} {self.reason}: {self.cure}"


@dataclasses.dataclass(frozen=True)
class Record:
    """Hold one record: encoded images, its text and its task."""

    image: bytes  # encoded: JPEG, PNG or WebP; empty where the answer is text
    caption: str  # the caption, instruction or question
    key: str  # names the example within its shard
    shard: str  # the file it was read from
    task: str = "t2i"
    references: tuple[bytes, ...] = ()  # encoded reference images
    answer: str = ""  # the answer to a question

    @property
    def first_image(self) -> bytes:
        """Return the target image, or the first reference where the answer is text: all images of a
        record have its shape.
        """
        return self.references[0] if self.task == "understand" else self.image


class TextFields(NamedTuple):
    """Hold the task and the texts of a record."""

    task: str
    text: str
    answer: str


class Source(abc.ABC):
    """Provide random access to a data set of images and text. `name` is the path it was opened
    from; `shape` is (height, width) if the source is a bucket, whose images are all cut to one
    shape.

    Opening sets `unused`, the number of members that no record uses, by reason; `incomplete`, the
    number of records that lack something; `notes`, a line on each of both; and `reused`, the number
    of files that were not read, since they are as they were when they were indexed.
    """

    shape: tuple[int, int] | None = None
    unused: Mapping[str, int] = types.MappingProxyType({})
    incomplete: int = 0
    notes: tuple[str, ...] = ()
    reused: int = 0

    def __init__(self, name: str, files: Iterable[str]) -> None:
        self.name = name
        self.files = tuple(files)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Return a record. Raises `BadRecord` if this one record cannot be used."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of the content (data/index.py), independent of the names and paths of its
        files.
        """


def read_record(source: Source, index: int, use: Callable[[Record], T]) -> T:
    """Return `use(source[index])`. All records are read through this function.

    Raises BadRecord, with shard, key and reason, for any exception that reading or using this one
    record raises. For an unexpected exception the reason names its type and the line of the package
    that raised it, which distinguishes a bug from bad data. ConfigError is raised unchanged: an
    impossible setting is no fault of the record.
    """
    record = None
    try:
        record = source[index]
        return use(record)
    except ConfigError:
        raise
    except Exception as error:
        shard = ""
        key = ""
        kind = ""
        if isinstance(error, BadRecord):
            shard, key, reason, kind = error.args
        elif isinstance(error, RowTooLong):
            reason = error.reason
            kind = TOO_LONG
        elif isinstance(error, UserError):
            reason = str(error)
            kind = "no row can be made of it"
        else:
            kind = type(error).__name__
            message = type_and_line(error).removeprefix(kind)
            reason = f"{kind} at {_error_location(error)}{message}"
        if record is not None:  # decoding errors name neither shard nor key
            shard = record.shard
            key = record.key
        raise BadRecord(shard or source.name, key or str(index), reason, kind) from error


def _error_location(error: Exception) -> str:
    """Return file and line of the innermost frame outside of libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if pathlib.Path(frame.filename).is_relative_to(_PACKAGE)]
    other = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    frame = next(frame for frame in reversed(frames) if frame in own or frame in other)
    path = pathlib.Path(frame.filename)
    return f"{path.relative_to(_PACKAGE.parent) if frame in own else path.name}:{frame.lineno}"


def one_line(text: str, max_length: int = 150) -> str:
    """Return `text` cut to `max_length` characters, with everything that cannot be printed escaped,
    lone surrogates included.
    """
    shown = escaped(text[: max_length + 1])
    return shown if len(shown) <= max_length else shown[: max_length - 3] + "..."


def decode_text(value: bytes | str | None, shard: str, key: str) -> str:
    """Return a text without its byte-order mark and outer whitespace. Raises BadRecord if it is not
    text or not valid in UTF-8.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(shard, key, f"the text is not UTF-8 (byte {error.start})") from None
    if not isinstance(value, str):
        raise BadRecord(shard, key, f"no caption; expected text in {' or '.join(CAPTION_FIELDS)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON's \ud83c: an emoji cut in two
        half = ascii(value[error.start])
        raise BadRecord(
            shard, key, f"the text has half a character ({half} at {error.start})"
        ) from None
    return value.removeprefix("\ufeff").strip()


def parse_json(raw: bytes, shard: str, key: str) -> tuple[dict[str, Any], TextFields]:
    """Parse a JSON object: return its fields and its task and texts."""
    try:
        fields = json.loads(decode_text(raw, shard, key))
    except json.JSONDecodeError as error:
        raise BadRecord(shard, key, f"broken JSON: {error}") from None
    except ValueError as error:  # a number with more digits than int accepts
        if isinstance(error, BadRecord):
            raise
        raise BadRecord(shard, key, f"broken JSON: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise BadRecord(shard, key, "broken JSON: too many brackets within each other") from None
    if not isinstance(fields, dict):
        raise BadRecord(shard, key, "the JSON is not an object")
    return fields, parse_text_fields(fields, shard, key)


def parse_text_fields(fields: Mapping[str, Any], shard: str, key: str) -> TextFields:
    """Return task, text and answer of a record from the fields listed at the top."""
    fields = {name: _first(fields.get(name)) for name in ("task", *TEXT_FIELDS, "answer")}
    given = [name for name in TEXT_FIELDS if fields[name] is not None]
    # TFDS has no missing values: a missing text is empty.
    given = [name for name in given if fields[name]] or given
    default = {"instruction": "edit", "question": "understand"}.get(
        given[0] if given else "", "t2i"
    )
    task = fields["task"] or default
    task = decode_text(task, shard, key)
    if task not in TASKS:
        raise BadRecord(shard, key, f"task {one_line(task)!r} {not_a_choice(task, TASKS)}")
    if task == "reconstruct":
        return TextFields(task, "", "")
    own = {"edit": ("instruction",), "understand": ("question",)}.get(task, CAPTION_FIELDS)
    name = next((name for name in (*own, *given) if name in given), None)
    text = decode_text(fields[name] if name else None, shard, key)
    if task != "t2i" and not text:
        raise BadRecord(shard, key, f"the {own[0]} is empty")
    answer = decode_text(fields["answer"] or "", shard, key)
    if task == "understand" and not answer:
        raise BadRecord(shard, key, "no answer to the question")
    return TextFields(task, text, answer)


def _first(value: Any) -> Any:
    """Return the first text of several (a list, or TFDS's array) that is not empty: the same in
    every epoch.
    """
    if not isinstance(value, list | tuple | np.ndarray):
        return value
    texts = list(value)
    return next((text for text in texts if text), texts[0] if texts else None)


def make_record(
    text_fields: TextFields, image: bytes | None, inputs: Iterable[bytes], key: str, shard: str
) -> Record:
    """Return a record with the images that its task needs. Raises BadRecord if one is missing."""
    inputs = tuple(inputs)
    if text_fields.task == "t2i" and inputs:
        raise BadRecord(
            shard,
            key,
            "input images with a caption: give an instruction or a question in its place",
        )
    if text_fields.task == "reconstruct":  # one image can be both reference and target
        inputs = inputs or (() if image is None else (image,))
        image = inputs[0] if image is None and inputs else image
    if text_fields.task != "t2i" and not inputs:
        raise BadRecord(
            shard,
            key,
            f"no input image; task {text_fields.task} needs one in {' or '.join(INPUT_FIELDS)}",
        )
    if text_fields.task == "understand":
        image = b""
    if image is None:
        raise BadRecord(shard, key, "no image; expected the one to be drawn")
    return Record(
        image,
        text_fields.text,
        key,
        shard,
        text_fields.task,
        inputs,
        text_fields.answer,
    )


def read_spans(path: str, spans: list[tuple[int, int]]) -> list[bytes]:
    """Read byte ranges (offset, size) of a file; an offset of -1 gives no bytes."""
    with open(path, "rb", buffering=0) as file:
        return [
            # pread has no file position, so that threads can share a file.
            os.pread(file.fileno(), size, start) if start >= 0 else b""
            for start, size in spans
        ]
