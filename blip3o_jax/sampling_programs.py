"""Compile the sampling programs, which map prompts to images or text.

`pipeline.py` runs them for users, reinforcement learning for rollouts.

Legend: B batch, L prompt length, N image tokens, H W C image or latent, R reference slots.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar.sampling import SampleOutput, TextOutput, generate_image_tokens, generate_text
from blip3o_jax.blip3o import Blip3o, References, encode_references
from blip3o_jax.config import ModelConfig, SamplingConfig
from blip3o_jax.dit import sampler
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.rows import insert_references
from blip3o_jax.text.vocabulary import Vocabulary, codes_from_image_ids, image_ids_from_codes


def make_image_sampler(
    graphdef: Any, strategy: Strategy, image_ids: tuple[int, int]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return the compiled program that samples a batch of images.

    The program maps (params, tokens_BL, lengths_B, indices_B, seed, settings, references, size),
    with static settings and size, to (uint8 images [B, H, W, 3], codes [B, N]). `references` holds
    the reference_* arrays of a batch whose rows have reference slots, or is None; `size` is
    (height, width), None for the model's first. `image_ids` is (first, last + 1).
    """

    def sample(
        params: Any,
        tokens_BL: jax.Array,
        lengths_B: jax.Array,
        indices_B: jax.Array,
        seed: jax.Array,
        settings: SamplingConfig,
        references: dict[str, jax.Array] | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        model: Blip3o = nnx.merge(graphdef, params)
        tokens_BL = nn.constrain(tokens_BL, "batch", None)
        x_BHWC, ids_BN = generate_images(
            model,
            tokens_BL,
            lengths_B,
            sampling_keys(seed, indices_B),
            settings,
            image_ids,
            references,
            size,
        )
        return to_uint8(x_BHWC), codes_from_image_ids(ids_BN, image_ids[0])

    # Unused parameters stay arguments, since they lie in the device's memory all the same.
    return strategy.jit(sample, static_argnames=("settings", "size"), keep_unused=True)


def generate_images(
    model: Blip3o,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    settings: SamplingConfig,
    image_ids: tuple[int, int],
    references: dict[str, jax.Array] | None,
    size: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sample images from prompts: [B, H, W, 3] in [0, 1], float32, and their tokens' ids [B, N].

    `keys` are those of `sampling_keys`; the other arguments are those of `make_image_sampler`'s
    program.
    """
    token_keys_B, noise_keys_B = keys
    tokens_BL, embedded_BLD, encoded = _insert_references(
        model, tokens_BL, references, image_ids[0]
    )
    tokens = sample_image_tokens(
        model, tokens_BL, lengths_B, token_keys_B, settings, image_ids, embedded_PLD=embedded_BLD
    )
    noise_BHWC = prepare_latents(model.cfg, noise_keys_B, size)
    guidance = model.guidance(tokens.hidden_BTD, settings, encoded)
    with nn.part("dit"):
        z_BHWC = sampler.sample(
            model.dit, guidance, noise_BHWC, steps=settings.steps, flow=model.cfg.flow
        )
    return model.pixels(z_BHWC), tokens.ids_BN


def make_text_sampler(
    graphdef: Any, strategy: Strategy, vocabulary: Vocabulary
) -> Callable[..., TextOutput]:
    """Return the compiled program that samples text.

    Its arguments are those of `make_image_sampler`'s program, and a static `max_new_tokens`.
    """
    stop = vocabulary.end_of_turn
    text_ids = (0, vocabulary.image_start)
    image_token_offset = vocabulary.image_token_offset

    def sample(
        params: Any,
        tokens_BL: jax.Array,
        lengths_B: jax.Array,
        indices_B: jax.Array,
        seed: jax.Array,
        settings: SamplingConfig,
        references: dict[str, jax.Array],
        max_new_tokens: int,
    ) -> TextOutput:
        model: Blip3o = nnx.merge(graphdef, params)
        tokens_BL = nn.constrain(tokens_BL, "batch", None)
        keys_B, _ = sampling_keys(seed, indices_B)
        tokens_BL, embedded_BLD, _ = _insert_references(
            model, tokens_BL, references, image_token_offset
        )
        with nn.part("ar"):
            return generate_text(
                model.ar,
                tokens_BL,
                lengths_B,
                keys_B,
                max_new_tokens=max_new_tokens,
                text_ids=text_ids,
                stop=stop,
                temperature=settings.temperature,
                # The setting is of the codebook's 65536 codes; the text vocabulary of a small model
                # has fewer ids.
                top_k=min(settings.top_k, text_ids[1]),
                top_p=settings.top_p,
                embedded_BLD=embedded_BLD,
            )

    return strategy.jit(sample, static_argnames=("settings", "max_new_tokens"), keep_unused=True)


def _insert_references(
    model: Blip3o,
    tokens_BL: jax.Array,
    references: dict[str, jax.Array] | None,
    image_token_offset: int,
) -> tuple[jax.Array, jax.Array | None, References | None]:
    """Insert the reference images into the prompts.

    Returns the tokens, the embeddings (None where they are those of the tokens) and the encoded
    references.
    """
    if references is None:
        return tokens_BL, None, None
    encoded = encode_references(model, references)
    assert encoded is not None  # None only without references
    span_BR = references["reference_span"]
    tokens_BL = insert_references(
        tokens_BL,
        span_BR,
        image_ids_from_codes(encoded.codes_BRN, image_token_offset),
        encoded.mask_BR,
    )
    if encoded.features_BRND is None:
        return tokens_BL, None, encoded
    return (
        tokens_BL,
        model.embed(tokens_BL, (encoded.features_BRND, span_BR, encoded.mask_BR)),
        encoded,
    )


def sampling_keys(seed: jax.Array, indices_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the keys [B] of each row's image tokens and of its noise.

    They depend only on (seed, index of the row), so that a sample does not depend on its batch.
    """
    keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices_B)
    # Two keys: the number of tokens sampled has no influence on the latents' noise.
    token_keys_B, noise_keys_B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
    return token_keys_B, noise_keys_B


def sample_image_tokens(
    model: Blip3o,
    tokens_PL: jax.Array,
    lengths_P: jax.Array,
    keys_B: jax.Array,
    settings: SamplingConfig,
    image_ids: tuple[int, int],
    **more: Any,
) -> SampleOutput:
    """Call `generate_image_tokens` with `settings`; `more` are its further arguments."""
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


def prepare_latents(
    cfg: ModelConfig, keys_B: jax.Array, size: tuple[int, int] | None = None
) -> jax.Array:
    """Sample the latents' initial noise [B, H, W, C], float32, for images of `size` pixels."""
    shape = (
        *(side // cfg.vae.spatial_compression for side in size or cfg.sizes[0]),
        cfg.vae.latent_channels,
    )
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys_B)


def to_uint8(x: jax.Array) -> jax.Array:
    """Convert values in [0, 1] to uint8, rounded to nearest."""
    return jnp.round(x * 255).astype(jnp.uint8)
