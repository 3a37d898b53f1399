"""What every source of images and text is made of: the record, the record that cannot be used, random access to both, and how
their text is read.

Every format has the same fields, whether they are keys of JSON, columns, features or members of a tar file:

    task           t2i, edit, reconstruct or understand; where it is missing, a question or an instruction says which
    caption, text  what the image shows                       instruction  what is to be done to the input images
    question       about the input images                     answer       in words, to a question
    image          the image that is to be drawn              input_image  one shown, input_images several
"""

import abc
import dataclasses
import json
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from blip3o_jax.config import UserError
from blip3o_jax.data.template import TASKS

CAPTION_FIELDS = ("caption", "text")
TEXT_FIELDS = ("instruction", "question", *CAPTION_FIELDS)
INPUT_FIELDS = ("input_image", "input_images")


class BadRecord(UserError):
    """One record that cannot be used. `shard` and `key` say which; empty where only the bytes are known."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)  # all three, so that it survives the pickling between processes
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}" if self.shard else self.reason


class ChangedRecord(BadRecord):
    """A record whose bytes are not those that were indexed: it may be as it was again."""


@dataclasses.dataclass(frozen=True)
class Record:
    image: bytes  # encoded: JPEG, PNG or WebP; empty where the answer is text
    caption: str  # or instruction, or question
    key: str  # names the example within its shard
    shard: str  # the file it was read from
    task: str = "t2i"
    references: tuple[bytes, ...] = ()  # encoded images that are shown
    answer: str = ""  # to a question

    @property
    def first_image(self) -> bytes:
        """The image to be drawn, or the first shown where the answer is text: all of a record have its shape."""
        return self.references[0] if self.task == "understand" else self.image


class Words(NamedTuple):
    """What a record says."""

    task: str
    text: str
    answer: str


class Source(abc.ABC):
    """A data set of images and text. `name` is the path it was opened from; `shape` is (height, width) where all of its images
    are cut to one of several.

    What was found when it was opened: `unused`, how many things that no record uses, by reason; `incomplete`, how many records
    lack something; `notes`, a line on each of both.
    """

    shape: tuple[int, int] | None = None
    unused: Mapping[str, int] = types.MappingProxyType({})
    incomplete: int = 0
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, files: Iterable[str]) -> None:
        self.name = name
        self.files = tuple(files)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Raises `BadRecord` if this one record cannot be used."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Digest of the content (data/index.py), whatever its files are called and wherever they lie."""


def decode_text(value: bytes | str | None, shard: str, key: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadRecord(shard, key, f"the text is not UTF-8 (byte {error.start})") from None
    if not isinstance(value, str):
        raise BadRecord(shard, key, f"no caption; expected text in {' or '.join(CAPTION_FIELDS)}")
    return value.strip()


def parse_json(raw: bytes, shard: str, key: str) -> tuple[dict[str, Any], Words]:
    """A JSON object and what is said in it."""
    try:
        fields = json.loads(decode_text(raw, shard, key))
    except json.JSONDecodeError as error:
        raise BadRecord(shard, key, f"broken JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRecord(shard, key, "the JSON is not an object")
    return fields, words(fields, shard, key)


def words(fields: Mapping[str, Any], shard: str, key: str) -> Words:
    """Task, text and answer by the fields above."""
    given = [name for name in TEXT_FIELDS if fields.get(name) is not None]
    given = [name for name in given if fields[name]] or given  # TFDS has no missing values: what is not there is empty
    task = fields.get("task") or {"instruction": "edit", "question": "understand"}.get(given[0] if given else "", "t2i")
    task = decode_text(task, shard, key)
    if task not in TASKS:
        raise BadRecord(shard, key, f"task {task!r} is not one of {', '.join(TASKS)}")
    if task == "reconstruct":
        return Words(task, "", "")
    own = {"edit": ("instruction",), "understand": ("question",)}.get(task, CAPTION_FIELDS)
    name = next((name for name in (*own, *given) if name in given), None)
    text = decode_text(fields[name] if name else None, shard, key)
    if task != "t2i" and not text:
        raise BadRecord(shard, key, f"the {own[0]} is empty")
    answer = decode_text(fields.get("answer") or "", shard, key)
    if task == "understand" and not answer:
        raise BadRecord(shard, key, "no answer to the question")
    return Words(task, text, answer)


def make_record(said: Words, image: bytes | None, inputs: Iterable[bytes], key: str, shard: str) -> Record:
    """A record with the images that its task needs; BadRecord where one is missing."""
    inputs = tuple(inputs)
    if said.task == "t2i" and inputs:
        raise BadRecord(shard, key, "input images beside a caption: say in an instruction or a question what they are for")
    if said.task == "reconstruct":  # one image for both will do
        inputs = inputs or (() if image is None else (image,))
        image = inputs[0] if image is None and inputs else image
    if said.task != "t2i" and not inputs:
        raise BadRecord(shard, key, f"no input image; task {said.task} needs one in {' or '.join(INPUT_FIELDS)}")
    if said.task != "understand" and image is None:
        raise BadRecord(shard, key, "no image; expected the one to be drawn")
    return Record(b"" if said.task == "understand" else image, said.text, key, shard, said.task, inputs, said.answer)


def read_spans(path: str, spans: list[tuple[int, int]]) -> list[bytes]:
    """Byte ranges (offset, size) of a file; -1 as the offset gives nothing."""
    with open(path, "rb", buffering=0) as file:
        return [os.pread(file.fileno(), size, start) if start >= 0 else b"" for start, size in spans]
