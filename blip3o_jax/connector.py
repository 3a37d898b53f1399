"""Map the AR's hidden states to the condition tokens of the diffusion head.

    Linear(d_in, d_out), GELU (tanh form), Linear(d_out, d_out), RMSNorm

With `cfg.positions`, sine-cosine positions are added to the hidden states first. The norm's weight
starts at `cfg.norm_init` (sqrt(5.5)), so that the condition has the scale of the captions the
diffusion head was pretrained on. Shape suffixes: B batch, L tokens, D width (in or out).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import config, nn


class Connector(nnx.Module):
    """Apply Linear, GELU, Linear, RMSNorm to each token."""

    def __init__(
        self,
        cfg: config.ConnectorConfig,
        d_in: int,
        d_out: int,
        *,
        rngs: nnx.Rngs,
        axis: str | None = "embed",
    ):
        """Create the layers; `axis` is the logical name of d_in."""
        dtypes: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        self.linear1 = nn.Linear(d_in, d_out, (axis, "mlp"), rngs=rngs, **dtypes)
        self.linear2 = nn.Linear(d_out, d_out, ("mlp", "embed"), rngs=rngs, **dtypes)
        self.positions = cfg.positions
        self.norm = nn.RMSNorm(
            d_out,
            rngs=rngs,
            eps=cfg.rms_norm_eps,
            param_dtype=cfg.param_dtype,
            init=jax.nn.initializers.constant(cfg.norm_init),
        )

    def __call__(self, hidden_BLD: jax.Array, keep_B: jax.Array | None = None) -> jax.Array:
        """Map [B, L, d_in] to [B, L, d_out].

        Rows with `keep_B` False have zeros for hidden states: their output is the condition of
        classifier-free guidance's unconditional branch.
        """
        with jax.named_scope("connector"):
            if self.positions:
                hidden_BLD += nn.sinusoids(*hidden_BLD.shape[1:]).astype(hidden_BLD.dtype)
            if keep_B is not None:
                hidden_BLD = jnp.where(keep_B[:, None, None], hidden_BLD, 0)
            y_BLD = jax.nn.gelu(self.linear1(hidden_BLD), approximate=True)
            y_BLD = self.norm(self.linear2(nn.constrain(y_BLD, "batch", None, "act_mlp")))
            return nn.constrain(y_BLD, "batch", None, "act_embed")
