"""Store with a checkpoint what an export needs to reproduce the imported files exactly.

conversion.json       name variants, dtypes and the config.json of the source
unread.safetensors    tensors that this package does not use
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from blip3o_jax import checksums
from blip3o_jax.config import UserError
from blip3o_jax.convert.tensor_files import Tensor, read_file
from blip3o_jax.convert.tensor_writer import ShardedWriter

RECORD_FILE = "conversion.json"
UNREAD = "unread"


@dataclasses.dataclass(frozen=True)
class ConversionRecord:
    """Hold the contents of conversion.json: properties of the imported files."""

    tied_head: bool = False  # lm_head.weight is stored although it equals the embeddings
    # (part, prefix in its table, prefix in the files), of those in `Conversion.spellings`
    spellings: tuple[tuple[str, str, str], ...] = ()
    own_tokenizer: bool = False  # the vision tokenizer is in a file of its own
    # (full name, dtype in the files) of tensors that the checkpoint stores in a wider dtype
    dtypes: tuple[tuple[str, str], ...] = ()
    # config.json and generation_config.json of the source
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    def published_key(self, part: str, key: str) -> str:
        """Return the name in the source's files of the table's `key`."""
        for of, table, file in self.spellings:
            if of == part and key.startswith(table):
                return file + key.removeprefix(table)
        return key

    def table_key(self, part: str, key: str) -> str:
        """Return the table's key of a name in the files: the inverse of `published_key`."""
        for of, table, file in self.spellings:
            if of == part and key.startswith(file):
                return table + key.removeprefix(file)
        return key


def spellings_in(names: Iterable[str], known: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return those of `known`, pairs (prefix in the table, prefix in the files), that a part's
    `names` have.

    One of the two prefixes begins with the other: whether any name has the longer one decides.
    """
    names = list(names)
    found = []
    for table, file in known:
        there = any(name.startswith(file) for name in names)
        longer = any(name.startswith(max(table, file, key=len)) for name in names)
        if there and longer == (len(file) > len(table)):
            found.append((table, file))
    return found


def write_record(
    directory: pathlib.Path, record: ConversionRecord, unread: Mapping[str, Tensor]
) -> None:
    """Write the record and the unread tensors to a checkpoint directory."""
    kept = directory / f"{UNREAD}.safetensors"
    if unread:
        specs = {name: (tensor.shape, tensor.dtype) for name, tensor in unread.items()}
        # One shard whatever its size: the record has the checksum of a single file.
        writer = ShardedWriter(directory, UNREAD, specs, max_shard_bytes=2**62)
        for name, tensor in unread.items():
            writer.write(name, tensor.read())
        writer.close()
    values = dataclasses.asdict(record) | {UNREAD: checksums.of_file(kept) if unread else None}
    checksums.write_json(directory / RECORD_FILE, values)


def read_record(directory: pathlib.Path) -> tuple[ConversionRecord | None, dict[str, Tensor]]:
    """Return the record and the unread tensors of a checkpoint.

    Returns (None, {}) for a checkpoint that was not imported. Raises UserError for damaged files.
    """
    file = directory / RECORD_FILE
    if not file.is_file():
        return None, {}
    values = checksums.read_json(file)
    try:
        stored = values.pop(UNREAD)
        pairs = {name: tuple(map(tuple, values[name])) for name in ("dtypes", "spellings")}
        record = ConversionRecord(**values | pairs)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged, or of another version of blip3o_jax ({error}): "
            "import the weights again"
        ) from error
    if stored is None:
        return record, {}
    unread = directory / f"{UNREAD}.safetensors"
    if not unread.is_file() or list(checksums.of_file(unread)) != stored:
        raise UserError(
            f"{unread} is missing or damaged (its CRC32C differs): copy it, or import the weights "
            "again"
        )
    return record, read_file(unread)
