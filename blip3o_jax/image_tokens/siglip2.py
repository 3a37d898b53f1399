"""Encode images with the SigLIP2 vision encoder; matches `transformers.SiglipVisionModel`.

Shape suffixes: B batch, H height, W width, C channels, N image tokens, D width.
"""

from typing import NamedTuple

import jax
from flax import nnx

from blip3o_jax import config, nn
from blip3o_jax.image_tokens.encoder import AttentionPool, Encoder, EncoderShape


class SiglipOutput(NamedTuple):
    """Hold the encoder's outputs."""

    features_BND: jax.Array  # of the last layer, before post_layernorm: `features(x, -1)`
    last_hidden_state_BND: jax.Array  # after post_layernorm
    pooled_BD: jax.Array  # the attention-pooling head's vector, SigLIP's image embedding


class SiglipVision(nnx.Module):
    """Encode pixels to one feature vector per patch.

    `patch_embedding` is the stock convolution (stride = kernel size = patch size) as a matrix
    product over patches flattened in the order row, column, channel: the torch weight
    [out, C, p, p], transposed to [p, p, C, out] and flattened to [p * p * C, out].
    """

    def __init__(self, cfg: config.SiglipVisionConfig, *, rngs: nnx.Rngs):
        d = cfg.hidden_size
        shape = EncoderShape.of(cfg)
        self.patch_embedding = nn.Linear(
            3 * cfg.patch_size**2, d, (None, "embed"), rngs=rngs, **shape.dtypes
        )
        self.position_embedding = nn.param(
            rngs, (cfg.grid**2, d), (None, "embed"), nn.normal(d**-0.5), cfg.param_dtype
        )
        self.encoder = Encoder(shape, rngs=rngs)
        self.post_layernorm = nn.LayerNorm(
            d, rngs=rngs, eps=cfg.layer_norm_eps, param_dtype=cfg.param_dtype
        )
        # Only the contrastive stage uses the head. It is always created, since published
        # checkpoints store it.
        self.head = AttentionPool(shape, rngs=rngs)
        self.cfg = cfg

    def embed(self, x_BHWC: jax.Array) -> jax.Array:
        """Embed images [B, image_size, image_size, 3] in [-1, 1] as patch tokens [B, N, D].

        Patches are in row-major order and have positions added; pixels past the last whole patch
        are dropped. Raises ValueError for another size.
        """
        size = self.cfg.image_size
        if x_BHWC.shape[1:] != (size, size, 3):
            raise ValueError(
                f"vision encoder: images of shape {x_BHWC.shape[1:]}, expected {(size, size, 3)}: "
                "resize them"
            )
        x_BND = self.patch_embedding(self.patches(x_BHWC))
        return nn.constrain(
            x_BND + self.position_embedding[...].astype(x_BND.dtype), "batch", None, "act_embed"
        )

    def patches(self, x_BHWC: jax.Array) -> jax.Array:
        """Split square images [B, H, H, 3] into flattened patches [B, N, 3 patch^2]."""
        patch = self.cfg.patch_size
        grid = self.cfg.grid
        # 384 = 27 x 14 + 6: the stock convolution with valid padding drops the last 6 pixels too.
        x_BHWC = x_BHWC[:, : grid * patch, : grid * patch]
        return (
            x_BHWC.reshape(-1, grid, patch, grid, patch, 3)
            .swapaxes(2, 3)
            .reshape(-1, grid**2, 3 * patch**2)
        )

    def features(self, x_BHWC: jax.Array, select_layer: int = -2) -> jax.Array:
        """Return `hidden_states[select_layer]` [B, N, D], as transformers numbers them.

        -1 is the last layer's output, before post_layernorm; -1 - num_hidden_layers are the
        embeddings. Later layers are not computed. Raises ValueError outside of that range.
        """
        depth = self.cfg.num_hidden_layers + 1 + select_layer
        if select_layer >= 0 or depth < 0:
            raise ValueError(
                f"vision encoder: select_layer={select_layer} must be in "
                f"[-{self.cfg.num_hidden_layers + 1}, -1]"
            )
        return self.encoder(self.embed(x_BHWC), depth=depth)

    def __call__(self, x_BHWC: jax.Array) -> SiglipOutput:
        features_BND = self.encoder(self.embed(x_BHWC))
        last_BND = self.post_layernorm(features_BND)
        with jax.named_scope("head"):
            return SiglipOutput(features_BND, last_BND, self.head(last_BND))
