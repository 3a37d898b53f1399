"""Quantise vectors with SimVQ, the codebook of the vision tokenizer.

Source: "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer" (arXiv
2411.02038). The K codes c_k are a linear function of stored vectors e_k, so that an update of one
code moves all of them and no code is left unused:

    c_k = embedding_proj(e_k)          (SimVQ keeps the random e_k fixed and learns the projection)
    s_k(z) = <z/|z|, c_k/|c_k|>        l2-normalised lookup: cosine similarity; below, z and c are
                                       the normalised vectors
    s_k(z) = -|z - c_k|^2              plain lookup
    index(z) = arg max_k s_k(z),       or, when stochastic, a sample of
                                       p_k(z) = softmax_k(s_k(z) / temperature)
    out(z) = z + stop(c_index - z)     straight-through: the value is the code, the gradient is z's

Training terms, each a mean over tokens:

    codebook_loss   = |stop(z) - c_index|^2   moves codes to the vectors
    commitment_loss = |z - stop(c_index)|^2   moves vectors to their codes; its weight in VQ-VAE
                                              (arXiv 1711.00937, eq. 3) is 0.25
    entropy_gap     = log K - H(mean over tokens of p(z)), in nats: 0 for uniform use of the codes

The entropy gap revives unused codes (the diversity half of the entropy penalty of MAGVIT-2, arXiv
2310.05737): p is soft, so a code that no token selects still receives a gradient. It vanishes when
the distances between all codes are below the temperature; the codebook loss keeps the codes apart.

Deviations: (1) squared norms are sums over the code's dimensions, as in the papers; the published
implementations take means, which scale as 1 / dim for unit vectors and become negligible against
the entropy. (2) The stochastic mode also works with the plain lookup.

Shape suffixes: B batch, N image tokens, D code width, K codes, S chunks of n tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn

# The largest number of scores (tokens x codes) of an image to compute at once: 16 MiB of float32.
# All 729 x 65536 take 191 MiB per image, and the soft assignment and its gradient as much again.
MAX_SCORES = 2**22


class Quantised(NamedTuple):
    """Hold the quantised vectors, the scalar training terms and the codebook's statistics."""

    codes_BND: jax.Array  # straight-through, float32
    ids_BN: jax.Array  # int32
    codebook_loss: jax.Array
    commitment_loss: jax.Array
    entropy_gap: jax.Array  # nats, to minimise
    usage: jax.Array  # fraction of the codes used at least once in this batch
    perplexity: jax.Array  # exp of the entropy of the ids: the effective number of codes in use


def l2_normalise(x: jax.Array) -> jax.Array:
    """Return x / |x| over the last dimension, with a finite gradient at 0.

    Matches `torch.nn.functional.normalize`.
    """
    # The maximum is inside of the root, where its gradient at 0 is 0; the square root's own is
    # infinite. 1e-24 is torch's eps of 1e-12, squared.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


