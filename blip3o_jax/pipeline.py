"""Text -> image from a checkpoint: `blip3o_jax.load(DIR).generate([...], seed=0)`.

Legend: B batch, L prompt length, N image tokens, H W C image or latent.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar.sampling import Drawn, generate_image_tokens
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, MeshConfig, ModelConfig, SamplingConfig, UserError, check
from blip3o_jax.data.sequence import text_to_image_prompt
from blip3o_jax.dit import sampler
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.samples import write_images
from blip3o_jax.text.tokenizers import load_tokenizer
from blip3o_jax.text.vocabulary import Vocabulary, codes_from_image_ids
from blip3o_jax.train import checkpoint as checkpoints

PARTS = ("tokenizer", "ar", "connector", "dit", "vae")
# Prompts are padded to a multiple of this many tokens, so that few lengths are compiled.
LENGTH_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Generated:
    """uint8 images [B, H, W, 3] and the codebook indices [B, N] they were drawn from, in the order of the prompts."""

    prompts: list[str]
    images: np.ndarray
    codes: np.ndarray


class Pipeline:
    """A trained model on a mesh, ready to sample. `params` is {part: nested dict of arrays}."""

    def __init__(self, config: Config, graphdef: Any, params: Any, vocabulary: Vocabulary, strategy: Strategy):
        self.config, self.vocabulary, self.strategy = config, vocabulary, strategy
        self._graphdef, self._params = graphdef, params
        image_ids = vocabulary.image_first, vocabulary.image_last
        self._sample = make_sample(config.model, graphdef, strategy, image_ids)

    def generate(
        self, prompts: Sequence[str], *, seed: int = 0, progress: bool = False, first_index: int = 0, **overrides: Any
    ) -> Generated:
        """One image a prompt. `overrides` are fields of SamplingConfig (steps, guidance, temperature, top_k, ...).

        Image i depends on (seed, first_index + i, prompts[i]) and the settings alone, not on the batch it was made in.
        Raises UserError for no prompt, an unknown setting, or a prompt that does not fit the model's rows.
        """
        settings = self.settings(**overrides)
        check(0 <= seed < 2**32, f"seed={seed} must lie between 0 and {2**32 - 1}")
        rows = [self._encode(prompt) for prompt in prompts]
        if not rows:
            raise UserError("no prompt given: pass at least one")
        length = -(-max(map(len, rows)) // LENGTH_BUCKET) * LENGTH_BUCKET
        size = settings.batch_size
        images, codes, began = [], [], time.monotonic()
        for start in range(0, len(rows), size):
            batch = [rows[min(i, len(rows) - 1)] for i in range(start, start + size)]
            tokens_BL = np.zeros((size, length), np.int32)
            for row, ids in zip(tokens_BL, batch, strict=True):
                row[: len(ids)] = ids
            indices_B = np.arange(start, start + size, dtype=np.uint32) + first_index
            pixels_BHWC, codes_BN = self._sample(
                self._params, tokens_BL, np.array([len(ids) for ids in batch], np.int32), indices_B, np.uint32(seed), settings
            )
            count = min(size, len(rows) - start)
            images.append(np.asarray(pixels_BHWC)[:count])
            codes.append(np.asarray(codes_BN)[:count])
            if progress:
                done, seconds = start + count, time.monotonic() - began
                left = seconds / done * (len(rows) - done)
                print(f"sample  {done}/{len(rows)} images  {done / seconds:.2f} images/s  ETA {left:.0f} s", file=sys.stderr)
        return Generated(list(prompts), np.concatenate(images), np.concatenate(codes))

    def settings(self, **overrides: Any) -> SamplingConfig:
        """The checkpoint's sampling settings with `overrides` (None leaves one as it is)."""
        known = {f.name for f in dataclasses.fields(SamplingConfig)}
        if unknown := set(overrides) - known:
            raise UserError(f"unknown sampling setting {', '.join(sorted(unknown))}: it takes {', '.join(sorted(known))}")
        settings = dataclasses.replace(self.config.sampling, **{k: v for k, v in overrides.items() if v is not None})
        shards = self.strategy.batch_shards
        # Padded up, since every device needs a row; rows past the last prompt are dropped.
        return dataclasses.replace(settings, batch_size=-(-settings.batch_size // shards) * shards)

    def reconstruct(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """uint8 images [B, S, S, 3] through the autoencoder and back."""
        return np.asarray(self._reconstruct(self._params, pixels_BHWC))

    def codes(self, tokenizer_pixels_BHWC: np.ndarray) -> np.ndarray:
        """uint8 images at the tokenizer's size -> codebook indices [B, N]."""
        return np.asarray(self._codes(self._params, tokenizer_pixels_BHWC))

    def _encode(self, prompt: str) -> list[int]:
        model, limit = self.config.model, self.config.data.max_length
        ids = text_to_image_prompt(self.vocabulary, model.template, prompt, model.tokenizer.pool_scale)
        if len(ids) + model.tokenizer.num_tokens > limit:
            raise UserError(
                f"prompt {prompt[:60]!r}... is {len(ids)} tokens long; with {model.tokenizer.num_tokens} image tokens that is "
                f"more than the model's {limit}: shorten it"
            )
        return ids

    def _model(self, params: Any) -> Blip3o:
        return nnx.merge(self._graphdef, params)

    @functools.partial(jax.jit, static_argnums=0)
    def _reconstruct(self, params: Any, pixels_BHWC: jax.Array) -> jax.Array:
        model = self._model(params)
        return to_uint8(model.pixels(model.latents(pixels_BHWC)))

    @functools.partial(jax.jit, static_argnums=0)
    def _codes(self, params: Any, pixels_BHWC: jax.Array) -> jax.Array:
        return self._model(params).codes(pixels_BHWC)


def make_sample(
    cfg: ModelConfig, graphdef: Any, strategy: Strategy, image_ids: tuple[int, int]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The compiled program that draws a batch: (params, tokens_BL, lengths_B, indices_B, seed, settings), the settings static,
    -> (uint8 images [B, H, W, 3], codes [B, N]). `image_ids` is (first, last + 1).
    """

    def sample(
        params: Any,
        tokens_BL: jax.Array,
        lengths_B: jax.Array,
        indices_B: jax.Array,
        seed: jax.Array,
        settings: SamplingConfig,
    ) -> tuple[jax.Array, jax.Array]:
        model: Blip3o = nnx.merge(graphdef, params)
        with nn.sharding_resolver(strategy.resolver):
            tokens_BL = nn.constrain(tokens_BL, "batch", None)
            token_keys_B, noise_keys_B = row_keys(seed, indices_B)
            drawn = draw_tokens(model, tokens_BL, lengths_B, token_keys_B, settings, image_ids)
            noise_BHWC = draw_noise(cfg, noise_keys_B)
            with nn.part("dit"):
                z_BHWC = sampler.sample(
                    model.dit,
                    model.condition(drawn.hidden_BTD),
                    model.null_condition(len(indices_B)),
                    noise_BHWC,
                    steps=settings.steps,
                    guidance=settings.guidance,
                    flow=cfg.flow,
                )
            return to_uint8(model.pixels(z_BHWC)), codes_from_image_ids(drawn.ids_BN, image_ids[0])

    # Unused parameters stay arguments, since they lie in the device's memory all the same.
    return jax.jit(sample, static_argnames="settings", keep_unused=True)


def row_keys(seed: jax.Array, indices_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of each row's image tokens and of its noise, folded from (seed, index)."""
    keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices_B)
    return tuple(jax.vmap(jax.random.split, out_axes=1)(keys_B))


def draw_tokens(
    model: Blip3o,
    tokens_PL: jax.Array,
    lengths_P: jax.Array,
    keys_B: jax.Array,
    settings: SamplingConfig,
    image_ids: tuple[int, int],
    **more: Any,
) -> Drawn:
    """`generate_image_tokens` as `settings` say; `more` are further arguments of it."""
    with nn.part("ar"):
        return generate_image_tokens(
            model.ar,
            tokens_PL,
            lengths_P,
            keys_B,
            num_tokens=model.cfg.tokenizer.num_tokens,
            image_ids=image_ids,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            guidance=settings.token_guidance,
            **more,
        )


def draw_noise(cfg: ModelConfig, keys_B: jax.Array) -> jax.Array:
    """What the denoising starts from, float32 [B, H, W, C]."""
    shape = (cfg.latent_size, cfg.latent_size, cfg.vae.latent_channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys_B)


def to_uint8(x: jax.Array) -> jax.Array:
    """[0, 1] -> uint8, rounded."""
    return jnp.round(x * 255).astype(jnp.uint8)


def load(path: str | pathlib.Path, mesh: MeshConfig | None = None) -> Pipeline:
    """The pipeline of a joint run's checkpoint: its workdir, checkpoints directory or one step. Needs nothing else.

    `mesh` places it (all devices, batch-parallel, by default). Raises UserError when `path` is not such a checkpoint.
    """
    root, _ = checkpoints.find(path)
    config = checkpoints.read_config(root)
    if config.stage != "joint":
        raise UserError(f"{root} was written by stage {config.stage!r}; sampling needs a checkpoint of stage 'joint'")
    mesh = mesh or MeshConfig(data=-1, fsdp=1, strategy="dp")
    strategy = Strategy.of(mesh)
    params = checkpoints.restore_parts(path, strategy, PARTS)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Blip3o(config.model, PARTS, seed=0)))
    text = dataclasses.replace(config.model.text, path=str(root / "text"))
    vocabulary = Vocabulary(load_tokenizer(text), config.model.tokenizer.codebook_size)
    return Pipeline(config, graphdef, params, vocabulary, strategy)


def sample_to_directory(
    checkpoint: str | pathlib.Path, prompts: Sequence[str], out: str | pathlib.Path, *, seed: int, overrides: dict[str, Any]
) -> list[pathlib.Path]:
    """Writes 00000.png, ... , a labelled grid.png and prompts.jsonl under `out`; returns the images' paths."""
    generated = load(checkpoint).generate(prompts, seed=seed, progress=True, **overrides)
    return write_images(generated.images, generated.prompts, pathlib.Path(out))
