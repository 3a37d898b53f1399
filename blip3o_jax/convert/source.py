"""Open a PyTorch model on disk: return its configuration and the tensors of each part.

A source is a BLIP3o-NEXT directory, a directory of a stock language model (Qwen3, or Qwen2, as Tar
is published), a diffusers directory (transformer/, vae/, scheduler/) and a TA-Tok file, in any
combination that makes a whole model. Sizes and options come from config.json files; those that are
absent are the published model's. Only headers of weights are read, and the values of a tied head
that is stored, which must equal the embeddings.

Published files may spell a tensor's name in several ways, all of which are accepted
(`Conversion.spellings`). Prefixes of wrapper modules (wrappers.py) are removed, with a note.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from blip3o_jax import config as config_lib
from blip3o_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    SamplingConfig,
    UserError,
)
from blip3o_jax.convert.conversions import (
    conversion_of,
    known_prefixes,
    prefix_of,
    read_stock_config,
)
from blip3o_jax.convert.record import ConversionRecord, spellings_in
from blip3o_jax.convert.source_checks import check_buffer, check_part, check_tied_head
from blip3o_jax.convert.source_files import SECTION, Files, WeightSource
from blip3o_jax.convert.stock_config import OWN_FIELDS, SCHEDULER
from blip3o_jax.convert.tables import HEAD, PUBLISHED_PARTS
from blip3o_jax.convert.tensor_files import Tensor, read_json
from blip3o_jax.part_registry import settings_of
from blip3o_jax.text.tokenizers import BPE_FILE, SENTENCEPIECE_FILE, TextTokenizer, load_tokenizer
from blip3o_jax.text.vocabulary import Vocabulary

INITIALISABLE = ("connector", "image_embeddings", "latent_connector", "feature_connector")


@dataclasses.dataclass(frozen=True)
class TorchSource:
    """Hold an opened source.

    `tensors` maps part -> name in the table -> tensor, complete and with the table's shapes;
    `unread` maps full names to tensors. `initialise` lists those of INITIALISABLE that the import
    creates. `weight_sources` are in reading order: a later one replaces tensors of an earlier one.
    """

    config: Config
    tokenizer: TextTokenizer
    text_rows: int  # the number of ids of the text tokenizer, without image tokens
    tensors: dict[str, dict[str, Tensor]]
    unread: dict[str, Tensor]
    record: ConversionRecord
    initialise: tuple[str, ...]
    notes: tuple[str, ...]
    weight_sources: tuple[WeightSource, ...]


def open_source(
    source: pathlib.Path,
    *,
    diffusion: pathlib.Path | None = None,
    ta_tok: pathlib.Path | None = None,
    ta_tok_config: pathlib.Path | None = None,
    initialise: Iterable[str] = (),
    dtype: str = "",
    variant: str = "",
) -> TorchSource:
    """Read headers and configurations and check that they form one complete model.

    `variant` selects the weights of a directory that has several ("bf16", "fp16", "non_ema"); "" is
    the default one. `dtype` is the parameters' dtype in the checkpoint; "" keeps the files' (the
    widest of a part, which represents the others exactly). Raises UserError, naming file and
    tensor, for files that do not match.
    """
    initialise = tuple(initialise)
    for name in initialise:
        config_lib.check_choice("--initialise", name, INITIALISABLE)
    files = Files.read(source, diffusion, ta_tok, variant)
    files.tokenizer_sizes = ta_tok_config
    tokenizer = _text_tokenizer(source)
    model = _model_config(files, initialise)
    vocabulary = Vocabulary(tokenizer, model.tokenizer.codebook_size)
    model = _with_vocabulary(model, vocabulary, files, initialise)
    record, parts, unread = _match_tensors(files, model)
    for part, given in parts.items():
        check_part(part, model, given, files, initialise)
    model, dtypes = _with_dtypes(model, parts, dtype)
    # The last check, since it alone reads values, up to a whole table.
    check_tied_head(files, model)
    section = files.section
    config = Config(
        stage="joint",
        model=model,
        data=config_lib.from_dict(
            {"max_length": section.get("max_length", 2048)},
            DataConfig,
            f"{files.config_file}: {SECTION}",
        ),
        sampling=config_lib.from_dict(
            section.get("sampling", {}), SamplingConfig, f"{files.config_file}: {SECTION}.sampling"
        ),
        mesh=MeshConfig(data=-1, fsdp=1, strategy="dp"),
    )
    generation = source / "generation_config.json"
    record = dataclasses.replace(
        record,
        dtypes=dtypes,
        config=files.values,
        generation=read_json(generation) if generation.is_file() else {},
    )
    return TorchSource(
        config,
        tokenizer,
        vocabulary.image_start,
        parts,
        unread,
        record,
        initialise,
        tuple(files.notes),
        tuple(files.weight_sources),
    )


def _text_tokenizer(source: pathlib.Path) -> TextTokenizer:
    kind: Literal["bpe", "sentencepiece"]
    kind = "sentencepiece" if (source / SENTENCEPIECE_FILE).is_file() else "bpe"
    if kind == "bpe" and not any((source / name).is_file() for name in (BPE_FILE, "vocab.json")):
        raise UserError(
            f"{source} holds no text tokenizer ({BPE_FILE}, vocab.json with merges.txt, or "
            f"{SENTENCEPIECE_FILE}): put the tokenizer's files next to the weights"
        )
    return load_tokenizer(config_lib.TextConfig(kind=kind, path=str(source)))


def _model_config(files: Files, initialise: tuple[str, ...]) -> ModelConfig:
    """Return every part's sizes and options, from the most specific file that has them.

    Raises UserError for parts whose sizes do not match.
    """
    where = str(files.config_file)
    model = files.model
    ar = _with_own(read_stock_config("ar", files.values, where), model.ar, OWN_FIELDS)
    replaced: dict[str, Any] = {"ar": dataclasses.replace(ar, spare_rows=0)}
    for name, part in (("transformer", "dit"), ("vae", "vae")):
        if (found := getattr(files, name)) is not None:
            new = read_stock_config(part, found[1], str(found[0]))
            replaced[part] = _with_own(new, getattr(model, part), ("dtype", "remat", "unroll"))
    if files.scheduler is not None:
        replaced["flow"] = SCHEDULER.read(files.scheduler[1], str(files.scheduler[0]))
    if (own := conversion_of("tokenizer", model).file) is not None:
        replaced["tokenizer"] = own.settings(
            model.tokenizer, files.tokenizer_args, files.tokenizer_sizes
        )
    there = lambda part: (
        any(key.startswith(prefix_of(part, model)) for key in files.tensors) or part in initialise
    )
    editing: dict[str, Any] = {
        "latents": there("latent_connector"),
        "features": there("feature_connector"),
    }
    if "model" not in files.section and any(editing.values()):
        editing["reference_slots"] = 1  # published editing models take one reference image
    replaced["editing"] = dataclasses.replace(model.editing, **editing)
    dit = replaced.get("dit", model.dit)
    vae = replaced.get("vae", model.vae)
    if "model" not in files.section:
        # Published configurations state the size of the latents only.
        replaced["image_size"] = dit.sample_size * vae.spatial_compression
    text = dataclasses.replace(model.text, kind="bpe", path="text", train_size=0)
    if (files.config_file.parent / SENTENCEPIECE_FILE).is_file():
        text = dataclasses.replace(text, kind="sentencepiece")
    try:
        return dataclasses.replace(model, text=text, **replaced)
    except config_lib.ConfigError as error:  # sizes of parts that do not match
        sources = [
            files.config_file,
            *(found[0] for found in (files.transformer, files.vae) if found is not None),
        ]
        raise UserError(f"{', '.join(map(str, sources))}: {error}") from error


def _with_own(new: Any, old: Any, names: Iterable[str]) -> Any:
    """Return settings of a stock class with the fields `names` of `old`.

    The fields keep their defaults if `old` is of another family.
    """
    if type(old) is not type(new):
        return new
    return dataclasses.replace(new, **{n: getattr(old, n) for n in names if hasattr(new, n)})


def _with_vocabulary(
    model: ModelConfig, vocabulary: Vocabulary, files: Files, initialise: tuple[str, ...]
) -> ModelConfig:
    """Return the model with the checkpoint's number of vocabulary rows.

    Raises UserError unless the ids in config.json agree with the tokenizer.
    """
    stated = {
        "image_start_tag_id": vocabulary.image_start,
        "image_end_tag_id": vocabulary.image_end,
        "scale_start_token_id": vocabulary.scale(1),
        "image_start_token_id": vocabulary.image_token_offset,
        "image_end_token_id": vocabulary.image_token_end - 1,
        "num_image_tokens": vocabulary.codebook_size,
    }
    for key, value in stated.items():
        if files.values.get(key, value) != value:
            raise UserError(
                f"{files.config_file}: {key}={files.values[key]}, but the tokenizer's files and "
                f"the codebook make it {value}: use the tokenizer that belongs to the weights"
            )
    if "image_embeddings" in initialise and model.ar.vocab_size >= vocabulary.size:
        raise UserError(
            f"--initialise=image_embeddings, but the tables of {files.config_file.parent} already "
            f"have rows for all {vocabulary.size} ids: remove the option"
        )
    rows = vocabulary.size if "image_embeddings" in initialise else model.ar.vocab_size
    if rows < vocabulary.size:
        raise UserError(
            f"{files.config_file}: vocab_size={rows}, but text tokenizer and image tokens have "
            f"{vocabulary.size} ids; --initialise=image_embeddings adds the missing rows at the "
            "mean of the others"
        )
    return dataclasses.replace(
        model, ar=dataclasses.replace(model.ar, vocab_size=rows, spare_rows=rows - vocabulary.size)
    )


def _match_tensors(
    files: Files, model: ModelConfig
) -> tuple[ConversionRecord, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Assign the files' tensors to parts.

    Returns (record of the name variants, tensors by part and name in the table, unused tensors by
    full name).
    """
    wanted = list(PUBLISHED_PARTS)
    wanted += ["latent_connector"] * model.editing.latents + [
        "feature_connector"
    ] * model.editing.features
    record = ConversionRecord(
        tied_head=model.ar.tie_word_embeddings and HEAD in files.tensors,
        spellings=tuple(_spellings(files, model, wanted)),
        own_tokenizer=files.own_tokenizer,
    )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in wanted}
    unread: dict[str, Tensor] = {}
    for name, tensor in files.tensors.items():
        part = next(part for prefix, part in known_prefixes().items() if name.startswith(prefix))
        conversion = conversion_of(part, model)
        # A name with the prefix of another family stays whole, and is refused as unknown.
        key = record.table_key(part, name.removeprefix(conversion.prefix))
        # A stored copy of a tied head is checked (`check_tied_head`) and noted in the record, not
        # read twice.
        if part == "ar" and key == HEAD and model.ar.tie_word_embeddings:
            continue
        buffers = conversion.buffers(settings_of(part, model))
        if key in buffers:
            check_buffer(tensor, buffers[key])
            unread[name] = tensor
        elif key.startswith(conversion.unread):
            conversion.check_unread(key, tensor)
            unread[name] = tensor
        else:
            parts[part][key] = tensor
    return record, parts, unread


