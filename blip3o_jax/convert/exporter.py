"""Export a checkpoint to PyTorch files, parameter by parameter.

Each tensor is written at its offset in files allocated at full size. The output is the BLIP3o-NEXT
layout, or with `parts` the directories of the stock classes:

OUT/model*.safetensors, config.json, generation_config.json, the text tokenizer's files
OUT/ar, OUT/dit, OUT/scheduler, OUT/vae, OUT/ta_tok/ta_tok.pth
"""

import dataclasses
import pathlib
import time
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from blip3o_jax import __version__
from blip3o_jax import config as config_lib
from blip3o_jax.config import Config, TaTokConfig, TextConfig, UserError
from blip3o_jax.convert.conversions import conversion_of, stock_config
from blip3o_jax.convert.directory import atomic_directory, check_space
from blip3o_jax.convert.export_tensors import PlannedGroup, write_tensors
from blip3o_jax.convert.mapping import groups
from blip3o_jax.convert.memory import PeakMemory
from blip3o_jax.convert.merged import MergedWeights
from blip3o_jax.convert.record import ConversionRecord, read_record
from blip3o_jax.convert.source_files import SECTION
from blip3o_jax.convert.ta_tok_args import args_of, overrides_of
from blip3o_jax.convert.tables import PREFIXES
from blip3o_jax.convert.tensor_files import Tensor
from blip3o_jax.convert.text_files import write_text_files
from blip3o_jax.files import write_json
from blip3o_jax.lora import base_config
from blip3o_jax.part_registry import settings_of
from blip3o_jax.text.tokenizers import load_tokenizer
from blip3o_jax.text.vocabulary import NUM_SCALES, Vocabulary
from blip3o_jax.train.checkpoint import find, read_config, stored_text

