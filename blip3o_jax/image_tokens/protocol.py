"""What every vision tokenizer is to the rest of the package.

B batch, N image tokens, K codes, D width of features, C width of codes.
"""

from typing import Any, Protocol

import jax

from blip3o_jax.config import ImageTokenizerConfig


class ImageTokenizer(Protocol):
    """Images to codebook indices and back to features: an `nnx.Module`.

    Images are float32 [B, side, side, 3] in [-1, 1], side `cfg.image_size`; N is `cfg.num_tokens`,
    in the order of rows of a square grid. It is frozen in the joint stage.
    """

    cfg: ImageTokenizerConfig
    # The image encoder, which the stage `contrastive` pretrains: images -> features and one pooled
    # vector (`siglip2.SiglipVision`).
    encoder: Any

    def encode(self, x_BHWC: jax.Array) -> jax.Array:
        """Return codebook indices [B, N], int32, each below `cfg.codebook_size`."""
        ...

    def features(self, x_BHWC: jax.Array) -> jax.Array:
        """Return the features [B, N, `cfg.feature_channels`], float32, that codes are made of."""
        ...

    def decode(self, ids_BN: jax.Array) -> jax.Array:
        """Return the features [B, N, D], float32, that indices stand for."""
        ...

    def codes(self) -> jax.Array:
        """Return the codebook in use [K, C], float32."""
        ...

    def __call__(self, x_BHWC: jax.Array, *, key: jax.Array | None = None) -> Any:
        """Return what the stage `tokenizer` computes its loss of (`ta_tok.TaTokOutput`)."""
        ...
