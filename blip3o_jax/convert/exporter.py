"""Export a checkpoint to PyTorch files, parameter by parameter.

Each tensor is written at its offset in files allocated at full size. The output is the BLIP3o-NEXT
layout, or with `parts` the directories of the stock classes:

OUT/model*.safetensors, config.json, generation_config.json, the text tokenizer's files
OUT/ar, OUT/dit, OUT/scheduler, OUT/vae, and that of a part with a file of its own (OUT/ta_tok)
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax import __version__
from blip3o_jax import config as config_lib
from blip3o_jax.config import Config, TextConfig, UserError
from blip3o_jax.convert.conversions import PartFile, conversion_of, prefix_of, stock_config
from blip3o_jax.convert.directory import atomic_directory, check_space
from blip3o_jax.convert.export_tensors import PlannedGroup, write_tensors
from blip3o_jax.convert.mapping import groups
from blip3o_jax.convert.memory import PeakMemory
from blip3o_jax.convert.merged import MergedWeights
from blip3o_jax.convert.record import ConversionRecord, read_record
from blip3o_jax.convert.source_files import SECTION
from blip3o_jax.convert.tables import CONVERTED_PARTS, PUBLISHED_PARTS
from blip3o_jax.convert.tensor_files import Tensor
from blip3o_jax.convert.text_files import write_text_files
from blip3o_jax.convert.weight_files import ORDER
from blip3o_jax.files import write_json
from blip3o_jax.lora import base_config
from blip3o_jax.part_registry import family_of, settings_of
from blip3o_jax.text.tokenizers import load_tokenizer
from blip3o_jax.text.vocabulary import NUM_SCALES, Vocabulary
from blip3o_jax.train.checkpoint import find, read_config, stored_text


@dataclasses.dataclass(frozen=True)
class ExportSummary:
    """Hold the results of an export.

    `size` is the bytes written, `tensors` their number, `peak` the peak resident memory in bytes,
    `seconds` the duration and `notes` lines for the user.
    """

    size: int
    tensors: int
    peak: int
    seconds: float
    notes: tuple[str, ...]


def export_weights(
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    parts: Sequence[str] = (),
    dtype: str = "",
    max_shard_bytes: int = 5 * 10**9,
    ema: bool = False,
    overwrite: bool = False,
) -> ExportSummary:
    """Write `out` atomically: the BLIP3o-NEXT layout, or the stock directories of `parts`.

    `dtype` "" keeps the checkpoint's. Low-rank factors are merged (merged.py) and the sums rounded
    to the dtype written. `ema` exports averaged parameters. Raises UserError when the checkpoint
    lacks a part or the averages.
    """
    began = time.monotonic()
    root, step = find(source)
    config = read_config(root)
    weights = MergedWeights(root, step, config.model, ema=ema)
    config = dataclasses.replace(config, model=base_config(config.model))
    record, unread = read_record(root)
    exporter = _Exporter(config, root, weights, record, unread, dtype, max_shard_bytes)
    exporter.check(parts)
    check_space(out, exporter.size_of(parts))
    with (
        atomic_directory(out, overwrite=overwrite, sources=(root,)) as directory,
        PeakMemory() as memory,
    ):
        if parts:
            for name in parts:
                exporter.write_stock_part(name, directory / name)
            # Records the version and the parts of the directories.
            write_json(
                directory / "config.json", {SECTION: {"version": __version__, "parts": list(parts)}}
            )
        else:
            exporter.write_model(directory)
    return ExportSummary(
        exporter.size, exporter.count, memory.peak, time.monotonic() - began, tuple(exporter.notes)
    )


class _Exporter:
    """Write the files of one export."""

    def __init__(
        self,
        config: Config,
        root: pathlib.Path,
        weights: MergedWeights,
        record: ConversionRecord | None,
        unread: dict[str, Tensor],
        dtype: str,
        max_shard_bytes: int,
    ):
        self.config = config
        self.model = config.model
        self.root = root
        self.weights = weights
        # Only an import of one BLIP3o-NEXT directory has stored the buffers of the reference's
        # class; for other checkpoints they are created.
        self.whole_source = record is not None and not record.own_tokenizer
        self.record = record or ConversionRecord()
        self.unread = unread
        self.dtype = dtype
        self.max_shard_bytes = max_shard_bytes
        self.size = 0
        self.count = 0
        self.notes: list[str] = []
        self._own_dtypes = dict(self.record.dtypes)
        self._conversions = {
            part: conversion_of(part, self.model)
            for part in CONVERTED_PARTS
            if family_of(part, self.model).conversion
        }
        # Name on the command line and of the directory -> part; connectors have no stock class.
        stock = [part for part, found in self._conversions.items() if found.layout is not None]
        own = {f.file.name: part for part, f in self._conversions.items() if f.file is not None}
        self._stock_parts = {part: part for part in stock} | own

    def size_of(self, parts: Sequence[str]) -> int:
        """Return the approximate number of bytes to write."""
        chosen = [self._stock_parts[name] for name in parts] or [
            part for part in CONVERTED_PARTS if part in self.weights.parts
        ]
        return sum(plan.size for part in chosen for plan in self._tensors(part, ""))

    def check(self, parts: Sequence[str]) -> None:
        """Raise UserError unless the checkpoint holds all parts to export."""
        for name in parts:
            config_lib.check_choice("--parts", name, tuple(self._stock_parts))
            config_lib.check(parts.count(name) == 1, f"--parts names {name} twice")
        wanted = [self._stock_parts[name] for name in parts] or PUBLISHED_PARTS
        if missing := [part for part in wanted if part not in self.weights.parts]:
            raise UserError(
                f"{self.root} holds no part {', '.join(missing)}, only "
                f"{', '.join(self.weights.parts)}: select parts to export with --parts, or give a "
                "checkpoint of stage 'joint'"
            )
        for part in wanted:
            conversion_of(part, self.model)  # raises for a family without one

    def write_model(self, directory: pathlib.Path) -> None:
        """Write the BLIP3o-NEXT layout."""
        found = {
            part: conversion
            for part, conversion in self._conversions.items()
            if part in self.weights.parts
        }
        tensors = [t for part in found for t in self._tensors(part, found[part].prefix)]
        constants: dict[str, Tensor] = {}
        for part, conversion in found.items():
            constants |= self._buffers(part, conversion.prefix)
        constants |= self.unread
        # An import of a whole source brought its own, and no others are added to it.
        for conversion in () if self.whole_source else found.values():
            constants |= _constants(conversion.constants, conversion.prefix)
        self._write(directory, ORDER["transformers"][0][0], tensors, constants)
        vocabulary = self._vocabulary()
        write_json(directory / "config.json", self._config_json(vocabulary))
        self._write_text(directory, vocabulary)
        if left := [part for part in self.weights.parts if part not in CONVERTED_PARTS]:
            self.notes.append(f"parts {', '.join(left)} belong to training only: not exported")

    def write_stock_part(self, name: str, directory: pathlib.Path) -> None:
        """Write the directory of one part's stock class, or of its own file."""
        part = self._stock_parts[name]
        conversion = self._conversions[part]
        if conversion.file is not None:
            self._write_part_file(part, conversion.file, directory)
            return
        stem = ORDER[conversion.library][0][0]
        self._write(directory, stem, self._tensors(part, ""), self._buffers(part, ""))
        values = stock_config(part, self.model)
        if conversion.library == "transformers":
            vocabulary = self._vocabulary()
            dtype = self.dtype or settings_of(part, self.model).param_dtype
            values |= {"dtype": dtype} | _special_ids(vocabulary)
            self._write_text(directory, vocabulary)
        write_json(directory / "config.json", values)
        if part == "dit":
            scheduler = directory.with_name("scheduler")
            scheduler.mkdir()
            write_json(scheduler / "scheduler_config.json", stock_config("scheduler", self.model))

    def _write_part_file(self, part: str, file: PartFile, directory: pathlib.Path) -> None:
        """Write the file that a part is published in, with the tensors that it needs there."""
        conversion = self._conversions[part]
        unread = {
            key.removeprefix(conversion.prefix): tensor
            for key, tensor in self.unread.items()
            if key.startswith(conversion.prefix)
        }
        # Constants of a whole directory have other values in a file of its own.
        constants = unread | _constants(file.constants, "")
        self._write(directory, file.name, self._tensors(part, ""), constants, max_shard_bytes=2**62)
        self.notes += file.finish(directory, settings_of(part, self.model))

    def _tensors(self, part: str, prefix: str) -> list[PlannedGroup]:
        """Return the tensors of one part in the table's order, with their names and dtypes."""
        stored = str(self.weights.dtype(part))
        planned = []
        for group in groups(part, self.model):
            names = {key: prefix + self.record.published_key(part, key) for key in group.tensors}
            full = {
                key: prefix_of(part, self.model) + self.record.published_key(part, key)
                for key in group.tensors
            }
            shapes = {names[key]: shape for key, shape in group.tensors.items()}
            own = {
                names[key]: np.dtype(self.dtype or self._own_dtypes.get(full[key], stored))
                for key in group.tensors
            }
            planned.append(PlannedGroup(part, group, shapes, own))
        return planned

    def _buffers(self, part: str, prefix: str) -> dict[str, Tensor]:
        """Return the tensors that the stock class of a part stores and this package computes."""
        found = self._conversions[part].buffers(settings_of(part, self.model))
        return _constants(found, prefix)

    def _write(
        self,
        directory: pathlib.Path,
        stem: str,
        planned: Sequence[PlannedGroup],
        constants: dict[str, Tensor],
        max_shard_bytes: int = 0,
    ) -> None:
        """Write tensors, and count them; note the parts whose low-rank factors were merged."""
        size, count = write_tensors(
            directory,
            stem,
            planned,
            constants,
            self.weights,
            tied_head=self.record.tied_head,
            max_shard_bytes=max_shard_bytes or self.max_shard_bytes,
        )
        self.size += size
        self.count += count
        merged = [
            part for part in self.weights.merged_parts if any(plan.part == part for plan in planned)
        ]
        self.notes += [
            f"low-rank factors of {part} were merged into its weights" for part in merged
        ]

    def _vocabulary(self) -> Vocabulary:
        text = stored_text(self.root, TextConfig(kind=self.model.text.kind))
        return Vocabulary(load_tokenizer(text), self.model.tokenizer.codebook_size)

    def _write_text(self, directory: pathlib.Path, vocabulary: Vocabulary) -> None:
        self.notes += write_text_files(
            vocabulary, directory, image_tokens=True, template=self.model.template
        )
        sampling = self.config.sampling
        generation = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
        generation |= {"do_sample": sampling.temperature > 0, **_special_ids(vocabulary)}
        write_json(directory / "generation_config.json", self.record.generation or generation)

    def _config_json(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """Return config.json: the source's, if any, updated with this checkpoint's settings.

        Settings without a published key are in the section SECTION.
        """
        source = self.record.config
        stock = stock_config("ar", self.model)
        defaults = {
            **{
                key: value
                for part, found in self._conversions.items()
                for key, value in found.config_keys(settings_of(part, self.model)).items()
            },
            "diffusion_name_or_path": None,
            "dtype": self.model.ar.param_dtype,
            **stock,
            **_special_ids(vocabulary),
        }
        if "torch_dtype" in source:
            del defaults["dtype"]
        conversion = self._conversions["ar"]
        assert conversion.layout is not None, "language models are classes of transformers"
        stated = {key: stock[key] for key in conversion.layout.fields} | {
            "image_start_tag_id": vocabulary.image_start,
            "image_end_tag_id": vocabulary.image_end,
            "scale_start_token_id": vocabulary.scale(1),
            "scale_end_token_id": vocabulary.scale(NUM_SCALES),
            "num_scale_tokens": NUM_SCALES,
            "image_start_token_id": vocabulary.image_token_offset,
            "image_end_token_id": vocabulary.image_token_end - 1,
            "num_image_tokens": vocabulary.codebook_size,
        }
        key = "torch_dtype" if "torch_dtype" in source else "dtype"
        # Otherwise each tensor is written in its original dtype, and the source's value holds.
        if self.dtype or not self.record.dtypes:
            stated[key] = self.dtype or self.model.ar.param_dtype
        if not str(source.get("model_type")).startswith("blip3o"):
            stated |= conversion.published
        # The export writes the tokenizer next to config.json.
        model = dataclasses.replace(
            self.model, text=dataclasses.replace(self.model.text, path="text", train_size=0)
        )
        own = {
            "version": __version__,
            "model": config_lib.to_dict(model),
            "max_length": self.config.data.max_length,
        }
        own["sampling"] = config_lib.to_dict(self.config.sampling)
        # Later ones win: this checkpoint's sizes and ids over the source's values, these over the
        # defaults.
        return defaults | source | stated | {SECTION: own}


def _constants(values: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """Return arrays as tensors whose names have a prefix."""

    def tensor(name: str, value: np.ndarray) -> Tensor:
        return Tensor(name, value.shape, value.dtype, pathlib.Path(), lambda: value)

    return {prefix + key: tensor(prefix + key, value) for key, value in values.items()}


def _special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    return {"eos_token_id": vocabulary.end_of_turn, "pad_token_id": vocabulary.pad_id}
