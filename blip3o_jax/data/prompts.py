"""Read files of prompts, for sampling, evaluation and reinforcement learning.

    kind         recognised by                                     a prompt is
    JSON         .json, .jsonl, .ndjson, or the first characters   a string, or "prompt" or
                                                                   "caption" of an object
    CSV, TSV     .csv, .tsv, or a first line of column names,      the column prompt or caption
                 one of which is prompt or caption
    plain text   everything else                                   a line

JSON is one array, over any number of lines, or one value a line. The other fields of an object or a
row are metadata for a scorer, as in the shapes data set's prompts_*.jsonl, GenEval's
evaluation_metadata.jsonl and PartiPrompts.tsv. Names of keys and columns may be in capitals. Empty
lines are skipped. The file must be a regular file, not a pipe.
"""

import csv
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from blip3o_jax import files
from blip3o_jax.config import UserError

TEXT_NAMES = ("prompt", "caption")
CATEGORY_NAMES = ("category", "tag")
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_OPENS_JSON = re.compile(r'(\[\s*(["{\[\]]|$)|\{\s*("|\}|$))')
_COLUMN_NAME = re.compile(r"[\w .-]{1,40}")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Hold a prompt. `metadata`: its whole object or row, for the rewards. `category`: "category"
    or "tag" of the metadata, or "".
    """

    text: str
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    category: str = ""


def read_prompts(path: str | pathlib.Path) -> list[Prompt]:
    """Return all prompts of a file. UserError, with file and line, for what is none."""
    path = pathlib.Path(path)
    text = _read_text(path)
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    if not first:
        raise UserError(f"{path} holds no prompt: write one a line")
    kind = path.suffix.lower()
    if kind in _JSON_SUFFIXES or (kind not in _TABLE_SUFFIXES and _begins_json(first)):
        values = _json_array(text, path) if first.startswith("[") else _json_lines(text, path)
        prompts = [_prompt(value, where) for value, where in values]
    elif delimiter := _TABLE_SUFFIXES.get(kind):
        prompts = [_prompt(row, where) for row, where in _table(text, delimiter, path)]
    elif delimiter := _delimiter(first):
        hint = "the first line was read as names of columns: if it is a prompt, put another first"
        try:
            prompts = [_prompt(row, where) for row, where in _table(text, delimiter, path)]
        except UserError as e:
            raise UserError(f"{e}; {hint}") from e
        if not prompts:
            raise UserError(f"{path} holds no prompt below its names of columns; {hint}")
    else:
        # Not splitlines: a text may hold U+2028 and its like.
        lines = [line.strip() for line in text.split("\n")]
        prompts = [Prompt(line) for line in lines if line]
    if not prompts:
        raise UserError(f"{path} holds no prompt: it is an empty list or table")
    return prompts


def _read_text(path: pathlib.Path) -> str:
    r"""Return what the file says, without its byte-order mark, lines ended by "\n"."""
    try:
        files.check_regular(path)
        data = path.read_bytes()
    except UserError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a path with NUL
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from e
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text: save it as UTF-8")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise UserError(f"{path}:{line} holds a NUL byte: that is no text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _begins_json(line: str) -> bool:
    """Return whether the first line of a file without a JSON suffix is JSON."""
    if not line.startswith(("{", "[")):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return _OPENS_JSON.match(line) is not None
    return True


def _json_lines(text: str, path: pathlib.Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            value, end = _decoded(line, len(line) - len(line.lstrip()), where)
            if line[end:].strip():
                raise UserError(
                    f"{where} is no JSON: extra data in column {end + 1}; write one a line"
                )
            yield value, where


def _json_array(text: str, path: pathlib.Path) -> Iterator[tuple[Any, str]]:
    """Return the values of one array, each with the line it begins in, for error messages."""
    space = re.compile(r"\s*")

    def skip_space(position: int) -> int:
        found = space.match(text, position)
        assert found is not None  # the pattern matches no characters too
        return found.end()

    counted, line = 0, 1  # lines up to a position: counted once, as a file may have millions

    def where(position: int) -> str:
        nonlocal counted, line
        line += text.count("\n", counted, position)
        counted = position
        return f"{path}:{line}"

    position = skip_space(text.index("[") + 1)
    ended = text.startswith("]", position)
    while not ended:
        here = where(position)
        value, position = _decoded(text, position, here)
        yield value, here
        position = skip_space(position)
        ended = text.startswith("]", position)
        if not ended and not text.startswith(",", position):
            reason = 'expected "," or "]" after a value of the array'
            raise UserError(f"{where(position)} is no JSON: {reason}")
        if not ended:
            position = skip_space(position + 1)
    position = skip_space(position + 1)
    if text[position:]:
        reason = "something follows the array; write all into one array"
        raise UserError(f"{where(position)} is no JSON: {reason}")


def _decoded(text: str, position: int, where: str) -> tuple[Any, int]:
    """Return the JSON value that begins at `position`, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError as e:
        file, _, first = where.rpartition(":")
        line = int(first) + text.count("\n", position, e.pos)
        raise UserError(
            f"{file}:{line} is no JSON: {e.msg}; write one array, or one object a line"
        ) from e
    except ValueError as e:  # a number with more digits than int accepts
        raise UserError(f"{where} is no JSON: {str(e).partition(';')[0]}") from e
    except RecursionError as e:
        raise UserError(f"{where} is no JSON: too many brackets within each other") from e


