"""Run the frozen encoders over a source once and store codes and latents on disk.

data/encoded.py defines the files' layout.
"""

import concurrent.futures
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from blip3o_jax import config as config_lib
from blip3o_jax import files
from blip3o_jax.config import Config, ConfigError
from blip3o_jax.data import encoded
from blip3o_jax.data.encoded import (
    DTYPES,
    RECORDS_PER_SHARD,
    DamagedShard,
    EncodedSource,
    directory_name,
)
from blip3o_jax.data.examples import ExampleBuilder, Views
from blip3o_jax.data.record import CHANGED, BadRecord, Source, read_record
from blip3o_jax.parallel.distributed import barrier
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.progress import Progress
from blip3o_jax.train.state import WEIGHTS, StatePlan

# (pixels, tokenizer_pixels) uint8 [B, ...] -> (codes [B, N], latents [B, H, W, C])
Encode = Callable[[np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]
BATCH = 64
_log = logging.getLogger(__name__)


def make_encode(plan: StatePlan, strategy: Strategy) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return the compiled (encoders, pixels, tokenizer_pixels) -> (codes [B, N], latents [B, H, W,
    C]); `encoders` are the frozen parameters of "tokenizer" and "vae".
    """
    rows = strategy.batch_sharding()

    def encode(
        encoders: Any, pixels: jax.Array, tokenizer_pixels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # The other parts' parameters are zeros that no operation reads: XLA drops them.
        nothing = {
            group: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), plan.abstract[group])
            for group in WEIGHTS
        }
        model = plan.model(nothing["params"], nothing["frozen"] | encoders)
        pixels = jax.lax.with_sharding_constraint(pixels, rows)
        tokenizer_pixels = jax.lax.with_sharding_constraint(tokenizer_pixels, rows)
        return model.codes(tokenizer_pixels), model.latents(pixels)

    return strategy.jit(encode)


def encoded_source(
    source: Source, encode: Encode, fingerprint: str, config: Config, *, batch_shards: int = 1
) -> EncodedSource:
    """Return `source` with its encoder outputs under `config.data.cache_dir`; missing or damaged
    shards are encoded first, in batches of BATCH images or the next multiple of `batch_shards`.
    """
    batch = -(-BATCH // batch_shards) * batch_shards
    settings = {
        "weights": fingerprint,
        "image_size": config.model.image_size if source.shape is None else source.shape,
        "crop": config.data.crop,
        "tokenizer": config_lib.to_dict(config.model.tokenizer),
        "vae": config_lib.to_dict(config.model.vae),
    }
    if slots := config.model.editing.reference_slots:
        settings["references"] = slots
    directory = pathlib.Path(config.data.cache_dir) / directory_name(source, settings)
    directory.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:  # for people; nothing reads it
        text = json.dumps({"source": source.name, **settings}, indent=1)
        files.replace_text(directory / "settings.json", text)

    builder = ExampleBuilder(("pixels", "tokenizer_pixels"), config.model, config.data)
    shards = -(-len(source) // RECORDS_PER_SHARD)
    mine = range(jax.process_index(), shards, jax.process_count())
    todo = [shard for shard in mine if not _whole(directory, shard)]
    images = sum(len(_records(source, shard)) for shard in todo)
    with Progress(f"encode {source.name}", images, after="records") as progress:
        for shard in todo:
            _write_shard(source, encode, builder, directory, shard, batch, progress)
    barrier(f"encoded {directory.name}", seconds=86400.0)
    return EncodedSource(source, directory, config.model.tokenizer.codebook_size)


def _whole(directory: pathlib.Path, shard: int) -> bool:
    """Return whether a shard exists and can be opened; report a damaged one."""
    if not encoded.shard_file(directory, shard).exists():
        return False
    try:
        encoded.open_shard(directory, shard)
    except DamagedShard as error:
        _log.warning("%s: encoding shard %d again", error.reason, shard)
        return False
    return True


def _records(source: Source, shard: int) -> range:
    """Return the numbers of the records of a shard."""
    return range(shard * RECORDS_PER_SHARD, min(len(source), (shard + 1) * RECORDS_PER_SHARD))


def _write_shard(
    source: Source,
    encode: Encode,
    builder: ExampleBuilder,
    directory: pathlib.Path,
    shard: int,
    batch: int,
    progress: Progress,
) -> None:
    indices = _records(source, shard)
    unreadable: dict[str, str] = {}

    def images_of(index: int) -> list[tuple[int, Views]]:
        try:
            return read_record(source, index, builder.images_of)
        except BadRecord as error:
            files.raise_trouble(error)
            if error.kind == CHANGED:  # the cache's name is a digest of the unchanged data
                raise ConfigError(str(error)) from error
            unreadable[str(index)] = error.reason
            return []

    side = builder.model.tokenizer.image_size
    sizes = source.shape or builder.model.sizes[0], (side, side)
    blank = tuple(np.zeros((*size, 3), np.uint8) for size in sizes)
    slots = builder.model.editing.reference_slots + 1
    outputs: tuple[np.ndarray, ...] = ()
    waiting: list[tuple[int, int, Views]] = []  # (record of the shard, place, views)

    def encode_some() -> None:
        """Encode one batch of images, taken from any records.

        The batch always has the same size, so that `encode` is compiled once.
        """
        nonlocal outputs
        chosen = waiting[:batch]
        del waiting[:batch]
        rows = [views for _, _, views in chosen] + [blank] * (batch - len(chosen))
        pixels, tokenizer_pixels = (np.stack(column) for column in zip(*rows, strict=True))
        with progress.once("compiling", pixels.shape):
            running = encode(pixels, tokenizer_pixels)
        found = jax.device_get(running)
        if not outputs:
            # Shapes are known from the first result only.
            outputs = tuple(
                np.zeros((len(indices), slots, *x.shape[1:]), dtype)
                for x, dtype in zip(found, (np.int32, np.float32), strict=True)
            )
        for output, values in zip(outputs, found, strict=True):
            for (record, place, _), value in zip(chosen, values, strict=False):
                output[record, place] = value

    # Threads: reading files and decoding images release the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), batch):
            for record, found in enumerate(
                pool.map(images_of, indices[start : start + batch]), start
            ):
                waiting += [(record, place, views) for place, views in found]
            while len(waiting) >= batch:
                encode_some()
            progress.advance(len(indices[start : start + batch]))
        # Without any readable record, one blank batch provides the arrays' shapes. The loader
        # decides how many unreadable records are too many.
        while waiting or not outputs:
            encode_some()

    arrays = {
        name: values if slots > 1 else values[:, 0]
        for name, values in zip(DTYPES, outputs, strict=True)
    }
    for row, (codes, latents) in enumerate(zip(*arrays.values(), strict=True)):
        if reason := encoded.not_outputs(codes, latents, builder.model.tokenizer.codebook_size):
            unreadable.setdefault(str(indices[row]), f"the encoders give {reason}")
    encoded.write_shard(directory, shard, arrays, unreadable)