class SimVq(nnx.Module):
    """Quantise vectors to the nearest of K codes.

    All of it is in float32, since the differences of neighbouring codes are below bfloat16's
    resolution.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        l2_normalized: bool,
        stochastic: bool,
        temperature: float,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.embedding = nn.param(
            rngs, (codebook_size, dim), ("vocab", "embed"), nn.normal(dim**-0.5), param_dtype
        )
        self.embedding_proj = nn.Linear(
            dim, dim, ("embed", "mlp"), rngs=rngs, param_dtype=param_dtype
        )
        self.l2_normalized = l2_normalized
        self.stochastic = stochastic
        self.temperature = temperature

    def table(self) -> jax.Array:
        """Return the codes c_k [K, D], float32."""
        return self._normalise(self.embedding_proj(self.embedding[...]))

    def lookup(self, ids_BN: jax.Array) -> jax.Array:
        """Return the codes [B, N, D] of indices [B, N]: the inverse of `indices`."""
        return self._normalise(self.embedding_proj(self.embedding[...][ids_BN]))

    def indices(self, z_BND: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Return the code index [B, N], int32, of each vector [B, N, D].

        The index is the best one, or a sampled one in stochastic mode with a `key`.
        """
        return self._assign(self._normalise(z_BND), self.table(), key, soft=False)[0]

    def __call__(self, z_BND: jax.Array, key: jax.Array | None = None) -> Quantised:
        """Quantise vectors [B, N, D] for training.

        Raises ValueError in stochastic mode without a `key`.
        """
        if self.stochastic and key is None:
            raise ValueError(
                "vision tokenizer: stochastic=True needs a random key in training: pass key="
            )
        z_BND = self._normalise(z_BND)
        table_KD = self.table()
        ids_BN, usage_K = self._assign(z_BND, table_KD, key, soft=True)
        assert usage_K is not None  # soft=True
        codes_BND = table_KD[ids_BN]
        stop = jax.lax.stop_gradient
        num_codes = table_KD.shape[0]
        frequency_K = (
            # A scatter-add of the B N ids; one-hot vectors would be B N x 65536.
            jnp.zeros(num_codes, jnp.float32).at[ids_BN.reshape(-1)].add(1.0 / ids_BN.size)
        )
        return Quantised(
            codes_BND=z_BND + stop(codes_BND - z_BND),
            ids_BN=ids_BN,
            codebook_loss=jnp.mean(jnp.sum((stop(z_BND) - codes_BND) ** 2, axis=-1)),
            commitment_loss=jnp.mean(jnp.sum((z_BND - stop(codes_BND)) ** 2, axis=-1)),
            entropy_gap=jnp.log(num_codes) - entropy(usage_K),
            usage=jnp.mean(frequency_K > 0),
            perplexity=jnp.exp(entropy(frequency_K)),
        )

    def _normalise(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return l2_normalise(x) if self.l2_normalized else x

    def _scores(self, z_BnD: jax.Array, table_KD: jax.Array) -> jax.Array:
        """Return s_k(z); the plain form omits |z|^2, which is equal for all codes."""
        dot_BnK = z_BnD @ table_KD.T
        return dot_BnK if self.l2_normalized else 2 * dot_BnK - jnp.sum(table_KD**2, axis=-1)

    def _assign(
        self, z_BND: jax.Array, table_KD: jax.Array, key: jax.Array | None, *, soft: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return indices [B, N] and, if `soft`, the mean of p over all tokens [K].

        Loops over chunks of n of the N tokens, n the largest divisor of N within MAX_SCORES. The
        batch dimension is not split, so that it can be sharded. The backward pass recomputes the
        scores.
        """
        tokens = z_BND.shape[1]
        limit = max(1, MAX_SCORES // table_KD.shape[0])
        # Equal chunks, so that `lax.map` has one body; N = 729 = 27 x 27 has the divisors 1, 3, 9,
        # 27, ...
        size = max(n for n in range(1, tokens + 1) if tokens % n == 0 and n <= limit)
        chunks = tokens // size

        def assign(
            inputs: tuple[jax.Array, jax.Array | None],
        ) -> tuple[jax.Array, jax.Array | None]:
            z_BnD, key = inputs
            scores_BnK = self._scores(z_BnD, table_KD)
            # arg max has no gradient; without the stop the backward pass would carry the noise's
            # arrays.
            ranked_BnK = jax.lax.stop_gradient(scores_BnK)
            if key is not None:
                # Gumbel-max: the arg max of logits + Gumbel noise is a sample of their softmax.
                ranked_BnK = ranked_BnK / self.temperature + jax.random.gumbel(
                    key, ranked_BnK.shape
                )
            p_K = (
                jnp.mean(jax.nn.softmax(scores_BnK / self.temperature), axis=(0, 1))
                if soft
                else None
            )
            return jnp.argmax(ranked_BnK, axis=-1).astype(jnp.int32), p_K

        z_SBnD = jnp.moveaxis(z_BND.reshape(z_BND.shape[0], chunks, size, -1), 1, 0)
        # A key for each chunk, as the noise of one chunk must not repeat in the next.
        keys_S = jax.random.split(key, chunks) if self.stochastic and key is not None else None
        # Only ids and the mean of p leave a chunk, so that the scores of one chunk are alive at a
        # time.
        ids_SBn, p_SK = jax.lax.map(jax.checkpoint(assign), (z_SBnD, keys_S))
        ids_BN = jnp.moveaxis(ids_SBn, 0, 1).reshape(z_BND.shape[:2])
        return ids_BN, jnp.mean(p_SK, axis=0) if soft else None


def entropy(p_K: jax.Array) -> jax.Array:
    """Return -sum p log p in nats, 0 log 0 = 0, with a finite gradient."""
    return -jnp.sum(p_K * jnp.log(jnp.maximum(p_K, 1e-20)))