def _delimiter(first: str) -> str:
    """Return what separates the columns where the first line names them, one of them that of the
    prompts; else ""."""
    for delimiter in ("\t", ","):
        names = [name.strip() for name in first.split(delimiter)]
        named = {name.casefold() for name in names} & set(TEXT_NAMES)
        if len(names) > 1 and named and all(map(_COLUMN_NAME.fullmatch, names)):
            return delimiter
    return ""


def _table(text: str, delimiter: str, path: pathlib.Path) -> Iterator[tuple[dict[str, str], str]]:
    """Return the rows of a table as dicts by the names of its first line, each with its last line
    number.
    """
    try:
        rows = _rows(text, delimiter, quoting=True)
        quotes_are_text = False
    except csv.Error as e:
        if delimiter != "\t":
            hint = "close each quote, and double a quote that is text"
            raise UserError(f"{path}:{e.args[1]} is no CSV: {e.args[0]}; {hint}") from e
        quotes_are_text = True
    if quotes_are_text:  # as in PartiPrompts.tsv, where a prompt may begin with a quoted word
        try:
            rows = _rows(text, delimiter, quoting=False)
        except csv.Error as e:
            raise UserError(f"{path}:{e.args[1]} is no TSV: {e.args[0]}") from e
    (header, first), *rows = rows
    names = [name.strip() for name in header]
    if not {name.casefold() for name in names} & set(TEXT_NAMES):
        found = ", ".join(map(repr, names))
        raise UserError(f"{path}:{first} names no column prompt or caption; it has {found}")
    if len({name.casefold() for name in names}) < len(names):
        raise UserError(f"{path}:{first} names a column twice: {', '.join(map(repr, names))}")
    for values, line in rows:
        if len(values) != len(names):
            raise UserError(f"{path}:{line} has {len(values)} columns, the first line {len(names)}")
        yield dict(zip(names, values, strict=True)), f"{path}:{line}"


def _rows(text: str, delimiter: str, quoting: bool) -> list[tuple[list[str], int]]:
    """Return the rows that are not empty, each with its first line; csv.Error(reason, first line)
    for what is no table. Between quotes a row may go over many lines."""
    lines = (line + "\n" for line in text.removesuffix("\n").split("\n"))
    if quoting:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    rows: list[tuple[list[str], int]] = []
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return rows
        except csv.Error as e:
            raise csv.Error(str(e), first) from e
        if any(value.strip() for value in row):
            rows.append((row, first))


def _prompt(value: Any, where: str) -> Prompt:
    """Return the prompt of a string, an object or a row."""
    metadata = value if isinstance(value, dict) else {}
    named = {str(name).casefold(): content for name, content in metadata.items()}
    found = (
        value
        if isinstance(value, str)
        else next((named[n] for n in TEXT_NAMES if named.get(n)), None)
    )
    if not isinstance(found, str) or not found.strip():
        raise UserError(f'{where} has no text under "prompt" or "caption", and is no text itself')
    try:
        found.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where} has half a character in its text: {found[e.start]!a} at {e.start}"
        ) from e
    category = next((named[n] for n in CATEGORY_NAMES if named.get(n)), "")
    return Prompt(found.strip(), metadata, str(category))
