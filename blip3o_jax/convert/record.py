"""Store with a checkpoint what an export needs to reproduce the imported files exactly.

conversion.json       name variants, dtypes and the config.json of the source
unread.safetensors    tensors that this package does not use
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from blip3o_jax import checksums
from blip3o_jax.config import UserError
from blip3o_jax.convert.tensor_files import ShardedWriter, Tensor, read_file

RECORD_FILE = "conversion.json"
UNREAD = "unread"


@dataclasses.dataclass(frozen=True)
class ConversionRecord:
    """Hold the contents of conversion.json: properties of the imported files."""

    tied_head: bool = False  # lm_head.weight is stored although it equals the embeddings
    flat_decoder: bool = False  # decoder.x instead of decoder.vision_model.x
    nested_encoder: bool = False  # encoder.vision_model.x instead of encoder.x
    own_tokenizer: bool = False  # TA-Tok is in a separate file, with another scale_layer
    # (full name, dtype in the files) of tensors that the checkpoint stores in a wider dtype
    dtypes: tuple[tuple[str, str], ...] = ()
    # config.json and generation_config.json of the source
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    def published_key(self, part: str, key: str) -> str:
        """Return the name in the source's files of the table's `key`."""
        if part == "tokenizer" and self.flat_decoder:
            key = (
                key.replace("decoder.vision_model.", "decoder.", 1)
                if key.startswith("decoder.")
                else key
            )
        if part == "tokenizer" and self.nested_encoder and key.startswith("encoder."):
            key = "encoder.vision_model." + key.removeprefix("encoder.")
        return key

    def table_key(self, part: str, key: str) -> str:
        """Return the table's key of a name in the files: the inverse of `published_key`."""
        if part == "tokenizer" and self.flat_decoder and key.startswith("decoder."):
            key = "decoder.vision_model." + key.removeprefix("decoder.")
        if part == "tokenizer" and self.nested_encoder and key.startswith("encoder.vision_model."):
            key = "encoder." + key.removeprefix("encoder.vision_model.")
        return key


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
        record = ConversionRecord(**values | {"dtypes": tuple(map(tuple, values["dtypes"]))})
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
