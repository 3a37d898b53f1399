"""Define the interface of a vision tokenizer.

B batch, N image tokens, P patches, X values of a patch, K codes, D width of features, C width of
codes.
"""

from typing import NamedTuple, Protocol

import jax

from blip3o_jax.config import ImageTokenizerConfig


class ImageEmbedding(NamedTuple):
    """Hold what the encoder of a tokenizer makes of images, for its contrastive pretraining."""

    features_BPD: jax.Array  # of every patch
    pooled_BD: jax.Array  # of the whole image, compared with captions
    patches_BPX: jax.Array  # the pixels of every patch, which the dense objective predicts


class TokenizerOutput(NamedTuple):
    """Hold what the loss of the stage `tokenizer` needs; from `codebook_loss` on scalars."""

    teacher_BND: jax.Array  # the encoder's features that are reconstructed, float32, no gradient
    reconstructed_BND: jax.Array  # float32
    ids_BN: jax.Array  # int32
    codebook_loss: jax.Array  # moves codes to the vectors that they stand for
    commitment_loss: jax.Array  # moves the vectors to their codes
    entropy_gap: jax.Array  # in nats, 0 for uniform use of the codes
    usage: jax.Array  # the fraction of codes that the batch uses
    perplexity: jax.Array  # the effective number of codes in use


class ImageTokenizer(Protocol):
    """Encode images to codebook indices and decode indices to features.

    Implementations are `nnx.Module`s. Images are float32 [B, side, side, 3] in [-1, 1], with side
    `cfg.image_size`. The N = `cfg.num_tokens` tokens are a square grid in row-major order. The
    joint stage freezes the tokenizer. The parameters below `encoder/` are those of `embed_image`:
    the stage `contrastive` trains them, the stage `tokenizer` all others.
    """

    cfg: ImageTokenizerConfig

    def embed_image(self, x_BHWC: jax.Array) -> ImageEmbedding:
        """Return the encoder's features and the embeddings of images; D is
        `cfg.feature_channels`, X is `cfg.patch_values`.
        """
        ...

    def encode(self, x_BHWC: jax.Array) -> jax.Array:
        """Return codebook indices [B, N], int32, each below `cfg.codebook_size`."""
        ...

    def features(self, x_BHWC: jax.Array) -> jax.Array:
        """Return the features [B, N, `cfg.feature_channels`], float32, before quantisation."""
        ...

    def decode(self, ids_BN: jax.Array) -> jax.Array:
        """Return the features [B, N, D], float32, of indices [B, N]."""
        ...

    def codes(self) -> jax.Array:
        """Return the codebook [K, C], float32."""
        ...

    def __call__(self, x_BHWC: jax.Array, *, key: jax.Array | None = None) -> TokenizerOutput:
        """Return the outputs for the loss of the stage `tokenizer`; `key` is for a stochastic
        assignment of codes.
        """
        ...
