"""Open a PyTorch model on disk: return its configuration and the tensors of each part.

A source is a BLIP3o-NEXT directory, a directory of a stock language model (Qwen3, or Qwen2, as Tar
is published), a diffusers directory (transformer/, vae/, scheduler/) and a TA-Tok file, in any
combination that makes a whole model. Sizes and options come from config.json files; those that are
absent are the published model's. Only headers of weights are read, and the values of a tied head
that is stored.

Published files have several names for a tensor, all of which are accepted:

    decoder.vision_model.x, decoder.x     the TA-Tok decoder, saved with transformers before 5, or 5
    encoder.x, encoder.vision_model.x     its encoder
    lm_head.weight                        of a tied model it must equal the embeddings

Prefixes of wrapper modules (wrappers.py) are removed, with a note.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np

from blip3o_jax import config as config_lib
from blip3o_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    SamplingConfig,
    TaTokConfig,
    UserError,
)
from blip3o_jax.convert.conversions import conversion_of, read_stock_config
from blip3o_jax.convert.mapping import Group, groups
from blip3o_jax.convert.record import Record
from blip3o_jax.convert.source_files import SECTION, Files, WeightSource
from blip3o_jax.convert.stock_config import OWN_FIELDS, SCHEDULER
from blip3o_jax.convert.ta_tok_args import read_ta_tok
from blip3o_jax.convert.tables import PREFIXES
from blip3o_jax.convert.tensor_files import Tensor, read_json
from blip3o_jax.parts import settings_of
from blip3o_jax.text.tokenizers import BPE_FILE, SENTENCEPIECE_FILE, TextTokenizer, load_tokenizer
from blip3o_jax.text.vocabulary import Vocabulary

INITIALISABLE = ("connector", "image_embeddings", "latent_connector", "feature_connector")
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"
# Tensors that this package does not use and stores unchanged: names or their prefixes, by part.
UNREAD = {
    "tokenizer": (
        "scale_layer.",
        "teacher.",
        "encoder.embeddings.position_ids",
        "decoder.vision_model.embeddings.position_ids",
    ),
    "ar": ("model.und_image_vae_as_noise_connector.",),
}


@dataclasses.dataclass(frozen=True)
class Source:
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
    record: Record
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
) -> Source:
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
    files.ta_tok_config = ta_tok_config
    tokenizer = _text_tokenizer(source)
    model = _model_config(files, initialise)
    vocabulary = Vocabulary(tokenizer, model.tokenizer.codebook_size)
    model = _with_vocabulary(model, vocabulary, files, initialise)
    record, parts, unread = _match_tensors(files, model)
    for part, given in parts.items():
        _check_part(part, model, given, files, initialise)
    model, dtypes = _with_dtypes(model, parts, dtype)
    _check_tied_head(files, model)
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
    return Source(
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
    model = config_lib.from_dict(
        files.section.get("model", {}), ModelConfig, f"{where}: {SECTION}.model"
    )
    ar = _with_own(read_stock_config("ar", files.values, where), model.ar, OWN_FIELDS)
    replaced: dict[str, Any] = {"ar": dataclasses.replace(ar, spare_rows=0)}
    for name, part in (("transformer", "dit"), ("vae", "vae")):
        if (found := getattr(files, name)) is not None:
            new = read_stock_config(part, found[1], str(found[0]))
            replaced[part] = _with_own(new, getattr(model, part), ("dtype", "remat", "unroll"))
    if files.scheduler is not None:
        replaced["flow"] = SCHEDULER.read(files.scheduler[1], str(files.scheduler[0]))
    # The published layout has no other tokenizer than TA-Tok.
    tokenizer = cast("TaTokConfig", model.tokenizer)
    replaced["tokenizer"] = read_ta_tok(tokenizer, files.ta_tok, files.ta_tok_config)
    there = lambda part: (
        any(key.startswith(PREFIXES[part]) for key in files.tensors) or part in initialise
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
) -> tuple[Record, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Assign the files' tensors to parts.

    Returns (record of the name variants, tensors by part and name in the table, unused tensors by
    full name).
    """
    wanted = ["tokenizer", "ar", "connector", "dit", "vae"]
    wanted += ["latent_connector"] * model.editing.latents + [
        "feature_connector"
    ] * model.editing.features
    tower = [
        key.removeprefix(PREFIXES["tokenizer"])
        for key in files.tensors
        if key.startswith(PREFIXES["tokenizer"])
    ]
    decoder = [key for key in tower if key.startswith("decoder.")]
    record = Record(
        tied_head=model.ar.tie_word_embeddings and HEAD in files.tensors,
        flat_decoder=bool(decoder)
        and not any(key.startswith("decoder.vision_model.") for key in decoder),
        nested_encoder=any(key.startswith("encoder.vision_model.") for key in tower),
        own_tokenizer=files.own_tokenizer,
    )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in wanted}
    unread: dict[str, Tensor] = {}
    prefixes = sorted(
        ((prefix, part) for part, prefix in PREFIXES.items()), key=lambda p: -len(p[0])
    )
    for name, tensor in files.tensors.items():
        prefix, part = next((prefix, part) for prefix, part in prefixes if name.startswith(prefix))
        key = record.table_key(part, name.removeprefix(prefix))
        if part == "ar" and key == HEAD and model.ar.tie_word_embeddings:
            continue
        buffers = conversion_of(part, model).buffers(settings_of(part, model))
        if key in buffers:
            _check_buffer(tensor, buffers[key])
            unread[name] = tensor
        elif key.startswith(UNREAD.get(part, ("\0",))):
            _check_scale(key, tensor)
            unread[name] = tensor
        else:
            parts[part][key] = tensor
    return record, parts, unread


