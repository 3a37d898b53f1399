"""Write a directory in the published layout with random weights: real sizes without real
weights."""

import json
import pathlib
import string

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from blip3o_jax.config import ModelConfig, to_dict
from blip3o_jax.convert.conversions import conversion_of, prefix_of, stock_config
from blip3o_jax.convert.mapping import tensor_shapes
from blip3o_jax.convert.progress import ByteProgress
from blip3o_jax.convert.source import SECTION
from blip3o_jax.convert.tables import PUBLISHED_PARTS, Shape
from blip3o_jax.convert.tensor_writer import ShardedWriter
from blip3o_jax.text.tokenizers import BPE_FILE, CHAT_TAGS, END_OF_TEXT
from blip3o_jax.text.vocabulary import NUM_SCALES

_POOL = 2**24  # random values, which tensors take their own from in turn


def write_random_model(
    directory: pathlib.Path,
    model: ModelConfig,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write weights of deviation 0.02, the files of a tokenizer whose text ids fill the vocabulary
    up to the image tokens, and all sizes in config.json."""
    specs: dict[str, tuple[Shape, np.dtype]] = {
        prefix_of(part, model) + key: (shape, np.dtype(dtype))
        for part in PUBLISHED_PARTS
        for key, shape in tensor_shapes(part, model).items()
    }
    sizes = {name: int(np.prod(shape)) for name, (shape, _) in specs.items()}
    pool = (np.random.default_rng(seed).standard_normal(_POOL, np.float32) * 0.02).astype(dtype)
    writer = ShardedWriter(directory, "model", specs, max_shard_bytes)
    with ByteProgress("write", sum(sizes.values()) * pool.itemsize) as progress:
        for number, (name, (shape, _)) in enumerate(specs.items()):
            first = 7919 * number % max(1, _POOL - sizes[name])
            values = (
                np.resize(pool, sizes[name])
                if sizes[name] > _POOL
                else pool[first : first + sizes[name]]
            )
            writer.write(name, values.reshape(shape))
            progress.add(name, values.nbytes)
    writer.close()
    text_ids = (
        model.ar.vocab_size - model.ar.spare_rows - model.tokenizer.codebook_size - 2 - NUM_SCALES
    )
    (directory / BPE_FILE).write_text(json.dumps(_bpe(text_ids)), encoding="utf-8")
    settings = stock_config("ar", model) | {
        **conversion_of("ar", model).published,
        "dtype": dtype,
        SECTION: {"model": to_dict(model)},
    }
    (directory / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _bpe(size: int) -> dict:
    """Return a byte-level tokenizer.json without merges, filled up to `size` ids with tokens that
    no text encodes to."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = (END_OF_TEXT, *CHAT_TAGS)
    filler = [
        f"{string.ascii_letters[i % 52]}{i}" for i in range(size - len(letters) - len(specials))
    ]
    vocabulary = {token: i for i, token in enumerate([*letters, *filler])}
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(vocabulary) + i, "content": token} | flags
            for i, token in enumerate(specials)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
