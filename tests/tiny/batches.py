"""Load batches of the smallest set."""

import functools

import numpy as np

from blip3o_jax import config
from blip3o_jax.data.examples import ExampleBuilder
from blip3o_jax.data.loader import Loader
from blip3o_jax.data.sources import open_mixture
from blip3o_jax.train.stages import STAGES
from blip3o_jax.train.vocabulary import with_vocabulary
from tests.tiny.configs import run_config
from tests.tiny.datasets import data


@functools.cache
def prepared(
    stage: str = "joint", supervise_prompt: bool = False, references: int = 0
) -> tuple[config.Config, int, dict[str, np.ndarray]]:
    """Return (configuration with its vocabulary, image_token_offset, one batch of 8 rows) of a
    stage."""
    model = {
        "template": {"supervise_prompt": supervise_prompt},
        "editing": {"reference_slots": references},
    }
    cfg = run_config(data(), stage=stage, model=model)
    sources = open_mixture(cfg.data)
    cfg, vocabulary = with_vocabulary(cfg, sources, data().parent)
    loader = Loader(
        sources,
        ExampleBuilder(STAGES[stage].fields, cfg.model, cfg.data, vocabulary),
        cfg.data,
        cfg.seed,
    )
    batch = next(loader)
    loader.close()
    return cfg, vocabulary.image_token_offset if vocabulary else 0, batch


def cached_batch(
    cfg: config.Config, batch: dict[str, np.ndarray], seed: int = 0
) -> dict[str, np.ndarray]:
    """Return a joint batch as from the encoders' cache, with made-up codes and latents: no encoder
    runs in the step."""
    rng = np.random.default_rng(seed)
    rows, side = len(batch["tokens"]), cfg.model.latent_size
    views = {
        "codes": rng.integers(
            0, cfg.model.tokenizer.codebook_size, (rows, cfg.model.tokenizer.num_tokens), np.int32
        ),
        "latents": rng.normal(size=(rows, side, side, cfg.model.vae.latent_channels)).astype(
            np.float32
        ),
    }
    return {name: x for name, x in batch.items() if "pixels" not in name} | views