STOCK_PARTS = ("ar", "dit", "vae", "ta_tok")
PART_OF = {"ta_tok": "tokenizer"}  # names on the command line that differ from the model's
# The scaling layer in the published layout is the identity: pixels are already in [-1, 1].
SCALE_LAYER = {"scale_layer.shift": 0.0, "scale_layer.scale": 1.0}
# In TA-Tok's separate file it maps pixels in [0, 1] to [-1, 1].
TA_TOK_SCALE_LAYER = {"scale_layer.shift": 0.5, "scale_layer.scale": 0.5}


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

    def size_of(self, parts: Sequence[str]) -> int:
        """Return the approximate number of bytes to write."""
        chosen = [PART_OF.get(p, p) for p in parts] or [
            p for p in PREFIXES if p in self.weights.parts
        ]
        return sum(plan.size for part in chosen for plan in self._tensors(part, ""))

    def check(self, parts: Sequence[str]) -> None:
        """Raise UserError unless the checkpoint holds all parts to export."""
        for name in parts:
            config_lib.check_choice("--parts", name, STOCK_PARTS)
            config_lib.check(parts.count(name) == 1, f"--parts names {name} twice")
        wanted = [PART_OF.get(p, p) for p in parts] or [
            "tokenizer",
            "ar",
            "connector",
            "dit",
            "vae",
        ]
        if missing := [part for part in wanted if part not in self.weights.parts]:
            raise UserError(
                f"{self.root} holds no part {', '.join(missing)}, only "
                f"{', '.join(self.weights.parts)}: select parts to export with --parts, or give a "
                "checkpoint of stage 'joint'"
            )

    def write_model(self, directory: pathlib.Path) -> None:
        """Write the BLIP3o-NEXT layout."""
        parts = [part for part in PREFIXES if part in self.weights.parts]
        tensors = [t for part in parts for t in self._tensors(part, PREFIXES[part])]
        self._write(
            directory,
            "model",
            tensors,
            {k: t for part in parts for k, t in self._buffers(part, PREFIXES[part]).items()}
            | self._constants(PREFIXES["tokenizer"], SCALE_LAYER, self.unread),
        )
        vocabulary = self._vocabulary()
        write_json(directory / "config.json", self._config_json(vocabulary))
        self._write_text(directory, vocabulary)
        if left := [part for part in self.weights.parts if part not in PREFIXES]:
            self.notes.append(f"parts {', '.join(left)} belong to training only: not exported")

    def write_stock_part(self, name: str, directory: pathlib.Path) -> None:
        """Write the directory of one part's stock class."""
        if name == "ta_tok":
            self._ta_tok(directory)
            return
        stem = "model" if name == "ar" else "diffusion_pytorch_model"
        self._write(directory, stem, self._tensors(name, ""), self._buffers(name, ""))
        values = stock_config(name, self.model)
        if name == "ar":
            vocabulary = self._vocabulary()
            values |= {"dtype": self.dtype or self.model.ar.param_dtype} | _special_ids(vocabulary)
            self._write_text(directory, vocabulary)
        write_json(directory / "config.json", values)
        if name == "dit":
            scheduler = directory.with_name("scheduler")
            scheduler.mkdir()
            write_json(scheduler / "scheduler_config.json", stock_config("scheduler", self.model))

    def _ta_tok(self, directory: pathlib.Path) -> None:
        """Write {"model": {"args", "sd"}} as TA-Tok is published, or safetensors without torch."""
        # The published layout has no other tokenizer than TA-Tok.
        cfg = typing.cast("TaTokConfig", self.model.tokenizer)
        own = {
            k: v
            for k, v in self.unread.items()
            if k.startswith(PREFIXES["tokenizer"]) and "scale_layer" not in k
        }
        own = {k.removeprefix(PREFIXES["tokenizer"]): v for k, v in own.items()}
        constants = self._constants("", TA_TOK_SCALE_LAYER, own)
        self._write(
            directory, "ta_tok", self._tensors("tokenizer", ""), constants, max_shard_bytes=2**62
        )
        args = args_of(cfg)
        write_json(directory / "ta_tok_config.json", overrides_of(cfg))
        write_json(directory / "args.json", args)
        _write_ta_tok_pth(directory, args, self.notes)

    def _tensors(self, part: str, prefix: str) -> list[PlannedGroup]:
        """Return the tensors of one part in the table's order, with their names and dtypes."""
        stored = str(self.weights.dtype(part))
        planned = []
        for group in groups(part, self.model):
            names = {key: prefix + self.record.published_key(part, key) for key in group.tensors}
            full = {
                key: PREFIXES[part] + self.record.published_key(part, key) for key in group.tensors
            }
            shapes = {names[key]: shape for key, shape in group.tensors.items()}
            own = {
                names[key]: np.dtype(self.dtype or self._own_dtypes.get(full[key], stored))
                for key in group.tensors
            }
            planned.append(PlannedGroup(part, group, shapes, own))
        return planned

    def _constants(
        self, prefix: str, values: dict[str, float], unread: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors that this package does not use: the imported ones and `values`.

        The imported ones alone are returned for the layout of a whole imported source.
        """
        if self.whole_source and prefix:
            return unread
        return unread | {
            prefix + key: _constant(prefix + key, value) for key, value in values.items()
        }

    def _buffers(self, part: str, prefix: str) -> dict[str, Tensor]:
        """Return the tensors that the stock class of a part stores and this package computes."""
        found = conversion_of(part, self.model).buffers(settings_of(part, self.model))
        return {prefix + key: _tensor(prefix + key, value) for key, value in found.items()}

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
            "mm_vision_tower": None,
            "mm_hidden_size": self.model.tokenizer.feature_channels,
            "mm_vision_select_layer": typing.cast("TaTokConfig", self.model.tokenizer).select_layer,
            "diffusion_name_or_path": None,
            "dtype": self.model.ar.param_dtype,
            **stock,
            **_special_ids(vocabulary),
        }
        if "torch_dtype" in source:
            del defaults["dtype"]
        conversion = conversion_of("ar", self.model)
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


def _constant(name: str, value: float) -> Tensor:
    return _tensor(name, np.full((1, 3, 1, 1), value, np.float32))


def _tensor(name: str, value: np.ndarray) -> Tensor:
    return Tensor(name, value.shape, value.dtype, pathlib.Path(), lambda: value)


def _special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    return {"eos_token_id": vocabulary.end_of_turn, "pad_token_id": vocabulary.pad_id}


def _write_ta_tok_pth(directory: pathlib.Path, args: dict[str, Any], notes: list[str]) -> None:
    """Replace ta_tok.safetensors by ta_tok.pth with its args, if torch is installed."""
    file = directory / "ta_tok.safetensors"
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError:
        notes.append(
            f"ta_tok is {file.name} with args.json: install PyTorch to export the published "
            "ta_tok.pth"
        )
        return
    torch.save({"model": {"args": args, "sd": load_file(file)}}, directory / "ta_tok.pth")
    file.unlink()
    (directory / "args.json").unlink()
