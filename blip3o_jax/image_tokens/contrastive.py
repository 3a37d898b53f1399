"""Compute the contrastive image-text loss of the vision encoder and hold its caption tower.

Source: SigLIP (arXiv 2303.15343, eq. 1 and algorithm 1). For a batch of n images x_i and captions
y_j, both scaled to length 1, with z_ij = 1 for i = j and -1 otherwise:

    logit_ij = exp(log_scale) <x_i, y_j> + bias
    loss = -1/n sum_ij log sigmoid(z_ij logit_ij)

log_scale starts at log 10 and bias at -10, so that the many negatives have a small loss at the
first step.

Deviations: (1) captions that repeat within a batch: an image's own caption under another index is
not a negative, so those terms are omitted. (2) The caption tower has fixed sinusoidal positions (no
maximum length), ignores padding, and takes the mean over the valid tokens where SigLIP takes the
last one: every token receives a gradient from the first step.

`loss.dense` adds a dense objective, as SigLIP2 does (arXiv 2502.14786, section 2.3), so that the
features also encode positions. One linear layer (W, b) predicts the pixels p of each patch from its
feature f:

    dense = mean (W f + b - p)^2 / var(p)

Shape suffixes: B batch (rows: images, columns: captions), L tokens, N patches, X values of a patch,
D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip3o_jax import config, nn
from blip3o_jax.image_tokens.encoder import Encoder, EncoderShape
from blip3o_jax.image_tokens.simvq import l2_normalise


class TextTower(nnx.Module):
    """Encode captions in the image embedding's space, and hold the loss's two scalars."""

    def __init__(
        self, cfg: config.TextTowerConfig, vocab_size: int, d_image: int, *, rngs: nnx.Rngs
    ):
        d = cfg.hidden_size
        shape = EncoderShape.of(cfg)
        self.token_embedding = nn.param(
            rngs, (vocab_size, d), ("vocab", "embed"), nn.normal(1.0), cfg.param_dtype
        )
        self.encoder = Encoder(shape, rngs=rngs)
        self.final_norm = nn.LayerNorm(
            d, rngs=rngs, eps=cfg.layer_norm_eps, param_dtype=cfg.param_dtype
        )
        self.projection = nn.Linear(d, d_image, ("embed", "mlp"), rngs=rngs, **shape.dtypes)
        # float32 for every dtype of the tower: both scalars move by small steps.
        self.log_scale = nn.param(rngs, (), (), jax.nn.initializers.constant(np.log(10.0)))
        self.bias = nn.param(rngs, (), (), jax.nn.initializers.constant(-10.0))
        self.dtype = jnp.dtype(cfg.dtype)

    def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        """Map captions [B, L] to embeddings [B, d_image], float32, not normalised.

        `mask_BL` is True on the caption's tokens.
        """
        table_VD = self.token_embedding[...].astype(self.dtype)
        x_BLD = table_VD[tokens_BL] + nn.sinusoids(tokens_BL.shape[1], table_VD.shape[1]).astype(
            self.dtype
        )
        x_BLD = self.final_norm(
            self.encoder(nn.constrain(x_BLD, "batch", None, "act_embed"), mask_BL)
        ).astype(jnp.float32)
        weight_BL = mask_BL.astype(jnp.float32)
        # At least 1, so that an empty caption gives zeros and no NaN.
        mean_BD = jnp.einsum("bld,bl->bd", x_BLD, weight_BL) / jnp.maximum(
            weight_BL.sum(axis=1, keepdims=True), 1.0
        )
        return self.projection(mean_BD).astype(jnp.float32)


class PatchReadout(nnx.Module):
    """Predict the pixels of patches from their features by one linear layer."""

    def __init__(self, cfg: config.ImageTokenizerConfig, *, rngs: nnx.Rngs):
        types: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        self.linear = nn.Linear(
            cfg.feature_channels, cfg.patch_values, ("embed", "mlp"), rngs=rngs, **types
        )

    def loss(self, features_BND: jax.Array, patches_BNX: jax.Array) -> jax.Array:
        """Return the mean squared error divided by the pixels' variance.

        Predicting the mean pixel has loss 1.
        """
        error_BNX = self.linear(features_BND).astype(jnp.float32) - patches_BNX
        # A batch of one flat colour has variance 0.
        return jnp.mean(error_BNX**2) / (jnp.var(patches_BNX) + 1e-6)


def same_caption_mask(tokens_BL: jax.Array) -> jax.Array:
    """Return [B, B], True where two rows hold the same tokens; the diagonal is True."""
    return jnp.all(tokens_BL[:, None, :] == tokens_BL[None, :, :], axis=-1)


def sigmoid_loss(
    image_BD: jax.Array,
    text_BD: jax.Array,
    log_scale: jax.Array,
    bias: jax.Array,
    same_caption_BB: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the SigLIP loss (see the module) in float32, and its metrics.

    `image_to_text` is the fraction of images whose highest-scoring caption is their own,
    `text_to_image` the reverse. `same_caption_BB` is True for pairs with equal captions
    (`same_caption_mask`): off the diagonal they are neither positives nor negatives, and retrieving
    one counts as correct.
    """
    image_BD, text_BD = (l2_normalise(x.astype(jnp.float32)) for x in (image_BD, text_BD))
    logits_BB = jnp.exp(log_scale) * (image_BD @ text_BD.T) + bias
    diagonal_BB = jnp.eye(image_BD.shape[0], dtype=bool)
    same_caption_BB = (
        diagonal_BB if same_caption_BB is None else same_caption_BB.astype(bool) | diagonal_BB
    )
    # `log_sigmoid` rather than log(sigmoid): finite for the large negative logits of the start
    # (bias -10).
    terms_BB = jax.nn.log_sigmoid(jnp.where(diagonal_BB, logits_BB, -logits_BB))
    loss = -jnp.sum(jnp.where(same_caption_BB & ~diagonal_BB, 0.0, terms_BB)) / image_BD.shape[0]
    rows = jnp.arange(image_BD.shape[0])
    return loss, {
        "image_to_text": jnp.mean(same_caption_BB[rows, jnp.argmax(logits_BB, axis=1)]),
        "text_to_image": jnp.mean(same_caption_BB[jnp.argmax(logits_BB, axis=0), rows]),
        "logit_scale": jnp.exp(log_scale),
        "logit_bias": bias,
    }
