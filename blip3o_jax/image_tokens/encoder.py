"""Run the pre-LN transformer of the SigLIP encoder, the TA-Tok decoder and the caption tower.

    x <- x + Attention(LN(x));  x <- x + MLP(LN(x)),  MLP = Linear, GELU (tanh form), Linear

Attention is bidirectional and every linear layer has a bias, as in
`transformers.SiglipEncoderLayer`.

Shape suffixes: B batch, L (query) tokens, M tokens attended to, N heads, K head_dim, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """Hold the settings that all layers of an encoder share.

    Names and sizes are those of `transformers.SiglipVisionConfig`. Raises ConfigError unless the
    heads divide the width.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    dtype: Any
    param_dtype: Any
    remat: str
    unroll: bool

    @classmethod
    def of(cls, cfg: Any, **overrides: Any) -> "EncoderShape":
        """Copy the fields from `cfg`, except those in `overrides`, which `cfg` may lack."""
        names = [field.name for field in dataclasses.fields(cls) if field.name not in overrides]
        return cls(**{name: getattr(cfg, name) for name in names}, **overrides)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @property
    def dtypes(self) -> dict[str, Any]:
        """Return the dtype arguments of `nn.Linear`."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class Attention(nnx.Module):
    """Attend from `x_BLD` to `memory_BMD` with several heads; the softmax is in float32."""

    def __init__(self, shape: EncoderShape, *, rngs: nnx.Rngs):
        d = shape.hidden_size
        self.query = nn.Linear(d, d, ("embed", "heads"), rngs=rngs, **shape.dtypes)
        self.key = nn.Linear(d, d, ("embed", "heads"), rngs=rngs, **shape.dtypes)
        self.value = nn.Linear(d, d, ("embed", "heads"), rngs=rngs, **shape.dtypes)
        self.out = nn.Linear(d, d, ("heads", "embed"), rngs=rngs, **shape.dtypes)
        self.heads = shape.num_attention_heads

    def __call__(
        self, x_BLD: jax.Array, memory_BMD: jax.Array, mask_BM: jax.Array | None = None
    ) -> jax.Array:
        """Return [B, L, D]. `mask_BM` is True on tokens that may be attended to; None means all."""
        q_BLNK, k_BMNK, v_BMNK = (
            nn.constrain(self._split(linear(tokens)), "batch", None, "act_heads", None)
            for linear, tokens in (
                (self.query, x_BLD),
                (self.key, memory_BMD),
                (self.value, memory_BMD),
            )
        )
        mask_B11M = None if mask_BM is None else mask_BM[:, None, None, :].astype(bool)
        y_BLNK = jax.nn.dot_product_attention(q_BLNK, k_BMNK, v_BMNK, mask=mask_B11M)
        return self.out(y_BLNK.reshape(x_BLD.shape))

    def _split(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD.reshape(*x_BLD.shape[:2], self.heads, -1)


class Mlp(nnx.Module):
    """Apply Linear, GELU (tanh form), Linear to each token."""

    def __init__(self, shape: EncoderShape, *, rngs: nnx.Rngs):
        d, d_mlp = shape.hidden_size, shape.intermediate_size
        self.up = nn.Linear(d, d_mlp, ("embed", "mlp"), rngs=rngs, **shape.dtypes)
        self.down = nn.Linear(d_mlp, d, ("mlp", "embed"), rngs=rngs, **shape.dtypes)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return self.down(
            nn.constrain(jax.nn.gelu(self.up(x_BLD), approximate=True), "batch", None, "act_mlp")
        )


class EncoderLayer(nnx.Module):
    """Apply attention and MLP with pre-norm residuals; matches `SiglipEncoderLayer`."""

    def __init__(self, shape: EncoderShape, *, rngs: nnx.Rngs):
        norm = {"eps": shape.layer_norm_eps, "param_dtype": shape.param_dtype, "rngs": rngs}
        self.norm1 = nn.LayerNorm(shape.hidden_size, **norm)
        self.attention = Attention(shape, rngs=rngs)
        self.norm2 = nn.LayerNorm(shape.hidden_size, **norm)
        self.mlp = Mlp(shape, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
        with jax.named_scope("attention"):
            y_BLD = self.norm1(x_BLD)
            x_BLD = x_BLD + self.attention(y_BLD, y_BLD, mask_BL)
        with jax.named_scope("mlp"):
            x_BLD = x_BLD + self.mlp(self.norm2(x_BLD))
        return nn.constrain(x_BLD, "batch", None, "act_embed")


class Encoder(nnx.Module):
    """Run a stack of `EncoderLayer`s, without embeddings before or a norm after it."""

    def __init__(self, shape: EncoderShape, *, rngs: nnx.Rngs):
        self.layers = nn.stack(
            lambda rngs: EncoderLayer(shape, rngs=rngs), shape.num_hidden_layers, rngs
        )
        self.depth = shape.num_hidden_layers
        self.remat = shape.remat
        self.unroll = shape.unroll

    def __call__(
        self, x_BLD: jax.Array, mask_BL: jax.Array | None = None, *, depth: int | None = None
    ) -> jax.Array:
        """Return the output [B, L, D] of the first `depth` layers (default: all)."""
        depth = self.depth if depth is None else depth

        def step(
            layer: EncoderLayer, x_BLD: jax.Array, run: jax.Array | None
        ) -> tuple[jax.Array, None]:
            if run is None:
                return layer(x_BLD, mask_BL), None
            # `cond` skips the layers past `depth`; slicing the stacked weights would copy them.
            return jax.lax.cond(run, lambda x: layer(x, mask_BL), lambda x: x, x_BLD), None

        run = None if depth == self.depth else jnp.arange(self.depth) < depth
        return nn.scan(self.layers, step, x_BLD, run, remat=self.remat, unroll=self.unroll)[0]


class AttentionPool(nnx.Module):
    """Pool tokens to one vector: a learned probe attends to them, then a residual MLP.

    Matches `transformers.SiglipMultiheadAttentionPoolingHead`.
    """

    def __init__(self, shape: EncoderShape, *, rngs: nnx.Rngs):
        d = shape.hidden_size
        self.probe = nn.param(rngs, (d,), ("embed",), nn.normal(d**-0.5), shape.param_dtype)
        self.attention = Attention(shape, rngs=rngs)
        self.norm = nn.LayerNorm(
            d, rngs=rngs, eps=shape.layer_norm_eps, param_dtype=shape.param_dtype
        )
        self.mlp = Mlp(shape, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        probe_B1D = jnp.broadcast_to(
            self.probe[...].astype(x_BLD.dtype), (x_BLD.shape[0], 1, x_BLD.shape[2])
        )
        y_B1D = self.attention(probe_B1D, x_BLD)
        return (y_B1D + self.mlp(self.norm(y_B1D)))[:, 0]
