"""Compute the losses of the stages that train one part: autoencoder, contrastive and tokenizer.

Every function has the signature of `stages.StageLoss`; `image_token_offset` is for stages with rows
of tokens, and unused here.

Legend: B batch, H W C image or latent, N image tokens, P patches, D width.
"""

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.blip3o import Blip3o, scale_pixels
from blip3o_jax.config import LossConfig
from blip3o_jax.image_tokens.contrastive import same_caption_mask, sigmoid_loss
from blip3o_jax.vae.losses import reconstruction_loss

Arrays = dict[str, jax.Array]


def autoencoder_loss(
    model: Blip3o, batch: Arrays, keys_B: jax.Array, *, loss: LossConfig, image_token_offset: int
) -> tuple[jax.Array, Arrays]:
    """Reconstruct the pixels from noisy latents: L1, squared error and image gradients, and the
    squared log of the latents' deviation from 1, by channel.
    """
    del image_token_offset
    x_BHWC = scale_pixels(batch["pixels"])
    with nn.part("vae"):
        scale = model.cfg.vae.scaling_factor
        # Noise is added at the scale of the latents that the diffusion head has.
        z_BHWC = model.vae.encode(x_BHWC).astype(jnp.float32) * scale
        noise = jax.vmap(lambda key: jax.random.normal(key, z_BHWC.shape[1:]))(keys_B)
        noisy_BHWC = z_BHWC + loss.latent_noise * noise
        total, metrics = reconstruction_loss(
            model.vae.decode(noisy_BHWC / scale), x_BHWC, loss.gradient, loss.squared
        )
    # Added inside of the root, whose gradient is infinite at 0 (a channel that is constant).
    deviation_C = jnp.sqrt(jnp.mean(z_BHWC**2, axis=(0, 1, 2)) + 1e-8)
    off_scale = jnp.mean(jnp.log(deviation_C) ** 2)
    metrics["latent_deviation"] = jnp.mean(deviation_C)
    return total + loss.latent_scale * off_scale, metrics


def autoencoder_preview(
    model: Blip3o, batch: Arrays, keys_B: jax.Array, *, loss: LossConfig, image_token_offset: int
) -> jax.Array:
    """Return images [B, H, 2 W, 3] in [0, 1]: each target and its reconstruction."""
    del keys_B, loss, image_token_offset
    reconstructed_BHWC = model.pixels(model.latents(batch["pixels"]))
    return jnp.concatenate([batch["pixels"] / 255, reconstructed_BHWC], axis=2)


def contrastive_loss(
    model: Blip3o, batch: Arrays, keys_B: jax.Array, *, loss: LossConfig, image_token_offset: int
) -> tuple[jax.Array, Arrays]:
    """Match images and captions by SigLIP's sigmoid loss (arXiv 2303.15343), and with `loss.dense`
    predict pixels from the features of the patches.
    """
    del keys_B, image_token_offset
    with nn.part("tokenizer"):
        x_BHWC = scale_pixels(batch["tokenizer_pixels"])
        image = model.tokenizer.embed_image(x_BHWC)
    with nn.part("text_tower"):
        tower = model.text_tower
        text_BD = tower(batch["text_ids"], batch["text_mask"])
        same_BB = same_caption_mask(batch["text_ids"])
        total, metrics = sigmoid_loss(
            image.pooled_BD, text_BD, tower.log_scale[...], tower.bias[...], same_BB
        )
    if loss.dense:
        with nn.part("patch_readout"):
            metrics["dense"] = model.patch_readout.loss(image.features_BPD, image.patches_BPX)
        total += loss.dense * metrics["dense"]
    return total, metrics


def tokenizer_loss(
    model: Blip3o, batch: Arrays, keys_B: jax.Array, *, loss: LossConfig, image_token_offset: int
) -> tuple[jax.Array, Arrays]:
    """Reconstruct the features of the frozen encoder from their codes; the codebook's and the
    commitment loss, and the codes' usage.
    """
    del image_token_offset
    with nn.part("tokenizer"):
        # One key for all rows: a stochastic codebook samples over the whole array.
        out = model.tokenizer(scale_pixels(batch["tokenizer_pixels"]), key=keys_B[0])
    # Divided by the features' variance: predicting their mean has error 1 at any scale of the
    # encoder.
    variance = jnp.mean((out.teacher_BND - out.teacher_BND.mean(axis=(0, 1))) ** 2)
    reconstruction = jnp.mean((out.reconstructed_BND - out.teacher_BND) ** 2) / variance
    total = (
        reconstruction
        + out.codebook_loss
        + loss.commitment * out.commitment_loss
        + loss.code_entropy * out.entropy_gap
    )
    return total, {
        "reconstruction": reconstruction,
        "commitment": out.commitment_loss,
        "entropy_gap": out.entropy_gap,
        "usage": out.usage,
        "perplexity": out.perplexity,
    }