def _check_buffer(tensor: Tensor, value: np.ndarray) -> None:
    """Raise UserError unless a stored tensor has the value computed from the settings."""
    stored = tensor.read()
    if stored.shape != value.shape or not np.allclose(stored.astype(np.float32), value, atol=1e-2):
        raise UserError(
            f"{tensor.file}: {tensor.key} differs from the values computed from its network's "
            "settings: use the config.json that was saved with the weights"
        )


def _check_scale(key: str, tensor: Tensor) -> None:
    """Raise UserError unless a tokenizer's scaling layer maps to [-1, 1].

    It must map pixels from [0, 1] or be the identity, since this package passes pixels in [-1, 1].
    """
    allowed = {"scale_layer.shift": (0.0, 0.5), "scale_layer.scale": (1.0, 0.5)}.get(key)
    if allowed and not any(np.all(tensor.read() == value) for value in allowed):
        raise UserError(
            f"{tensor.file}: {tensor.key} is {tensor.read().reshape(-1).tolist()}, but the vision "
            f"tokenizer takes pixels in [-1, 1]: it must be {' or '.join(map(str, allowed))}"
        )


def _check_part(
    part: str,
    model: ModelConfig,
    given: dict[str, Tensor],
    files: Files,
    initialise: tuple[str, ...],
) -> None:
    """Raise UserError unless the files hold exactly the tensors of the part's table."""
    if not given:
        if part in initialise:
            return
        diffusers = "--diffusion=DIR with weights"
        advice = {"dit": diffusers, "vae": diffusers, "tokenizer": "--ta_tok=FILE"}.get(part)
        advice = f"give {advice}" if advice else f"use --initialise={part} to create them"
        raise UserError(
            f"{files.config_file.parent} holds no tensors of part {part} ({PREFIXES[part]}*): "
            f"{files.unknown_prefix(PREFIXES[part]) or advice}{files.unread_files()}"
        )
    if part in initialise:
        raise UserError(
            f"--initialise={part}, but {next(iter(given.values())).file} holds its tensors: remove "
            "the option or the tensors"
        )
    try:
        shapes = {
            key: (shape, group)
            for group in groups(part, model)
            for key, shape in group.tensors.items()
        }
    except config_lib.ConfigError as error:  # invalid sizes
        raise UserError(f"{_sizes(part, files)}: {error}") from error
    if missing := [key for key in shapes if key not in given]:
        behind = files.unknown_prefix(PREFIXES[part] + missing[0])
        raise UserError(
            f"{next(iter(given.values())).file.parent}: {PREFIXES[part]}{missing[0]} is missing "
            f"({len(missing)} tensors of {part} in all), which {_sizes(part, files)} requires"
            f"{'; ' * bool(behind)}{behind}{files.unread_files()}"
        )
    if extra := [tensor for key, tensor in given.items() if key not in shapes]:
        raise UserError(
            f"{extra[0].file}: {extra[0].key} belongs to no parameter of {part} ({len(extra)} "
            f"tensors in all) according to {_sizes(part, files)}: correct the sizes or remove it"
        )
    for key, (shape, group) in shapes.items():
        _check_tensor(part, given[key], shape, group, files, grown="image_embeddings" in initialise)


def _check_tensor(
    part: str, tensor: Tensor, shape: tuple[int, ...], group: Group, files: Files, *, grown: bool
) -> None:
    wanted = shape
    if grown and group.rule.vocabulary:
        wanted = (files.values["vocab_size"], *shape[1:])
    if tensor.shape != wanted:
        raise UserError(
            f"{tensor.file}: {tensor.key} has shape {list(tensor.shape)}, but "
            f"{_sizes(part, files)} makes it {list(wanted)}"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(
            f"{tensor.file}: {tensor.key} has dtype {tensor.dtype}, which is not floating-point"
        )


def _sizes(part: str, files: Files) -> str:
    """Return the source of a part's sizes, for messages."""
    if part == "tokenizer" and files.ta_tok_config is not None:
        return f"{files.ta_tok_config} (over the published so400m tokenizer)"
    stock = {"vae": files.vae, "latent_connector": files.vae}.get(part, files.transformer)
    if stock is not None and part not in ("ar", "tokenizer"):
        return str(stock[0]) if part in ("dit", "vae") else f"{files.config_file} with {stock[0]}"
    if part == "ar" or files.section:
        return str(files.config_file)
    if part == "tokenizer":
        return "the published so400m tokenizer (--ta_tok_config=FILE.json states another)"
    return f"{files.config_file} with the published sizes (--diffusion=DIR states others)"


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


def _check_tied_head(files: Files, model: ModelConfig) -> None:
    head = files.tensors.get(HEAD)
    if head is None or not model.ar.tie_word_embeddings:
        return
    embeddings = files.tensors[EMBEDDINGS]
    same = head.shape == embeddings.shape and head.dtype == embeddings.dtype
    if not same or not _same_values(head.read(), embeddings.read()):
        raise UserError(
            f"{head.file}: {HEAD} differs from {EMBEDDINGS}, but {files.config_file} has "
            "tie_word_embeddings: true; set it to false there, or remove the tensor"
        )


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether the arrays are bitwise equal.

    They are compared in pieces, since a comparison of all of it allocates half their size.
    """
    a, b = (x.reshape(-1).view(np.uint8) for x in (a, b))
    piece = 2**24
    return all(np.array_equal(a[i : i + piece], b[i : i + piece]) for i in range(0, len(a), piece))
