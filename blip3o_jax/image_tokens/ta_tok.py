"""Encode images as a grid of codebook indices and decode indices to SigLIP2 features: TA-Tok.

    pixels -> SigLIP2 hidden state -> mean over s x s tokens -> Linear, tanh -> in_linear
        -> SimVQ indices
    indices -> codes -> out_linear -> Siglip2 transformer -> Linear, tanh, Linear -> features

It is trained to reconstruct its input, the pooled hidden state (the teacher's features). The
encoder receives no gradient from this loss: constant features would minimise it.

Shape suffixes: B batch, H height, W width, C channels, N image tokens, D width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import config, nn
from blip3o_jax.image_tokens.encoder import AttentionPool, Encoder, EncoderShape
from blip3o_jax.image_tokens.protocol import ImageEmbedding, TokenizerOutput
from blip3o_jax.image_tokens.siglip2 import SiglipVision
from blip3o_jax.image_tokens.simvq import Quantised, SimVq


class Bottleneck(nnx.Module):
    """Hold the layers of the bottleneck: Linear to the code space, SimVQ, Linear."""

    def __init__(self, cfg: config.TaTokConfig, *, rngs: nnx.Rngs):
        dtypes: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        self.in_linear = nn.Linear(
            cfg.encoder.hidden_size, cfg.bottleneck_dim, ("embed", "mlp"), rngs=rngs, **dtypes
        )
        self.codebook = SimVq(
            cfg.codebook_size,
            cfg.bottleneck_dim,
            l2_normalized=cfg.l2_normalized,
            stochastic=cfg.stochastic,
            temperature=cfg.stochastic_temperature,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )
        self.out_linear = nn.Linear(
            cfg.bottleneck_dim, cfg.bottleneck_dim, ("mlp", "embed"), rngs=rngs, **dtypes
        )


class Decoder(nnx.Module):
    """Decode codes to features.

    Matches `transformers.Siglip2VisionModel` with patch_size 1 on square grids without padding.
    """

    def __init__(self, cfg: config.TaTokConfig, *, rngs: nnx.Rngs):
        d = cfg.decoder.hidden_size
        loop: dict[str, Any] = {"remat": cfg.encoder.remat, "unroll": cfg.encoder.unroll}
        shape = EncoderShape.of(cfg.decoder, dtype=cfg.dtype, param_dtype=cfg.param_dtype, **loop)
        side = math.isqrt(cfg.decoder.num_patches)
        self.patch_embedding = nn.Linear(
            cfg.bottleneck_dim, d, (None, "embed"), rngs=rngs, **shape.dtypes
        )
        self.position_embedding = nn.param(
            rngs, (side**2, d), (None, "embed"), nn.normal(d**-0.5), cfg.param_dtype
        )
        self.encoder = Encoder(shape, rngs=rngs)
        self.post_layernorm = nn.LayerNorm(
            d, rngs=rngs, eps=cfg.decoder.layer_norm_eps, param_dtype=cfg.param_dtype
        )
        # Unused. The stock class has it, so import and export keep its weights.
        self.head = AttentionPool(shape, rngs=rngs)

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        x_BND = self.patch_embedding(x_BND)
        positions_ND = self.positions(math.isqrt(x_BND.shape[1])).astype(x_BND.dtype)
        return self.post_layernorm(
            self.encoder(nn.constrain(x_BND + positions_ND, "batch", None, "act_embed"))
        )

    def positions(self, grid: int) -> jax.Array:
        """Return the position table resized to `grid` per side, [grid^2, D], float32.

        The resampling is bilinear with antialias (align_corners False), as in the stock class.
        """
        table_ND = self.position_embedding[...].astype(jnp.float32)
        d = table_ND.shape[1]
        side = math.isqrt(table_ND.shape[0])
        return jax.image.resize(
            table_ND.reshape(side, side, d), (grid, grid, d), "linear", antialias=True
        ).reshape(-1, d)


class TaTok(nnx.Module):
    """Encode images to codebook indices and decode indices to SigLIP2 features.

    Methods take `pool_scale` 1, 2 or 3; None means `cfg.pool_scale`. `key` is for the stochastic
    mode: training requires it; without one, `encode` returns the best code.
    """

    def __init__(self, cfg: config.TaTokConfig, *, rngs: nnx.Rngs):
        dtypes: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        d = cfg.encoder.hidden_size
        d_decoder = cfg.decoder.hidden_size
        self.encoder = SiglipVision(cfg.encoder, rngs=rngs)
        self.encode_task_layer = nn.Linear(d, d, ("embed", "mlp"), rngs=rngs, **dtypes)
        self.bottleneck = Bottleneck(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.decode_task_layer1 = nn.Linear(
            d_decoder, d_decoder, ("embed", "mlp"), rngs=rngs, **dtypes
        )
        self.decode_task_layer2 = nn.Linear(d_decoder, d, ("mlp", "embed"), rngs=rngs, **dtypes)
        self.cfg = cfg

    def num_tokens(self, pool_scale: int | None = None) -> int:
        """Return the number of tokens per image.

        The published encoder has 729, 169 or 81 for pool scales 1, 2 and 3.
        """
        return (self.cfg.encoder.grid // self._pool_scale(pool_scale)) ** 2

    def embed_image(self, x_BHWC: jax.Array) -> ImageEmbedding:
        """Run the whole SigLIP2 encoder, with a gradient, for its contrastive pretraining."""
        output = self.encoder(x_BHWC)
        return ImageEmbedding(output.features_BND, output.pooled_BD, self.encoder.patches(x_BHWC))

    def features(self, x_BHWC: jax.Array, pool_scale: int | None = None) -> jax.Array:
        """Return the quantiser's input: pooled SigLIP2 features [B, N, D], float32.

        `x_BHWC` holds images in [-1, 1]. No gradient flows to the encoder.
        """
        with jax.named_scope("encoder"):
            # float32, as the quantiser compares neighbouring codes (simvq.py).
            features_BND = self.encoder.features(x_BHWC, self.cfg.select_layer).astype(jnp.float32)
        return jax.lax.stop_gradient(pool(features_BND, self._pool_scale(pool_scale)))

    def encode(
        self, x_BHWC: jax.Array, pool_scale: int | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Encode images [B, H, W, 3] in [-1, 1] to codebook indices [B, N], int32, row by row."""
        z_BND = self._to_codes(self.features(x_BHWC, pool_scale))
        with jax.named_scope("codebook"):
            return self.bottleneck.codebook.indices(z_BND, key)

    def codes(self) -> jax.Array:
        """Return the codebook in use [K, D], float32."""
        return self.bottleneck.codebook.table()

    def quantise(self, features_BND: jax.Array, *, key: jax.Array | None = None) -> Quantised:
        """Quantise pooled features [B, N, D] for training."""
        z_BND = self._to_codes(features_BND)
        with jax.named_scope("codebook"):
            return self.bottleneck.codebook(z_BND, key)

    def decode(self, ids_BN: jax.Array) -> jax.Array:
        """Decode indices [B, N] to reconstructed SigLIP2 features [B, N, D], float32.

        Raises ValueError when N is not a square number.
        """
        with jax.named_scope("codebook"):
            codes_BND = self.bottleneck.codebook.lookup(ids_BN)
        return self._reconstruct(codes_BND)

    def __call__(
        self, x_BHWC: jax.Array, pool_scale: int | None = None, *, key: jax.Array | None = None
    ) -> TokenizerOutput:
        """Encode and reconstruct images [B, H, W, 3] in [-1, 1] for training."""
        teacher_BND = self.features(x_BHWC, pool_scale)
        quantised = self.quantise(teacher_BND, key=key)
        reconstructed_BND = self._reconstruct(quantised.codes_BND)
        # The codes are dropped: the remaining fields have the same names and order in both tuples.
        return TokenizerOutput(teacher_BND, reconstructed_BND, *quantised[1:])

    def _to_codes(self, features_BND: jax.Array) -> jax.Array:
        with jax.named_scope("encode_task"):
            return self.bottleneck.in_linear(jnp.tanh(self.encode_task_layer(features_BND)))

    def _reconstruct(self, codes_BND: jax.Array) -> jax.Array:
        tokens = codes_BND.shape[1]
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(
                f"vision tokenizer: {tokens} image tokens are not a square grid; "
                "decode whole images"
            )
        with jax.named_scope("decoder"):
            x_BND = self.decoder(self.bottleneck.out_linear(codes_BND))
            return self.decode_task_layer2(jnp.tanh(self.decode_task_layer1(x_BND))).astype(
                jnp.float32
            )

    def _pool_scale(self, pool_scale: int | None) -> int:
        scale = self.cfg.pool_scale if pool_scale is None else pool_scale
        if scale not in (1, 2, 3):
            raise ValueError(f"vision tokenizer: pool_scale={scale} must be 1, 2 or 3")
        return scale


def pool(x_BND: jax.Array, scale: int) -> jax.Array:
    """Average-pool scale x scale blocks of a square token grid: [B, N, D] -> [B, N', D].

    Rows and columns past the last whole block are dropped.
    """
    batch, tokens, d = x_BND.shape
    grid = math.isqrt(tokens)
    out = grid // scale
    x_BHWD = x_BND.reshape(batch, grid, grid, d)[:, : out * scale, : out * scale]
    return (
        x_BHWD.reshape(batch, out, scale, out, scale, d).mean(axis=(2, 4)).reshape(batch, out**2, d)
    )
