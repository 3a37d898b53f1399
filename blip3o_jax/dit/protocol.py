"""Define the interface of a diffusion head.

B batch, H W latent height and width, R reference slots, T condition tokens, C channels.
"""

from typing import Any, NamedTuple, Protocol

import jax

from blip3o_jax.config import DiffusionHeadConfig


class LatentConcat(NamedTuple):
    """Hold latents of reference images, of the size of the noisy ones."""

    z_BRHWC: jax.Array
    mask_BR: jax.Array  # True for used slots, which precede empty ones


class Condition(NamedTuple):
    """Hold the condition: condition tokens, and reference latents to concatenate."""

    tokens_BTC: jax.Array
    mask_BT: jax.Array | None = None  # True where there is a token; None: everywhere
    latent_concat: LatentConcat | None = None


class DiffusionHead(Protocol):
    """Predict the velocity from noisy latents, timestep and condition.

    Implementations are `nnx.Module`s. The joint stage trains parameters with "caption" in their
    path and freezes the others; recipes also select `patch_embed` and `proj_out`.
    """

    cfg: DiffusionHeadConfig

    def __call__(
        self,
        z_BHWC: jax.Array,
        timestep_B: jax.Array,
        condition_BTC: jax.Array,
        condition_mask_BT: jax.Array | None = None,
        latent_concat: LatentConcat | None = None,
    ) -> jax.Array:
        """Return the velocity [B, H, W, C] in the compute dtype: `prepare`, then `velocity`.

        `timestep_B` is 1000 sigma, float, in [0, 1000].
        """
        ...

    def prepare(self, condition_BTC: jax.Array, mask_BT: jax.Array | None = None) -> Any:
        """Return a pytree of the arrays that depend only on the condition.

        A sampler computes them once. A condition of one row is broadcast to every row.
        """
        ...

    def velocity(
        self,
        z_BHWC: jax.Array,
        timestep_B: jax.Array,
        context: Any,
        latent_concat: LatentConcat | None = None,
    ) -> jax.Array:
        """Return the velocity [B, H, W, C] for a prepared condition.

        Raises ValueError unless H and W are multiples of `cfg.patch_size`.
        """
        ...