def _spellings(
    files: Files, model: ModelConfig, parts: Iterable[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield (part, prefix in its table, prefix in the files) of names that are spelled so."""
    for part in parts:
        if known := conversion_of(part, model).spellings:
            prefix = prefix_of(part, model)
            names = [k.removeprefix(prefix) for k in files.tensors if k.startswith(prefix)]
            yield from ((part, *pair) for pair in spellings_in(names, known))


def _with_dtypes(
    model: ModelConfig, parts: dict[str, dict[str, Tensor]], dtype: str
) -> tuple[ModelConfig, tuple[tuple[str, str], ...]]:
    """Return the model with each part's parameter dtype, and (name, dtype) of narrower tensors."""
    wide = next(
        (t for given in parts.values() for t in given.values() if t.dtype == np.float64), None
    )
    if wide is not None and not dtype:
        raise UserError(
            f"{wide.file}: {wide.key} has dtype float64, and parameters have at most 32 bits: "
            "--dtype=float32 rounds it"
        )
    own = lambda names: [t.dtype for name in names for t in parts.get(name, {}).values()]
    widest = lambda *names: (
        dtype or str(jnp.result_type(*own(names))) if own(names) else dtype or "float32"
    )
    # The widest dtype represents the others' values exactly; the record keeps the narrower ones for
    # an export.
    dtypes = {part: widest(part) for part in ("ar", "tokenizer", "dit", "vae")}
    dtypes["connector"] = widest("connector", "latent_connector", "feature_connector")
    changes = {
        part: config_lib.replace_everywhere(getattr(model, part), param_dtype=dtype)
        for part, dtype in dtypes.items()
    }
    model = dataclasses.replace(model, **changes)
    if dtype:
        return model, ()
    stored = {part: np.dtype(getattr(model, part, model.connector).param_dtype) for part in parts}
    narrower = [
        (t.key, str(t.dtype))
        for part, given in parts.items()
        for t in given.values()
        if t.dtype != stored[part]
    ]
    return model, tuple(narrower)
